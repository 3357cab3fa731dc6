"""Pieces joined are the text of all tokens, cut at a stop sequence, and nothing is shown that is taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from petalite.client.parts import load_tokenizer
from petalite.client.text import TextStream
from petalite.models import FAIRYTALE, find_model

TOKENIZER: Tokenizer = load_tokenizer(find_model(FAIRYTALE))
WORDS = 'Once upon a time there was a little bear. He said: "Ho, ho!" and ran into the woods.'


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    made = TextStream(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text).ids:
        pieces.append(made.push(token))
        if made.stopped:
            break
    return [*pieces, made.flush()], made


@pytest.mark.parametrize("text", [WORDS, "naïve café", "日本語のお話", "a🐻b🐻‍❄️c", "tabs\tand\nlines\n\n", "end "])
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces, _ = stream(text)
    assert "".join(pieces) == TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_any_text_comes_whole_and_never_with_half_a_character(text: str) -> None:
    pieces, _ = stream(text)
    assert "".join(pieces) == TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=True)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.integers(0, len(WORDS) - 1), st.integers(1, 12), st.integers(0, len(WORDS) - 1), st.integers(1, 12))
def test_the_text_ends_before_the_stop_sequence_that_is_complete_first(
    at: int, length: int, other_at: int, other_length: int
) -> None:
    stops = (WORDS[at : at + length], WORDS[other_at : other_at + other_length])
    pieces, made = stream(WORDS, stops)
    whole = TOKENIZER.decode(TOKENIZER.encode(WORDS).ids, skip_special_tokens=True)
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    if found:
        assert made.stopped
        assert "".join(pieces) == whole[: min(found)[1]]


def test_a_stop_sequence_may_lie_across_many_tokens() -> None:
    pieces, made = stream(WORDS, ("a little bear. He s",))
    assert made.stopped
    assert "".join(pieces) == WORDS[: WORDS.index("a little")]


def test_the_beginning_of_a_stop_sequence_is_held_back_and_given_if_it_was_none() -> None:
    pieces, made = stream("Ho, ho, hum", ("ho, ho, ho",))
    assert not made.stopped
    assert "".join(pieces) == "Ho, ho, hum"


def test_no_empty_stop_sequence() -> None:
    assert "".join(stream(WORDS, ("",))[0]) == WORDS
