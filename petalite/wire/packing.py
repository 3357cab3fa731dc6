"""Strict msgpack, and the rules by which a map's fields are checked (spec/04).

Everything that arrives as msgpack goes through `decode`, and then through a schema made of the rules below. Floats do
not exist in this protocol, so a value is None, bool, int, str, bytes, list or dict with str keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NoReturn, Protocol, cast

import msgpack

from petalite.errors import ErrorCode, GoAwayCode, LocalProtocolError, RemoteProtocolError, RequestError
from petalite.limits import MAX_ELEMENTS, MAX_FRAME, MAX_KEY, MAX_NESTING, MAX_STR

Buffer = bytes | bytearray | memoryview

_SCALARS: Final = frozenset({int, str, bytes, bool, type(None)})
_INT: Final = frozenset({int})


class _Refused(ValueError):
    """A rule of spec/04 is broken; a ValueError so that it passes through msgpack's decoder like msgpack's own."""


class FieldError(LocalProtocolError):
    """A value breaks its field's rule: our mistake, unless it came from a peer; then `code` is what the peer gets."""

    def __init__(self, text: str, code: ErrorCode = ErrorCode.BAD_REQUEST) -> None:
        super().__init__(text)
        self.code = code


# ---------------------------------------------------------------------------------------------------------- decode


def decode(data: Buffer, *, max_size: int | None = None, max_str: int = MAX_STR) -> Any:
    """The one value that `data` holds; at most `max_size` bytes (default: one frame), strings of at most `max_str`.

    Raises RemoteProtocolError(FRAME) for anything that PT-MSG-001 to PT-MSG-022 forbid; no other exception leaves,
    whatever the bytes.
    """
    limit = MAX_FRAME if max_size is None else max_size
    size = len(data)
    if size > limit:
        raise RemoteProtocolError(f"msgpack value of {size} bytes, limit {limit}", GoAwayCode.FRAME)
    # An entry takes at least one byte: a short input cannot hold too many, and needs no counting while it is decoded.
    build_map, build_list = (_unique, None) if size <= MAX_ELEMENTS else _counting_hooks()
    try:
        value = msgpack.unpackb(
            data,
            object_pairs_hook=build_map,
            list_hook=build_list,
            ext_hook=_refuse_ext,
            max_str_len=max_str,
            max_bin_len=limit,
            max_array_len=MAX_ELEMENTS,
            max_map_len=MAX_ELEMENTS,
            max_ext_len=0,
        )
        kind = type(value)
        if kind is dict or kind is list:
            if _inspect(value, 1) > MAX_ELEMENTS:
                raise _Refused(f"more than {MAX_ELEMENTS} elements")
        elif kind not in _SCALARS:
            raise _Refused(f"{kind.__name__} is not allowed")
    # ValueError covers FormatError, StackError, ExtraData and UnicodeDecodeError.
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        text = str(error) if isinstance(error, _Refused) else f"{type(error).__name__} {error}".strip()
        raise RemoteProtocolError(f"bad msgpack: {text[:200]}", GoAwayCode.FRAME) from None
    return value


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _Refused("duplicate map key")
    return made


def _refuse_ext(code: int, data: bytes) -> NoReturn:
    raise _Refused(f"extension type {code}")


def _counting_hooks() -> tuple[Any, Any]:
    """Hooks that stop a decode as soon as its containers are too many: 65,000 empty maps would be 5 MiB of objects."""
    left = MAX_ELEMENTS + 1  # the outermost container is in nobody's entries

    def spend() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Refused(f"more than {MAX_ELEMENTS} elements")

    def build_map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        spend()
        return _unique(pairs)

    def build_list(items: list[Any]) -> list[Any]:
        spend()
        return items

    return build_map, build_list


def _inspect(value: dict[Any, Any] | list[Any], depth: int) -> int:
    """Number of array entries and map pairs in `value`; raises _Refused for a wrong type, key or depth."""
    if depth > MAX_NESTING:
        raise _Refused(f"nested more than {MAX_NESTING} deep")
    items: Any = value
    if type(value) is dict:
        items = value.values()
        _check_keys(value)
    count = len(value)
    # issuperset walks at C speed; the loop below is for those that hold further containers.
    if not _SCALARS.issuperset(map(type, items)):
        for item in items:
            kind = type(item)
            if kind is dict or kind is list:
                count += _inspect(item, depth + 1)
            elif kind not in _SCALARS:
                raise _Refused(f"{kind.__name__} is not allowed")
    return count


def count_elements(value: Mapping[str, Any]) -> int:
    """Array entries and map pairs in a map that was decoded, at any depth."""
    return _inspect(dict(value), 1)


