"""A whole swarm in one task tree: real servers, real client, real handshakes, memory instead of sockets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import trio

from petalite import limits
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_embeddings, load_head, load_span
from petalite.bloom.manifest import load_or_make
from petalite.bloom.span import Span
from petalite.client.api import RemoteModel
from petalite.client.generation import Generation, decode_tokens, prefill
from petalite.client.model import Model
from petalite.client.parts import LocalParts, load_local_parts, load_tokenizer
from petalite.client.runner import run_inline
from petalite.client.session import InferenceSession
from petalite.identity import Address, Identity, PeerId
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from petalite.net.endpoint import Endpoint, open_endpoint
from petalite.net.tcp import Accept, Bound
from petalite.net.transport import Transport
from petalite.server.blockserver import BlockServer
from petalite.server.executor import run_inline as run_blocks_inline
from petalite.server.push import Send
from petalite.swarm.directory import Directory, server_info
from petalite.swarm.node import Node
from petalite.swarm.snapshot import Snapshot
from petalite.testing import MemoryHost, MemoryNet, MemoryTransport
from petalite.wire.frames import Buffer
from petalite.wire.writer import Priority

CACHE_TOKENS = 4_096


@dataclass(frozen=True)
class Parts:
    """A model held once: all its blocks, and the client's share."""

    blocks: Span
    local: LocalParts

    def span(self, start: int, end: int) -> Span:
        """Some of the blocks; the weights are shared."""
        return Span(self.blocks.config, start, end, self.blocks.layers[start:end])


@cache
def load_parts(model: str = FAIRYTALE) -> Parts:
    local = load_local_parts(model)
    return Parts(load_span(find_model(model), 0, local.config.n_layer), local)


def load_tiny(directory: Path) -> Parts:
    """A checkpoint without a tokenizer: the embedded model's serves for it."""
    manifest = load_or_make(directory)
    embeddings = load_embeddings(directory)
    head = load_head(directory, embeddings=embeddings)
    config = BloomConfig.load(directory)
    tokenizer = load_tokenizer(find_model(FAIRYTALE))
    local = LocalParts("tiny", config, manifest, tokenizer, embeddings, head, torch.device("cpu"))
    return Parts(load_span(directory, 0, config.n_layer), local)


class Host(MemoryHost):
    """A machine whose connections can be broken, frozen, or refused."""

    def __init__(self, net: MemoryNet, name: str) -> None:
        super().__init__(net, name)
        self.transports: list[MemoryTransport] = []
        self.stopped = False
        self.dead = False

    def reset(self) -> None:
        """Every connection breaks."""
        for transport in self.transports:
            transport.reset()
        self.transports.clear()

    def stop(self) -> None:
        """As SIGSTOP: nothing is read any more; new connections are taken by the system and hang."""
        self.stopped = True
        for transport in self.transports:
            _stop(transport)

    def resume(self) -> None:
        self.stopped = self.dead = False
        for transport in self.transports:
            transport.thaw()
            transport._out.frozen = False
            transport._out.notify()

    def die(self) -> None:
        """As SIGKILL: connections break, new ones are refused."""
        self.dead = True
        self.reset()

    async def serve(
        self,
        host: str,
        port: int,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Bound] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async def take(transport: Transport) -> None:
            assert isinstance(transport, MemoryTransport)
            if self.dead:
                transport.reset()
                return
            if self.stopped:
                _stop(transport)
            self.transports.append(transport)
            try:
                await accept(transport)
            finally:
                if transport in self.transports:
                    self.transports.remove(transport)

        await super().serve(host, port, take, task_status=task_status)


def _stop(transport: MemoryTransport) -> None:
    """Nothing is read, and what this end writes does not arrive."""
    transport.freeze()
    transport._out.frozen = True


@dataclass
class Place:
    """One server of the world. `heard_at` is when the client last learnt that it is alive."""

    server: BlockServer
    endpoint: Endpoint
    host: Host
    address: Address
    rate: float
    heard_at: float = 0.0

    @property
    def peer(self) -> PeerId:
        return self.endpoint.peer_id

    @property
    def up(self) -> bool:
        return not (self.host.dead or self.host.stopped)


class KnowingDirectory(Directory):
    """Believes every server of the world to be online until told otherwise: news of a failure comes late."""

    def __init__(self, endpoint: Endpoint, places: Sequence[Place]) -> None:
        super().__init__(endpoint)
        self.places = places

    def snapshot(self, model: bytes) -> Snapshot | None:
        now = trio.current_time()
        servers = []
        for place in self.places:
            info = dataclasses.replace(
                place.server.describe(), decode_rate=int(place.rate), batch_rate=int(place.rate), state="online"
            )
            servers.append(server_info(place.peer, info, {}, now - place.heard_at))
        config = self.places[0].server.span.config
        return Snapshot(
            model=model.hex(),
            layers=config.n_layer,
            token_bits=config.hidden_size * 32,
            servers=tuple(servers),
            taken_at=now,
        )

    def addresses_of(self, peer: PeerId) -> list[Address]:
        return [place.address for place in self.places if place.peer == peer]

    async def refresh(self) -> None:
        await trio.lowlevel.checkpoint()
        for place in self.places:
            if place.up:
                place.heard_at = trio.current_time()


Tap = Callable[[Place, Call, Handler], Awaitable[Reply]]
"""What stands between a server and its handlers: may answer in their place."""


