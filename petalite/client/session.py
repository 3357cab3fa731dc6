"""An inference session over a chain of servers, any of which may be replaced at any token (spec 07).

The shell around `pipeline.Pipeline`: it plans routes, opens, sends and judges. Only a fault of the peer or of the
way to it bans a peer; an error of our own propagates.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from types import TracebackType

import trio
from torch import Tensor

from petalite import bridge, limits
from petalite.client.pipeline import Action, Extend, Hop, Open, Pipeline, Plan, Send
from petalite.errors import ErrorCode, HandshakeError, PeerLost, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.net.connection import PeerConnection, Reply
from petalite.net.nursery import open_flat_nursery
from petalite.swarm.node import Node
from petalite.swarm.routing import Needs, Route
from petalite.wire import messages
from petalite.wire.tensors import Descriptor, encoded_size
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.client")

# Answers that mean "not this session any more": open a new one at the same server and replay.
_FORGOTTEN = frozenset({ErrorCode.NO_SESSION, ErrorCode.CONFLICT, ErrorCode.OUT_OF_ORDER, ErrorCode.POSITION})
# Answers that put the blame on us: believed when a second peer says so too.
_OWN_FAULT = frozenset({ErrorCode.BAD_REQUEST, ErrorCode.UNSUPPORTED})


class SessionError(PetaliteError):
    """The session cannot go on: names peers, blocks and cause."""


class InferenceSession:
    """A KV cache of `batch` rows x `max_len` tokens spread over a chain of servers.

    Use it as an async context manager: leaving it tells the servers to forget. `dtype` and `codec` are those of the
    activations on the wire; `pad` is the left padding of each row. `notice` gets a quiet line when a server is lost.
    """

    def __init__(
        self,
        node: Node,
        model: bytes,
        *,
        layers: int,
        hidden: int,
        batch: int,
        max_len: int,
        dtype: str,
        codec: str,
        pad: Sequence[int] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        token = Descriptor("h", dtype, (batch, 1, hidden), codec)
        piece = min(limits.PREFILL_TOKENS, max(1, limits.PREFILL_BYTES // encoded_size(token)))
        self._pipeline = Pipeline(
            layers, batch=batch, max_len=max_len, piece=piece, new_sid=lambda: os.urandom(limits.SESSION_ID_BYTES)
        )
        self._node = node
        self._model = model
        self._dtype = dtype
        self._codec = codec
        self._pad = tuple(pad) if pad is not None and any(pad) else None
        self._notice = notice or (lambda line: log.info("%s", line))
        self._compute_class: tuple[str, str] | None = None
        self._failures: list[str] = []
        self._forgotten: dict[PeerId, int] = {}
        self._accused_by: PeerId | None = None
        self._lost_at: float | None = None
        self.failovers = 0
        self.failover_seconds = 0.0

    # Verbs

    @property
    def position(self) -> int:
        """Tokens cached so far."""
        return self._pipeline.position

    @property
    def history_bytes(self) -> int:
        """Memory that the inputs kept for replay take."""
        return self._pipeline.history_bytes

    @property
    def route(self) -> list[tuple[PeerId, tuple[int, int]]]:
        """Who holds which blocks now."""
        return [(hop.peer, (hop.blocks.start, hop.blocks.end)) for hop in self._pipeline.hops]

    async def step(self, hidden: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
        """Send `hidden` (B, T, C) through all blocks; returns (B, T, C) in the wire's dtype.

        Survives the loss of servers until the caller's deadline. Cancelled or failed, the session stays at its
        position and can be used on. `progress` hears how many tokens have come out so far.

        Raises SessionError (no way to go on within the deadline), RequestError of our own fault, LocalProtocolError.
        """
        pipeline = self._pipeline
        pipeline.feed(hidden.to(bridge.torch_dtype(self._dtype)))
        try:
            while not pipeline.complete:
                await self._advance(pipeline.ready())
                if progress is not None:
                    progress(pipeline.done_tokens)
        except BaseException:
            pipeline.truncate(pipeline.position)
            raise
        if self._lost_at is not None:
            self.failover_seconds += trio.current_time() - self._lost_at
            self._lost_at = None
        return pipeline.take_output()

    def truncate(self, position: int) -> None:
        """Forget the tokens at and behind `position`; the servers learn it with the next step."""
        self._pipeline.truncate(position)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was (beam search)."""
        self._pipeline.reorder(sources)

    async def __aenter__(self) -> InferenceSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Tell the servers that they may forget; bounded, and silent about those that are gone."""
        with trio.move_on_after(limits.GOODBYE_SECONDS, shield=True):
            async with trio.open_nursery() as nursery:
                for hop in self._pipeline.hops:
                    if hop.opened:
                        nursery.start_soon(self._close_hop, hop)

    async def _close_hop(self, hop: Hop) -> None:
        connection = self._node.endpoint.connections.get(hop.peer)
        if connection is not None and not connection.leaving:
            try:
                await connection.request("close", messages.Close(sid=hop.sid).to_wire())
            except (PeerLost, RequestError):
                pass  # it forgets by itself

    # Acting

    async def _advance(self, actions: list[Action]) -> None:
        if len(actions) == 1:
            await self._perform(actions[0])
            return
        async with open_flat_nursery() as nursery:
            for action in actions:
                nursery.start_soon(self._perform, action)

    async def _perform(self, action: Action) -> None:
        if isinstance(action, Plan):
            await self._plan(action)
            return
        hop = action.hop
        hop.busy = True
        try:
            if isinstance(action, Open):
                await self._open(hop)
            elif isinstance(action, Extend):
                await self._extend(action)
            else:
                await self._send(action)
        except RequestError as error:
            self._refused(hop, error)
        except (PeerLost, HandshakeError) as error:
            self._lose(hop, str(error))
        finally:
            hop.busy = False

    async def _plan(self, action: Plan) -> None:
        """Give the gap to the best servers; while there are none, look again until the caller's deadline."""
        pipeline = self._pipeline
        pause = 0.1
        while True:
            needs = Needs(
                blocks=action.blocks,
                cache_tokens=pipeline.batch * pipeline.max_len,
                compute_class=self._compute_class,
                codec=self._codec,
                push=False,
            )
            route = self._node.plan(self._model, needs)
            if isinstance(route, Route):
                break
            why = "no server serves this model" if route is None else route.reason
            if trio.current_effective_deadline() - trio.current_time() <= pause:
                raise SessionError("; ".join([why, *self._node.directory.problems(), *self._failures[-3:]]))
            await trio.sleep(pause)
            pause = min(2 * pause, 2.0)
            await self._node.directory.refresh()
        made = pipeline.assign([(hop.peer, hop.blocks) for hop in route.hops])
        if self._lost_at is not None and pipeline.position:
            names = ", ".join(str(hop) for hop in made)
            self._notice(f"replaying {pipeline.position} tokens on {names}")
        snapshot = self._node.directory.snapshot(self._model)
        server = snapshot.get(made[0].peer) if snapshot else None
        if self._compute_class is None and server is not None:
            self._compute_class = server.compute_class

    async def _open(self, hop: Hop) -> None:
        message = messages.Open(
            sid=hop.sid,
            model=self._model,
            blocks=(hop.blocks.start, hop.blocks.end),
            max_len=hop.max_len,
            batch=self._pipeline.batch,
            dtype=self._dtype,
            codec=self._codec,
        )
        await self._request(hop, "open", message.to_wire())
        self._pipeline.opened(hop)

    async def _extend(self, action: Extend) -> None:
        message = messages.Extend(sid=action.hop.sid, max_len=action.max_len)
        reply = await self._request(action.hop, "extend", message.to_wire())
        self._pipeline.extended(action.hop, messages.ExtendReply.from_wire(reply.head).max_len)

    async def _send(self, action: Send) -> None:
        hop = action.hop
        inputs = self._pipeline.inputs(action)
        descriptor, body = bridge.to_wire(inputs, self._dtype, self._codec)
        step = messages.Step(
            sid=hop.sid, n=action.n, pos=action.start, hypo=action.reorder, pad=self._pad, tensors=(descriptor,)
        )
        short = inputs.shape[0] * inputs.shape[1] <= 32
        reply = await self._request(
            hop, "step", step.to_wire(), body, Priority.STEP if short else Priority.BULK, encoded_size(descriptor)
        )
        self._pipeline.replied(action, self._check_reply(action, descriptor, reply))
        self._forgotten.pop(hop.peer, None)
        self._node.succeeded(hop.peer)

    def _check_reply(self, action: Send, sent: Descriptor, reply: Reply) -> Tensor:
        """The output, if the reply is what was asked for; otherwise the peer is at fault: PeerLost."""
        try:
            answer = messages.StepReply.from_wire(reply.head)
            tensor = answer.tensors[0]
            if (answer.n, answer.pos) != (action.n, action.end):
                raise PeerLost(f"answered step {answer.n} at {answer.pos}, asked was {action.n} at {action.end}")
            if (tensor.dtype, tensor.codec, tensor.shape) != (sent.dtype, sent.codec, sent.shape):
                raise PeerLost(f"answered a tensor of {tensor.shape} {tensor.dtype}, not {sent.shape} {sent.dtype}")
            return bridge.from_wire(tensor, reply.body[0])
        except RequestError as error:
            raise PeerLost(f"answered wrongly: {error.text}") from error

    async def _request(
        self,
        hop: Hop,
        method: str,
        head: dict[str, object],
        body: Sequence[memoryview] = (),
        priority: Priority = Priority.STEP,
        max_reply: int = 0,
    ) -> Reply:
        """Ask; if the connection breaks, ask once more over a new one: every request here is safe to repeat."""
        connection = await self._node.connect(hop.peer)
        try:
            return await self._ask(connection, method, head, body, priority, max_reply)
        except PeerLost as error:
            log.debug("%s: %s; trying a new connection", hop, error)
        connection = await self._node.connect(hop.peer)
        return await self._ask(connection, method, head, body, priority, max_reply)

    async def _ask(
        self,
        connection: PeerConnection,
        method: str,
        head: dict[str, object],
        body: Sequence[memoryview],
        priority: Priority,
        max_reply: int,
    ) -> Reply:
        return await connection.request(method, head, body, priority=priority, max_reply=max_reply)

    # Judging

    def _refused(self, hop: Hop, error: RequestError) -> None:
        """A forgotten session is opened anew; what two peers call our fault propagates; the rest costs the hop."""
        if error.code in _OWN_FAULT:
            if self._accused_by not in (None, hop.peer):
                raise error
            self._accused_by = hop.peer
        if error.code in _FORGOTTEN and self._forgotten.get(hop.peer, 0) < 2:
            self._forgotten[hop.peer] = self._forgotten.get(hop.peer, 0) + 1
            if self._pipeline.position:
                self._notice(f"peer {hop} has dropped the session, replaying {hop.position} tokens there")
            self._pipeline.forgotten(hop)
            return
        self._lose(hop, error.text)

    def _lose(self, hop: Hop, why: str) -> None:
        self._failures.append(f"{hop}: {why}")
        self._node.failed(hop.peer)
        self._pipeline.lost(hop)
        if hop.opened:
            self.failovers += 1
            if self._lost_at is None:
                self._lost_at = trio.current_time()
            self._notice(f"peer {hop} lost: {why}")
