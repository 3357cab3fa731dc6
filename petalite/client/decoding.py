"""From what the servers gave to the next tokens, and to what the servers get next: all that runs in the worker thread.

With one row several tokens may come of one pass (see `speculation`). Each is drawn by the plain sampler from the
model's own distribution in its place, one draw a token: a guess is never drawn from, only compared with. So the text is
that of plain decoding for every seed, whoever guesses and however well (Daliri et al. 2024); for a guess of certainty,
as a lookup makes it, this is the acceptance rule of Leviathan et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petalite import limits
from petalite.client.draft import DraftRow
from petalite.client.model import Model
from petalite.client.sampling import Sampler, Sampling
from petalite.client.speculation import Draft, PassSeconds, PromptLookup

NOTHING = Draft()


@dataclass(frozen=True, slots=True)
class Turn:
    """`chosen`: new tokens, one a row in each. `hidden` (B, T, C): the last of them and, behind it, a draft."""

    chosen: list[list[int]]
    hidden: Tensor
    draft: Draft


class Decoder:
    """The choices of one generation, pass by pass. `seen`: what each row has read; it is copied."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        seen: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        speculate: bool,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._sampler = Sampler(sampling)
        self._seen = [list(row) for row in seen]
        self._left = max_new_tokens
        self._guesser: Guesser | None = None
        if speculate and len(seen) == 1:
            text = self._seen[0]
            row = None if model.draft is None else DraftRow(model.draft, len(text) + max_new_tokens)
            self._guesser = Guesser(text, row)
        self._clock = clock
        self._guessing = 0.0  # seconds that the guesses of the pass under way took to make

    def begin(self, logits: Tensor) -> Turn:
        """logits (B, vocabulary) behind the prompt."""
        return self._next([self._choose(logits)])

    @property
    def likeliest(self) -> bool:
        """Whether every choice is `Model.choose`'s, and what follows it is brief."""
        return self._sampler.likeliest and not (self._guesser is not None and self._guesser.thinks)

    def go_on(
        self, turn: Turn, output: Tensor, asked: float | None, likeliest: tuple[list[int], Tensor] | None = None
    ) -> Turn:
        """output (B, T, C) of the pass that `turn` asked for. `asked`: when; None where the time says nothing.

        `likeliest`: what `Model.choose` made of the output, if it did.
        """
        guesses = turn.draft.tokens
        chosen: list[list[int]] = []
        with torch.inference_mode():
            for column, guess in zip(self._columns(output, likeliest), (*guesses, None), strict=True):
                chosen.append(column)
                if column != [guess]:
                    break
        if self._guesser is not None:
            seconds = None if asked is None else self._clock() - asked + (self._guessing if guesses else 0.0)
            self._guesser.learn(turn.draft, [column[0] for column in chosen], seconds)
        rows = len(self._seen)
        embedded = None if likeliest is None else likeliest[1][(len(chosen) - 1) * rows : len(chosen) * rows]
        return self._next(chosen, embedded)

    def _columns(self, output: Tensor, likeliest: tuple[list[int], Tensor] | None) -> Iterator[list[int]]:
        """What is chosen in each place, one token a row; each is chosen only when it is asked for."""
        rows = len(self._seen)
        if likeliest is None:
            logits = self._model.logits_here(output.flatten(0, 1))  # of more than one row there is one token each
            for place in torch.split(logits, rows):
                yield self._choose(place)
            return
        tokens = likeliest[0]
        for first in range(0, len(tokens), rows):
            yield self._take(tokens[first : first + rows])

    def _choose(self, logits: Tensor) -> list[int]:
        return self._take(self._sampler.choose(logits, self._seen))

    def _take(self, tokens: list[int]) -> list[int]:
        for row, token in zip(self._seen, tokens, strict=True):
            row.append(token)
        return tokens

    def _next(self, chosen: list[list[int]], embedded: Tensor | None = None) -> Turn:
        """`embedded` (B, 1, C): the last of `chosen`, if that was made already."""
        began = self._clock()
        self._left -= len(chosen)
        draft = NOTHING
        if self._guesser is not None:
            self._guesser.read([column[0] for column in chosen])
            # A pass gives one token more than it has guesses, and stays short: pushed, and preferred by servers.
            draft = self._guesser.guess(self._sampler, min(limits.SHORT_STEP_TOKENS, self._left) - 1)
        hidden = embedded
        if hidden is None or draft.tokens:
            hidden = self._model.embed_here([[token, *draft.tokens] for token in chosen[-1]])
        self._guessing = self._clock() - began
        return Turn(chosen, hidden, draft)


class Guesser:
    """What goes into the next pass of one row: by looking up what was read, or by a small model if there is one.

    `text` is what the row has read; it grows behind us, and `read` says so.
    """

    def __init__(self, text: Sequence[int], row: DraftRow | None = None) -> None:
        self._text = text
        self._lookup = PromptLookup()
        self._passes = PassSeconds()
        self._row = row
        self.read(text)

    @property
    def thinks(self) -> bool:
        """Whether guesses may take long to make."""
        return self._row is not None

    def read(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._lookup.read(token)

    def guess(self, sampler: Sampler, most: int) -> Draft:
        """At most `most` guesses of what follows the text, as many as pay."""
        if most < 1 or self._passes.plain_due:
            return NOTHING
        draft = self._lookup.guess(most)
        length, gain = self._passes.best_length(draft)
        return self._drafted(sampler, most, gain) or draft.cut(length)

    def _drafted(self, sampler: Sampler, most: int, gain: float) -> Draft | None:
        """The small model's guesses, if there is one and they promise more than `gain`."""
        if self._row is None:
            return None
        length, promised = self._passes.best_length(self._row.usual(most))
        if promised <= gain:
            self._row.rest()
            return None
        draft = self._row.guess(self._text, sampler.ahead(), length, self._pays)
        length, promised = self._passes.best_length(draft)
        return draft.cut(length) if promised > gain else None

    def _pays(self, draft: Draft) -> bool:
        return self._passes.best_length(draft)[0] == len(draft.tokens)

    def learn(self, draft: Draft, chosen: Sequence[int], seconds: float | None) -> None:
        """The pass that carried `draft` took so long and gave the tokens `chosen`, which are not read yet."""
        if self._row is not None:
            self._row.learn(chosen)
        if seconds is not None:
            self._passes.learn(draft.source, len(draft.tokens), seconds)
