"""A sequence classification head: one linear layer on the last token's hidden state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from petalite.bloom.adapters import expect_shapes, read_tensors, save_tensors
from petalite.bloom.config import BloomConfig, read_json
from petalite.client.tuning.forward import Differentiable, hidden_states
from petalite.client.tuning.lora import LoraAdapter
from petalite.client.tuning.prompts import PromptTuning
from petalite.errors import CheckpointError

TENSORS_FILE = "classifier.safetensors"
CONFIG_FILE = "classifier.json"
MAX_CLASSES = 2**16


class SequenceClassifier(nn.Module):
    """Scores of a text for each of `classes` (their names), as BloomForSequenceClassification computes them.

    `score` (classes, C) is all that it holds; what else is trained, a soft prompt or an adapter, is given to `forward`
    and saved by itself.
    """

    def __init__(self, config: BloomConfig, classes: Sequence[str]) -> None:
        super().__init__()
        if not classes or len(classes) != len(set(classes)):
            raise ValueError("classes need names of their own, at least one")
        self.config = config
        self.classes = tuple(classes)
        self.score = nn.Linear(config.hidden_size, len(classes), bias=False)

    def forward(
        self,
        model: Differentiable,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        soft_prompt: PromptTuning | None = None,
        adapter: LoraAdapter | str | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, classes), from each row's last real token; `mask` as for `hidden_states`."""
        hidden = hidden_states(model, ids, mask=mask, soft_prompt=soft_prompt, adapter=adapter)
        return self.score(model.head.ln_f(last_real(hidden, mask)))  # type: ignore[no-any-return]

    def save(self, directory: Path | str) -> None:
        """Write the head (safetensors) and the names of its classes (json). Raises OSError."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_tensors(directory / TENSORS_FILE, {"score.weight": self.score.weight})
        (directory / CONFIG_FILE).write_text(json.dumps({"classes": self.classes}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str, config: BloomConfig) -> SequenceClassifier:
        """Read what `save` wrote. Raises CheckpointError that names the file."""
        path = Path(directory) / CONFIG_FILE
        classes = read_json(path).get("classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise CheckpointError(f"{path}: classes must be a list of names")
        if not 1 <= len(classes) <= MAX_CLASSES or len(set(classes)) != len(classes):
            raise CheckpointError(f"{path}: {len(classes)} classes, expected 1 to {MAX_CLASSES} different ones")
        due = {"score.weight": (len(classes), config.hidden_size)}
        tensors = read_tensors(Path(directory) / TENSORS_FILE, expect_shapes(due))
        classifier = cls(config, classes)
        classifier.score.weight = nn.Parameter(tensors["score.weight"])
        return classifier


def last_real(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """hidden (B, T, C) -> (B, C): at each row's last position whose mask is not 0."""
    if mask is None:
        return hidden[:, -1]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = (places * (mask != 0).to(places.dtype)).argmax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
