"""A server's life: choose blocks, load them, serve, announce, move when that helps the swarm, drain, leave (spec/10).

`placement` decides, this module acts. A moving server is two block servers for a while: the old one finishes the
sessions it has, the new one takes what comes.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import trio

from petalite import limits
from petalite.bloom.adapters import Lora
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.lora import stack_adapter
from petalite.bloom.manifest import Manifest
from petalite.bloom.packed import why_not_packed
from petalite.bloom.span import Span as BloomSpan
from petalite.dht.ids import model_key, models_key
from petalite.errors import ErrorCode, HandshakeError, PeerLost, PeerUnreachable, PetaliteError, RequestError
from petalite.identity import Address, PeerId
from petalite.net.call import Call, Handler, Reply
from petalite.server.blockserver import BlockServer
from petalite.server.executor import ThreadRunner, run_in_thread
from petalite.server.measure import estimate_rates
from petalite.server.threads import CountedThreads, best_threads
from petalite.swarm.directory import place_of, server_info
from petalite.swarm.node import Node
from petalite.swarm.placement import (
    CHECK_SECONDS,
    SETTLE_SECONDS,
    Choice,
    Mode,
    Move,
    choose_span,
    confirm_move,
    may_leave,
    should_move,
)
from petalite.swarm.probe import answer_probe, measure_line
from petalite.swarm.snapshot import ServerInfo, Snapshot, Span
from petalite.wire import messages
from petalite.wire.frames import Buffer
from petalite.wire.packing import encode
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.server")

T = TypeVar("T")

ANNOUNCE_SECONDS = 120.0
# On a LAN news is there in a breath: others are asked every two seconds.
LAN_LOOK_SECONDS = 2.0
LAN_SETTLE_SECONDS = 3.0
LOOK_AGAIN_SECONDS = 5.0
MOVE_DRAIN_SECONDS = 60.0
ASSUMED_LINE = 1e8
# A record's payload less its own fields.
MOST_RECORD = limits.MAX_RECORD_PAYLOAD - 200

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What to serve and with what. `blocks` None: chosen, and moved, by what helps the swarm; `capacity` blocks then.

    `cache_tokens(blocks)`: KV cache for a span of so many blocks, in tokens. `spare_blocks()`: how many blocks fit
    into memory beside what is held. `threads`: the most that torch may use. `adapters`: low-rank adapters by the names
    that clients call them. `fetch(start, end)` brings the files of blocks [start, end) into `directory` where that is
    not whole.
    """

    directory: Path
    config: BloomConfig
    manifest: Manifest
    name: str
    blocks: tuple[int, int] | None
    capacity: int
    dtype: torch.dtype
    device: torch.device
    quantize: str | None
    cache_tokens: Callable[[int], int]
    spare_blocks: Callable[[], int]
    threads: int = 1
    idle_seconds: float = limits.SESSION_IDLE_SECONDS
    push: bool = True
    check_seconds: float = CHECK_SECONDS
    adapters: Mapping[str, Lora] = field(default_factory=dict)
    fetch: Callable[[int, int], object] | None = None


