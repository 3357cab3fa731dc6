"""Frames that come again and again, and differ in a few integers and the body: steps, their pushes, their replies.

The first of its kind goes through the strict decoder of `frames`. Its bytes, with the integers of stream and head cut
out, are then a pattern, and what fits that is the same frame with other integers: well formed, and decoded without
looking at each field again. Anything else goes the usual way, so what is accepted, and as what, stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from petalite import limits
from petalite.wire import frames, packing
from petalite.wire.heads import map_header

# What a peer can have a connection remember is less than 1 MiB: so many patterns (a session has one for its steps, or
# for their replies), each of so many bytes, with so many array entries and map pairs in its head.
_MOST_PATTERNS: Final = 64
_MOST_BYTES: Final = 512
_MOST_ELEMENTS: Final = 64
_MOST_LENGTHS: Final = 4
_REPLACE_EVERY: Final = (
    16  # frames without a pattern, where there are too many: taking turns, they would all be cut anew
)
_STARTS: Final = frozenset({b"\x96\x01", b"\x95\x02"})  # REQ and RES with a body, so with one element more
_WIDTHS: Final = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}  # of an integer behind its first byte


class KnownHead(Mapping[str, Any]):
    """A head that fits `pattern`: the same keys, and the same values but for the `integers`."""

    __slots__ = ("integers", "pattern")

    def __init__(self, pattern: Pattern, integers: list[int]) -> None:
        self.pattern = pattern
        self.integers = integers

    def get(self, name: str, default: Any = None) -> Any:
        at = self.pattern.places.get(name)
        return self.pattern.constants.get(name, default) if at is None else self.integers[at]

    def __getitem__(self, name: str) -> Any:
        at = self.pattern.places.get(name)
        return self.pattern.constants[name] if at is None else self.integers[at]

    def __iter__(self) -> Iterator[str]:
        yield from self.pattern.constants
        yield from self.pattern.places

    def __len__(self) -> int:
        return len(self.pattern.constants) + len(self.integers)


class Pattern:
    """What frames like `frame` have in common, behind their stream. `made`: what others made of such a head, by type.

    `pieces` stand before the integers of the head, whose names have their `places` in that order, one each, and the
    last of them before the body. No field is critical.
    """

    __slots__ = ("_body", "_end", "_method", "constants", "made", "pieces", "places")

    def __init__(self, frame: frames.Req | frames.Res, body: bytes) -> None:
        self._method = frame.method if isinstance(frame, frames.Req) else None
        self._end = frame.end
        self._body = len(body)
        self.places: dict[str, int] = {}
        self.constants: dict[str, Any] = {}
        self.pieces: list[bytes] = []
        self.made: dict[type, Any] = {}
        piece = bytes((frame.end,)) + (b"" if self._method is None else packing.encode(self._method))
        piece += map_header(len(frame.head))
        for name, value in frame.head.items():
            piece += packing.encode(name)
            if type(value) is int and value >= 0:
                self.places[name] = len(self.places)
                self.pieces.append(piece)
                piece = b""
            else:
                self.constants[name] = value
                piece += packing.encode(value, within=2)
        self.pieces.append(piece + b"\xc5" + self._body.to_bytes(2, "big"))

    def match(self, data: bytes, at: int, stream: int) -> frames.Req | frames.Res | None:
        """The frame whose stream id ends before `at`, if it fits."""
        *before, last = self.pieces
        integers = []
        for piece in before:
            if not data.startswith(piece, at):
                return None
            value, at = _integer(data, at + len(piece))
            integers.append(value)
        start = at + len(last)
        if not data.startswith(last, at) or len(data) != start + self._body:
            return None
        head = KnownHead(self, integers)
        if self._method is not None:
            return frames.Req(stream, self._end, self._method, head, data[start:])
        return frames.Res(stream, self._end, head, data[start:])


class Repeats:
    """Decodes the frames of one connection."""

    def __init__(self) -> None:
        self._patterns: dict[bytes, Pattern] = {}  # by their first piece, oldest first
        self._lengths: list[int] = []  # of first pieces
        self._misses = 0

    def decode(self, data: memoryview) -> frames.Frame:
        """As `frames.decode`, with the same errors."""
        if len(data) > limits.MAX_INLINE_BODY + _MOST_BYTES or bytes(data[:2]) not in _STARTS:
            return frames.decode(data)
        encoded = bytes(data)
        stream, at = _integer(encoded, 2)
        for length in self._lengths:
            pattern = self._patterns.get(encoded[at : at + length])
            if pattern is not None and (known := pattern.match(encoded, at, stream)) is not None:
                frames.check_stream(stream)
                return known
        frame = frames.decode(data)
        if isinstance(frame, frames.Req | frames.Res) and frame.body and self._worth_learning(frame, encoded):
            self._learn(Pattern(frame, frame.body), encoded, at, stream)
        return frame

    def _worth_learning(self, frame: frames.Req | frames.Res, encoded: bytes) -> bool:
        """Asked before a pattern is made: a head of thousands of fields is not cut into as many pieces."""
        self._misses += 1
        if len(self._patterns) >= _MOST_PATTERNS and self._misses % _REPLACE_EVERY:
            return False
        if any(packing.is_critical(name) for name in frame.head):
            return False
        size = len(encoded) - len(frame.body or b"")
        return size <= _MOST_BYTES and packing.count_elements(frame.head) <= _MOST_ELEMENTS

    def _learn(self, pattern: Pattern, encoded: bytes, at: int, stream: int) -> None:
        """Unless it is not encoded as it would be here: it was not cut at the right places then."""
        first = pattern.pieces[0]
        if pattern.match(encoded, at, stream) is None:
            return
        if len(self._patterns) >= _MOST_PATTERNS:
            del self._patterns[next(iter(self._patterns))]
        self._patterns[first] = pattern
        if len(first) not in self._lengths:
            self._lengths = [len(first), *self._lengths][:_MOST_LENGTHS]


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned integer and where it ends; -1 for anything else, which fits nowhere."""
    value = data[at] if at < len(data) else 0xC0
    if value < 0x80:
        return value, at + 1
    width = _WIDTHS.get(value)
    if width is None:
        return -1, len(data)
    return int.from_bytes(data[at + 1 : at + 1 + width], "big"), at + 1 + width
