"""From logits to the next token: greedy or sampled, as transformers does it, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    Raises ValueError for a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")


class Sampler:
    """Chooses tokens for the rows of one generation; the seed decides every draw."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def likeliest(self) -> bool:
        """Whether the choice is that of the highest logit, and nothing else."""
        return self._sampling.temperature == 0 and self._sampling.repetition_penalty == 1.0

    def ahead(self) -> Sampler:
        """A sampler that draws what this one is about to draw, and leaves it where it is.

        torch draws by an exponential race: the least of e_i / p_i wins, where the e_i come from the generator. Two
        that draw with the same e_i from distributions that are alike mostly draw the same token (Daliri et al. 2024).
        """
        other = Sampler(self._sampling)
        other._random.set_state(self._random.get_state())
        return other

    def choose(self, logits: Tensor, seen: list[list[int]]) -> list[int]:
        """logits (B, vocabulary), and the tokens each row has seen, prompt included -> one token a row."""
        scores = logits.float()
        if self._sampling.repetition_penalty != 1.0:
            scores = penalize(scores, seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            return [int(token) for token in scores.argmax(dim=-1)]
        scores = scores.cpu() / self._sampling.temperature
        if self._sampling.top_k:
            kept = scores.topk(min(self._sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kept, float("-inf"))
        if self._sampling.top_p < 1:
            scores = _nucleus(scores, self._sampling.top_p)
        drawn = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random)
        return [int(token) for token in drawn[:, 0]]


def penalize(scores: Tensor, seen: list[list[int]], penalty: float) -> Tensor:
    """Seen tokens: positive logits divided, negative ones multiplied (Keskar et al. 2019, section 4.1)."""
    scores = scores.clone()
    for row, tokens in zip(scores, seen, strict=True):
        ids = torch.tensor(sorted(set(tokens)), device=scores.device)
        old = row[ids]
        row[ids] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities sum to `top_p` or more (Holtzman et al. 2020)."""
    ordered, order = scores.sort(dim=-1)
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    outside[:, -1] = False
    return scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
