"""The requests of spec 07 to one hop: what is asked, and what counts as an answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import trio
from torch import Tensor

from petalite import bridge, limits
from petalite.client.given import Given
from petalite.client.hidden import Encoded, Hidden, as_tensor, decoded, few_as_they_came
from petalite.client.hop import Hop
from petalite.client.pipeline import Send
from petalite.errors import PeerLost, PeerSilent, PeerUnreachable, RequestError
from petalite.identity import PeerId
from petalite.net.connection import OnProgress, PeerConnection, Reply
from petalite.swarm.node import Node
from petalite.wire import messages
from petalite.wire.heads import RepeatedHead, Template
from petalite.wire.streams import OwnRequest
from petalite.wire.tensors import RAW, Descriptor, known_descriptor
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.client")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all hops of a session agree on: `dtype` and `codec` are those of the activations on the wire."""

    model: bytes
    layers: int
    hidden: int
    batch: int
    dtype: str
    codec: str

    def descriptor(self, tokens: int) -> Descriptor:
        """Of the activations of so many tokens a row."""
        return known_descriptor("h", self.dtype, (self.batch, tokens, self.hidden), self.codec)


@dataclass(frozen=True, slots=True)
class Step:
    """A step to be asked for: `inputs` (B, T, C) in the wire's dtype. `pad`: the left padding of each row, if there is
    any; `following`: the same step of the hops that the output is to be pushed through.
    """

    send: Send
    inputs: Hidden
    pad: tuple[int, ...] | None
    following: Sequence[Send]
    on_progress: OnProgress


class _Request(NamedTuple):
    """What `PeerConnection.request` is called with."""

    method: str
    head: Mapping[str, Any]
    body: Sequence[memoryview]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has left. If nobody waits for its reply any more, `drop` it."""

    connection: PeerConnection
    request: OwnRequest

    def drop(self) -> None:
        self.connection.drop(self.request)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's output (B, T, C), and whether the server asks us to move on."""

    output: Hidden
    draining: bool


