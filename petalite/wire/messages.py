"""What requests and replies say: one frozen dataclass a message, checked when it is made (spec/07, PT-SES-001).

A field's rule stands in its annotation; its key on the wire is its name, unless the rule is wrapped in `Key`. A field
with a default is optional and left out where it is None. The keys "size", "max" and "dl" of a head belong to the
connection, so no message uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    NamedTuple,
    Self,
    TypeVar,
    dataclass_transform,
    get_type_hints,
)

from petalite.errors import ErrorCode, RequestError
from petalite.limits import (
    MAX_ADAPTERS,
    MAX_ANNOUNCED_ADDRESSES,
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_HOPS,
    MAX_NEXT_HOPS,
    MAX_RATE,
    MAX_SESSION_LENGTH,
    MAX_WORD,
    SESSION_ID_BYTES,
)
from petalite.wire.additions import ADDITIONS, AdapterName, TensorSet, check_additions
from petalite.wire.heads import Template
from petalite.wire.packing import Bin, Bool, FieldError, Int, Ints, ListOf, OneOf, Plain, Rule, Str, refuse_critical
from petalite.wire.repeats import KnownHead
from petalite.wire.tensors import CODECS, FLOATS, Descriptor, check_names, parse_descriptors, total_size

COMPUTE_DTYPES: Final = ("float32", "bfloat16", "float16")
STATES: Final = ("joining", "online", "draining", "offline")
ACTIVATION_DTYPES: Final = tuple(sorted(FLOATS))


# ----------------------------------------------------------------------------------------------------------- rules


class Key(Plain):
    """A rule whose field has another name on the wire."""

    __slots__ = ("key", "rule")

    def __init__(self, key: str, rule: Rule) -> None:
        self.key, self.rule = key, rule


class Span(Plain):
    """Blocks [a, b): two integers, not empty."""

    __slots__ = ()

    def load(self, name: str, raw: Any) -> tuple[int, ...]:
        if type(raw) is not list:
            raise FieldError(f"field {name!r} must be an array [start, end]")
        return tuple(raw)

    def check(self, name: str, value: Any) -> None:
        if type(value) is not tuple or len(value) != 2 or not all(type(bound) is int for bound in value):
            raise FieldError(f"field {name!r} must be two integers [start, end]")
        if not 0 <= value[0] < value[1] <= MAX_BLOCKS:
            text = f"field {name!r} is [{value[0]}, {value[1]}], must be 0 <= start < end <= {MAX_BLOCKS}"
            raise FieldError(text, ErrorCode.NOT_SERVED)


_DESCRIPTOR: Final = frozenset({Descriptor})


class Tensors:
    """Descriptors of exactly the named tensors."""

    __slots__ = ("dimensions", "dtypes", "names")

    def __init__(self, *names: str, dtypes: frozenset[str], dimensions: int) -> None:
        self.names, self.dtypes, self.dimensions = names, dtypes, dimensions

    def load(self, name: str, raw: Any) -> tuple[Descriptor, ...]:
        try:
            return parse_descriptors(raw, names=self.names)
        except RequestError as error:
            raise FieldError(error.text, error.code) from None

    def check(self, name: str, value: Any) -> None:
        if type(value) is not tuple or not _DESCRIPTOR.issuperset(map(type, value)):
            raise FieldError(f"field {name!r} must be a tuple of descriptors")
        if len(value) != 1 or (value[0].name,) != self.names:
            check_names(value, self.names)
            if len(value) != len(self.names):
                raise FieldError(f"field {name!r} must describe {', '.join(map(repr, self.names))}")
            total_size(value)
        for tensor in value:
            if tensor.dtype not in self.dtypes or len(tensor.shape) != self.dimensions:
                text = f"tensor {tensor.name!r}: must be {self.dimensions}-dimensional {'/'.join(sorted(self.dtypes))}"
                raise FieldError(text, ErrorCode.TENSOR)

    def dump(self, value: tuple[Descriptor, ...]) -> list[dict[str, Any]]:
        return [descriptor.to_wire() for descriptor in value]


class Nested:
    """A map that is a message of its own."""

    __slots__ = ("kind",)

    def __init__(self, kind: type[Message]) -> None:
        self.kind = kind

    def load(self, name: str, raw: Any) -> Message:
        try:
            return self.kind.from_wire(raw)
        except RequestError as error:
            raise FieldError(f"in {name!r}: {error.text}", error.code) from None

    def check(self, name: str, value: Any) -> None:
        if type(value) is not self.kind:
            raise FieldError(f"field {name!r} must hold {self.kind.__name__}")

    def dump(self, value: Message) -> dict[str, Any]:
        return value.to_wire()


# ------------------------------------------------------------------------------------------------------- machinery


class _Field(NamedTuple):
    attribute: str
    key: str
    rule: Rule
    required: bool
    plain: bool
    """The rule's `load` and `dump` change nothing: not worth calling for every field of every step."""


