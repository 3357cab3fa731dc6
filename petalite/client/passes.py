"""Forward and backward passes through the swarm, in pieces, each retried elsewhere until a deadline (spec/15).

A pass is cut by rows into pieces that travel side by side. What entered each server is kept, so that the backward pass
can go the same way back, or another one where a server is gone: then the span that it had is planned anew.

B rows, T tokens, C hidden size, n blocks of the pass, P prompt tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import trio
from torch import Tensor

from petalite import limits
from petalite.bloom.config import BloomConfig
from petalite.bloom.training import pass_bytes
from petalite.client.batches import BatchPlanner
from petalite.client.calls import Terms
from petalite.client.given import Given, nbytes
from petalite.client.pieces import TrainingCalls
from petalite.client.verdicts import Judge, Verdict, retry_after
from petalite.errors import HandshakeError, LocalProtocolError, PeerLost, PetaliteError, RequestError
from petalite.identity import PeerId
from petalite.net.nursery import open_flat_nursery
from petalite.swarm.node import Node
from petalite.swarm.routing import Hop, Route
from petalite.swarm.snapshot import Span

log = logging.getLogger("petalite.client")

T = TypeVar("T")

# Activations of one piece, each way, and its fewest tokens: below, a request costs more than its work.
PIECE_BYTES = 8 * 2**20
LEAST_TOKENS = 128
# Pieces on their way to each server: one that is computed, one that travels.
PIECES_A_SERVER = 2
SLOW_AVOID_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Segment:
    """What entered one server: a piece's rows at the first of `blocks`, (rows, T, C)."""

    blocks: Span
    inputs: Tensor
    peer: PeerId


