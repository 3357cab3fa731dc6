"""The client's half on CUDA: a greedy choice as one graph, so that neither logits nor tokens wait for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.graphs import BATCHES, Graph, Replay, capture, kernels_for
from petalite.bloom.span import Underway


def accelerate_ends(embeddings: Embeddings, head: Head) -> tuple[FastEnds | None, str]:
    """Embeddings and head as graphs, or None and why not. Blocking."""
    weight = head.ln_f.weight
    kernels, reason = kernels_for(weight.device, weight.dtype)
    if reason:
        return None, reason
    try:
        return FastEnds(embeddings, head, kernels), ""
    except RuntimeError as error:
        return None, f"graphs cannot be captured: {str(error).splitlines()[0]}"


class Ends(Protocol):
    """Embeddings and head on a device that works while others do."""

    def begin(self, hidden: Tensor) -> Underway[tuple[list[int], Tensor]] | None:
        """hidden (B, C) of one position each, on the host -> the B likeliest tokens, their embeddings (B, 1, C) on the
        host; None for too many rows. One call at a time: its result is taken before the next one begins.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (N, C) -> (N, vocabulary) in float32, on the device."""


class FastEnds:
    """`Ends` on CUDA, a greedy choice as one graph. Logits are float32: in half precision many would be equal."""

    def __init__(self, embeddings: Embeddings, head: Head, kernels: Any) -> None:
        self._weight = weight = head.lm_head.weight
        self._device = weight.device
        self._norm = head.ln_f
        self._kernels = kernels

        def choose(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            tokens = self._logits(given[0]).argmax(dim=-1)
            embedded = F.embedding(tokens, embeddings.word_embeddings.weight)
            return tokens, kernels.layer_norm(embedded, embeddings.word_embeddings_layernorm)

        with torch.inference_mode(), torch.cuda.device(self._device):
            self._graphs = {
                batch: capture(
                    self._device,
                    (torch.zeros((batch, weight.shape[1]), dtype=weight.dtype, pin_memory=True),),
                    choose,
                )
                for batch in BATCHES
            }

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Ends.logits`: the very numbers that `begin` chooses by."""
        with torch.inference_mode(), torch.cuda.device(self._device):
            rows = hidden.to(device=self._device, dtype=self._weight.dtype)
            return torch.cat([self._logits(part) for part in torch.split(rows, BATCHES[-1])])

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = self._kernels.layer_norm(hidden, self._norm)
        logits: Tensor = self._kernels.linear(normed, self._weight, dtype=torch.float32)
        return logits

    def begin(self, hidden: Tensor) -> Underway[tuple[list[int], Tensor]] | None:
        """As `Ends.begin`."""
        batch = hidden.shape[0]
        graph = next((self._graphs[size] for size in BATCHES if size >= batch), None)
        if graph is None:
            return None
        with torch.inference_mode():
            graph.fill((hidden,))
            graph.replay()

        def take(graph: Graph) -> tuple[list[int], Tensor]:
            tokens, embedded = graph.taken
            if len(tokens) > batch:
                tokens, embedded = tokens[:batch], embedded[:batch]
            return tokens.tolist(), embedded.unsqueeze(1).clone()

        return Replay(graph, take)
