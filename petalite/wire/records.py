"""Records: u16 length and a Noise transport message each (spec 01). Bytes <-> plaintext frames, both ways.

Reading decrypts into a scratch buffer of its own, never into memory that somebody else can see: a failed
decryption leaves unauthenticated plaintext behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from petalite import limits
from petalite.errors import GoAwayCode, RemoteProtocolError
from petalite.wire.noise import TransportCipher
from petalite.wire.writer import Plain

_SMALLEST_BUFFER = 64 * 1024 + 1024
_LARGEST_BUFFER = 1024 * 1024
# In a row, after which the buffer is small again: in a stream of large messages a small read now and then is no end of
# it, and a fresh megabyte costs as much as decrypting one.
_SMALL_READS = 8
_OVERHEAD = 2 + limits.RECORD_TAG
_KEPT_OUTPUT = limits.WRITE_AHEAD + 4 * limits.MAX_FRAME


class Scratch:
    """Room for one plaintext. Nothing stays in it between two calls, so all connections of a thread may share one."""

    __slots__ = ("view",)

    def __init__(self) -> None:
        self.view = memoryview(bytearray(limits.MAX_FRAME))


class RecordWriter:
    """Encrypts frames in the order given."""

    def __init__(self, cipher: TransportCipher, scratch: Scratch | None = None) -> None:
        self._cipher = cipher
        self._plain = (scratch or Scratch()).view
        self._out = memoryview(b"")

    def pack(self, frames: Sequence[Plain]) -> memoryview:
        """All `frames` as consecutive records; valid until the next call, which may write into the same memory."""
        total = 0
        for prefix, body in frames:
            total += _OVERHEAD + len(prefix) + (0 if body is None else len(body))
        out = self._room(total)
        plain, encrypt_into = self._plain, self._cipher.encrypt_into
        at = 0
        for prefix, body in frames:
            size = len(prefix)
            if body is None:
                text: bytes | memoryview = prefix
            else:
                split, size = size, size + len(body)
                plain[:split] = prefix
                plain[split:size] = body
                text = plain[:size]
            end = at + _OVERHEAD + size
            out[at] = (size + limits.RECORD_TAG) >> 8
            out[at + 1] = (size + limits.RECORD_TAG) & 0xFF
            encrypt_into(text, out[at + 2 : end])
            at = end
        return out

    def _room(self, total: int) -> memoryview:
        """Small batches get memory of their own; large ones come in rows, and reuse one buffer while they last."""
        if total <= limits.WRITE_AHEAD_SLOW:
            self._out = memoryview(b"")
            return memoryview(bytearray(total))
        if total > len(self._out):
            self._out = memoryview(bytearray(min(max(total, 2 * len(self._out)), max(total, _KEPT_OUTPUT))))
        return self._out[:total]


class RecordReader:
    """Collects bytes and decrypts whole records.

    Write received bytes into `space()`, say how many with `received(n)`, then call `next_frame()` until it
    returns None. The buffer grows while reads fill it, and is small again after some that left most of it empty.
    """

    def __init__(self, cipher: TransportCipher, trailing: bytes = b"", scratch: Scratch | None = None) -> None:
        self._cipher = cipher
        self._plain = (scratch or Scratch()).view
        self._view = memoryview(bytearray(max(_SMALLEST_BUFFER, len(trailing))))
        self._view[: len(trailing)] = trailing
        self._start = 0
        self._end = len(trailing)
        self._last_read = 0
        self._small_reads = 0  # in a row

    def space(self) -> memoryview:
        """Where the next bytes go: never empty."""
        size = len(self._view)
        if self._start == self._end:
            self._start = self._end = 0
            if size > _SMALLEST_BUFFER and self._small_reads >= _SMALL_READS:
                self._move_to(_SMALLEST_BUFFER)
        # A read that filled the buffer to its end has left more behind in the kernel.
        elif self._end == size or size - self._end < _SMALLEST_BUFFER // 2:
            self._move_to(min(2 * size, _LARGEST_BUFFER) if self._last_read >= size // 2 else size)
        return self._view[self._end :]

    def _move_to(self, size: int) -> None:
        """The unread bytes go to the start of a buffer of `size`."""
        rest = self._view[self._start : self._end]
        if size != len(self._view):
            self._view = memoryview(bytearray(size))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def received(self, count: int) -> None:
        self._end += count
        self._last_read = count
        self._small_reads = self._small_reads + 1 if count < _SMALLEST_BUFFER // 2 else 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[memoryview]:
        """Frames of `data`, for tests and tools: each is valid until the next is asked for."""
        rest = memoryview(data)
        while rest:
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            self.received(count)
            rest = rest[count:]
            while (frame := self.next_frame()) is not None:
                yield frame

    def next_frame(self) -> memoryview | None:
        """Plaintext of the next whole record, valid until the next call; None when more bytes are needed.

        Raises RemoteProtocolError(FRAME) for a length under 17, (DECRYPT) when authentication fails.
        """
        start, view = self._start, self._view
        have = self._end - start
        if have < 2:
            return None
        size = (view[start] << 8) | view[start + 1]
        if size < limits.MIN_RECORD:
            raise RemoteProtocolError(f"record of {size} bytes, at least {limits.MIN_RECORD}", GoAwayCode.FRAME)
        if have < 2 + size:
            return None
        end = start + 2 + size
        plain = self._plain[: size - limits.RECORD_TAG]
        self._cipher.decrypt_into(view[start + 2 : end], plain)
        self._start = end
        return plain
