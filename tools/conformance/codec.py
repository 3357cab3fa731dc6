"""msgpack by hand: an encoder that can also spell what nobody should, and a decoder that forgives nothing (spec/04)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any


class Malformed(ValueError):
    """Bytes that spec/04 forbids."""


class Raw(bytes):
    """Goes into the output as it is."""


class Pairs:
    """A map given as pairs: keys of any type, in any order, twice if need be."""

    def __init__(self, *pairs: tuple[Any, Any]) -> None:
        self.pairs = pairs


def pack(value: Any) -> bytes:
    """The shortest form of a value made of None, bool, int, float, str, bytes, list, tuple, dict, Raw and Pairs."""
    if isinstance(value, Raw):
        return bytes(value)
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _pack_int(value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        return _pack_str(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _sized(len(value), ((0xC4, 1), (0xC5, 2), (0xC6, 4))) + bytes(value)
    if isinstance(value, (list, tuple)):
        head = bytes([0x90 | len(value)]) if len(value) < 16 else _sized(len(value), ((0xDC, 2), (0xDD, 4)))
        return head + b"".join(map(pack, value))
    pairs: Sequence[tuple[Any, Any]] = value.pairs if isinstance(value, Pairs) else list(value.items())
    head = bytes([0x80 | len(pairs)]) if len(pairs) < 16 else _sized(len(pairs), ((0xDE, 2), (0xDF, 4)))
    return head + b"".join(pack(key) + pack(item) for key, item in pairs)


def _pack_int(value: int) -> bytes:
    if 0 <= value < 0x80:
        return bytes([value])
    if -32 <= value < 0:
        return bytes([value & 0xFF])
    if value >= 0:
        for code, size in ((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8)):
            if value < 1 << (8 * size):
                return bytes([code]) + value.to_bytes(size, "big")
    else:
        for code, size in ((0xD0, 1), (0xD1, 2), (0xD2, 4), (0xD3, 8)):
            if value >= -(1 << (8 * size - 1)):
                return bytes([code]) + value.to_bytes(size, "big", signed=True)
    raise OverflowError(value)


def _pack_str(data: bytes) -> bytes:
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    return _sized(len(data), ((0xD9, 1), (0xDA, 2), (0xDB, 4))) + data


def _sized(count: int, forms: Sequence[tuple[int, int]]) -> bytes:
    for code, size in forms:
        if count < 1 << (8 * size):
            return bytes([code]) + count.to_bytes(size, "big")
    raise OverflowError(count)


def wide(value: Any) -> Raw:
    """The longest form of everything: legal, and unlike what most encoders write."""
    if value is None or isinstance(value, bool):
        return Raw(pack(value))
    if isinstance(value, int):
        if value < 0:
            return Raw(b"\xd3" + value.to_bytes(8, "big", signed=True))
        return Raw(b"\xcf" + value.to_bytes(8, "big"))
    if isinstance(value, str):
        data = value.encode()
        return Raw(b"\xdb" + len(data).to_bytes(4, "big") + data)
    if isinstance(value, (bytes, bytearray)):
        return Raw(b"\xc6" + len(value).to_bytes(4, "big") + value)
    if isinstance(value, (list, tuple)):
        return Raw(b"\xdd" + len(value).to_bytes(4, "big") + b"".join(map(wide, value)))
    body = b"".join(wide(key) + wide(item) for key, item in value.items())
    return Raw(b"\xdf" + len(value).to_bytes(4, "big") + body)


def unpack(data: bytes) -> Any:
    """The one value in `data`. Raises Malformed for whatever spec/04 forbids a sender."""
    reader = _Reader(data)
    value = reader.value(1)
    if reader.at != len(data):
        raise Malformed(f"{len(data) - reader.at} bytes after the value")
    return value


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise Malformed("the value ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "big", signed=signed)

    def value(self, depth: int) -> Any:
        code = self.take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if code < 0x90:
            return self.map(code & 15, depth)
        if code < 0xA0:
            return self.array(code & 15, depth)
        if code < 0xC0:
            return self.text(code & 31)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xCC <= code <= 0xCF:
            return self.number(1 << (code - 0xCC))
        if 0xD0 <= code <= 0xD3:
            return self.number(1 << (code - 0xD0), signed=True)
        if 0xC4 <= code <= 0xC6:
            return self.take(self.number(1 << (code - 0xC4)))
        if 0xD9 <= code <= 0xDB:
            return self.text(self.number(1 << (code - 0xD9)))
        if code in (0xDC, 0xDD):
            return self.array(self.number(2 << (code - 0xDC)), depth)
        if code in (0xDE, 0xDF):
            return self.map(self.number(2 << (code - 0xDE)), depth)
        raise Malformed(f"type byte {code:#x} is not allowed")

    def text(self, size: int) -> str:
        try:
            return self.take(size).decode()
        except UnicodeDecodeError:
            raise Malformed("a str that is not UTF-8") from None

    def array(self, count: int, depth: int) -> list[Any]:
        self.check(count, depth)
        return [self.value(depth + 1) for _ in range(count)]

    def map(self, count: int, depth: int) -> dict[str, Any]:
        self.check(count, depth)
        made: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if type(key) is not str or len(key.encode()) > 64:
                raise Malformed(f"map key {key!r}")
            if key in made:
                raise Malformed(f"map key {key!r} twice")
            made[key] = self.value(depth + 1)
        return made

    def check(self, count: int, depth: int) -> None:
        if depth > 16 or count > len(self.data) - self.at:
            raise Malformed(f"{count} entries at depth {depth}")
