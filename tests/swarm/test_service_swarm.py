"""Servers that choose, announce and move by themselves, and a client that follows: a swarm in memory."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import torch
import trio
from trio.testing import MockClock

import petalite
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import load_or_make
from petalite.bloom.packed import PackedLinear, pack
from petalite.client.api import RemoteModel
from petalite.errors import PeerSilent, PetaliteError, RemoteProtocolError
from petalite.identity import Address, Identity
from petalite.models import find_model
from petalite.server.executor import run_inline
from petalite.server.service import Service, ServiceOptions
from petalite.swarm.node import Node, open_node
from petalite.swarm.snapshot import Span
from petalite.testing import MemoryNet

DIRECTORY = find_model("fairytale")
CONFIG = BloomConfig.load(DIRECTORY)
MANIFEST = load_or_make(DIRECTORY)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a worker thread works, the mock clock would run away: deadlines would pass that nobody waited for."""

    async def run_here(function: Callable[..., object], *arguments: object, **options: object) -> object:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)


def options(blocks: tuple[int, int] | None, capacity: int, **changes: object) -> ServiceOptions:
    fields = {
        "directory": DIRECTORY,
        "config": CONFIG,
        "manifest": MANIFEST,
        "name": "fairytale",
        "blocks": blocks,
        "capacity": capacity,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "quantize": None,
        "cache_tokens": lambda blocks: 2048,
        "spare_blocks": lambda: 8,
        **changes,
    }
    return ServiceOptions(**fields)  # type: ignore[arg-type]


@dataclass
class Server:
    node: Node
    service: Service
    scope: trio.CancelScope

    @property
    def address(self) -> Address:
        return self.service.addresses[0]

    @property
    def blocks(self) -> tuple[int, int]:
        described = self.service.describe()
        assert described is not None
        return described.blocks

    def kill(self) -> None:
        self.scope.cancel()


class Swarm:
    """Servers on hosts 10.0.0.N of one memory network."""

    def __init__(self, nursery: trio.Nursery, subnet: str = "10.0") -> None:
        self.net = MemoryNet()
        self.subnet = subnet
        self.servers: list[Server] = []
        self._nursery = nursery

    async def serve(
        self,
        blocks: tuple[int, int] | None = None,
        capacity: int = 4,
        peers: Sequence[Address] = (),
        **changes: object,
    ) -> Server:
        server: Server = await self._nursery.start(self._run, options(blocks, capacity, **changes), list(peers))
        self.servers.append(server)
        return server

    async def _run(
        self, wanted: ServiceOptions, peers: Sequence[Address], task_status: trio.TaskStatus[Server]
    ) -> None:
        number = len(self.servers) + 1 + random.randrange(1, 200)
        host = f"{self.subnet}.{number}.{len(self.servers) + 1}"
        with trio.CancelScope() as scope:
            async with (
                open_node(Identity.generate(), peers=peers, carrier=self.net.host(host)) as node,
                trio.open_nursery() as nursery,
            ):
                service = Service(node, wanted, rng=random.Random(1), runner=run_inline)
                node.endpoint.handlers.update(service.methods)
                service.addresses = await node.endpoint.listen(host, 31337)
                await node.start(lan=False, addresses=service.addresses)
                await nursery.start(service.run)
                task_status.started(Server(node, service, scope))
                await trio.sleep_forever()

    @asynccontextmanager
    async def client(self, *peers: Address) -> AsyncIterator[RemoteModel]:
        async with petalite.join(peers=peers, carrier=self.net.host("10.9.9.9")) as joined:
            yield await joined.load("fairytale", wire="f32")


