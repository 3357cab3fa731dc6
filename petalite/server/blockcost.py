"""How long a block takes for so many tokens: learned from what long pieces took. Pure."""

from __future__ import annotations

# How much an earlier measurement counts beside the one after it.
_MEMORY = 0.6
# Sizes that differ by less than this share of their mean say nothing about what a token costs by itself.
_TELLING_SPREAD = 0.1
# Before the first measurement.
_FIRST_GUESS = 1e-4
# A clock that stands still (tests) must not make a token cost nothing.
_LEAST_SECONDS = 1e-9
# A piece is at most so many times the largest one measured lately: the line is only known where it was measured.
_STRIDE = 4


class BlockCost:
    """A line through the measurements, seconds = fixed + each * tokens, by least squares that forget.

    On a CPU `fixed` is next to nothing. On a GPU that waits for its launches it is nearly all, and cutting a piece
    smaller makes it no quicker.
    """

    def __init__(self) -> None:
        self.fixed = 0.0
        self.each = _FIRST_GUESS
        self._largest = 0.0
        self._count = self._tokens = self._seconds = self._squares = self._products = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        """A block took `seconds` for `tokens` tokens."""
        seconds = max(_LEAST_SECONDS, seconds)
        self._largest = max(float(tokens), self._largest * _MEMORY)
        self._count = self._count * _MEMORY + 1
        self._tokens = self._tokens * _MEMORY + tokens
        self._seconds = self._seconds * _MEMORY + seconds
        self._squares = self._squares * _MEMORY + tokens * tokens
        self._products = self._products * _MEMORY + tokens * seconds
        mean_tokens, mean_seconds = self._tokens / self._count, self._seconds / self._count
        spread = self._squares / self._count - mean_tokens**2
        if spread > (_TELLING_SPREAD * mean_tokens) ** 2:
            slope = (self._products / self._count - mean_tokens * mean_seconds) / spread
            self.fixed = min(max(0.0, mean_seconds - slope * mean_tokens), mean_seconds)
        elif self.fixed > mean_seconds:
            self.fixed = mean_seconds
        self.each = max((mean_seconds - self.fixed) / mean_tokens, _LEAST_SECONDS)

    def tokens_within(self, seconds: float) -> int:
        """How many tokens to give a block that should take `seconds`. Where hardly any number would do, as many as
        double what it takes anyway.
        """
        wanted = max(seconds - self.fixed, self.fixed) / self.each
        return int(min(wanted, _STRIDE * self._largest) if self._largest else wanted)
