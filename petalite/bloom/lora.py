"""Low-rank adapters (Hu et al. 2021) over a block's four products, beside the weights and not in them.

Names are PEFT's: the change of a product with weight W (out, in) is B A with A (r, in) and B (out, r). The factor
alpha / r is in B already.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from petalite.bloom.adapters import TARGETS
from petalite.bloom.blocks import Block


class LowRankLinear(nn.Module):
    """y = base(x) + (x A^T) B^T, in x's dtype; differentiable in x, A and B."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base = base
        self._a, self._b = a, b

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        low = F.linear(x, self._a.to(x.dtype))
        return self.base(x) + F.linear(low, self._b.to(x.dtype))  # type: ignore[no-any-return]


def adapted(block: Block, adapter: Mapping[str, Tensor]) -> Block:
    """`block` with an adapter; the weights are shared, and `block` itself stays as it was.

    `adapter`: "query_key_value.lora_A" -> (r, in), "query_key_value.lora_B" -> (out, r), and so on for any of TARGETS;
    other names are left aside.
    """
    changes = {
        layer: (adapter[f"{target}.lora_A"], adapter[f"{target}.lora_B"])
        for target, layer in TARGETS.items()
        if f"{target}.lora_A" in adapter
    }
    if not changes:
        return block
    made = _shallow(block)
    for part in {layer.partition(".")[0] for layer in changes}:
        made._modules[part] = _shallow(getattr(block, part))
    for layer, (a, b) in changes.items():
        part, _, name = layer.partition(".")
        made.get_submodule(part)._modules[name] = LowRankLinear(block.get_submodule(layer), a, b)
    return made


M = TypeVar("M", bound=nn.Module)


def _shallow(module: M) -> M:
    """A module of its own with the same parts."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
