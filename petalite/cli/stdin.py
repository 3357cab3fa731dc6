"""Lines of what a command reads, waited for without a thread."""

from __future__ import annotations

import os

import trio

READ_BYTES = 65_536


class Lines:
    """Lines of a file descriptor, given whole. A thread that blocks in a read could not be interrupted; this can."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = b""
        self._ended = False

    async def next(self) -> str:
        """The next line with its line break; what is left at the end of the input, then ""."""
        while b"\n" not in self._held and not self._ended:
            try:
                await trio.lowlevel.wait_readable(self._descriptor)
            except PermissionError:
                pass  # epoll does not take plain files, which never keep a reader waiting
            piece = os.read(self._descriptor, READ_BYTES)
            self._held += piece
            self._ended = not piece
        line, newline, self._held = self._held.partition(b"\n")
        return (line + newline).decode("utf-8", "replace")
