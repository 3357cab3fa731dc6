"""An adapter as PEFT names it, made into the tensors that travel (spec/15): stacked by block, padded in rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from petalite import limits
from petalite.bloom.adapters import parse_name
from petalite.swarm.snapshot import Span
from petalite.wire.training import LORA_TARGETS


def stack_adapter(adapter: Mapping[str, Tensor], blocks: Span, hidden: int, scaling: float = 1.0) -> dict[str, Tensor]:
    """The part of an adapter that concerns `blocks`: "query_key_value.lora_A" -> (blocks, r, in), and so on.

    `adapter` has PEFT's names without "base_model.model.": "transformer.h.3.mlp.dense_4h_to_h.lora_B.weight". A block
    without a change of a product that others have gets zeros, a smaller rank is filled up with zeros; neither changes
    a number. `scaling`, alpha / r, goes into B. Differentiable in the adapter's tensors.

    Raises ValueError for a name that is none, for A without B, and for shapes that do not fit `hidden`.
    """
    parts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in adapter.items():
        parsed = parse_name(name)
        if parsed is None:
            raise ValueError(f"adapter tensor {name[:100]!r} is none of a LoRA adapter of BLOOM's layers")
        index, layer, side = parsed
        target = layer.rpartition(".")[2]
        if index in blocks:
            parts.setdefault(target, {})[index, side] = tensor
    made = {}
    for target, found in parts.items():
        rank = _checked_rank(target, found, hidden)
        empty = next(iter(found.values())).new_zeros
        wide_in, wide_out = (hidden * width for width in LORA_TARGETS[target])
        a = [found.get((i, "A"), empty(0, wide_in)) for i in range(blocks.start, blocks.end)]
        b = [found.get((i, "B"), empty(wide_out, 0)) for i in range(blocks.start, blocks.end)]
        made[f"{target}.lora_A"] = torch.stack([F.pad(each, (0, 0, 0, rank - each.shape[0])) for each in a])
        made[f"{target}.lora_B"] = torch.stack([F.pad(each, (0, rank - each.shape[1])) for each in b]) * scaling
    return made


def _checked_rank(target: str, found: Mapping[tuple[int, str], Tensor], hidden: int) -> int:
    """The largest rank among a target's blocks."""
    wide_in, wide_out = (hidden * width for width in LORA_TARGETS[target])
    ranks = {}
    for index in {index for index, _ in found}:
        a, b = found.get((index, "A")), found.get((index, "B"))
        if a is None or b is None:
            raise ValueError(f"adapter of {target} in block {index}: lora_A and lora_B belong together")
        rank = ranks[index] = a.shape[0]
        if a.shape != (rank, wide_in) or b.shape != (wide_out, rank) or not 1 <= rank <= limits.MAX_LORA_RANK:
            raise ValueError(
                f"adapter of {target} in block {index}: shapes {tuple(a.shape)} and {tuple(b.shape)}, must be "
                f"(r, {wide_in}) and ({wide_out}, r) with a rank r of 1..{limits.MAX_LORA_RANK}"
            )
    return max(ranks.values())
