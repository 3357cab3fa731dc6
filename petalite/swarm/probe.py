"""How fast the line to another peer is: bytes there and back over an ordinary connection (spec/10, rates)."""

from __future__ import annotations

import trio

from petalite.errors import ErrorCode, RequestError
from petalite.limits import MAX_PROBE
from petalite.net.call import Call, Reply
from petalite.net.connection import PeerConnection
from petalite.wire.packing import Int, field
from petalite.wire.writer import Priority


async def answer_probe(call: Call) -> Reply:
    """Method `probe`: take the body, send back `back` bytes."""
    back = field(call.head, "back", Int(0, MAX_PROBE), 0)
    if len(call.body) > MAX_PROBE:
        raise RequestError(ErrorCode.RESOURCES, f"probe of {len(call.body)} bytes, limit {MAX_PROBE}")
    return Reply(body=(bytes(back),) if back else (), priority=Priority.BULK)


async def measure_line(connection: PeerConnection) -> float:
    """Bits/s in the slower direction, the round trip taken off. Raises RequestError, PeerLost."""
    round_trip = await _timed(connection, 0, 0)
    up = await _timed(connection, MAX_PROBE, 0)
    down = await _timed(connection, 0, MAX_PROBE)
    return 8 * MAX_PROBE / max(1e-5, max(up, down) - round_trip)


async def _timed(connection: PeerConnection, size: int, back: int) -> float:
    started = trio.current_time()
    body = (bytes(size),) if size else ()
    await connection.request("probe", {"back": back}, body, priority=Priority.BULK, max_reply=back)
    return trio.current_time() - started
