"""What training requests and their replies say: `forward` and `backward` (spec/15)."""

from __future__ import annotations

from typing import Annotated, Final

from petalite.errors import ErrorCode
from petalite.limits import MAX_BATCH, MAX_BLOCKS, MAX_WORD
from petalite.wire.additions import ADAPTER, ADAPTER_KINDS, AdapterName, Kind, TensorSet, check_adapter, check_shape
from petalite.wire.messages import Blocks, Key, Message, ModelId, message
from petalite.wire.packing import FieldError, Ints, ListOf, Str
from petalite.wire.tensors import CODECS, Descriptor

DIFFERENTIABLE: Final = ("h", "prompts", *ADAPTER)


_ACTIVATIONS = Kind((3,), codecs=CODECS)
_TAPS = Kind((4,), codecs=CODECS)
_PROMPTS = Kind((3, 4))
_GIVEN: Final = {
    "h": _ACTIVATIONS,
    "mask": Kind((2,), frozenset({"u8"})),
    "prompts": _PROMPTS,
    **ADAPTER_KINDS,
}


Taps = Annotated[tuple[int, ...] | None, Ints(1, MAX_BLOCKS, MAX_BLOCKS - 1)]


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
        check_shape(given["grad"], shape)
        if (self.taps is None) != ("tap_grads" not in given):
            raise FieldError("field 'taps' and tensor 'tap_grads' belong together")
        if self.taps is not None:
            check_shape(given["tap_grads"], (len(self.taps), *shape))
        unknown = [name for name in self.wanted if name not in DIFFERENTIABLE or name not in given]
        if unknown or len(set(self.wanted)) != len(self.wanted):
            raise FieldError("field 'wanted' must name tensors of the request that have gradients, each once")


@message
class BackwardReply(Message):
    """The gradients asked for, each of the shape of its tensor."""

    tensors: Annotated[
        tuple[Descriptor, ...], Key("t", TensorSet({"h": _ACTIVATIONS, "prompts": _PROMPTS, **ADAPTER_KINDS}))
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
        check_shape(given["mask"], (batch, tokens))
    if "prompts" in given:
        _check_prompts(given["prompts"], end - start, given["h"].shape)
    taps = request.taps
    if taps is not None and not (taps == tuple(sorted(set(taps))) and start <= taps[0] and taps[-1] < end):
        raise FieldError(f"field 'taps' must hold rising numbers in {start}..{end - 1}")
    check_adapter(request.adapter, given, end - start, hidden)


def _check_prompts(prompts: Descriptor, blocks: int, shape: tuple[int, ...]) -> None:
    batch, tokens, hidden = shape
    count = prompts.shape[-2]
    if count > tokens:
        raise FieldError(f"tensor 'prompts' is for {count} positions, 'h' has {tokens}", ErrorCode.TENSOR)
    rows = () if len(prompts.shape) == 3 else (batch,)
    check_shape(prompts, (blocks, *rows, count, hidden))
