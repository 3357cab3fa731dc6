"""What training requests and their replies say: `forward` and `backward` (spec/15)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

from petalite.errors import ErrorCode, RequestError
from petalite.limits import MAX_ADAPTER_BYTES, MAX_BATCH, MAX_BLOCKS, MAX_LORA_RANK, MAX_WORD
from petalite.wire.messages import Blocks, Key, Message, ModelId, message
from petalite.wire.packing import FieldError, Ints, ListOf, Str
from petalite.wire.tensors import (
    CODECS,
    FLOATS,
    RAW,
    Descriptor,
    check_names,
    encoded_size,
    parse_descriptors,
    total_size,
)

# The products that an adapter may change -> widths of their input and output, in hidden sizes.
LORA_TARGETS: Final[Mapping[str, tuple[int, int]]] = {
    "query_key_value": (1, 3),
    "dense": (1, 1),
    "dense_h_to_4h": (1, 4),
    "dense_4h_to_h": (4, 1),
}
ADAPTER: Final = tuple(f"{target}.lora_{side}" for target in LORA_TARGETS for side in "AB")
DIFFERENTIABLE: Final = ("h", "prompts", *ADAPTER)


class Kind(NamedTuple):
    """What a tensor of some name may look like."""

    dimensions: tuple[int, ...]
    dtypes: frozenset[str] = FLOATS
    codecs: tuple[str, ...] = (RAW,)


_ACTIVATIONS = Kind((3,), codecs=CODECS)
_TAPS = Kind((4,), codecs=CODECS)
_PROMPTS = Kind((3, 4))
_ADAPTER = dict.fromkeys(ADAPTER, Kind((3,)))
_GIVEN: Final = {
    "h": _ACTIVATIONS,
    "mask": Kind((2,), frozenset({"u8"})),
    "prompts": _PROMPTS,
    **_ADAPTER,
}


class TensorSet:
    """Descriptors of tensors by name: all those `required`, and any others of `kinds`."""

    __slots__ = ("kinds", "required")

    def __init__(self, kinds: Mapping[str, Kind], *required: str) -> None:
        self.kinds, self.required = kinds, required

    def load(self, name: str, raw: Any) -> tuple[Descriptor, ...]:
        try:
            return parse_descriptors(raw, names=tuple(self.kinds))
        except RequestError as error:
            raise FieldError(error.text, error.code) from None

    def check(self, name: str, value: Any) -> None:
        if type(value) is not tuple or not all(type(tensor) is Descriptor for tensor in value):
            raise FieldError(f"field {name!r} must be a tuple of descriptors")
        check_names(value, tuple(self.kinds))
        missing = [each for each in self.required if each not in {tensor.name for tensor in value}]
        if missing:
            raise FieldError(f"field {name!r} must describe {', '.join(map(repr, missing))}")
        for tensor in value:
            dimensions, dtypes, codecs = self.kinds[tensor.name]
            if tensor.dtype not in dtypes or len(tensor.shape) not in dimensions:
                many = " or ".join(map(str, dimensions))
                text = f"tensor {tensor.name!r}: must be {many}-dimensional {'/'.join(sorted(dtypes))}"
                raise FieldError(text, ErrorCode.TENSOR)
            if tensor.codec not in codecs:
                raise FieldError(f"tensor {tensor.name!r}: only {RAW} is taken", ErrorCode.UNSUPPORTED)
        total_size(value)

    def dump(self, value: tuple[Descriptor, ...]) -> list[dict[str, Any]]:
        return [descriptor.to_wire() for descriptor in value]


Taps = Annotated[tuple[int, ...] | None, Ints(1, MAX_BLOCKS, MAX_BLOCKS - 1)]
AdapterName = Annotated[str | None, Str(1, MAX_WORD)]


@message
class Forward(Message):
    """Run "h" (B, T, C) through blocks [a, b) without a cache.

    `taps`: the blocks whose inputs are to come back too. `adapter`: one that the server holds, by its name.
    """

    model: ModelId
    blocks: Blocks
    taps: Taps = None
    adapter: AdapterName = None
    tensors: Annotated[tuple[Descriptor, ...], Key("t", TensorSet(_GIVEN, "h"))]

    def check_together(self) -> None:
        check_pass(self)


@message
class ForwardReply(Message):
    """The output "h", and "taps" (number of taps, B, T, C)."""

    tensors: Annotated[tuple[Descriptor, ...], Key("t", TensorSet({"h": _ACTIVATIONS, "taps": _TAPS}, "h"))]


@message
class Backward(Message):
    """The same pass with "grad", the gradient of a loss by its output, and "tap_grads", by the inputs of `taps`.

    `wanted`: the tensors by which the gradient is asked for.
    """

    model: ModelId
    blocks: Blocks
    taps: Taps = None
    adapter: AdapterName = None
    wanted: Annotated[tuple[str, ...], ListOf(Str(1, MAX_WORD), 1, len(DIFFERENTIABLE))]
    tensors: Annotated[
        tuple[Descriptor, ...],
        Key("t", TensorSet({**_GIVEN, "grad": _ACTIVATIONS, "tap_grads": _TAPS}, "h", "grad")),
    ]

    def check_together(self) -> None:
        check_pass(self)
        given = {tensor.name: tensor for tensor in self.tensors}
        shape = given["h"].shape
        _check_shape(given["grad"], shape)
        if (self.taps is None) != ("tap_grads" not in given):
            raise FieldError("field 'taps' and tensor 'tap_grads' belong together")
        if self.taps is not None:
            _check_shape(given["tap_grads"], (len(self.taps), *shape))
        unknown = [name for name in self.wanted if name not in DIFFERENTIABLE or name not in given]
        if unknown or len(set(self.wanted)) != len(self.wanted):
            raise FieldError("field 'wanted' must name tensors of the request that have gradients, each once")


@message
class BackwardReply(Message):
    """The gradients asked for, each of the shape of its tensor."""

    tensors: Annotated[
        tuple[Descriptor, ...], Key("t", TensorSet({"h": _ACTIVATIONS, "prompts": _PROMPTS, **_ADAPTER}))
    ]


TRAINING_METHODS: Final[dict[str, tuple[type[Message], type[Message]]]] = {
    "forward": (Forward, ForwardReply),
    "backward": (Backward, BackwardReply),
}


def check_pass(request: Forward | Backward) -> None:
    """Whether fields and shapes of a request fit together. Raises FieldError."""
    given = {tensor.name: tensor for tensor in request.tensors}
    start, end = request.blocks
    batch, tokens, hidden = given["h"].shape
    if batch > MAX_BATCH:
        raise FieldError(f"tensor 'h' has {batch} rows, must have 1..{MAX_BATCH}", ErrorCode.TENSOR)
    if "mask" in given:
        _check_shape(given["mask"], (batch, tokens))
    if "prompts" in given:
        _check_prompts(given["prompts"], end - start, given["h"].shape)
    taps = request.taps
    if taps is not None and not (taps == tuple(sorted(set(taps))) and start <= taps[0] and taps[-1] < end):
        raise FieldError(f"field 'taps' must hold rising numbers in {start}..{end - 1}")
    _check_adapter(request.adapter, given, end - start, hidden)


def _check_shape(tensor: Descriptor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        text = f"tensor {tensor.name!r} has shape {list(tensor.shape)}, must have {list(shape)}"
        raise FieldError(text, ErrorCode.TENSOR)


def _check_prompts(prompts: Descriptor, blocks: int, shape: tuple[int, ...]) -> None:
    batch, tokens, hidden = shape
    count = prompts.shape[-2]
    if count > tokens:
        raise FieldError(f"tensor 'prompts' is for {count} positions, 'h' has {tokens}", ErrorCode.TENSOR)
    rows = () if len(prompts.shape) == 3 else (batch,)
    _check_shape(prompts, (blocks, *rows, count, hidden))


def _check_adapter(name: str | None, given: Mapping[str, Descriptor], blocks: int, hidden: int) -> None:
    tensors = [given[each] for each in ADAPTER if each in given]
    if name is not None and tensors:
        raise FieldError("an adapter is given by name or as tensors, not both")
    for target, (wide_in, wide_out) in LORA_TARGETS.items():
        a, b = given.get(f"{target}.lora_A"), given.get(f"{target}.lora_B")
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise FieldError(f"adapter of {target!r}: lora_A and lora_B belong together")
        rank = a.shape[1]
        if rank > MAX_LORA_RANK:
            raise FieldError(f"tensor {a.name!r}: rank {rank}, limit {MAX_LORA_RANK}", ErrorCode.RESOURCES)
        _check_shape(a, (blocks, rank, wide_in * hidden))
        _check_shape(b, (blocks, wide_out * hidden, rank))
    size = sum(map(encoded_size, tensors))
    if size > MAX_ADAPTER_BYTES:
        raise FieldError(f"an adapter of {size} bytes, limit {MAX_ADAPTER_BYTES}", ErrorCode.RESOURCES)