@dataclass(slots=True)
class Pass:
    """A forward pass that is through. `output` (B, T, C); `taps`: what entered each block but the first, likewise.

    `pieces`: rows and segments, in block order, of each piece, for the way back.
    """

    blocks: Span
    output: Tensor
    taps: list[Tensor]
    pieces: list[tuple[slice, list[Segment]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Loss:
    """Gradients of a loss by a pass's outputs: `output` (B, T, C), and by what entered a block, by block number."""

    output: Tensor
    taps: Mapping[int, Tensor]
    wanted: frozenset[str]

    def of_rows(self, rows: slice) -> Loss:
        return Loss(self.output[rows], {block: grad[rows] for block, grad in self.taps.items()}, self.wanted)


class Passes:
    """All passes of one client through one model. `activations`: dtype and codec of activations on the wire."""

    def __init__(
        self,
        node: Node,
        model: bytes,
        config: BloomConfig,
        activations: Callable[[], tuple[str, str]],
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self._node = node
        self._model = model
        self._activations = activations
        self._notice = notice or (lambda line: log.info("%s", line))
        self._judge = Judge()
        self._terms: Terms | None = None
        self._planners: dict[str | None, BatchPlanner] = {}

    async def forward(self, blocks: Span, hidden: Tensor, given: Given, *, taps: bool = False) -> Pass:
        """hidden (B, T, C) through `blocks`, whatever becomes of single servers, until the caller's deadline.

        Raises SessionError (no way to go on), RequestError (servers agree that it is our fault), LocalProtocolError.
        """
        self._planner(given).compute_class = None  # servers of another kind than last time may be the only ones now
        output = torch.empty_like(hidden)
        done = Pass(blocks, output, [torch.empty_like(hidden) for _ in range(taps * (blocks.size - 1))])
        pieces, at_once = self._cut(blocks, hidden.shape, given, taps)

        async def run(piece: _Piece) -> None:
            async with at_once:
                segments, done.output[piece.rows], tapped = await piece.forward(hidden[piece.rows])
            for whole, part in zip(done.taps, tapped, strict=True):
                whole[piece.rows] = part
            done.pieces.append((piece.rows, segments))

        await self._all(given, run, pieces)
        return done

    async def backward(self, done: Pass, given: Given, loss: Loss) -> dict[str, Tensor]:
        """Gradients by the pass's inputs: "h" (B, T, C), "prompts" and the adapter's names, as far as wanted; float32
        ones are sums over the pieces. Raises as `forward`.
        """
        made = {"h": torch.zeros(done.output.shape)} if "h" in loss.wanted else {}
        for name, tensor in {"prompts": given.prompts, **given.adapter}.items():
            if tensor is not None and name in loss.wanted:
                made[name] = torch.zeros(tensor.shape)
        _, at_once = self._cut(done.blocks, done.output.shape, given, bool(done.taps))

        def add(rows: slice, blocks: Span, found: Mapping[str, Tensor]) -> None:
            place = slice(blocks.start - done.blocks.start, blocks.end - done.blocks.start)
            for name, gradient in found.items():
                total = made[name]
                (total[place, rows] if name == "prompts" and total.dim() == 4 else total[place]).add_(gradient)

        async def run(way: tuple[slice, list[Segment]]) -> None:
            rows, segments = way
            piece = self._piece(done.blocks, rows, done.output.shape[1], given, bool(done.taps))
            async with at_once:
                flowing = await piece.backward(segments, loss.of_rows(rows), add)
            if "h" in made:
                made["h"][rows] = flowing

        await self._all(given, run, done.pieces)
        return made

    async def _all(self, given: Given, run: Callable[[T], Awaitable[None]], pieces: Sequence[T]) -> None:
        """All pieces side by side. However it ends, nothing but bans is held against anybody in the next pass."""
        planner = self._planner(given)
        planner.progressed()
        try:
            async with open_flat_nursery() as nursery:
                for piece in pieces:
                    nursery.start_soon(run, piece)
        finally:
            self._judge.step_done()
            planner.step_done()

    # Cutting

    def _cut(self, blocks: Span, shape: Sequence[int], given: Given, taps: bool) -> tuple[list[_Piece], trio.Semaphore]:
        """Pieces of the batch for all servers there are, and how many of them to have on their way at a time."""
        batch, tokens, hidden = map(int, shape)
        if hidden != self.config.hidden_size:
            raise LocalProtocolError(f"hidden states of width {hidden}, the model has {self.config.hidden_size}")
        if tokens > limits.MAX_TRAINING_TOKENS:
            raise LocalProtocolError(f"rows of {tokens} tokens, the limit is {limits.MAX_TRAINING_TOKENS}")
        servers, rows = self._share(blocks, batch, tokens, given)
        cuts = [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]
        pieces = [self._piece(blocks, cut, tokens, given, taps) for cut in cuts]
        return pieces, trio.Semaphore(PIECES_A_SERVER * servers)

    def _share(self, blocks: Span, batch: int, tokens: int, given: Given) -> tuple[int, int]:
        """How many servers there are for it, and how many rows a piece should have."""
        token_bytes = self._known_terms().descriptor(1).nbytes
        # An adapter travels with every piece: it should not outweigh what it is for.
        least = max(LEAST_TOKENS, given.block_bytes * blocks.size // (4 * token_bytes))
        planner, most = self._planner(given), max(tokens, PIECE_BYTES // token_bytes)
        servers, rows = 1, max(1, min(batch, limits.MAX_TRAINING_TOKENS // tokens))
        for offer in planner.offers():
            largest = max(1, min(batch, min(offer, most) // tokens))
            routes = planner.routes(blocks, largest * tokens)
            if isinstance(routes, tuple):
                servers = len({hop.peer for route in routes for hop in route.hops})
                even = math.ceil(batch / (servers * PIECES_A_SERVER)) if servers > 1 else batch
                rows = min(max(even, math.ceil(least / tokens)), largest)
                break
        return servers, rows

    def _piece(self, blocks: Span, rows: slice, tokens: int, given: Given, taps: bool) -> _Piece:
        return _Piece(self, self._planner(given), self._known_terms(), blocks, rows, tokens, given, taps)

    def _known_terms(self) -> Terms:
        if self._terms is None:
            dtype, codec = self._activations()
            config = self.config
            self._terms = Terms(
                model=self._model,
                layers=config.n_layer,
                hidden=config.hidden_size,
                batch=1,
                dtype=dtype,
                codec=codec,
            )
        return self._terms

    def _planner(self, given: Given) -> BatchPlanner:
        name = given.adapter_name
        if name not in self._planners:
            self._planners[name] = BatchPlanner(self._node, self._known_terms(), self._judge, self._notice, name)
        return self._planners[name]

    # Asking one server, and judging it

    async def attempt(
        self,
        planner: BatchPlanner,
        hop: Hop,
        call: Callable[[TrainingCalls], Awaitable[dict[str, Tensor]]],
        method: str,
    ) -> dict[str, Tensor] | None:
        """What `call` gives; None if it failed and somebody, maybe the same server, should be asked again."""
        calls = TrainingCalls(self._node, self._known_terms())
        try:
            with trio.move_on_after(limits.TRAINING_SECONDS):
                found = await call(calls)
                self._judge.succeeded(hop.peer)
                self._node.succeeded(hop.peer)
                planner.progressed()
                return found
            self._lose(planner, hop, f"no answer within {limits.TRAINING_SECONDS:.0f} s")
            self._judge.avoid(hop.peer, SLOW_AVOID_SECONDS, trio.current_time())
        except RequestError as error:
            await self._refused(planner, hop, method, error)
        except (PeerLost, HandshakeError) as error:
            self._lose(planner, hop, str(error), ban=error)
        return None

    async def _refused(self, planner: BatchPlanner, hop: Hop, method: str, error: RequestError) -> None:
        verdict = self._judge.refused(hop.peer, method, error, trio.current_time())
        if verdict is Verdict.AGAIN:
            await trio.sleep(min(retry_after(error.detail, 0.1), limits.ROOM_SECONDS))
        else:
            self._lose(planner, hop, error.text, ban=error if verdict is Verdict.BAN else None)

    def _lose(self, planner: BatchPlanner, hop: Hop, why: str, *, ban: PetaliteError | None = None) -> None:
        name = f"peer {hop.peer.short}.. (blocks {hop.blocks})"
        why = why.removeprefix(f"connection to peer {hop.peer.short}.. ended: ")
        self._judge.note(f"{name}: {why}")
        if ban is not None:
            planner.failed(hop.peer, ban)
            self._notice(f"{name} lost ({why}), training goes on elsewhere")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows on their way through the `blocks` of a pass."""

    passes: Passes
    planner: BatchPlanner
    terms: Terms
    blocks: Span
    rows: slice
    length: int  # T
    given: Given
    taps: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def batch(self) -> int:
        return int(self.rows.stop - self.rows.start)

    async def forward(self, inputs: Tensor) -> tuple[list[Segment], Tensor, list[Tensor]]:
        """inputs (rows, T, C) -> what entered each server, the output, and what entered each block but the first."""
        segments: list[Segment] = []
        tapped: list[Tensor] = []
        at = self.blocks.start
        while at < self.blocks.end:
            route = await self._route(Span(at, self.blocks.end))
            with self.planner.claimed(route, self.tokens):
                for hop in self._parts(route):
                    found = await self._forward(hop, inputs, self._inner(hop.blocks) if self.taps else ())
                    if found is None:
                        break
                    segments.append(Segment(hop.blocks, inputs, hop.peer))
                    if self.taps:
                        tapped += [inputs] * (at > self.blocks.start) + list(found.get("taps", ()))
                    inputs, at = found["h"], hop.blocks.end
        return segments, inputs, tapped

    async def backward(
        self,
        segments: Sequence[Segment],
        loss: Loss,
        add: Callable[[slice, Span, Mapping[str, Tensor]], None],
    ) -> Tensor:
        """The gradient by the piece's input, zeros if nobody wants it; those by prompts and adapter are added up."""
        stack, flowing = list(segments), loss.output
        while stack:
            segment = stack.pop()
            route = await self._route(segment.blocks, segment.peer)
            hop = next(iter(self._parts(route)))
            with self.planner.claimed(route, self.tokens):
                if hop.blocks != segment.blocks:
                    stack += await self._divided(segment, hop)
                    continue
                found = await self._backward(hop, segment.inputs, flowing, loss)
            if found is None:
                stack.append(segment)
                continue
            flowing = found.pop("h", torch.zeros_like(segment.inputs))
            if segment.blocks.start in loss.taps:
                flowing = flowing + loss.taps[segment.blocks.start]
            add(self.rows, segment.blocks, found)
        return flowing

    async def _divided(self, segment: Segment, hop: Hop) -> list[Segment]:
        """The segment in two, where no server takes it whole: what lies between comes from the first of them."""
        found = await self._forward(hop, segment.inputs, ())
        if found is None:
            return [segment]
        rest = Span(hop.blocks.end, segment.blocks.end)
        return [Segment(hop.blocks, segment.inputs, hop.peer), Segment(rest, found["h"], hop.peer)]

    async def _route(self, blocks: Span, usual: PeerId | None = None) -> Route:
        """Where to go: to the `usual` server if it still takes all of it."""
        if usual is not None and self.planner.takes(usual, blocks):
            return Route((Hop(usual, blocks),), push=False, seconds=0.0)
        found = self.planner.find(blocks, self.tokens)
        if not isinstance(found, Route):
            found = await self.planner.wait(blocks, self.tokens, lambda: None)
        self.planner.settle_class(found)
        return found

    async def _forward(self, hop: Hop, inputs: Tensor, taps: Sequence[int]) -> dict[str, Tensor] | None:
        given = self._given(hop.blocks)
        return await self.passes.attempt(
            self.planner,
            hop,
            lambda calls: calls.forward(hop, {"h": inputs, **given}, taps, self.given.adapter_name),
            "forward",
        )

    async def _backward(self, hop: Hop, inputs: Tensor, grad: Tensor, loss: Loss) -> dict[str, Tensor] | None:
        taps = {block: loss.taps[block] for block in self._inner(hop.blocks) if block in loss.taps}
        given = self._given(hop.blocks)
        wanted = [name for name in given if name in loss.wanted]
        if hop.blocks.start > self.blocks.start or "h" in loss.wanted:
            wanted.insert(0, "h")
        if not wanted:
            return {}
        return await self.passes.attempt(
            self.planner,
            hop,
            lambda calls: calls.backward(hop, {"h": inputs, **given}, grad, taps, wanted, self.given.adapter_name),
            "backward",
        )

    def _given(self, blocks: Span) -> dict[str, Tensor]:
        first = self.blocks.start
        return self.given.tensors(self.rows, slice(blocks.start - first, blocks.end - first))

    def _inner(self, blocks: Span) -> range:
        """The blocks whose inputs never leave the server by themselves."""
        return range(blocks.start + 1, blocks.end)

    # Fitting into a request

    def _parts(self, route: Route) -> list[Hop]:
        """The route's hops, in parts that one request can hold."""
        parts = []
        for hop in route.hops:
            count = self._fitting(hop.blocks.size)
            for start in range(hop.blocks.start, hop.blocks.end, count):
                parts.append(Hop(hop.peer, Span(start, min(start + count, hop.blocks.end))))
        return parts

    def _fitting(self, most: int) -> int:
        """How many blocks one request can be about. Raises LocalProtocolError if not even one."""
        count = next((count for count in range(most, 0, -1) if self._fits(count)), 0)
        if not count:
            raise LocalProtocolError(f"{self.tokens} tokens, with what belongs to them, do not fit into one request")
        return count

    def _fits(self, blocks: int) -> bool:
        activations = self.tokens * self.terms.descriptor(1).nbytes
        tapped = activations * (blocks - 1) if self.taps else 0
        beside = blocks * self.given.block_bytes
        memory = pass_bytes(self.passes.config, blocks, self.batch, self.length, backward=True, itemsize=4)
        return (
            2 * activations + tapped + beside + self.tokens <= limits.MAX_BODY
            and blocks * sum(nbytes(tensor[:1]) for tensor in self.given.adapter.values()) <= limits.MAX_ADAPTER_BYTES
            and memory <= limits.MAX_TRAINING_BYTES
        )
