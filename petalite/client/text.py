"""Tokens to text as it comes: whole characters only, and an end at stop sequences."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns one row's tokens into pieces of text. Pieces joined are the text of all tokens, cut at a stop sequence.

    Of several stop sequences the one that is complete first ends the text, at its beginning.

    A piece is held back while it may still be half a character or the beginning of a stop sequence.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(sequence for sequence in stop if sequence)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token, maybe empty."""
        self._held += self._stream.step(self._tokenizer, token) or ""
        # The one that is complete first counts, however the tokens cut the text.
        found = [(at + len(sequence), at) for sequence in self._stop if (at := self._held.find(sequence)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found)[1])
        return self._give(len(self._held) - self._doubtful())

    def flush(self) -> str:
        """What was held back and turned out to be text."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        return piece

    def _doubtful(self) -> int:
        """Length of the longest end of what is held with which a stop sequence begins."""
        lengths = (n for sequence in self._stop for n in range(1, len(sequence)) if self._held.endswith(sequence[:n]))
        return max(lengths, default=0)
