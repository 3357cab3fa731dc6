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

from petalite.bloom.blocks import Block

# Product -> the part of a block that holds it.
TARGETS: Mapping[str, str] = {
    "query_key_value": "self_attention",
    "dense": "self_attention",
    "dense_h_to_4h": "mlp",
    "dense_4h_to_h": "mlp",
}


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
        target: (adapter[f"{target}.lora_A"], adapter[f"{target}.lora_B"])
        for target in TARGETS
        if f"{target}.lora_A" in adapter
    }
    if not changes:
        return block
    made = _shallow(block)
    for part in {TARGETS[target] for target in changes}:
        made._modules[part] = _shallow(getattr(block, part))
    for target, (a, b) in changes.items():
        inner = getattr(made, TARGETS[target])
        inner._modules[target] = LowRankLinear(getattr(inner, target), a, b)
    return made


M = TypeVar("M", bound=nn.Module)


def _shallow(module: M) -> M:
    """A module of its own with the same parts."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
