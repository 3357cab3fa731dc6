"""Low-rank adapters (Hu et al. 2021) at work: over a block's four products, beside the weights and not in them.

The change of a product with weight W (out, in) is B A with A (r, in) and B (out, r). Here, as on the wire (spec/15),
all blocks' A of one product are one tensor, and the factor alpha / r is in B already.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petalite.bloom.adapters import TARGETS, layer_sizes, parse_name
from petalite.bloom.blocks import Block
from petalite.bloom.config import BloomConfig
from petalite.bloom.span import Span


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


def stack_adapter(
    tensors: Mapping[str, Tensor], config: BloomConfig, start: int, end: int, scaling: float = 1.0
) -> dict[str, Tensor]:
    """What an adapter changes in blocks [start, end): "query_key_value.lora_A" -> (blocks, r, in), and so on.

    `tensors` go by PEFT's names (see `adapters`); those of other blocks are left aside. A block without a change of a
    product that others have gets zeros, and a smaller rank is filled up with zeros: neither changes a number.
    `scaling`, alpha / r, goes into B. Differentiable in `tensors`.

    Raises ValueError for a name that is none, for A without B, and for shapes that do not fit the model.
    """
    parts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        parsed = parse_name(name)
        if parsed is None:
            raise ValueError(f"tensor {name[:100]!r} is none of a LoRA adapter of BLOOM's layers")
        index, layer, side = parsed
        if start <= index < end:
            parts.setdefault(layer.rpartition(".")[2], {})[index, side] = tensor
    made = {}
    for target, found in parts.items():
        inputs, outputs = layer_sizes(config, target)
        rank = _largest_rank(target, found, inputs, outputs)
        nothing = next(iter(found.values())).new_zeros
        a = [found.get((index, "A"), nothing(0, inputs)) for index in range(start, end)]
        b = [found.get((index, "B"), nothing(outputs, 0)) for index in range(start, end)]
        made[f"{target}.lora_A"] = torch.stack([F.pad(each, (0, 0, 0, rank - each.shape[0])) for each in a])
        made[f"{target}.lora_B"] = torch.stack([F.pad(each, (0, rank - each.shape[1])) for each in b]) * scaling
    return made


def _largest_rank(target: str, found: Mapping[tuple[int, str], Tensor], inputs: int, outputs: int) -> int:
    """Of one product's changes in all blocks, whose shapes it checks."""
    ranks = []
    for index in {index for index, _ in found}:
        a, b = found.get((index, "A")), found.get((index, "B"))
        if a is None or b is None:
            raise ValueError(f"adapter of {target} in block {index}: lora_A and lora_B belong together")
        ranks.append(a.shape[0])
        if not ranks[-1] or a.shape != (ranks[-1], inputs) or b.shape != (outputs, ranks[-1]):
            raise ValueError(
                f"adapter of {target} in block {index}: shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                f"must be (rank, {inputs}) and ({outputs}, rank)"
            )
    return max(ranks)


def adapted_span(span: Span, adapter: Mapping[str, Tensor]) -> Span:
    """A plain span of `span`'s blocks with an adapter, its weights shared; `adapter`: "query_key_value.lora_A" ->
    (blocks, r, in), and so on.
    """
    blocks = [
        adapted(block, {name: tensor[index] for name, tensor in adapter.items()})
        for index, block in enumerate(span.layers)
    ]
    return Span(span.config, span.start, span.end, blocks)


M = TypeVar("M", bound=nn.Module)


def _shallow(module: M) -> M:
    """A module of its own with the same parts."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
