"""What can go wrong at one server, done at the next message that reaches it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from petalite.errors import ErrorCode, RequestError
from petalite.net.call import Call, Handler, Reply
from tools.simulate_sessions.world import Place

# What a client sees, and what a server or client does when told to run a step.
TOLD = frozenset({"step", "push", "await"})
ANSWERED = frozenset({"step", "await"})


async def death(place: Place, call: Call, handler: Handler) -> Reply:
    """The process is killed: connections break, new ones are refused."""
    place.host.die()
    await trio.sleep_forever()
    raise AssertionError


async def reset(place: Place, call: Call, handler: Handler) -> Reply:
    """All connections break once; the server and its sessions live on."""
    place.host.reset()
    await trio.sleep_forever()
    raise AssertionError


async def silence(place: Place, call: Call, handler: Handler) -> Reply:
    """The process is stopped: nothing breaks, nothing answers."""
    place.host.stop()
    await trio.sleep_forever()
    raise AssertionError


async def stall(place: Place, call: Call, handler: Handler) -> Reply:
    """The connection lives and says that the step runs, but it never ends."""
    await trio.sleep_forever()
    raise AssertionError


async def error(place: Place, call: Call, handler: Handler) -> Reply:
    """An answer that is an error."""
    raise RequestError(ErrorCode.INTERNAL, "the step failed in the model")


async def accusation(place: Place, call: Call, handler: Handler) -> Reply:
    """An answer that says that the client broke the protocol."""
    raise RequestError(ErrorCode.BAD_REQUEST, "field 'n' must be a unicorn")


async def amnesia(place: Place, call: Call, handler: Handler) -> Reply:
    """The session is gone, as after an eviction."""
    sid = call.head["sid"]
    place.server.table.close(call.peer, sid, trio.current_time())
    return await handler(call)


async def garbage(place: Place, call: Call, handler: Handler) -> Reply:
    """An answer that is none."""
    await handler(call)
    return Reply({"n": "four", "t": [1, 2]})


async def noise(place: Place, call: Call, handler: Handler) -> Reply:
    """Bytes that nobody encrypted, on every connection."""
    for transport in place.host.transports:
        transport.send_now(memoryview(bytes([0, 64]) + bytes(range(64))))
    return await handler(call)


async def truncation(place: Place, call: Call, handler: Handler) -> Reply:
    """A body that is shorter than its tensor."""
    reply = await handler(call)
    body = b"".join(reply.body)
    return Reply(reply.head, (body[: len(body) // 2],))


async def shape(place: Place, call: Call, handler: Handler) -> Reply:
    """An output of another shape."""
    reply = await handler(call)
    (tensor,) = reply.head["t"]
    batch, tokens, hidden = tensor["s"]
    body = b"".join(reply.body)
    head = {**reply.head, "t": [{**tensor, "s": [batch, tokens, hidden // 2]}]}
    return Reply(head, (body[: len(body) // 2],))


async def position(place: Place, call: Call, handler: Handler) -> Reply:
    """Another position than the client counts."""
    reply = await handler(call)
    return Reply({**reply.head, "pos": reply.head["pos"] + 1}, reply.body)


async def number(place: Place, call: Call, handler: Handler) -> Reply:
    """The answer to another step."""
    reply = await handler(call)
    return Reply({**reply.head, "n": max(0, reply.head["n"] - 1)}, reply.body)


async def infinity(place: Place, call: Call, handler: Handler) -> Reply:
    """An output that is no number."""
    reply = await handler(call)
    return Reply(reply.head, (b"\xff" * sum(map(len, reply.body)),))


async def redirect(place: Place, call: Call, handler: Handler) -> Reply:
    """An answer that would have the client go elsewhere."""
    reply = await handler(call)
    elsewhere = [{"peer": bytes(32), "sid": bytes(16), "addr": "10.6.6.6:666"}]
    return Reply({**reply.head, "next": elsewhere, "redirect": "10.6.6.6:666"}, reply.body)


async def drain(place: Place, call: Call, handler: Handler) -> Reply:
    """The server is about to leave."""
    reply = await handler(call)
    place.server.state = "draining"
    return Reply({**reply.head, "drain": True}, reply.body)


Fault = Callable[[Place, Call, Handler], "object"]

# name -> the methods it applies to
FAULTS = {
    "death": (death, TOLD),
    "reset": (reset, TOLD),
    "silence": (silence, TOLD),
    "stall": (stall, TOLD),
    "error": (error, ANSWERED),
    "accusation": (accusation, frozenset({"step"})),
    "amnesia": (amnesia, ANSWERED),
    "garbage": (garbage, ANSWERED),
    "noise": (noise, TOLD),
    "truncation": (truncation, ANSWERED),
    "shape": (shape, ANSWERED),
    "position": (position, ANSWERED),
    "number": (number, ANSWERED),
    "infinity": (infinity, ANSWERED),
    "redirect": (redirect, ANSWERED),
    "drain": (drain, ANSWERED),
}


class Once:
    """A tap that lets one fault happen, at the first fitting message to `place` after `arm`."""

    def __init__(self, kind: str) -> None:
        self.act, self.methods = FAULTS[kind]
        self.place: Place | None = None
        self.happened = False

    def arm(self, place: Place) -> None:
        self.place = place

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        if place is not self.place or self.happened or call.method not in self.methods:
            return await handler(call)
        self.happened = True
        return await self.act(place, call, handler)