class Message:
    """Common to all messages. Making one with a value that breaks a rule raises FieldError, a LocalProtocolError."""

    __slots__ = ()
    FIELDS: ClassVar[tuple[_Field, ...]] = ()

    def __post_init__(self) -> None:
        for attribute, key, rule, required, _ in self.FIELDS:
            value = getattr(self, attribute)
            if value is not None or required:
                rule.check(key, value)
        self.check_together()

    def check_together(self) -> None:
        """Rules that concern several fields."""

    def to_wire(self) -> dict[str, Any]:
        """The map that `encode` takes; a fresh one, to which the connection may add its keys."""
        made = {}
        for attribute, key, rule, _, plain in self.FIELDS:
            value = getattr(self, attribute)
            if value is not None:
                made[key] = value if plain else rule.dump(value)
        return made

    def template(self, *varying: str) -> Template:
        """For messages that differ from this one in the `varying` integers only."""
        return Template({name: value for name, value in self.to_wire().items() if name not in varying})

    @classmethod
    def from_wire(cls, received: Mapping[str, Any]) -> Self:
        """The message in a received map; unknown keys are ignored, null counts as absent.

        Raises RequestError: BAD_REQUEST naming the field and its limit, or the code that the field's rule gives.
        """
        if type(received) is KnownHead:
            known = received.pattern.made.get(cls)
            if known is None:
                known = received.pattern.made[cls] = cls.from_wire(dict(received))
            return known._with_integers(received)
        if type(received) is not dict:
            raise RequestError(ErrorCode.BAD_REQUEST, f"{cls.__name__} must be a map")
        refuse_critical(received)
        values = {}
        try:
            for attribute, key, rule, required, plain in cls.FIELDS:
                raw = received.get(key)
                if raw is not None:
                    values[attribute] = raw if plain else rule.load(key, raw)
                elif required:
                    raise FieldError(f"field {key!r} is missing")
            return cls(**values)
        except FieldError as error:
            raise RequestError(error.code, str(error)) from None

    def _with_integers(self, received: Mapping[str, Any]) -> Self:
        """This message with the integers in `received`, the one thing that is looked at again."""
        made = object.__new__(type(self))
        try:
            for attribute, key, rule, _, _ in self.FIELDS:
                value = getattr(self, attribute)
                if type(value) is int:
                    value = received[key]
                    rule.check(key, value)
                object.__setattr__(made, attribute, value)
            made.check_together()
        except FieldError as error:
            raise RequestError(error.code, str(error)) from None
        return made


M = TypeVar("M", bound=Message)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def message(cls: type[M]) -> type[M]:
    """Makes the class a frozen, slotted, keyword-only dataclass and reads its rules from its annotations."""
    made = dataclass(frozen=True, slots=True, kw_only=True)(cls)
    hints = get_type_hints(made, include_extras=True)
    schema = []
    for each in fields(made):  # type: ignore[arg-type]  # mypy does not see that `made` is a dataclass
        rule = hints[each.name].__metadata__[0]
        key, rule = (rule.key, rule.rule) if type(rule) is Key else (each.name, rule)
        plain = type(rule).load is Plain.load and type(rule).dump is Plain.dump
        schema.append(_Field(each.name, key, rule, each.default is MISSING, plain))
    made.FIELDS = tuple(schema)
    return made


# ---------------------------------------------------------------------------------------------------------- fields

SessionId = Annotated[bytes, Bin(SESSION_ID_BYTES)]
PeerIdBytes = Annotated[bytes, Bin(32)]
ModelId = Annotated[bytes, Bin(32)]
Blocks = Annotated[tuple[int, int], Span()]
StepNumber = Annotated[int, Int()]
Position = Annotated[int, Int(0, MAX_SESSION_LENGTH, ErrorCode.POSITION)]
Length = Annotated[int, Int(1, MAX_SESSION_LENGTH, ErrorCode.RESOURCES)]
Hypotheses = Annotated[tuple[int, ...] | None, Ints(1, MAX_BATCH, MAX_BATCH - 1)]
LastTokens = Annotated[int | None, Int(1, MAX_SESSION_LENGTH)]
Padding = Annotated[tuple[int, ...] | None, Ints(1, MAX_BATCH, MAX_SESSION_LENGTH)]
Hidden = Annotated[tuple[Descriptor, ...], Key("t", Tensors("h", dtypes=FLOATS, dimensions=3))]
Bytes = Annotated[tuple[Descriptor, ...], Key("t", Tensors("manifest", dtypes=frozenset({"u8"}), dimensions=1))]


