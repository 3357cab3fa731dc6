"""Hidden states as a session keeps them: as tensors, or as they travel until somebody computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from petalite import bridge
from petalite.wire.tensors import RAW, Descriptor, surely_finite


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hidden states (B, T, C) as they travel, every value finite; `values`: decoded, where they were already."""

    tensor: Descriptor
    body: Sequence[memoryview]
    values: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        apart = self.values is not None and self.tensor.codec != RAW
        return self.tensor.nbytes + (self.values.nbytes if self.values is not None and apart else 0)


Hidden = Tensor | Encoded


def as_tensor(hidden: Hidden) -> Tensor:
    """(B, T, C) in the wire's dtype."""
    if isinstance(hidden, Tensor):
        return hidden
    return bridge.few_from_wire(hidden.tensor, hidden.body[0]) if hidden.values is None else hidden.values


def few_as_they_came(tensor: Descriptor, body: memoryview) -> Encoded | None:
    """Without decoding them. None where they must be looked at more closely: are they finite, and as many as due?"""
    few = tensor.codec == RAW and len(body) == tensor.nbytes <= bridge.FEW_BYTES
    return Encoded(tensor, (body,)) if few and surely_finite(tensor.dtype, body, tensor.dtype) else None


def decoded(tensor: Descriptor, body: memoryview) -> Encoded:
    """After a closer look. Raises RequestError(TENSOR) as `bridge.from_wire` does."""
    return Encoded(tensor, (body,), bridge.from_wire(tensor, body))