def _check_keys(value: dict[Any, Any]) -> None:
    joined = "".join(value)  # TypeError unless each key is a str
    if len(joined) > MAX_KEY or not joined.isascii():
        for key in value:
            if len(key.encode()) > MAX_KEY:
                raise _Refused(f"map key longer than {MAX_KEY} bytes")


# ---------------------------------------------------------------------------------------------------------- encode


def encode(value: Any, *, within: int = 0) -> bytes:
    """`value` as msgpack that `decode` accepts (tuples and IntEnums become lists and ints; any buffer becomes bin).

    It will stand `within` so many containers.

    Raises LocalProtocolError where spec/04 has no form for it. The size is the caller's to check.
    """
    try:
        _examine((value,), within)
        data = cast(bytes, msgpack.packb(value))
        # Nothing in a short result can be too long or too many; a long one is judged as its receiver would judge it.
        if len(data) > min(MAX_STR, MAX_ELEMENTS):
            decode(data, max_size=len(data))
    except (ValueError, TypeError, OverflowError, RecursionError, RemoteProtocolError) as error:
        raise LocalProtocolError(f"cannot encode: {error}") from None
    return data


def encode_uint(value: int) -> bytes:
    """An integer of 0..2^64-1 in its shortest form."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x100:
        return bytes((0xCC, value))
    if value < 0x1_0000:
        return b"\xcd" + value.to_bytes(2, "big")
    if value < 0x1_0000_0000:
        return b"\xce" + value.to_bytes(4, "big")
    return b"\xcf" + value.to_bytes(8, "big")


def _examine(value: Any, depth: int) -> None:
    """The sender's twin of `_inspect`: knows tuples, buffers and IntEnums too, and leaves the counting to `encode`."""
    if depth > MAX_NESTING:
        raise _Refused(f"nested more than {MAX_NESTING} deep")
    items = value
    if type(value) is dict:
        items = value.values()
        _check_keys(value)
    if not _SCALARS.issuperset(map(type, items)):
        for item in items:
            kind = type(item)
            if kind is dict or kind is list or kind is tuple:
                _examine(item, depth + 1)
            elif kind not in _SCALARS and not isinstance(item, (bytearray, memoryview, int)):
                raise _Refused(f"{kind.__name__} is not allowed")


# ---------------------------------------------------------------------------------------------------------- fields


class Rule(Protocol):
    """What a field may hold. `load` turns the wire's value into ours (a list becomes a tuple), `check` judges ours."""

    def load(self, name: str, raw: Any) -> Any: ...

    def check(self, name: str, value: Any) -> None:
        """Raises FieldError that names the field and the limit."""

    def dump(self, value: Any) -> Any: ...


class Plain:
    """A value that looks the same on the wire and in Python."""

    __slots__ = ()

    def load(self, name: str, raw: Any) -> Any:
        return raw

    def check(self, name: str, value: Any) -> None:
        raise NotImplementedError

    def dump(self, value: Any) -> Any:
        return value


class Int(Plain):
    """An integer in low..high, both included; a bool is none. `code`: what one outside gets."""

    __slots__ = ("code", "high", "low")

    def __init__(self, low: int = 0, high: int = 2**63 - 1, code: ErrorCode = ErrorCode.BAD_REQUEST) -> None:
        self.low, self.high, self.code = low, high, code

    def check(self, name: str, value: Any) -> None:
        if type(value) is not int:
            raise FieldError(f"field {name!r} must be an integer, not {_word(value)}")
        if not self.low <= value <= self.high:
            raise FieldError(f"field {name!r} is {value}, must be {self.low}..{self.high}", self.code)


class Ints:
    """An array of low..high integers, each in 0..top; a tuple in Python. `ListOf(Int())` for long lists."""

    __slots__ = ("high", "low", "top")

    def __init__(self, low: int, high: int, top: int) -> None:
        self.low, self.high, self.top = low, high, top

    def load(self, name: str, raw: Any) -> tuple[int, ...]:
        if type(raw) is not list:
            raise FieldError(f"field {name!r} must be an array, not {_word(raw)}")
        return tuple(raw)

    def check(self, name: str, value: Any) -> None:
        if type(value) is not tuple:
            raise FieldError(f"field {name!r} must be a tuple, not {_word(value)}")
        if not self.low <= len(value) <= self.high:
            raise FieldError(f"field {name!r} has {len(value)} entries, must have {self.low}..{self.high}")
        if not _INT.issuperset(map(type, value)):
            raise FieldError(f"field {name!r} must hold integers only")
        if value and not (min(value) >= 0 and max(value) <= self.top):
            raise FieldError(f"field {name!r} must hold integers in 0..{self.top}")

    def dump(self, value: tuple[int, ...]) -> tuple[int, ...]:
        return value


