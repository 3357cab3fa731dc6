"""What goes through the blocks besides hidden states: masks, deep prompts, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petalite import bridge
from petalite.wire.tensors import FLOATS, RAW, Descriptor


@dataclass(frozen=True, slots=True)
class Given:
    """What goes into a pass besides hidden states, for all n blocks of it.

    `mask` (B, T) bool; `prompts` (n, P, C) or (n, B, P, C); `adapter`: "query_key_value.lora_A" -> (n, r, in) and so on
    (bloom/lora.py); `adapter_name`: one that servers hold.
    """

    mask: Tensor | None = None
    prompts: Tensor | None = None
    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    adapter_name: str | None = None

    def tensors(self, rows: slice, blocks: slice) -> dict[str, Tensor]:
        """What some rows, in some blocks of the pass, need of it."""
        found = {}
        if self.mask is not None:
            found["mask"] = self.mask[rows].to(torch.uint8)
        if self.prompts is not None:
            found["prompts"] = self.prompts[blocks] if self.prompts.dim() == 3 else self.prompts[blocks, rows]
        return found | {name: tensor[blocks] for name, tensor in self.adapter.items()}

    def encode(self, blocks: slice) -> tuple[tuple[Descriptor, ...], list[memoryview]]:
        """What a session over some of the blocks takes with it: prompts and adapter."""
        made = [bridge.to_wire(t, own_dtype(t), RAW, name) for name, t in self.tensors(slice(None), blocks).items()]
        return tuple(descriptor for descriptor, _ in made), [piece for _, body in made for piece in body]

    @property
    def wanted(self) -> bool:
        """Whether there is anything that a server must know how to add."""
        return self.prompts is not None or bool(self.adapter) or self.adapter_name is not None

    @property
    def block_bytes(self) -> int:
        """Of prompts and adapter, for one block, as float32: what their gradients take."""
        return sum(4 * tensor[0].numel() for tensor in (self.prompts, *self.adapter.values()) if tensor is not None)


def nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor which is no activation takes in a body."""
    return Descriptor("any", own_dtype(tensor), tuple(tensor.shape)).nbytes


def own_dtype(tensor: Tensor) -> str:
    """The wire type of a tensor that is no activation."""
    if tensor.dtype == torch.uint8:
        return "u8"
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(tensor.dtype, "f32")
    return name if name in FLOATS else "f32"
