"""Bytes in and out of one stream, with the one thing trio's streams lack: a send that does not wait."""

from __future__ import annotations

import select
import socket
from typing import Protocol

import trio


class Transport(Protocol):
    """What a connection's pumps need. Errors are trio's: BrokenResourceError, ClosedResourceError.

    Everything may be cancelled without loss: a cancelled send has taken nothing, a cancelled receive given nothing.
    """

    @property
    def address(self) -> str:
        """HOST:PORT of the other end, for people and for the caps by host."""

    async def receive_into(self, space: memoryview) -> int:
        """Bytes received, 0 at the end of the stream."""

    def send_now(self, data: memoryview) -> int:
        """How many bytes of `data` were taken without waiting. An error is left for `send_some` to find."""

    async def send_some(self, data: memoryview) -> int:
        """Wait until at least one byte of `data` is taken; how many were."""

    async def ready(self) -> bool:
        """Wait until what was sent has nearly left this machine, so that what is urgent finds a short queue; whether
        that took any waiting.
        """

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


class SocketTransport:
    """A TCP stream read straight into our buffers. trio keeps TCP_NODELAY on and TCP_NOTSENT_LOWAT at 16 KiB."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        # The same file descriptor as the stream's, seen as a plain socket; `aclose` detaches it before trio closes it.
        self._socket = socket.socket(fileno=stream.socket.fileno())
        self._socket.setblocking(False)
        self._open = True
        self._poll = _writable_poll(self._socket)
        self.address = _remote_address(self._socket)

    async def receive_into(self, space: memoryview) -> int:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv_into(space)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise trio.BrokenResourceError(_reason(error)) from error

    def send_now(self, data: memoryview) -> int:
        if not self._open:
            return 0
        try:
            return self._socket.send(data)
        except OSError:
            return 0

    async def send_some(self, data: memoryview) -> int:
        while True:
            await trio.lowlevel.wait_writable(self._socket)
            try:
                return self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise trio.BrokenResourceError(_reason(error)) from error

    async def ready(self) -> bool:
        if self._poll is not None and self._poll.poll(0):
            await trio.lowlevel.checkpoint()
            return False
        await trio.lowlevel.wait_writable(self._socket)
        return True

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._poll = None
            self._socket.detach()
        await trio.aclose_forcefully(self._stream)


def transport_over(stream: trio.SocketStream | Transport) -> Transport:
    return SocketTransport(stream) if isinstance(stream, trio.SocketStream) else stream


def _writable_poll(sock: socket.socket) -> select.poll | None:
    """A question that costs 1 us where a wait_writable costs a turn of the loop; None where there is no poll()."""
    if not hasattr(select, "poll"):
        return None
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return poll


def _remote_address(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return "unknown:0"  # it is gone already; the first read will say so
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{host}:{name[1]}"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