class Calls:
    """Each raises RequestError (the server said so), PeerLost or HandshakeError (it is gone, or answered what it must
    not); LocalProtocolError is our own mistake.
    """

    def __init__(self, node: Node, terms: Terms, given: Given | None = None) -> None:
        self._node = node
        self._terms = terms
        self._given = given or Given()
        self._heads: dict[bytes, tuple[object, Template]] = {}  # by session id: of its last step, and what it was like

    async def open(self, hop: Hop) -> None:
        terms = self._terms
        tensors, body = self._given.encode(slice(hop.blocks.start, hop.blocks.end))
        message = messages.Open(
            sid=hop.sid,
            model=terms.model,
            blocks=(hop.blocks.start, hop.blocks.end),
            max_len=hop.max_len,
            batch=terms.batch,
            dtype=terms.dtype,
            codec=terms.codec,
            from_=None if hop.source is None else bytes(hop.source),
            wait=True,
            adapter=self._given.adapter_name,
            tensors=tensors or None,
        )
        parse_reply(messages.OpenReply, await self._request(hop, "open", message.to_wire(), body))

    async def extend(self, hop: Hop, max_len: int) -> int:
        """The cache's length now, in tokens."""
        message = messages.Extend(sid=hop.sid, max_len=max_len)
        reply = parse_reply(messages.ExtendReply, await self._request(hop, "extend", message.to_wire()))
        if reply.max_len < max_len:
            raise PeerLost(f"extended the session to {reply.max_len} tokens, asked were {max_len}")
        return reply.max_len

    async def status(self, hop: Hop) -> tuple[int, int]:
        """The number of the next step, and the position."""
        reply = await self._request(hop, "status", messages.Status(sid=hop.sid).to_wire())
        status = parse_reply(messages.StatusReply, reply)
        return status.n, status.pos

    def own(self, hidden: Tensor) -> Hidden:
        """A copy of `hidden` (B, T, C) in the wire's dtype, which is for this session alone."""
        body = bridge.few_to_wire(hidden, self._terms.dtype)
        if body is not None and self._terms.codec == RAW:
            return Encoded(known_descriptor("h", self._terms.dtype, tuple(hidden.shape), RAW), (body,))
        return hidden.detach().to(bridge.torch_dtype(self._terms.dtype), copy=True)

    def begin_step(self, step: Step, deadline: float, on_reply: Callable[[Reply], None] | None = None) -> Asked | None:
        """Ask for one step, over the connection that is there; `step` must follow. None where that cannot be.

        `on_reply` gets the reply in the task that has read it, before whoever waits wakes up. Raises what
        `PeerConnection.begin` raises.
        """
        return self._begin(step.send.hop.peer, self._step_request(step), deadline, on_reply)

    async def step(self, step: Step, asked: Asked | None = None) -> Outcome:
        """Run one step, which may have been `asked` for already.

        Raises ReplyLate too: after PIECE_SECONDS, and where `on_progress` does.
        """
        return self._outcome(step.send, await self._reply(step.send.hop.peer, lambda: self._step_request(step), asked))

    def _begin(
        self,
        peer: PeerId,
        request: _Request,
        deadline: float,
        on_reply: Callable[[Reply], None] | None = None,
    ) -> Asked | None:
        connection = self._node.endpoint.connected(peer)
        if connection is None or deadline == -math.inf:  # cancelled
            return None
        method, head, body, options = request
        return Asked(connection, connection.begin(method, head, body, deadline, on_reply=on_reply, **options))

    async def _reply(self, peer: PeerId, make: Callable[[], _Request], asked: Asked | None) -> Reply:
        """As `ask`, where the first request may have left already."""
        if asked is None:
            method, head, body, options = make()
            return await ask(self._node, peer, method, head, body, **options)
        try:
            return await asked.connection.finish(asked.request)
        except PeerSilent:
            raise
        except PeerLost as error:
            log.debug("peer %s..: %s; trying a new connection", peer.short, error)
        method, head, body, options = make()
        return await (await _connect(self._node, peer)).request(method, head, body, **options)

    def _step_request(self, step: Step) -> _Request:
        """What one hop has sent goes on to the next in the bytes in which it came."""
        inputs = step.inputs
        if isinstance(inputs, Encoded):
            descriptor, body = inputs.tensor, inputs.body
        else:
            descriptor, body = bridge.to_wire(inputs, self._terms.dtype, self._terms.codec)
        short = descriptor.shape[0] * descriptor.shape[1] <= limits.SHORT_STEP_TOKENS
        options = {
            "priority": Priority.STEP if short else Priority.BULK,
            "max_reply": descriptor.nbytes,
            "on_progress": step.on_progress,
            "patience": limits.PIECE_SECONDS,
        }
        return _Request("step", self._step_head(step, descriptor), body, options)

    def _step_head(self, step: Step, descriptor: Descriptor) -> Mapping[str, Any]:
        """The steps of a decoding differ in two numbers only."""
        send, pad = step.send, step.pad
        sid, n, start = send.hop.sid, send.n, send.start
        route = [(other.hop.peer, other.hop.sid, other.n - n) for other in step.following] if step.following else []
        last = (step.following[-1] if step.following else send).last
        like = (send.reorder, pad, last, route, descriptor)
        known = self._heads.get(sid)
        if known is not None and known[0] == like:
            return RepeatedHead(known[1], n=n, pos=start)
        message = messages.Step(
            sid=sid,
            n=n,
            pos=start,
            hypo=send.reorder,
            pad=pad,
            last=last,
            next=_next(send, step.following),
            tensors=(descriptor,),
        )
        if all(ahead == 0 for _, _, ahead in route):  # else numbers of the route differ too
            if len(self._heads) >= limits.MAX_HOPS:
                self._heads.clear()
            self._heads[sid] = (like, message.template("n", "pos"))
        return message.to_wire()

    def begin_await(self, send: Send, deadline: float) -> Asked | None:
        """Ask for the output of a step that the hop before brings, as `begin_step` does."""
        return self._begin(send.hop.peer, self._await_request(send), deadline)

    async def await_pushed(self, send: Send, asked: Asked | None) -> Outcome:
        """The output of a step that the hop before brings, which may have been `asked` for already."""
        return self._outcome(send, await self._reply(send.hop.peer, lambda: self._await_request(send), asked))

    def _await_request(self, send: Send) -> _Request:
        descriptor = self._terms.descriptor(send.end - send.start)
        message = messages.Await(sid=send.hop.sid, n=send.n)
        return _Request("await", message.to_wire(), (), {"max_reply": descriptor.nbytes})

    def passed_on(self, send: Send, reply: Reply) -> Encoded | None:
        """The output in a reply to a step of which all is wanted, as the next hop gets it. None where it is not what
        was asked for, or must be looked at more closely: the task that waits for it does.
        """
        try:
            tensor = self._checked(send, reply).tensors[0]
        except PeerLost:
            return None
        return few_as_they_came(tensor, memoryview(reply.body[0]))

    def _checked(self, send: Send, reply: Reply) -> messages.StepReply:
        """What is in the reply, if it is what was asked for (PT-SES-029)."""
        answer = parse_reply(messages.StepReply, reply)
        tensor = answer.tensors[0]
        if (answer.n, answer.pos) != (send.n, send.end):
            raise PeerLost(f"answered step {answer.n} at {answer.pos}, asked was {send.n} at {send.end}")
        asked = send.answered
        due = self._terms.descriptor(asked)
        if tensor is not due and tensor != due:
            # A server that does not know `last`, or got the step from one, gives all (PT-SES-109).
            given = min(max(asked, tensor.shape[1]), send.end - send.start)
            if tensor != self._terms.descriptor(given):
                raise PeerLost(f"answered a tensor of {tensor.shape} {tensor.dtype}, not {due.shape} {due.dtype}")
        return answer

    def _outcome(self, send: Send, reply: Reply) -> Outcome:
        answer = self._checked(send, reply)
        tensor, asked = answer.tensors[0], send.answered
        body = memoryview(reply.body[0])
        try:
            output = few_as_they_came(tensor, body) or decoded(tensor, body)
        except RequestError as error:
            raise PeerLost(f"answered wrongly: {error.text}") from error
        whole = tensor.shape[1] == asked
        return Outcome(output if whole else as_tensor(output)[:, -asked:], bool(answer.drain))

    def connected(self, hop: Hop) -> bool:
        """Whether a request to the server needs no dialling."""
        return self._node.endpoint.connected(hop.peer) is not None

    def watch(self, hop: Hop, ended: Callable[[], None]) -> Callable[[], None]:
        """Call `ended` when the connection to the server ends, at once if there is none; gives what stops that."""
        connection = self._node.endpoint.connected(hop.peer)
        if connection is None:
            ended()
            return lambda: None
        connection.on_closed.add(ended)
        return lambda: connection.on_closed.discard(ended)

    async def close(self, hop: Hop) -> None:
        """Tell the server that it may forget, if there is a connection; silent about one that is gone."""
        connection = self._node.endpoint.connected(hop.peer)
        if connection is None:
            return
        try:
            await connection.request("close", messages.Close(sid=hop.sid).to_wire())
        except (PeerLost, RequestError) as error:
            log.debug("closing at %s: %s", hop, error)  # it forgets by itself

    # The way there

    async def _request(
        self, hop: Hop, method: str, head: Mapping[str, Any], body: Sequence[memoryview] = (), **options: Any
    ) -> Reply:
        return await ask(self._node, hop.peer, method, head, body, **options)


