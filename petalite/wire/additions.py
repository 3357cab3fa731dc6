"""Tensors that requests may add to the model's own weights: low-rank adapters and deep prompts (spec/07, spec/15)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

from petalite.errors import ErrorCode, RequestError
from petalite.limits import MAX_ADAPTER_BYTES, MAX_LORA_RANK, MAX_WORD
from petalite.wire.packing import FieldError, Str
from petalite.wire.tensors import FLOATS, RAW, Descriptor, check_names, parse_descriptors, total_size

# The products that an adapter may change -> widths of their input and output, in hidden sizes.
LORA_TARGETS: Final[Mapping[str, tuple[int, int]]] = {
    "query_key_value": (1, 3),
    "dense": (1, 1),
    "dense_h_to_4h": (1, 4),
    "dense_4h_to_h": (4, 1),
}
ADAPTER: Final = tuple(f"{target}.lora_{side}" for target in LORA_TARGETS for side in "AB")
AdapterName = Annotated[str | None, Str(1, MAX_WORD)]


class Kind(NamedTuple):
    """What a tensor of some name may look like."""

    dimensions: tuple[int, ...]
    dtypes: frozenset[str] = FLOATS
    codecs: tuple[str, ...] = (RAW,)


ADAPTER_KINDS: Final = dict.fromkeys(ADAPTER, Kind((3,)))
ADDITIONS: Final = {"prompts": Kind((3,)), **ADAPTER_KINDS}


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


def check_shape(tensor: Descriptor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        text = f"tensor {tensor.name!r} has shape {list(tensor.shape)}, must have {list(shape)}"
        raise FieldError(text, ErrorCode.TENSOR)


def check_adapter(name: str | None, given: Mapping[str, Descriptor], blocks: int, hidden: int) -> None:
    """Whether an adapter fits `blocks` blocks of width `hidden`, and the limits. Raises FieldError."""
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
        check_shape(a, (blocks, rank, wide_in * hidden))
        check_shape(b, (blocks, wide_out * hidden, rank))
    size = sum(tensor.nbytes for tensor in tensors)
    if size > MAX_ADAPTER_BYTES:
        raise FieldError(f"an adapter of {size} bytes, limit {MAX_ADAPTER_BYTES}", ErrorCode.RESOURCES)


def check_additions(name: str | None, tensors: tuple[Descriptor, ...], blocks: int, max_len: int) -> None:
    """Whether what an open adds for `blocks` blocks fits together, and the limits. Raises FieldError."""
    given = {tensor.name: tensor for tensor in tensors}
    check_adapter(name, given, blocks, width_of(tensors))
    prompts = given.get("prompts")
    if prompts is not None:
        if prompts.shape[1] > max_len:
            text = f"tensor 'prompts' is for {prompts.shape[1]} positions, the session has {max_len}"
            raise FieldError(text, ErrorCode.TENSOR)
        check_shape(prompts, (blocks, prompts.shape[1], width_of(tensors)))
    size = total_size(tensors)
    if size > MAX_ADAPTER_BYTES:
        raise FieldError(f"adapter and prompts of {size} bytes, limit {MAX_ADAPTER_BYTES}", ErrorCode.RESOURCES)


def width_of(tensors: tuple[Descriptor, ...]) -> int:
    """The hidden size that the first tensor is for; 0 if there is none."""
    for tensor in tensors:
        target, _, side = tensor.name.partition(".lora_")
        if target == "prompts":
            return tensor.shape[2]
        return tensor.shape[2] // LORA_TARGETS[target][0] if side == "A" else tensor.shape[1] // LORA_TARGETS[target][1]
    return 0