class Bool(Plain):
    __slots__ = ()

    def check(self, name: str, value: Any) -> None:
        if type(value) is not bool:
            raise FieldError(f"field {name!r} must be a boolean, not {_word(value)}")


class Str(Plain):
    """Text of low..high bytes of UTF-8."""

    __slots__ = ("high", "low")

    def __init__(self, low: int = 0, high: int = MAX_STR) -> None:
        self.low, self.high = low, high

    def check(self, name: str, value: Any) -> None:
        if type(value) is not str:
            raise FieldError(f"field {name!r} must be a string, not {_word(value)}")
        size = len(value.encode(errors="surrogatepass"))  # a lone surrogate is for `encode` to refuse
        if not self.low <= size <= self.high:
            raise FieldError(f"field {name!r} has {size} bytes, must have {self.low}..{self.high}")


class OneOf(Plain):
    """One word of a fixed set; any other is UNSUPPORTED, since a newer peer may know more of them."""

    __slots__ = ("words",)

    def __init__(self, *words: str) -> None:
        self.words = words

    def check(self, name: str, value: Any) -> None:
        if type(value) is not str:
            raise FieldError(f"field {name!r} must be a string, not {_word(value)}")
        if value not in self.words:
            text = f"field {name!r} is {value[:32]!r}, known are {', '.join(self.words)}"
            raise FieldError(text, ErrorCode.UNSUPPORTED)


class Bin(Plain):
    """Bytes of low..high length; `Bin(16)` is exactly 16."""

    __slots__ = ("high", "low")

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, low if high is None else high

    def check(self, name: str, value: Any) -> None:
        if type(value) is not bytes:
            raise FieldError(f"field {name!r} must be bin, not {_word(value)}")
        if not self.low <= len(value) <= self.high:
            raise FieldError(f"field {name!r} has {len(value)} bytes, must have {self.low}..{self.high}")


class Map(Plain):
    """A map whose fields are somebody else's to check."""

    __slots__ = ()

    def check(self, name: str, value: Any) -> None:
        if type(value) is not dict:
            raise FieldError(f"field {name!r} must be a map, not {_word(value)}")


class ListOf:
    """An array of low..high entries, each by `rule`; a tuple in Python."""

    __slots__ = ("high", "low", "rule")

    def __init__(self, rule: Rule, low: int, high: int) -> None:
        self.rule, self.low, self.high = rule, low, high

    def load(self, name: str, raw: Any) -> tuple[Any, ...]:
        if type(raw) is not list:
            raise FieldError(f"field {name!r} must be an array, not {_word(raw)}")
        self._check_length(name, raw)
        return tuple([self.rule.load(name, item) for item in raw])

    def check(self, name: str, value: Any) -> None:
        if type(value) is not tuple:
            raise FieldError(f"field {name!r} must be a tuple, not {_word(value)}")
        self._check_length(name, value)
        for item in value:
            self.rule.check(name, item)

    def dump(self, value: tuple[Any, ...]) -> list[Any]:
        return [self.rule.dump(item) for item in value]

    def _check_length(self, name: str, value: Any) -> None:
        if not self.low <= len(value) <= self.high:
            raise FieldError(f"field {name!r} has {len(value)} entries, must have {self.low}..{self.high}")


REQUIRED: Final[Any] = object()


def field(fields: Mapping[str, Any], name: str, rule: Rule, default: Any = REQUIRED) -> Any:
    """The checked value of one field of a received map; `default`, unchecked, where the map has none (or null).

    Raises RequestError with BAD_REQUEST, or UNSUPPORTED for an unknown word; the text names field and limit.
    """
    raw = fields.get(name)
    if raw is None:
        if default is REQUIRED:
            raise RequestError(ErrorCode.BAD_REQUEST, f"field {name!r} is missing")
        return default
    try:
        value = rule.load(name, raw)
        rule.check(name, value)
    except FieldError as error:
        raise RequestError(error.code, str(error)) from None
    return value


def is_critical(name: str) -> bool:
    """Of a field (PT-MSG-045)."""
    return name[:1] == "!"


def refuse_critical(fields: Mapping[str, Any]) -> None:
    """Unknown keys are ignored, but one that begins with "!" changes the meaning: RequestError(UNSUPPORTED).

    No version of this protocol that this library speaks defines such a key, so each is unknown.
    """
    for name in fields:
        if is_critical(name):
            raise RequestError(ErrorCode.UNSUPPORTED, f"critical field {name[:MAX_KEY]!r} is not known here")


def _word(value: Any) -> str:
    return {list: "array", dict: "map", bytes: "bin", type(None): "null"}.get(type(value), type(value).__name__)
