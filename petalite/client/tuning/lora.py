"""LoRA adapters that the client owns and trains (Hu et al. 2021): they travel with the requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from petalite.bloom.adapters import TARGETS, Lora, layer_sizes, load_lora, parse_name, save_lora, scaling_of
from petalite.bloom.config import BloomConfig


class _Pair(nn.Module):
    """One layer's low-rank addition. A begins as nn.Linear does (Kaiming uniform), B at zero: as in PEFT."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_B.weight)


class LoraAdapter(nn.Module):
    """Trainable low-rank weights beside `targets` of `blocks` (all of them if not given).

    `targets` are PEFT's names: query_key_value, dense, dense_h_to_4h, dense_4h_to_h. Parameters are named as in PEFT,
    so `dict(adapter.named_parameters())` is what the blocks take. There is no dropout: servers compute the same in
    training and afterwards. Raises ValueError for a number or a name that makes no sense.
    """

    def __init__(
        self,
        config: BloomConfig,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        targets: Sequence[str] = ("query_key_value",),
        blocks: Iterable[int] | None = None,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be 1 or more, not {rank}")
        self.config = config
        self.rank = rank
        self.alpha = alpha
        self.rank_stabilized = rank_stabilized
        blocks = range(config.n_layer) if blocks is None else blocks
        places = [(block, target) for block in blocks for target in targets]
        self.transformer = nn.ModuleDict({"h": _pairs(config, places, rank)})

    @property
    def scaling(self) -> float:
        """What B (A x) is multiplied by."""
        return scaling_of(self.rank, self.alpha, self.rank_stabilized)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters by PEFT's names, without `base_model.model.`."""
        return dict(self.named_parameters())

    def save(self, directory: Path | str, base_model: str | None = None) -> None:
        """Write the two files of PEFT's format; `base_model` is noted as the model they belong to. Raises OSError."""
        lora = Lora(tensors=self.tensors, rank=self.rank, alpha=self.alpha, rank_stabilized=self.rank_stabilized)
        save_lora(directory, lora, base_model)

    @classmethod
    def load(cls, directory: Path | str, config: BloomConfig) -> LoraAdapter:
        """Read what `save` or PEFT wrote for this model. Raises CheckpointError with one line that names the file."""
        lora = load_lora(directory, config)
        of_layer = {layer: target for target, layer in TARGETS.items()}
        found = {parsed[:2] for parsed in map(parse_name, lora.tensors) if parsed is not None}
        adapter = cls(config, rank=lora.rank, alpha=lora.alpha, rank_stabilized=lora.rank_stabilized)
        pairs = _pairs(config, sorted((block, of_layer[layer]) for block, layer in found), lora.rank)
        adapter.transformer = nn.ModuleDict({"h": pairs})
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                parameter.copy_(lora.tensors[name])
        return adapter


def _pairs(config: BloomConfig, places: Iterable[tuple[int, str]], rank: int) -> nn.ModuleDict:
    """A pair for each (block, target), nested as the layers are, so that parameters get PEFT's names."""
    tree: dict[str, dict[str, dict[str, nn.Module]]] = {}
    for block, target in places:
        if not 0 <= block < config.n_layer:
            raise ValueError(f"no such block to adapt: {block}; there are {config.n_layer}")
        inputs, outputs = layer_sizes(config, target)
        part, _, layer = TARGETS[target].partition(".")
        tree.setdefault(str(block), {}).setdefault(part, {})[layer] = _Pair(inputs, outputs, rank)
    if not tree:
        raise ValueError("an adapter without a layer to adapt")
    return nn.ModuleDict(
        {
            block: nn.ModuleDict({part: nn.ModuleDict(pairs) for part, pairs in parts.items()})
            for block, parts in tree.items()
        }
    )
