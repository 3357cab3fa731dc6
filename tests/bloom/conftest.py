"""Small random BLOOMs on disk, and transformers' own reading of the same files: the oracle of these tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_embeddings, load_head, load_span
from petalite.bloom.span import Span
from petalite.bloom.synthetic import write_checkpoint

SHAPE = {"hidden_size": 60, "n_head": 6, "n_layer": 3, "vocab_size": 97}


@dataclass
class Pair:
    """One checkpoint read twice: by us and by transformers, both float32."""

    directory: Path
    span: Span
    embeddings: Embeddings
    head: Head
    oracle: Any  # BloomForCausalLM

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.span(self.embeddings(ids)) if hidden is None else hidden)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """pair(n_head=..., ...) -> the same Pair for the same arguments."""
    from transformers import BloomForCausalLM

    made: dict[Any, Pair] = {}

    def make(**changes: Any) -> Pair:
        key = tuple(sorted(changes.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp("bloom")
            write_checkpoint(directory, BloomConfig(**(SHAPE | changes)), seed=len(made))
            oracle = BloomForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            embeddings = load_embeddings(directory)
            head = load_head(directory, embeddings=embeddings)
            span = load_span(directory, 0, BloomConfig.load(directory).n_layer)
            made[key] = Pair(directory, span, embeddings, head, oracle.requires_grad_(False))
        return made[key]

    return make


@pytest.fixture(autouse=True)
def _no_grad_one_thread() -> Any:
    """Tiny matrices: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
