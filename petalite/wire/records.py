"""Records: u16 length and a Noise transport message each (spec 01). Bytes <-> plaintext frames, both ways.

Reading decrypts into a scratch buffer of its own, never into memory that somebody else can see: a failed
decryption leaves unauthenticated plaintext behind.
"""

from __future__ import annotations

from collections.abc import Iterable

from petalite import limits
from petalite.errors import GoAwayCode, RemoteProtocolError
from petalite.wire.noise import TransportCipher
from petalite.wire.writer import Plain

_SMALLEST_BUFFER = 64 * 1024 + 1024
_LARGEST_BUFFER = 1024 * 1024


class RecordWriter:
    """Encrypts frames in the order given."""

    def __init__(self, cipher: TransportCipher) -> None:
        self._cipher = cipher
        self._plain = memoryview(bytearray(limits.MAX_FRAME))

    def pack(self, frames: Iterable[Plain]) -> memoryview:
        """All `frames` as consecutive records in one new buffer."""
        listed = list(frames)
        overhead = 2 + limits.RECORD_TAG
        out = memoryview(
            bytearray(sum(len(prefix) + (len(body) if body is not None else 0) + overhead for prefix, body in listed))
        )
        at = 0
        for prefix, body in listed:
            plain = self._join(prefix, body)
            size = len(plain) + limits.RECORD_TAG
            out[at] = size >> 8
            out[at + 1] = size & 0xFF
            self._cipher.encrypt_into(plain, out[at + 2 : at + 2 + size])
            at += 2 + size
        return out

    def _join(self, prefix: bytes, body: memoryview | None) -> memoryview | bytes:
        if body is None:
            return prefix
        split, end = len(prefix), len(prefix) + len(body)
        self._plain[:split] = prefix
        self._plain[split:end] = body
        return self._plain[:end]


class RecordReader:
    """Collects bytes and decrypts whole records.

    Write received bytes into `space()`, say how many with `received(n)`, then call `next_frame()` until it
    returns None. The buffer grows while full reads arrive and shrinks when they stop.
    """

    def __init__(self, cipher: TransportCipher, trailing: bytes = b"") -> None:
        self._cipher = cipher
        self._buffer = bytearray(max(_SMALLEST_BUFFER, len(trailing)))
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = len(trailing)
        self._view[: self._end] = trailing
        self._plain = memoryview(bytearray(limits.MAX_FRAME))

    def space(self) -> memoryview:
        """Where the next bytes go: never empty."""
        pending = self._end - self._start
        if self._start == self._end:
            self._start = self._end = 0
        if len(self._view) - self._end < _SMALLEST_BUFFER // 2:
            size = len(self._view)
            if pending > size // 2:
                size = min(2 * size, _LARGEST_BUFFER)
            self._move_to(size)
        return self._view[self._end :]

    def _move_to(self, size: int) -> None:
        rest = bytes(self._view[self._start : self._end])
        if size != len(self._view):
            self._view = memoryview(bytearray(size))
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def received(self, count: int) -> None:
        self._end += count

    def feed(self, data: bytes | bytearray | memoryview) -> Iterable[memoryview]:
        """Frames of `data`, for streams that hand out bytes and for tests."""
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
        have = self._end - self._start
        if have < 2:
            return None
        size = (self._view[self._start] << 8) | self._view[self._start + 1]
        if size < limits.MIN_RECORD:
            raise RemoteProtocolError(f"record of {size} bytes, at least {limits.MIN_RECORD}", GoAwayCode.FRAME)
        if have < 2 + size:
            return None
        at = self._start + 2
        count = self._cipher.decrypt_into(self._view[at : at + size], self._plain[: size - limits.RECORD_TAG])
        self._start = at + size
        return self._plain[:count]
