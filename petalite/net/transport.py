"""Bytes in and out of one stream: a socket read into our own buffer, or any other trio stream."""

from __future__ import annotations

from typing import Protocol

import trio


class Transport(Protocol):
    """What a connection's pumps need. Errors are trio's: BrokenResourceError, ClosedResourceError."""

    async def receive_into(self, space: memoryview) -> int:
        """Bytes received, 0 at the end of the stream."""

    async def send_some(self, data: memoryview) -> int:
        """How many bytes of `data` were taken. Cancelled: none."""

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


def transport_over(stream: trio.abc.HalfCloseableStream) -> Transport:
    return SocketTransport(stream) if isinstance(stream, trio.SocketStream) else StreamTransport(stream)


class SocketTransport:
    """A TCP stream: partial sends show progress, reads land where they are decrypted from."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._socket = stream.socket

    async def receive_into(self, space: memoryview) -> int:
        try:
            return await self._socket.recv_into(space)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_some(self, data: memoryview) -> int:
        try:
            return await self._socket.send(data)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


class StreamTransport:
    """Any trio stream; each send is whole, so a cancelled one leaves the stream broken."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream

    async def receive_into(self, space: memoryview) -> int:
        data = await self._stream.receive_some(min(len(space), 65_536))
        space[: len(data)] = data
        return len(data)

    async def send_some(self, data: memoryview) -> int:
        await self._stream.send_all(data)
        return len(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)
