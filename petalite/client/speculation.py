"""Speculative decoding: which tokens to guess, and how many of them to send (Leviathan et al. 2023, Chen et al. 2023).

A pass carries the token that was chosen last and, behind it, guesses of what comes next. The model's choice after each
of them is what it would have chosen without, so all are right up to the first that is not what it chose, and that
choice comes for free. A pass takes longer the more it carries: what it costs and how often guesses are right is
measured, and a guess that does not pay is not sent. Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of the latest guesses of one kind that their rate is made from.
RECENT = 16
# Longest end of the text that is looked up; from LONGEST_MATCH tokens in common on, all guesses are of one kind.
LONGEST_KEY = 4
LONGEST_MATCH = 12
# A pass with guesses must promise so much more tokens a second than one without: estimates are noisy.
HURDLE = 1.05
# What one pass changes of what is known about passes like it; and what one without guesses takes of what is known
# about those with: what was too slow once is tried again.
FRESHNESS = 0.1
DOUBT = 0.01
# The most guesses of a pass while little is known about what they cost.
FIRST_GUESSES = 2
# One pass so much slower than expected is a hiccup, which says little about the next.
HICCUP = 3.0
# Guesses that are all right so seldom need not be weighed.
HOPELESS = 0.02
# A clock that stands still (tests) must not make a pass cost nothing.
LEAST_SECONDS = 1e-6
# Passes without a guess at first, and then one after so many with: what guesses save is known from those alone.
PLAIN_FIRST = 2
PLAIN_EVERY = 32


@dataclass(slots=True)
class Rate:
    """How often guesses of one kind were right lately. It begins as a belief that counts as `weight` guesses."""

    value: float
    weight: float = 2.0

    def learn(self, right: bool) -> None:
        self.weight = min(self.weight + 1, RECENT)
        self.value += (right - self.value) / self.weight


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens; `chances[i]` is that of token i to be right if those before it are. `source`: who guessed."""

    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    source: str = ""

    def cut(self, length: int) -> Draft:
        return Draft(self.tokens[:length], self.chances[:length], self.source)


class PromptLookup:
    """Guesses that the text goes on as it did where it last read the same (prompt lookup; Yang et al. 2023).

    With every token read it checks what it would have guessed, sent or not: how often that is right for each length of
    what the two places have in common costs nothing to know, and the prompt is the first to tell.
    """

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its last occurrence
        self._at: int | None = None  # the place whose token is the guess
        self._common = 0  # tokens before it that equal the last ones read
        self._rates = [Rate(n / (n + 4)) for n in range(1, LONGEST_MATCH + 1)]

    def read(self, token: int) -> None:
        """The text has one more token."""
        if self._at is not None:
            right = self._seen[self._at] == token
            self._rate(self._common).learn(right)
            self._at, self._common = (self._at + 1, self._common + 1) if right else (None, 0)
        self._seen.append(token)
        keys = [tuple(self._seen[-n:]) for n in range(1, min(LONGEST_KEY, len(self._seen)) + 1)]
        if self._at is None:
            self._at, self._common = next(
                ((self._behind[key], len(key)) for key in reversed(keys) if key in self._behind), (None, 0)
            )
        for key in keys:
            self._behind[key] = len(self._seen)

    def guess(self, most: int) -> Draft:
        """Up to `most` tokens; where the copied text ends, its beginning follows again."""
        if self._at is None:
            return Draft()
        tokens: list[int] = []
        for place in range(self._at, self._at + most):
            tokens.append(self._seen[place] if place < len(self._seen) else tokens[place - len(self._seen)])
        chances = tuple(self._rate(self._common + i).value for i in range(most))
        return Draft(tuple(tokens), chances, "lookup")

    def _rate(self, common: int) -> Rate:
        return self._rates[min(common, LONGEST_MATCH) - 1]


@dataclass(slots=True)
class _Line:
    """Seconds of passes that carry k guesses: a + b k, by least squares over the latest ones.

    It is no line from 0 on: the first guess costs more than another one, since a pass of one token is of a kind of its
    own (matrix times vector, captured graphs).
    """

    weight: float = 0.0
    k: float = 0.0
    kk: float = 0.0
    t: float = 0.0
    kt: float = 0.0

    def learn(self, k: int, seconds: float) -> None:
        self.weight += 1
        self.k += k
        self.kk += k * k
        self.t += seconds
        self.kt += k * seconds

    def fade(self, share: float) -> None:
        kept = 1 - share
        self.weight, self.k, self.kk = kept * self.weight, kept * self.k, kept * self.kk
        self.t, self.kt = kept * self.t, kept * self.kt

    def fit(self, plain: float) -> tuple[float, float]:
        """a and b. What is believed before the first: a tenth more than a plain pass, and a twentieth for each guess;
        it counts as half a pass of 1 guess and half one of 8.
        """
        weight, ks, kks, t, kt = self.weight, self.k, self.kk, self.t, self.kt
        for guesses in (1, 8):
            believed = plain * (1.1 + 0.05 * guesses)
            weight, ks, kks = weight + 0.5, ks + 0.5 * guesses, kks + 0.5 * guesses**2
            t, kt = t + 0.5 * believed, kt + 0.5 * guesses * believed
        slope = max(0.0, (weight * kt - ks * t) / (weight * kks - ks * ks))
        return (t - slope * ks) / weight, slope


@dataclass(slots=True)
class PassSeconds:
    """What a pass takes, learnt from those that were made."""

    plain: float = 0.0
    _lines: dict[str, _Line] = field(default_factory=dict)
    _plain_passes: int = 0
    _since_plain: int = 0

    @property
    def plain_due(self) -> bool:
        """The next pass should carry no guesses, so that there is something to compare with."""
        return self._plain_passes < PLAIN_FIRST or self._since_plain >= PLAIN_EVERY

    def learn(self, source: str, guesses: int, seconds: float) -> None:
        for line in self._lines.values():
            line.fade(FRESHNESS if guesses else DOUBT)
        seconds = max(seconds, LEAST_SECONDS)
        self._since_plain = self._since_plain + 1 if guesses else 0
        if guesses:
            line = self._lines.setdefault(source, _Line())
            first, each = line.fit(self.plain)
            line.learn(guesses, min(seconds, HICCUP * (first + each * guesses)))
            return
        self._plain_passes += 1
        if self._plain_passes <= PLAIN_FIRST:  # the first may have had connections to make
            self.plain = min(seconds, self.plain or seconds)
        else:
            self.plain += 2 * FRESHNESS * (min(seconds, HICCUP * self.plain) - self.plain)

    def best_length(self, draft: Draft) -> tuple[int, float]:
        """How many of the guesses to send for the most tokens a second, and how many times those of a plain pass
        that promises to be; (0, 1.0) where none pays."""
        best, gain, expected, carried = 0, 1.0, 1.0, 1.0
        line = self._lines.setdefault(draft.source, _Line())
        first, each = line.fit(self.plain)
        for length, chance in enumerate(draft.chances if line.weight > 0.5 else draft.chances[:FIRST_GUESSES], 1):
            carried *= chance
            expected += carried
            # no pass is believed to be quicker than a plain one
            speed = expected * self.plain / max(self.plain, first + each * length)
            if speed > max(gain, HURDLE):
                best, gain = length, speed
            if carried < HOPELESS:
                break
        return best, gain