class Service:
    """Answers `methods` from the start; serves blocks once `start` has returned and while `run` is running."""

    def __init__(
        self,
        node: Node,
        options: ServiceOptions,
        *,
        progress: Progress | None = None,
        notice: Callable[[str], None] | None = None,
        rng: random.Random | None = None,
        runner: ThreadRunner | None = None,
    ) -> None:
        self.node = node
        self.options = options
        self.current: BlockServer | None = None
        self.addresses: list[Address] = []
        self._old: list[BlockServer] = []
        self._progress = progress or (lambda what, done, total: None)
        self._notice = notice or (lambda line: log.info("%s", line))
        self._rng = rng or random.SystemRandom()
        self._runner = runner
        self._state = "joining"
        self._span: Span | None = Span(*options.blocks) if options.blocks else None
        self._moving_to: Span | None = None
        self._rates = (0.0, 0.0)
        self._line = ASSUMED_LINE
        self._nursery: trio.Nursery | None = None
        self._announce_now = trio.Event()
        self._look_again_at = 0.0
        methods = ("manifest", "open", "step", "extend", "status", "close", "await", "push", "forward", "backward")
        self.methods: dict[str, Handler] = dict.fromkeys(methods, self._dispatch)
        self.methods["info"] = self._info
        self.methods["probe"] = answer_probe

    # Answering

    async def _info(self, call: Call) -> Reply:
        messages.Empty.from_wire(dict(call.head))
        described = self.describe()
        if described is None:
            raise RequestError(ErrorCode.UNAVAILABLE, "not decided yet which blocks to serve", {"retry": True})
        return Reply(described.to_wire())

    def _dispatch(self, call: Call) -> Awaitable[Reply]:
        server = self._server_for(call)
        handler = server.methods.get(call.method)
        if handler is None:
            raise RequestError(ErrorCode.UNSUPPORTED, f"method {call.method!a} is not offered")
        return handler(call)

    def _server_for(self, call: Call) -> BlockServer:
        """Who holds the session that a request names; new things go to the current one."""
        sid, owner = call.head.get("sid"), call.head.get("owner", call.peer)
        if self._old and call.method != "open" and type(sid) is bytes and isinstance(owner, bytes) and len(owner) == 32:
            for server in self._old:
                if server.holds(PeerId(owner), sid):
                    return server
        if self.current is None:
            raise RequestError(ErrorCode.UNAVAILABLE, "still loading", {"retry": True, "after": 1000})
        return self.current

    def describe(self) -> messages.InfoReply | None:
        """What `info` answers and the record says; None before blocks are chosen."""
        if self._span is None:
            return None
        options = self.options
        base = self.current.describe() if self.current else self._describe_coming(self._span)
        return dataclasses.replace(
            base,
            state=self._state,
            moving_to=(self._moving_to.start, self._moving_to.end) if self._moving_to else None,
            pinned=options.blocks is not None,
            decode_rate=max(1, int(self._rates[0])) if self._rates[0] else None,
            batch_rate=max(1, int(self._rates[1])) if self._rates[1] else None,
            net_rate=max(1, int(self._line)),
            push=options.push and base.push,
            next_hops=self._next_hops(),
            addrs=tuple(place_of(a) for a in self.addresses if "%" not in a.host)[: limits.MAX_ANNOUNCED_ADDRESSES],
        )

    def _describe_coming(self, span: Span) -> messages.InfoReply:
        options = self.options
        return messages.InfoReply(
            model=options.manifest.model_id,
            name=options.name[: limits.MAX_WORD],
            blocks=(span.start, span.end),
            layers=options.config.n_layer,
            hidden=options.config.hidden_size,
            dtype=str(options.dtype).removeprefix("torch."),
            quant=options.quantize,
            codecs=BlockServer.CODECS,
            max_len=1,
            max_batch=limits.MAX_BATCH,
            cache_left=0,
            state="joining",
            version=BlockServer.VERSION,
        )

    def _next_hops(self) -> tuple[messages.NextHop, ...] | None:
        """Round trips to the nearest servers that can follow us."""
        if self._span is None:
            return None
        found = [
            (entry.round_trip, entry.peer)
            for entry in self.node.directory.entries.values()
            if entry.round_trip is not None and entry.info is not None and entry.info.blocks[0] <= self._span.end
        ]
        nearest = sorted(found)[: limits.MAX_NEXT_HOPS]
        return tuple(messages.NextHop(id=peer[:8], us=int(seconds * 1e6)) for seconds, peer in nearest) or None

    # Starting

    async def run(self, task_status: trio.TaskStatus[BlockServer] = trio.TASK_STATUS_IGNORED) -> None:
        """Choose, load and serve until cancelled; started once requests are answered."""
        config, node = self.options.config, self.node
        node.directory.watch(self.options.manifest.model_id, config.n_layer, config.hidden_size)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._announce_forever)
            if self._span is None:
                self._span = await self._choose()
            self.current = await self._load(self._span)
            self._state = "online"
            self._announce_now.set()
            task_status.started(self.current)
            if self.options.blocks is None:
                nursery.start_soon(self._balance_forever)
            else:
                nursery.start_soon(self._measure_line)

    async def _choose(self) -> Span:
        """By `choose_span`'s procedure; alone in the world there is nothing to wait for."""
        options, directory = self.options, self.node.directory
        self._rates = await self._blocking(partial(estimate_rates, options.config, options.dtype, options.device))
        await self._look_around()
        await self._measure_line()
        choice = self._choice(None)
        if directory.entries or self.node.lan_running:
            self._span = choice.span
            self._announce_now.set()
            await trio.sleep(self._settle_seconds())
            await directory.refresh()
            choice = self._choice(choice)
        return choice.span

    async def _look_around(self) -> None:
        """Give the LAN and the DHT the time they need to name others, and ask those."""
        directory = self.node.directory
        directory.touch()
        if self.node.lan_running:
            await trio.sleep(LAN_LOOK_SECONDS)
        if directory.entries:
            with trio.move_on_after(limits.INFO_SECONDS):
                await directory.refresh()

    def _settle_seconds(self) -> float:
        near = all(entry.near or entry.no_server for entry in self.node.directory.entries.values())
        return LAN_SETTLE_SECONDS if near else SETTLE_SECONDS

    def _choice(self, earlier: Choice | None) -> Choice:
        return choose_span(
            self._snapshot(), self.node.endpoint.peer_id, self.options.capacity, self._rates[0], self._line, self._rng,
            earlier,
        )  # fmt: skip

    def _snapshot(self) -> Snapshot:
        """What the swarm serves; nothing, if nobody is known."""
        config, model = self.options.config, self.options.manifest.model_id
        found = self.node.directory.snapshot(model)
        return found or Snapshot(
            model=model.hex(),
            layers=config.n_layer,
            token_bits=config.hidden_size * 16,
            servers=(),
            taken_at=trio.current_time(),
        )

    async def _load(self, span: Span) -> BlockServer:
        """Read the blocks in a worker thread, measure them, and start serving them."""
        options = self.options

        def read() -> tuple[BloomSpan, str, int, tuple[float, float]]:
            if options.fetch is not None:
                options.fetch(span.start, span.end)
            loaded = load_span(
                options.directory,
                span.start,
                span.end,
                dtype=options.dtype,
                device=options.device,
                quantize="int8" if options.quantize else None,
                pack=True,
                progress=lambda done, total: self._progress(f"loading blocks {span}", done, total),
                manifest=options.manifest,
            )
            reason = why_not_packed(options.device, options.dtype) if options.device.type == "cpu" else ""
            return loaded, reason, *best_threads(loaded, options.threads)

        blocks, reason, threads, self._rates = await self._blocking(read)
        if reason:
            self._notice(f"running with weights as they are: {reason}")
        counted = CountedThreads(threads)
        server = BlockServer(
            blocks,
            options.manifest,
            options.name,
            cache_tokens=options.cache_tokens(span.size),
            quantize=options.quantize,
            idle_seconds=options.idle_seconds,
            adapters={
                name: self._on_device(stack_adapter(lora.tensors, options.config, span.start, span.end, lora.scaling))
                for name, lora in options.adapters.items()
            },
            runner=self._runner or counted,
            here=None if self._runner else counted.here,
        )
        if options.device.type == "cuda":
            reason = await self._blocking(lambda: server.accelerate(partial(self._progress, "warming up")))
            if reason:
                self._notice(f"running without CUDA graphs: {reason}")
        if options.push:
            server.pusher.enable(self.node.endpoint.peer_id, self._send_push, self.node.endpoint.connected)
        if self._nursery is None:
            raise PetaliteError("the service is not running")
        await self._nursery.start(server.run)
        return server

    def _on_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        options = self.options
        return {name: tensor.to(device=options.device, dtype=options.dtype) for name, tensor in tensors.items()}

    async def _blocking(self, function: Callable[[], T]) -> T:
        """Run what takes long off the event loop."""
        results: list[T] = []
        await (self._runner or run_in_thread)(lambda: results.append(function()))
        return results[0]

    # Pushing to the next hop

    async def _send_push(
        self, peer: PeerId, method: str, head: Mapping[str, Any], body: Sequence[Buffer], priority: Priority, /
    ) -> None:
        """Over the connection that is there, or one dialled to where the peer itself says it is (PT-SES, push)."""
        connection = self.node.endpoint.connected(peer)
        if connection is None:
            addresses = self._proven_addresses(peer)
            if not addresses:
                await self._look_for_servers()
                addresses = self._proven_addresses(peer)
            if not addresses:
                raise PeerUnreachable(f"no address is known for peer {peer.short}..")
            connection = await self.node.endpoint.connect(*addresses)
        await connection.request(method, head, body, priority=priority)

    def _proven_addresses(self, peer: PeerId) -> list[Address]:
        """What the peer's own record or answer names; never a client's word."""
        entry = self.node.directory.entries.get(peer)
        if entry is None or entry.info is None:
            return []
        told = set(entry.info.addrs or ())
        return [address for address in entry.addresses if place_of(address) in told]

    async def _look_for_servers(self) -> None:
        """Read the records anew, but not for every stranger that a client names."""
        now = trio.current_time()
        if now >= self._look_again_at:
            self._look_again_at = now + LOOK_AGAIN_SECONDS
            with trio.move_on_after(limits.INFO_SECONDS):
                await self.node.directory.refresh()

    async def _measure_line(self) -> None:
        """The fastest line to a few peers: what our own side can do."""
        rates = []
        for entry in [e for e in self.node.directory.entries.values() if e.info is not None][:3]:
            with trio.move_on_after(limits.INFO_SECONDS):
                try:
                    rates.append(await measure_line(await self.node.connect(entry.peer)))
                except (PeerLost, HandshakeError, RequestError) as error:
                    log.debug("no measure of the line to %s: %s", entry.peer.short, error)
        if rates:
            self._line = max(rates)

    # Announcing

    async def _announce_forever(self) -> None:
        """Publish what we serve, again when it changes and every two minutes."""
        while True:
            self._announce_now = trio.Event()
            described, dht = self.describe(), self.node.dht
            if described is not None and dht is not None:
                network, model = self.node.endpoint.network, described.model
                with trio.move_on_after(limits.INFO_SECONDS):
                    await dht.publish(model_key(network, model), self._fitting(described).to_wire())
                    await dht.publish(models_key(network), {"model": model, "name": described.name})
            with trio.move_on_after(ANNOUNCE_SECONDS):
                await self._announce_now.wait()

    def _fitting(self, described: messages.InfoReply) -> messages.InfoReply:
        """As much of it as a record takes: latencies go first, then addresses, then adapters (PT-ANN-002)."""
        shorter = [described, dataclasses.replace(described, next_hops=None)]
        shorter.append(dataclasses.replace(shorter[-1], addrs=(described.addrs or ())[:2]))
        shorter.append(dataclasses.replace(shorter[-1], adapters=None))
        return next((each for each in shorter if len(encode(each.to_wire())) <= MOST_RECORD), shorter[-1])

    # Moving

    async def _balance_forever(self) -> None:
        """Look every minute whether another span would help more."""
        directory = self.node.directory
        while True:
            with trio.move_on_after(self.options.check_seconds):
                await self._anything_new()
            await directory.refresh()
            move = self._wanted()
            if move is None:
                continue
            await trio.sleep(move.delay)
            await directory.refresh()
            move = self._wanted()
            if move is not None:
                await self._try_move(move)

    async def _anything_new(self) -> None:
        """Keep the directory fresh, and return when a gap shows: that cannot wait for the next minute."""
        directory = self.node.directory
        while True:
            directory.touch()
            with trio.move_on_after(5.0):
                await directory.changed.wait()
                await trio.sleep(1.0)
                own = self._own()
                seen = self._snapshot_with(own)
                if own is not None and seen.gaps():
                    return

    def _own(self) -> ServerInfo | None:
        described = self.describe()
        return None if described is None else server_info(self.node.endpoint.peer_id, described, {}, 0.0)

    def _snapshot_with(self, own: ServerInfo | None) -> Snapshot:
        seen = self._snapshot()
        others = [server for server in seen.servers if own is None or server.peer != own.peer]
        return dataclasses.replace(seen, servers=(*others, *([own] if own else [])))

    def _wanted(self) -> Move | None:
        own = self._own()
        if own is None:
            return None
        return should_move(self._snapshot_with(own), own, self.options.spare_blocks(), self._rng)

    async def _try_move(self, move: Move) -> None:
        """Announce the move, wait for claims made at the same time, and carry it out if it still stands."""
        self._moving_to = move.to
        self._announce_now.set()
        try:
            await trio.sleep(self._settle_seconds())
            await self.node.directory.refresh()
            own = self._own()
            if own is None or not confirm_move(self._snapshot_with(own), own, self.options.spare_blocks(), move):
                return
            self._notice(f"moving from blocks {self._span} to {move.to}: {move.reason}")
            await (self._load_first(move) if move.mode is Mode.LOAD_FIRST else self._drain_first(move))
        finally:
            self._moving_to = None
            self._announce_now.set()

    async def _load_first(self, move: Move) -> None:
        """Hold both for a while; give the old span up only when that opens no gap."""
        new = await self._load(move.to)
        while not self._may_leave(move.to):
            await trio.sleep(LAN_SETTLE_SECONDS)
            await self.node.directory.refresh()
        old, self.current, self._span = self.current, new, move.to
        if old is not None:
            self._retire(old)

    async def _drain_first(self, move: Move) -> None:
        """Give the old span up while others hold all of it, then load the new one."""
        if not self._may_leave(None) or self.current is None:
            return
        self._state = "draining"
        self._announce_now.set()
        with trio.move_on_after(MOVE_DRAIN_SECONDS):
            await self.current.drain()
        old, self.current = self.current, None
        self._state, self._span, self._moving_to = "joining", move.to, None
        old.stop()
        try:
            self.current = await self._load(move.to)
        finally:
            self._state = "online"

    def _may_leave(self, to: Span | None) -> bool:
        return self._span is not None and may_leave(self._snapshot(), self.node.endpoint.peer_id, self._span, to)

    def _retire(self, old: BlockServer) -> None:
        """Let an old block server finish its sessions in the background."""
        self._old.append(old)

        async def finish() -> None:
            with trio.move_on_after(limits.SESSION_IDLE_SECONDS):
                await old.drain()
            self._old.remove(old)
            old.stop()

        if self._nursery is not None:
            self._nursery.start_soon(finish)

    # Leaving

    async def drain(self) -> None:
        """Say that we leave, and wait until nobody uses our sessions; bound it with a deadline."""
        self._state = "draining"
        if self.node.dht is not None:
            with trio.move_on_after(limits.GOODBYE_SECONDS):
                await self.node.dht.leave()
        for server in [*self._old, *([self.current] if self.current else [])]:
            await server.drain()
