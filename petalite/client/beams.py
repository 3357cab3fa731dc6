"""Beam search as transformers does it, for one prompt: pure, what the model says is an argument.

The rules are those of transformers' `generate`: each step keeps the best `beams` continuations that have not ended, and
of those that end the best `beams` by log probability / length ** length_penalty.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """How to search. `count` 1 is no search; `returned` of the best are given back.

    `early_stopping`: True ends a search as soon as `count` texts have ended, False where better ones are unlikely,
    "never" only where the score rules them out. Raises ValueError for what makes no sense.
    """

    count: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    returned: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"num_beams must be 1 or more, not {self.count}")
        if not 1 <= self.returned <= self.count:
            raise ValueError(f"num_return_sequences must be in 1..{self.count} (num_beams), not {self.returned}")
        if not abs(self.length_penalty) < float("inf"):
            raise ValueError(f"length_penalty must be a number, not {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """New tokens, and the score that ranks them (of a running one: the sum of log probabilities)."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """The search behind one prompt. `done`: nothing would come of going on."""

    def __init__(self, beams: Beams, eos: Collection[int], max_new_tokens: int) -> None:
        self.done = False
        self.running = [Hypothesis((), 0.0)] + [Hypothesis((), -1e9)] * (
            beams.count - 1
        )  # all the same: only one counts
        self._beams = beams
        self._eos = frozenset(eos)
        self._most = max_new_tokens
        self._ended: list[Hypothesis] = []

    def advance(self, log_probs: Tensor) -> tuple[list[int], list[int]]:
        """log_probs (count, vocabulary) of what may follow each beam -> which beam each one goes on from now, and with
        which token. Once it is done, all go on as they are, with any token.
        """
        count, vocabulary = log_probs.shape
        if self.done:
            return list(range(count)), [0] * count
        total = log_probs + log_probs.new_tensor([beam.score for beam in self.running])[:, None]
        values, places = total.view(-1).topk(min(count * max(2, 1 + len(self._eos)), total.numel()))
        found = [
            (place // vocabulary, Hypothesis((*self.running[place // vocabulary].tokens, place % vocabulary), score))
            for score, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
        self._end([each for _, each in found[:count] if self._ends(each)])
        alive = [(source, each) for source, each in found if not self._ends(each)][:count]
        if len(alive) < count:  # at the length's limit
            self.done = True
            return list(range(count)), [0] * count
        self.running = [each for _, each in alive]
        self.done = not self._may_improve() or (self._beams.early_stopping is True and self._full)
        return [source for source, _ in alive], [each.tokens[-1] for each in self.running]

    def best(self) -> list[Hypothesis]:
        """What was found, the best first, as many as are to be returned."""
        return self._ended[: self._beams.returned]

    @property
    def _full(self) -> bool:
        return len(self._ended) == self._beams.count

    def _ends(self, each: Hypothesis) -> bool:
        return each.tokens[-1] in self._eos or len(each.tokens) >= self._most

    def _end(self, ended: list[Hypothesis]) -> None:
        rated = [Hypothesis(each.tokens, self._rate(each, len(each.tokens))) for each in ended]
        self._ended = sorted([*self._ended, *rated], key=lambda each: -each.score)[: self._beams.count]

    def _rate(self, each: Hypothesis, length: int) -> float:
        return float(each.score / length**self._beams.length_penalty)

    def _may_improve(self) -> bool:
        """Whether the best beam could still get among the ended ones, judged as transformers does."""
        if not self._full:
            return True
        best = self.running[0]
        far = self._beams.early_stopping == "never" and self._beams.length_penalty > 0
        return self._rate(best, self._most if far else len(best.tokens)) > self._ended[-1].score