async def ask(
    node: Node, peer: PeerId, method: str, head: Mapping[str, Any], body: Sequence[memoryview] = (), **options: Any
) -> Reply:
    """Ask; if the connection breaks, ask once more over a new one: every request of a client is safe to repeat.

    `options` and errors are those of `PeerConnection.request`, and PeerUnreachable.
    """
    connection = node.endpoint.connected(peer) or await _connect(node, peer)
    try:
        return await connection.request(method, head, body, **options)
    except PeerSilent:
        raise
    except PeerLost as error:  # closed for idleness, it may be, or broken on its way
        log.debug("peer %s..: %s; trying a new connection", peer.short, error)
    connection = await _connect(node, peer)
    return await connection.request(method, head, body, **options)


async def _connect(node: Node, peer: PeerId) -> PeerConnection:
    with trio.move_on_after(limits.DIAL_SECONDS):
        return await node.connect(peer)
    raise PeerUnreachable(f"no connection within {limits.DIAL_SECONDS:.0f} s")


def _next(send: Send, following: Sequence[Send]) -> tuple[messages.Hop, ...] | None:
    if not following:
        return None
    same = all(other.n == send.n for other in following)  # unless a server was replaced on the way
    return tuple(
        messages.Hop(peer=bytes(other.hop.peer), sid=other.hop.sid, n=None if same else other.n) for other in following
    )


def parse_reply(kind: type[messages.M], reply: Reply) -> messages.M:
    """The message in a reply. Raises PeerLost where it is none."""
    try:
        return kind.from_wire(reply.head)
    except RequestError as error:
        raise PeerLost(f"answered wrongly: {error.text}") from error