def _check_rows(hypo: tuple[int, ...] | None, pad: tuple[int, ...] | None, tensors: tuple[Descriptor, ...]) -> None:
    """`hypo` and `pad` have one entry for each of the B rows of "h"."""
    rows = tensors[0].shape[0]
    if rows > MAX_BATCH:
        raise FieldError(f"tensor 'h' has {rows} rows, must have 1..{MAX_BATCH}", ErrorCode.TENSOR)
    for name, value in (("hypo", hypo), ("pad", pad)):
        if value is not None and len(value) != rows:
            raise FieldError(f"field {name!r} has {len(value)} entries, tensor 'h' has {rows} rows")
    if hypo is not None and max(hypo) >= rows:
        raise FieldError(f"field 'hypo' must hold integers in 0..{rows - 1}")


def _check_last(last: int, tensors: tuple[Descriptor, ...]) -> None:
    tokens = tensors[0].shape[1]
    if last > tokens:
        raise FieldError(f"field 'last' is {last}, tensor 'h' has {tokens} tokens")


def _check_route(next_: tuple[Hop, ...]) -> None:
    if len({hop.peer for hop in next_}) != len(next_):
        raise FieldError("field 'next' names a peer twice")


# -------------------------------------------------------------------------------------------------------- messages


@message
class Empty(Message):
    """A request or reply without fields."""


@message
class NextHop(Message):
    """A measured round trip to another server, named by the first 8 bytes of its peer id."""

    id: Annotated[bytes, Bin(8)]
    us: Annotated[int, Int(0, 2**32)]


@message
class InfoReply(Message):
    """What a server tells of itself: the reply to `info`, and the value of its record in the DHT (spec/10).

    `max_len`: its longest session in tokens; `cache_left`: tokens of cache not reserved. `decode_rate` and
    `batch_rate`: block-tokens/s in one-token steps and in long batches; `net_rate`: bits/s; `queue`: ms that a step
    waits. `moving_to`: the blocks it is about to hold instead; `pinned`: it will not move. `addrs`: host:port.
    `train`: it answers forward and backward of so many tokens (rows x tokens); `adapters`: those that it holds.
    """

    model: ModelId
    name: Annotated[str, Str(0, MAX_WORD)]
    blocks: Blocks
    layers: Annotated[int, Int(1, MAX_BLOCKS)]
    hidden: Annotated[int, Int(1, 2**24)]
    dtype: Annotated[str, OneOf(*COMPUTE_DTYPES)]
    quant: Annotated[str | None, OneOf("int8")] = None
    codecs: Annotated[tuple[str, ...], ListOf(Str(1, MAX_WORD), 1, 16)]
    max_len: Annotated[int, Int(1, MAX_SESSION_LENGTH)]
    max_batch: Annotated[int, Int(1, MAX_BATCH)]
    cache_left: Annotated[int, Int()]
    state: Annotated[str, OneOf(*STATES)]
    version: Annotated[str, Str(0, MAX_WORD)]
    moving_to: Annotated[tuple[int, int] | None, Span()] = None
    pinned: Annotated[bool | None, Bool()] = None
    decode_rate: Annotated[int | None, Int(1, MAX_RATE)] = None
    batch_rate: Annotated[int | None, Int(1, MAX_RATE)] = None
    net_rate: Annotated[int | None, Int(1, MAX_RATE)] = None
    queue: Annotated[int | None, Int(0, 2**32)] = None
    push: Annotated[bool | None, Bool()] = None
    train: Annotated[int | None, Int(1, 2**32)] = None
    adapters: Annotated[tuple[str, ...] | None, ListOf(Str(1, MAX_WORD), 0, MAX_ADAPTERS)] = None
    next_hops: Annotated[tuple[NextHop, ...] | None, ListOf(Nested(NextHop), 0, MAX_NEXT_HOPS)] = None
    addrs: Annotated[tuple[str, ...] | None, ListOf(Str(1, MAX_WORD), 0, MAX_ANNOUNCED_ADDRESSES)] = None

    def check_together(self) -> None:
        for name, span in (("blocks", self.blocks), ("moving_to", self.moving_to)):
            if span is not None and span[1] > self.layers:
                raise FieldError(f"field {name!r} ends at {span[1]}, the model has {self.layers} layers")


@message
class Manifest(Message):
    model: ModelId


@message
class ManifestReply(Message):
    """The manifest's own bytes are the body; their SHA-256 is the model id."""

    tensors: Bytes


