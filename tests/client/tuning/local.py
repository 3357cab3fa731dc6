"""The same tuning on transformers' own BLOOM, all on this machine: the oracle of what goes through servers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BloomForCausalLM

from petalite.models import FAIRYTALE, find_model
from tools.simulate_sessions.world import load_parts


@cache
def transformers_model() -> BloomForCausalLM:
    """Shared, so its weights stay as they are."""
    model = BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)
    return model.requires_grad_(False).eval()


class LocalBlocks(nn.Module):
    """What `model.blocks` computes, by transformers' blocks: adapters are added to the weights themselves."""

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        prompts: Tensor | None = None,
        adapter: Mapping[str, Tensor] | None = None,
        scaling: float = 1.0,
    ) -> Tensor:
        model = transformers_model().transformer
        B, T, _ = hidden.shape
        mask = torch.ones(B, T) if mask is None else mask
        alibi = model.build_alibi_tensor(mask, model.num_heads, dtype=hidden.dtype)
        causal = torch.ones(T, T).tril().bool() & (mask[:, None, None, :].bool() | torch.eye(T).bool())
        bias = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
        for index, block in enumerate(model.h):
            if prompts is not None:
                P = prompts.shape[-2]
                hidden = torch.cat([hidden[:, :P] + prompts[index], hidden[:, P:]], dim=1)
            changed = self._merged(block, f"transformer.h.{index}.", adapter or {}, scaling)
            arguments: dict[str, Any] = {"alibi": alibi, "attention_mask": bias}
            hidden = functional_call(block, changed, (hidden,), arguments)[0]
        return hidden

    def _merged(
        self, block: nn.Module, prefix: str, adapter: Mapping[str, Tensor], scaling: float
    ) -> dict[str, Tensor]:
        changed = {}
        for name, weight in block.named_parameters():
            layer = prefix + name.removesuffix(".weight")
            if f"{layer}.lora_A.weight" in adapter:
                product = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
                changed[name] = weight + scaling * product
        return changed


def local_model() -> SimpleNamespace:
    """Embeddings and head of ours, blocks of transformers."""
    parts = load_parts().local
    return SimpleNamespace(config=parts.config, embeddings=parts.embeddings, head=parts.head, blocks=LocalBlocks())