@asynccontextmanager
async def open_swarm(subnet: str = "10.0") -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery, subnet)
        nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def told_alone() -> list[int]:
    """The greedy tokens of a plain local loop over all blocks."""
    from petalite.client.parts import load_local_parts

    parts = load_local_parts("fairytale")
    span = load_span(DIRECTORY, 0, CONFIG.n_layer)
    tokens = list(parts.tokenizer.encode("Once upon a time").ids)
    with torch.inference_mode():
        for _ in range(24):
            logits = parts.head(span(parts.embeddings(torch.tensor([tokens]))))[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens


def text_of(model: RemoteModel, tokens: list[int]) -> str:
    return model.decode(tokens[-24:])


async def test_servers_share_the_blocks_and_a_client_finds_them_through_any_one(
    clock: MockClock, told_alone: list[int]
) -> None:
    async with open_swarm() as swarm:
        first = await swarm.serve()
        second = await swarm.serve(peers=[first.address])
        third = await swarm.serve(peers=[second.address])
        assert {first.blocks, second.blocks} == {(0, 4), (4, 8)}
        assert third.blocks in {(0, 4), (4, 8), (2, 6), (1, 5), (3, 7)}
        loaded = first.service.current
        assert loaded
        assert pack(loaded.span) or any(isinstance(part, PackedLinear) for part in loaded.span.modules())
        async with swarm.client(third.address) as model:
            text = await model.generate_text("Once upon a time", max_new_tokens=24)
            assert text == text_of(model, told_alone)


async def test_starters_at_the_same_moment_do_not_take_the_same_blocks(clock: MockClock) -> None:
    async with open_swarm() as swarm:
        middle = await swarm.serve(blocks=(0, 1))
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(swarm_serve, swarm, middle.address)
        spans = sorted(server.blocks for server in swarm.servers[1:])
        covered = {block for start, end in [*spans, middle.blocks] for block in range(start, end)}
        assert covered == set(range(8)), spans


async def swarm_serve(swarm: Swarm, peer: Address) -> None:
    await swarm.serve(peers=[peer])


async def test_server_moves_to_close_the_gap_that_a_dead_one_leaves(clock: MockClock, told_alone: list[int]) -> None:
    async with open_swarm() as swarm:
        root = await swarm.serve(blocks=(0, 4))
        tail = await swarm.serve(blocks=(4, 8), peers=[root.address])
        spare = await swarm.serve(capacity=4, peers=[root.address])
        before = spare.blocks
        victim = tail if before == (0, 4) else root if before == (4, 8) else tail
        victim.kill()
        with trio.fail_after(200):
            while not covers(spare, victim):
                await trio.sleep(1)
        async with swarm.client(spare.address) as model:
            text = await model.generate_text("Once upon a time", max_new_tokens=24)
            assert text == text_of(model, told_alone)


def covers(server: Server, victim: Server) -> bool:
    described = server.service.describe()
    assert described is not None
    return described.state == "online" and Span(*described.blocks).holds(Span(*victim.blocks))


async def test_dead_server_leaves_a_running_clients_directory_within_five_seconds(clock: MockClock) -> None:
    async with open_swarm() as swarm:
        root = await swarm.serve(blocks=(0, 8))
        other = await swarm.serve(blocks=(4, 8), peers=[root.address])
        async with swarm.client(root.address) as model:
            directory = model.node.directory
            with trio.fail_after(30):
                while other.node.endpoint.peer_id not in {s.peer for s in seen(model)}:
                    directory.touch()
                    await trio.sleep(0.5)
            other.kill()
            started = trio.current_time()
            while other.node.endpoint.peer_id in {s.peer for s in seen(model)}:
                directory.touch()
                await trio.sleep(0.1)
            assert trio.current_time() - started <= 5


async def test_a_server_that_gave_no_sign_of_life_is_out_until_it_answers(clock: MockClock) -> None:
    async with open_swarm() as swarm:
        root = await swarm.serve(blocks=(0, 8))
        peer = root.node.endpoint.peer_id
        async with swarm.client(root.address) as model:
            node = model.node
            await node.directory.refresh()
            node.failed(peer, RemoteProtocolError("nonsense"))
            assert [server.peer for server in seen(model)] == [peer] and not node.directory.suspicion(peer)
            node.failed(peer, PeerSilent("no sign of life for 2.0 s"))
            assert not seen(model) and "no sign of life" in node.directory.suspicion(peer)
            await trio.sleep(1)
            assert [server.peer for server in seen(model)] == [peer] and not node.directory.suspicion(peer)


# On one's own networks servers are asked every two seconds; far ones through the DHT alone.
@pytest.mark.parametrize(("subnet", "seconds"), [("10.0", 5), ("45.7", 30)])
async def test_running_client_sees_servers_appear_move_and_die(clock: MockClock, subnet: str, seconds: float) -> None:
    async with open_swarm(subnet) as swarm:
        root = await swarm.serve(blocks=(0, 8))
        async with swarm.client(root.address) as model:
            other = await swarm.serve(blocks=(4, 8), peers=[root.address])
            peer = other.node.endpoint.peer_id

            async def until(wanted: tuple[int, int] | None) -> float:
                started = trio.current_time()
                while {s.peer: (s.blocks.start, s.blocks.end) for s in seen(model)}.get(peer) != wanted:
                    model.node.directory.touch()
                    await trio.sleep(0.1)
                return trio.current_time() - started

            assert await until((4, 8)) <= 30  # through the DHT; a LAN tells at once
            moved = dataclasses.replace(other.service.describe(), blocks=(3, 8))  # type: ignore[type-var]
            other.service.describe = lambda: moved  # type: ignore[method-assign]
            assert await until((3, 8)) <= seconds
            other.kill()
            assert await until(None) <= seconds


def seen(model: RemoteModel) -> Sequence[object]:
    snapshot = model.node.directory.snapshot(model.model_id)
    return snapshot.servers if snapshot else ()


async def test_records_of_another_checkpoint_are_not_mixed_in(clock: MockClock) -> None:
    async with open_swarm() as swarm:
        root = await swarm.serve(blocks=(0, 8))
        async with swarm.client(root.address) as model:
            directory = model.node.directory
            stranger = Identity.generate().peer_id
            described = root.service.describe()
            assert described is not None
            value = {**described.to_wire(), "model": bytes(32)}
            directory._take_record(stranger, 1, 2**60, value, model.model_id)
            assert stranger not in directory.entries
            wrong_shape = {**described.to_wire(), "layers": 9}
            directory._take_record(stranger, 1, 2**60, wrong_shape, model.model_id)
            assert stranger not in {server.peer for server in seen(model)}


async def test_servers_push_to_each_other_when_they_know_where(clock: MockClock, told_alone: list[int]) -> None:
    async with open_swarm() as swarm:
        first = await swarm.serve(blocks=(0, 4))
        second = await swarm.serve(blocks=(4, 8), peers=[first.address])
        pushed: list[str] = []
        handler = second.node.endpoint.handlers["push"]

        async def counting(call: petalite.net.call.Call) -> petalite.net.call.Reply:  # type: ignore[name-defined]
            pushed.append(call.method)
            return await handler(call)

        second.node.endpoint.handlers["push"] = counting
        async with swarm.client(first.address) as model:
            text = await model.generate_text("Once upon a time", max_new_tokens=24)
            assert text == text_of(model, told_alone)
        assert len(pushed) >= 20


async def test_error_in_a_joined_block_leaves_as_itself(clock: MockClock) -> None:
    with pytest.raises(PetaliteError, match="no peer is known"):
        async with petalite.join(lan=False, carrier=MemoryNet().host("10.9.9.9")) as joined:
            await joined.load("fairytale")