@message
class Open(Message):
    """Reserve a session's cache. `from_` names the one peer that may push steps into it. `wait`: if there is no room,
    wait for it until the deadline.

    `adapter`, the name of one that the server holds, and `tensors` are added to the model for this session: "prompts"
    (n, P, C) and an adapter's "query_key_value.lora_A" (n, r, in) and so on, for the n blocks.
    """

    sid: SessionId
    model: ModelId
    blocks: Blocks
    max_len: Length
    batch: Annotated[int, Int(1, MAX_BATCH, ErrorCode.RESOURCES)]
    dtype: Annotated[str, OneOf(*ACTIVATION_DTYPES)]
    codec: Annotated[str, OneOf(*CODECS)]
    from_: Annotated[bytes | None, Key("from", Bin(32))] = None
    wait: Annotated[bool | None, Bool()] = None
    adapter: AdapterName = None
    tensors: Annotated[tuple[Descriptor, ...] | None, Key("t", TensorSet(ADDITIONS))] = None

    def check_together(self) -> None:
        if self.tensors is not None:
            check_additions(self.adapter, self.tensors, self.blocks[1] - self.blocks[0], self.max_len)


@message
class OpenReply(Message):
    """`ttl`: seconds that the session may stay idle."""

    pos: Position
    ttl: Annotated[int, Int(0, 7 * 24 * 3600)]


@message
class Hop(Message):
    """The next peer of a route, and the session there. `n`: the step's number there; absent where all have the same."""

    peer: PeerIdBytes
    sid: SessionId
    n: Annotated[int | None, Int()] = None


@message
class Step(Message):
    """Run "h" (B, T, C) through the span at positions pos..pos+T; `pos` below the session's position rolls it back.

    `last`: how many of the last tokens are wanted of what comes out where the route ends; all, if it is None.
    """

    sid: SessionId
    n: StepNumber
    pos: Position
    hypo: Hypotheses = None
    pad: Padding = None
    last: LastTokens = None
    next: Annotated[tuple[Hop, ...] | None, ListOf(Nested(Hop), 1, MAX_HOPS - 1)] = None
    tensors: Hidden

    def check_together(self) -> None:
        _check_rows(self.hypo, self.pad, self.tensors)
        if self.last is not None:
            _check_last(self.last, self.tensors)
        if self.next is not None:
            _check_route(self.next)

    @property
    def answered(self) -> int:
        """Tokens of each row in the reply (PT-SES-037): where the route goes on, its owner keeps all for a replay."""
        tokens: int = self.tensors[0].shape[1]
        return tokens if self.last is None or self.next else self.last


@message
class StepReply(Message):
    """Output of step `n`; `pos` is the session's position after it. Also the reply to `await`.

    `drain`: the server is about to leave; the client should move the session while there is time.
    """

    n: StepNumber
    pos: Position
    drain: Annotated[bool | None, Bool()] = None
    tensors: Hidden


@message
class Extend(Message):
    sid: SessionId
    max_len: Length


@message
class ExtendReply(Message):
    max_len: Length


@message
class Status(Message):
    sid: SessionId


@message
class StatusReply(Message):
    """`n` is the number that the next step must carry, which is the count of those done."""

    n: StepNumber
    pos: Position
    max_len: Length


@message
class Close(Message):
    sid: SessionId


@message
class Await(Message):
    """Wait for step `n`, which another peer will push."""

    sid: SessionId
    n: StepNumber


@message
class Push(Message):
    """A step from the previous hop, for the session `sid` that belongs to the peer `owner`."""

    owner: PeerIdBytes
    sid: SessionId
    n: StepNumber
    pos: Position
    hypo: Hypotheses = None
    pad: Padding = None
    last: LastTokens = None
    next: Annotated[tuple[Hop, ...] | None, ListOf(Nested(Hop), 1, MAX_HOPS - 2)] = None
    tensors: Hidden

    def check_together(self) -> None:
        _check_rows(self.hypo, self.pad, self.tensors)
        if self.last is not None:
            _check_last(self.last, self.tensors)
        if self.next is not None:
            _check_route(self.next)


@message
class Unpushed(Message):
    """To the owner: the output of step `n` of its session did not get to the next hop."""

    sid: SessionId
    n: StepNumber


# Method name in a REQ frame -> request, reply.
METHODS: Final[dict[str, tuple[type[Message], type[Message]]]] = {
    "info": (Empty, InfoReply),
    "manifest": (Manifest, ManifestReply),
    "open": (Open, OpenReply),
    "step": (Step, StepReply),
    "extend": (Extend, ExtendReply),
    "status": (Status, StatusReply),
    "close": (Close, Empty),
    "await": (Await, StepReply),
    "push": (Push, Empty),
    "unpushed": (Unpushed, Empty),
}