async def no_tap(place: Place, call: Call, handler: Handler) -> Reply:
    return await handler(call)


class World:
    """Made by `open_world`. `places` in the order of the spans given; `notices` are the lines a user would see."""

    def __init__(
        self,
        parts: Parts,
        net: MemoryNet,
        nursery: trio.Nursery,
        tap: Tap,
        randbytes: Callable[[int], bytes],
        host: Callable[[MemoryNet, str], Host],
    ) -> None:
        self.parts = parts
        self.places: list[Place] = []
        self.notices: list[str] = []
        self.net = net
        self._nursery = nursery
        self._tap = tap
        self._randbytes = randbytes
        self._host = host

    async def add(
        self, start: int, end: int, rate: float, *, push: bool, idle_seconds: float, session_seconds: float
    ) -> Place:
        """One more server."""
        name = f"10.0.{len(self.places)}.1"
        host = self._host(self.net, name)
        server = BlockServer(
            self.parts.span(start, end),
            self.parts.local.manifest,
            self.parts.local.name,
            cache_tokens=CACHE_TOKENS,
            idle_seconds=session_seconds,
            runner=run_blocks_inline,
            here=lambda function: function(),
        )
        endpoint = await self._nursery.start(self._run_server, server, host, idle_seconds)
        (address,) = await endpoint.listen(name, 0)
        place = Place(server, endpoint, host, address, rate)
        endpoint.handlers.update({method: self._tapped(place, each) for method, each in server.methods.items()})
        if push:
            server.pusher.enable(endpoint.peer_id, self._sender(endpoint), endpoint.connected)
        self.places.append(place)
        return place

    async def _run_server(
        self, server: BlockServer, host: Host, idle_seconds: float, task_status: trio.TaskStatus[Endpoint]
    ) -> None:
        async with (
            open_endpoint(Identity.generate(self._randbytes), carrier=host, idle_seconds=idle_seconds) as endpoint,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(server.run)
            task_status.started(endpoint)

    def _tapped(self, place: Place, handler: Handler) -> Handler:
        async def answer(call: Call) -> Reply:
            return await self._tap(place, call, handler)

        return answer

    def _sender(self, endpoint: Endpoint) -> Send:
        async def send(
            peer: PeerId, method: str, head: Mapping[str, Any], body: Sequence[Buffer], priority: Priority, /
        ) -> None:
            connection = await endpoint.connect(*(place.address for place in self.places if place.peer == peer))
            await connection.request(method, head, body, priority=priority)

        return send

    @asynccontextmanager
    async def client(
        self, *, push: bool = True, wire: str = "f32", idle_seconds: float = 10.0
    ) -> AsyncIterator[RemoteModel]:
        """The model as a client of this world sees it."""
        host = self._host(self.net, "10.1.0.1")
        async with (
            open_endpoint(Identity.generate(self._randbytes), carrier=host, idle_seconds=idle_seconds) as endpoint,
            trio.open_nursery() as nursery,
        ):
            node = Node(endpoint, nursery, ())
            node.directory = KnowingDirectory(endpoint, self.places)
            yield RemoteModel(
                node, self.parts.local, wire=wire, notice=self.notices.append, push=push, runner=run_inline
            )

    def place_of(self, peer: PeerId) -> Place:
        return next(place for place in self.places if place.peer == peer)

    def cache_left_over(self) -> int:
        """Token slots that are still reserved anywhere."""
        return sum(place.server.pool.capacity - place.server.pool.free for place in self.places)


@asynccontextmanager
async def open_world(
    parts: Parts,
    spans: Sequence[tuple[int, int]],
    spares: Sequence[tuple[int, int]] = (),
    *,
    tap: Tap = no_tap,
    push: bool = True,
    idle_seconds: float = 10.0,
    session_seconds: float = limits.SESSION_IDLE_SECONDS,
    net: MemoryNet | None = None,
    randbytes: Callable[[int], bytes] = os.urandom,
    host: Callable[[MemoryNet, str], Host] = Host,
) -> AsyncIterator[World]:
    """Servers of `spans`, and slower ones of `spares`, which are used when the others fail.

    Connections are closed after `idle_seconds` without use, sessions dropped after `session_seconds`.
    `randbytes` decides who everybody is, `host` what their machines are like.
    """
    async with trio.open_nursery() as nursery:
        world = World(parts, net or MemoryNet(), nursery, tap, randbytes, host)
        for rate, group in ((1000.0, spans), (1.0, spares)):
            for start, end in group:
                await world.add(start, end, rate, push=push, idle_seconds=idle_seconds, session_seconds=session_seconds)
        yield world
        nursery.cancel_scope.cancel()


async def tell(
    model: Model,
    prompt: Sequence[int],
    tokens: int,
    *,
    before: Callable[[int, InferenceSession], None] = lambda token, session: None,
    speculate: bool = False,
) -> list[int]:
    """Greedy continuation; `before(i, session)` is called before what brings token i is sent, or is looked at."""
    generation = Generation(max_new_tokens=tokens, speculate=speculate)
    seen = list(prompt)
    async with model.session(max_len=len(prompt) + tokens) as session:
        before(0, session)
        logits = await prefill(model, session, [seen])
        told: list[int] = []
        async with aclosing(decode_tokens(model, session, logits, [seen], generation)) as decoding:
            async for (token,) in decoding:
                told.append(token)
                if len(told) == tokens:
                    break
                before(len(told), session)
    return told
