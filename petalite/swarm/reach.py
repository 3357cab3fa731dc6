"""Method `reach`: "can you dial me?" Whoever is asked dials the asker's own address, and no other (spec/14)."""

from __future__ import annotations

import trio

from petalite.errors import ErrorCode, PeerUnreachable, RequestError
from petalite.limits import REACH_AT_ONCE, REACH_SECONDS
from petalite.net.call import Call, Handler, Reply
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import Endpoint
from petalite.net.tcp import Carrier, Tcp
from petalite.wire.packing import Int, field


def reach_handler(endpoint: Endpoint, carrier: Carrier | None = None) -> Handler:
    """The handler of `reach` {"port": 1..65535} -> {"ok": bool, "seen": host as we see it}.

    Only the address that the asker comes from is dialled, a few at a time, and nothing is sent there: nobody can point
    it at a third party.
    """
    dialler = carrier or Tcp()
    slots = trio.CapacityLimiter(REACH_AT_ONCE)

    async def reach(call: Call) -> Reply:
        port = field(call.head, "port", Int(1, 65_535))
        connection = endpoint.connections.get(call.peer)
        if connection is None:
            raise RequestError(ErrorCode.UNAVAILABLE, "the connection that asked is not there any more")
        try:
            slots.acquire_nowait()
        except trio.WouldBlock:
            raise RequestError(ErrorCode.BUSY, "too many ask to be dialled", {"retry": True, "after": 1000}) from None
        try:
            host = connection.address.rpartition(":")[0].strip("[]")
            return Reply({"ok": await _can_dial(dialler, host, port), "seen": host})
        finally:
            slots.release()

    return reach


async def _can_dial(carrier: Carrier, host: str, port: int) -> bool:
    with trio.move_on_after(REACH_SECONDS):
        try:
            transport = await carrier.dial(host, port)
        except PeerUnreachable:
            return False
        await transport.aclose()
        return True
    return False


async def ask_reach(connection: PeerConnection, port: int) -> bool | None:
    """Whether the other side can dial us at `port`; None if it does not offer that. Raises PeerLost."""
    try:
        reply = await connection.request("reach", {"port": port})
    except RequestError:
        return None
    ok = reply.head.get("ok")
    return ok if isinstance(ok, bool) else None
