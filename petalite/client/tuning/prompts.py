"""Prompt tuning: trained inputs in front of the words (Lester et al. 2021), and at every block (Li and Liang 2021)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from petalite.bloom.adapters import CONFIG_FILE, TENSORS_FILE, expect_shapes, read_tensors, write_adapter
from petalite.bloom.config import BloomConfig, read_json
from petalite.errors import CheckpointError

SHALLOW, DEEP = "PROMPT_TUNING", "DEEP_PROMPT_TUNING"


class PromptTuning(nn.Module):
    """A soft prompt of `tokens` positions, which stand before each row's first token.

    `prompt_embeddings` (P, C) take the place of word embeddings: BLOOM's norm of the embeddings comes after, as it does
    with PEFT's prompt tuning. With `deep`, `deep_prompts` (blocks, P, C) are added to each block's input at the same P
    positions; they begin at zero. `init` (P, C) is what the embeddings begin with, for example those of some words
    (`model.embeddings.word_embeddings(ids)`); without it they are random, of about the size of a word's.
    """

    def __init__(self, config: BloomConfig, tokens: int, *, deep: bool = False, init: Tensor | None = None) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"a prompt of {tokens} tokens")
        C = config.hidden_size
        if init is None:
            init = torch.randn(tokens, C) * 0.02
        if init.shape != (tokens, C):
            raise ValueError(f"a beginning of shape {list(init.shape)} for a prompt of shape [{tokens}, {C}]")
        self.config = config
        self.tokens = tokens
        self.prompt_embeddings = nn.Parameter(init.detach().clone().to(torch.float32))
        self.deep_prompts = nn.Parameter(torch.zeros(config.n_layer, tokens, C)) if deep else None

    def prepend(self, embeddings: Tensor) -> Tensor:
        """Word embeddings (B, T, C) -> (B, P + T, C)."""
        return torch.cat([self.prompt_embeddings.to(embeddings).expand(embeddings.shape[0], -1, -1), embeddings], dim=1)

    def save(self, directory: Path | str, base_model: str | None = None) -> None:
        """Write a shallow prompt in PEFT's format, which PEFT loads; a deep one in the same files. Raises OSError."""
        config = {
            "peft_type": SHALLOW if self.deep_prompts is None else DEEP,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_virtual_tokens": self.tokens,
            "token_dim": self.config.hidden_size,
            "num_layers": self.config.n_layer,
            "num_attention_heads": self.config.n_head,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        write_adapter(directory, dict(self.named_parameters()), config)

    @classmethod
    def load(cls, directory: Path | str, config: BloomConfig) -> PromptTuning:
        """Read what `save`, or PEFT's prompt tuning, wrote. Raises CheckpointError that names the file."""
        path = Path(directory) / CONFIG_FILE
        kind = read_json(path).get("peft_type")
        if kind not in (SHALLOW, DEEP):
            raise CheckpointError(f"{path}: peft_type is {kind!r}, expected {SHALLOW!r} or {DEEP!r}")
        due: dict[str, tuple[int | None, ...]] = {"prompt_embeddings": (None, config.hidden_size)}
        if kind == DEEP:
            due["deep_prompts"] = (config.n_layer, None, config.hidden_size)
        file = Path(directory) / TENSORS_FILE
        tensors = read_tensors(file, expect_shapes(due))
        init = tensors["prompt_embeddings"]
        prompt = cls(config, init.shape[0], deep=kind == DEEP, init=init)
        if prompt.deep_prompts is not None:
            deep = tensors["deep_prompts"]
            if deep.shape != prompt.deep_prompts.shape:
                raise CheckpointError(f"{file}: deep prompts of {deep.shape[1]} tokens, the others of {init.shape[0]}")
            with torch.no_grad():
                prompt.deep_prompts.copy_(deep)
        return prompt
