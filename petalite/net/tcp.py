"""TCP as what carries connections. Another carrier needs these two methods only."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from petalite import limits
from petalite.errors import PeerUnreachable
from petalite.net.transport import SocketTransport, Transport

Accept = Callable[[Transport], Awaitable[None]]
Bound = list[tuple[str, int]]


class Carrier(Protocol):
    async def dial(self, host: str, port: int) -> Transport:
        """Raises PeerUnreachable naming the place."""

    async def serve(self, host: str, port: int, accept: Accept, *, task_status: trio.TaskStatus[Bound]) -> None:
        """Run `accept` for each incoming stream, for ever. Started with the bound addresses; OSError before that."""


class Tcp:
    async def dial(self, host: str, port: int) -> Transport:
        place = f"{host}:{port}"
        with trio.move_on_after(limits.HANDSHAKE_SECONDS):
            try:
                return SocketTransport(await trio.open_tcp_stream(host, port))
            except OSError as error:
                raise PeerUnreachable(f"cannot reach {place}: {_os_reason(error)}") from error
        raise PeerUnreachable(f"cannot reach {place}: no answer for {limits.HANDSHAKE_SECONDS:.0f} s")

    async def serve(
        self,
        host: str,
        port: int,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Bound] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        listeners = await trio.open_tcp_listeners(port, host=host)
        names = [listener.socket.getsockname() for listener in listeners]

        async def handle(stream: trio.SocketStream) -> None:
            await accept(SocketTransport(stream))

        async with trio.open_nursery() as nursery:
            # serve_listeners backs off on EMFILE and its relatives instead of spinning.
            await nursery.start(trio.serve_listeners, handle, listeners)
            task_status.started([bound_place(name) for name in names])


def bound_place(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Host and port of a socket's name; a link-local IPv6 address means nothing without its scope."""
    host, port, scope = name[0], name[1], name[3] if len(name) == 4 else 0
    return (f"{host}%{socket.if_indextoname(scope)}", port) if scope and "%" not in host else (host, port)


def _os_reason(error: OSError) -> str:
    """The plain cause; trio wraps the failures of several addresses in one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ExceptionGroup):
            cause = cause.exceptions[-1]
        elif isinstance(cause, OSError) and cause.errno is not None:
            return {errno.ECONNREFUSED: "connection refused"}.get(cause.errno, cause.strerror or str(cause)).lower()
        else:
            cause = cause.__cause__
    return str(error)
