"""Sampling against transformers' own logits processors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from petalite.client.sampling import Sampler, Sampling, _nucleus, penalize

VOCABULARY = 50


def logits_of(seed: int, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


@given(st.integers(0, 10_000), st.floats(0.05, 0.999))
def test_top_p_keeps_what_transformers_keeps(seed: int, top_p: float) -> None:
    scores = logits_of(seed)
    expected = TopPLogitsWarper(top_p)(torch.zeros(3, 1, dtype=torch.long), scores)
    assert torch.equal(_nucleus(scores, top_p), expected)


@given(st.integers(0, 10_000), st.floats(0.5, 2.0))
def test_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    scores = logits_of(seed)
    seen = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, scores)
    assert torch.equal(penalize(scores, seen.tolist(), penalty), expected)


@pytest.mark.parametrize("seed", range(20))
def test_a_draw_follows_the_distribution_that_transformers_makes(seed: int) -> None:
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=1.3, seed=seed)
    scores = logits_of(seed)
    seen = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed + 1))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, scores)
    expected = TemperatureLogitsWarper(0.7)(seen, expected)
    expected = TopPLogitsWarper(0.8)(seen, TopKLogitsWarper(9)(seen, expected))
    drawn = torch.multinomial(expected.softmax(dim=-1), 1, generator=torch.Generator().manual_seed(seed))
    assert Sampler(sampling).choose(scores, seen.tolist()) == drawn[:, 0].tolist()


def test_greedy_takes_the_highest_after_the_penalty() -> None:
    scores = torch.tensor([[3.0, 2.9, -1.0]])
    assert Sampler(Sampling()).choose(scores, [[0]]) == [0]
    assert Sampler(Sampling(repetition_penalty=1.2)).choose(scores, [[0]]) == [1]


def test_the_same_seed_draws_the_same_tokens_and_another_one_others() -> None:
    def draws(seed: int | None) -> list[list[int]]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(logits_of(i), [[], [], []]) for i in range(20)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_top_k_above_the_vocabulary_is_off() -> None:
    sampling = Sampling(temperature=1.0, top_k=10 * VOCABULARY, seed=3)
    assert Sampler(sampling).choose(logits_of(3), [[], [], []]) == Sampler(Sampling(temperature=1.0, seed=3)).choose(
        logits_of(3), [[], [], []]
    )


def test_logits_are_not_changed() -> None:
    scores = logits_of(5)
    before = scores.clone()
    Sampler(Sampling(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0, seed=1)).choose(
        scores, [[1, 2], [3], [4]]
    )
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
)
def test_numbers_out_of_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
