"""A pass through the whole model with what is trained in its place: embeddings here, blocks in the swarm."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.config import BloomConfig
from petalite.client.tuning.lora import LoraAdapter
from petalite.client.tuning.prompts import PromptTuning


class Differentiable(Protocol):
    """What the functions and modules here need of a model; `petalite.connect` gives one."""

    @property
    def config(self) -> BloomConfig: ...
    @property
    def embeddings(self) -> Embeddings: ...
    @property
    def head(self) -> Head: ...
    @property
    def blocks(self) -> Any: ...


def hidden_states(
    model: Differentiable,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    soft_prompt: PromptTuning | None = None,
    adapter: LoraAdapter | str | None = None,
) -> Tensor:
    """ids (B, T) -> hidden states (B, T, C) after the last block, before the final norm. Differentiable.

    `mask` (B, T): 1 where a token is real, 0 where it is padding, on whichever side. Row i of a batch with a soft
    prompt is prompt, then tokens; the prompt's own positions are left out of the result. `adapter` is one of ours, or
    the name of one that the servers have loaded. `model.head` turns the result into logits.
    """
    x = model.embeddings.word_embeddings(ids)
    front = 0
    deep = None
    if soft_prompt is not None:
        front, deep = soft_prompt.tokens, soft_prompt.deep_prompts
        x = soft_prompt.prepend(x)
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], front), mask], dim=1)
    x = model.embeddings.word_embeddings_layernorm(x)
    output: Tensor = model.blocks(x, mask=mask, prompts=deep, **adapter_options(adapter))
    return output[:, front:]


def adapter_options(adapter: LoraAdapter | str | None) -> dict[str, Any]:
    """How blocks and sessions are told of an adapter."""
    if isinstance(adapter, LoraAdapter):
        return {"adapter": adapter.tensors, "scaling": adapter.scaling}
    return {"adapter": adapter}
