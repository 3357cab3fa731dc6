"""Guesses and their price: what is looked up, how far it is trusted, and that it never costs much."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.client.decoding import Guesser
from petalite.client.sampling import Sampler, Sampling
from petalite.client.speculation import Draft, PassSeconds, PromptLookup

SAMPLER = Sampler(Sampling())
SECONDS = st.floats(0.0005, 0.5)


def lookup_of(text: list[int]) -> PromptLookup:
    lookup = PromptLookup()
    for token in text:
        lookup.read(token)
    return lookup


def test_the_text_goes_on_as_it_did_after_the_longest_and_latest_match() -> None:
    assert lookup_of([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).guess(3).tokens == (9, 2, 3)
    assert lookup_of([2, 3, 9, 5, 2, 3, 8, 6, 2, 3]).guess(2).tokens == (8, 6)
    assert lookup_of([1, 2, 3]).guess(5) == Draft()


def test_where_the_copied_text_ends_its_beginning_follows_again() -> None:
    assert lookup_of([7, 1, 2, 3, 1, 2, 3]).guess(8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)
    assert lookup_of([5, 5]).guess(3).tokens == (5, 5, 5)


def test_a_match_goes_on_while_it_is_right_and_is_sought_anew_when_it_is_not() -> None:
    lookup = lookup_of([1, 2, 3, 4, 5, 6, 4, 9, 1, 2])
    lookup.read(3)
    assert lookup.guess(2).tokens == (4, 5)
    lookup.read(4)
    lookup.read(9)
    assert lookup.guess(2).tokens == (1, 2)


def test_trust_comes_from_what_would_have_been_right() -> None:
    chance = random.Random(1)
    chaos = lookup_of([chance.randrange(20) for _ in range(400)])
    order = lookup_of([*range(20)] * 20)
    assert chaos.guess(1).chances[0] < 0.2
    assert order.guess(4).chances[0] > 0.9
    guesses = lookup_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]).guess(5).chances
    assert list(guesses) == sorted(guesses), "what has matched for longer is likelier to go on so"


def trained(plain: float, first: float, each: float) -> PassSeconds:
    """What is known after passes that took `plain`, and `first` + `each` a guess more."""
    passes = PassSeconds()
    for k in (0, 0, 0, 1, 4, 2, 8, 1, 16, 3, 6):
        passes.learn("lookup" if k else "", k, plain + (first + each * k if k else 0.0))
    return passes


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9, 0.99])
def test_the_length_chosen_is_the_best_there_is(chance: float) -> None:
    plain, first, each = 1.0, 0.3, 0.05
    passes = trained(plain, first, each)

    def speed(k: int) -> float:
        expected = sum(chance**i for i in range(k + 1))
        return expected / (plain + (first + each * k if k else 0.0))

    length, gain = passes.best_length(Draft((0,) * 31, (chance,) * 31, "lookup"))
    best = max(range(32), key=speed)
    assert speed(length) >= 0.95 * speed(best)
    assert gain == pytest.approx(speed(length), rel=0.05)


def test_where_a_longer_pass_costs_more_than_it_saves_nothing_is_sent_and_where_it_is_free_all_is() -> None:
    draft = Draft((0,) * 31, (0.9,) * 31, "lookup")
    assert trained(1.0, 0.9, 1.0).best_length(draft) == (0, 1.0)
    assert trained(1.0, 0.0, 0.0).best_length(draft)[0] == 31
    assert trained(1.0, 0.0, 0.0).best_length(Draft((0,), (0.01,), "lookup")) == (0, 1.0)


def test_what_guesses_save_is_compared_with_a_plain_pass_now_and_then() -> None:
    passes = PassSeconds()
    lengths = []
    for _ in range(100):
        lengths.append(0 if passes.plain_due else 5)
        passes.learn("lookup" if lengths[-1] else "", lengths[-1], 0.1)
    assert lengths[:3] == [0, 0, 5]
    assert lengths.count(0) == 4


def told(text: list[int], prompt: int, seconds: list[float], noise: random.Random) -> float:
    """How long the tokens behind the first `prompt` take with a guesser, in a world where a pass with k guesses takes
    `seconds`[0], and [1] + [2] k more if k is not 0; half of it more or less at random."""
    guesser = Guesser(text[:prompt])
    at, total = prompt, 0.0
    while at < len(text):
        draft = guesser.guess(SAMPLER, min(31, len(text) - at - 1))
        right = 0
        while right < len(draft.tokens) and draft.tokens[right] == text[at + right]:
            right += 1
        k = len(draft.tokens)
        took = (seconds[0] + (seconds[1] + seconds[2] * k if k else 0.0)) * noise.uniform(0.75, 1.25)
        total += took
        guesser.learn(draft, text[at : at + right + 1], took)
        guesser.read(text[at : at + right + 1])
        at += right + 1
    return total


@settings(max_examples=20)
@given(
    plain=SECONDS, first=st.floats(0, 2), each=st.floats(0, 1), words=st.integers(50, 2000), seed=st.integers(0, 2**32)
)
def test_on_a_text_without_repeats_it_is_never_slower_than_a_twentieth(
    plain: float, first: float, each: float, words: int, seed: int
) -> None:
    chance = random.Random(seed)
    text = [chance.randrange(words) for _ in range(264)]
    took = sum(told(text, 64, [plain, first * plain, each * plain], chance) for _ in range(4)) / 4
    assert took <= 200 * plain / 0.95


@given(plain=SECONDS, first=st.floats(0, 0.8), each=st.floats(0, 0.05), seed=st.integers(0, 2**32))
def test_on_a_text_that_repeats_itself_it_is_faster_where_longer_passes_are_cheap(
    plain: float, first: float, each: float, seed: int
) -> None:
    chance = random.Random(seed)
    text = [chance.randrange(500) for _ in range(30)] * 8
    took = told(text, 60, [plain, first * plain, each * plain], chance)
    assert took <= 180 * plain / 1.5


def test_what_was_too_slow_is_tried_again_after_a_while() -> None:
    passes = trained(0.1, 0.05, 0.1)
    draft = Draft((0,) * 8, (0.7,) * 8, "lookup")
    assert passes.best_length(draft)[0] <= 1
    for _ in range(400):
        passes.learn("", 0, 0.1)
    assert passes.best_length(draft)[0] > 1
