"""A small random span, a block server that computes inline, and requests without a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
import trio.testing

from petalite import bridge
from petalite.bloom.blocks import Block
from petalite.bloom.config import BloomConfig
from petalite.bloom.manifest import Manifest
from petalite.bloom.span import Span
from petalite.identity import PeerId
from petalite.net.call import Call, Reply
from petalite.server.blockserver import BlockServer
from petalite.server.executor import run_inline
from petalite.server.scheduler import Scheduler
from petalite.wire import messages, packing

CONFIG = BloomConfig(hidden_size=32, n_head=4, n_layer=4, vocab_size=11)
MANIFEST = Manifest(CONFIG, {})
MODEL = MANIFEST.model_id
ALICE, BOB, EVE = (PeerId(letter * 32) for letter in (b"a", b"b", b"e"))


def sid(number: int) -> bytes:
    return number.to_bytes(16, "big")


def make_span(start: int = 0, end: int = 4, seed: int = 0) -> Span:
    """Blocks [start, end) of one random model: the same block has the same weights whatever the span."""
    blocks = []
    for index in range(start, end):
        torch.manual_seed(1000 * seed + index)
        blocks.append(Block(CONFIG))
    return Span(CONFIG, start, end, blocks).requires_grad_(False)


def hidden(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def open_message(number: int = 1, **changes: Any) -> messages.Open:
    fields: dict[str, Any] = {
        "sid": sid(number),
        "model": MODEL,
        "blocks": (0, 4),
        "max_len": 16,
        "batch": 1,
        "dtype": "f32",
        "codec": "raw",
    }
    return messages.Open(**(fields | changes))


def step_message(x: torch.Tensor, n: int, pos: int, number: int = 1, **changes: Any) -> tuple[messages.Step, bytearray]:
    descriptor, body = bridge.to_wire(x, "f32")
    return messages.Step(sid=sid(number), n=n, pos=pos, tensors=(descriptor,), **changes), joined(body)


def joined(body: Any) -> bytearray:
    return bytearray(b"".join(bytes(piece) for piece in body))


def received(reply: Reply) -> Reply:
    """As it is after its way over the wire."""
    return dataclasses.replace(reply, head=packing.decode(packing.encode(dict(reply.head))))


def output_of(reply: Reply) -> torch.Tensor:
    descriptor = messages.StepReply.from_wire(dict(reply.head)).tensors[0]
    return bridge.from_wire(descriptor, joined(reply.body))


@dataclass
class Client:
    """One peer's requests to one server, as messages; `progress` of the last one can be looked at."""

    server: BlockServer
    peer: PeerId = ALICE
    calls: list[Any] = field(default_factory=list)

    async def request(
        self, method: str, head: messages.Message | Mapping[str, Any], body: bytearray | None = None
    ) -> Reply:
        return received(await self.begin(method, head, body))

    def begin(
        self, method: str, head: messages.Message | Mapping[str, Any], body: bytearray | None = None
    ) -> Awaitable[Reply]:
        """What the handler returns."""
        fields = packing.decode(packing.encode(head.to_wire() if isinstance(head, messages.Message) else dict(head)))
        request: Any = SimpleNamespace(progress={"s": "running"})  # all that a call needs of its stream
        self.calls.append(request)
        call = Call(self.peer, method, fields, body or bytearray(), request, trio.current_effective_deadline())
        return self.server.methods[method](call)

    async def open(self, number: int = 1, **changes: Any) -> Reply:
        return await self.request("open", open_message(number, **changes))

    async def step(self, x: torch.Tensor, n: int, pos: int, number: int = 1, **changes: Any) -> Reply:
        return await self.request("step", *step_message(x, n, pos, number, **changes))

    async def run(self, x: torch.Tensor, n: int, pos: int, number: int = 1, **changes: Any) -> torch.Tensor:
        """The output of a step."""
        return output_of(await self.step(x, n, pos, number, **changes))

    async def status(self, number: int = 1) -> tuple[int, int, int]:
        reply = messages.StatusReply.from_wire(
            dict((await self.request("status", messages.Status(sid=sid(number)))).head)
        )
        return reply.n, reply.pos, reply.max_len

    async def close(self, number: int = 1) -> Reply:
        return await self.request("close", messages.Close(sid=sid(number)))


class HeldRunner:
    """A runner that lets the model run only when told: `step()` runs what waits in it, inline."""

    def __init__(self) -> None:
        self.entered = 0
        self._gate = trio.Semaphore(0)
        self.open = False

    async def __call__(self, function: Callable[[], None], /) -> None:
        self.entered += 1
        if not self.open:
            await self._gate.acquire()
        function()

    async def step(self) -> None:
        """Let one batch through, and wait until everybody has heard of it."""
        self._gate.release()
        await trio.testing.wait_all_tasks_blocked()

    def let_go(self) -> None:
        self.open = True
        self._gate.release()


@pytest.fixture
def tools() -> Any:
    """All of the above: this file is no module that a test could import."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})


@pytest.fixture
def make_server(nursery: trio.Nursery, request: Any, monkeypatch: Any) -> Callable[..., Any]:
    """await make_server(cache_tokens=..., runner=...) -> a running BlockServer of the random model.

    Where the fixture's parameter is "alone", a server without a `runner` of its own runs brief steps as soon as they
    come, where nobody shares the model with them.
    """
    alone = getattr(request, "param", "queued") == "alone"
    if alone:  # by a clock that stands still nothing is known to be brief
        monkeypatch.setattr(Scheduler, "brief", True)

    async def make(start: int = 0, end: int = 4, *, cache_tokens: int = 64, **options: Any) -> BlockServer:
        if alone and "runner" not in options:
            options["here"] = lambda function: function()
        options.setdefault("runner", run_inline)
        server = BlockServer(make_span(start, end), MANIFEST, "random", cache_tokens=cache_tokens, **options)
        await nursery.start(server.run)
        return server

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
