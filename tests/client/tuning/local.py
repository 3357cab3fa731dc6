"""The oracle: transformers' own BLOOM on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BloomForCausalLM

from petalite.models import FAIRYTALE, find_model


@cache
def transformers_model() -> Any:
    """The embedded model in float32. Shared, so its weights stay as they are."""
    model = BloomForCausalLM.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32)
    return model.requires_grad_(False).eval()


@contextmanager
def deep_prompts(prompts: Tensor) -> Iterator[None]:
    """Add prompts (blocks, P, C) to the inputs of its blocks."""
    blocks = transformers_model().transformer.h
    hooks = [block.register_forward_pre_hook(_adding(prompt)) for block, prompt in zip(blocks, prompts, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(prompt: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        P = len(prompt)
        return (torch.cat([args[0][:, :P] + prompt, args[0][:, P:]], dim=1), *args[1:])

    return hook


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """In norm."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm())
