"""Steps on a device that works while others do, by a stand-in for one: as bytes where they only append."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from petalite.bloom.span import Part, RawRows, Span, Underway
from petalite.errors import ErrorCode, RequestError
from petalite.server.blockserver import BlockServer
from petalite.server.executor import run_in_thread
from petalite.server.scheduler import Job

CLOSE = {"rtol": 0, "atol": 1e-5}


@dataclass
class _Later:
    """Done once it has been asked often enough; raises where there is an error instead of a value."""

    value: Any
    asked: int = 0

    def done(self) -> bool:
        self.asked += 1
        return self.asked > 3

    def result(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class DeviceSpan(Span):
    """Counts how its batches came; `breaks` says what the next ones from bytes end with."""

    asynchronous = True

    def __init__(self, span: Span, most_rows: int = 3) -> None:
        super().__init__(span.config, span.start, span.end, span.layers)
        self.most_rows = most_rows
        self.raw: list[int] = []
        self.tensors: list[int] = []
        self.breaks: list[Exception] = []

    def begin_batch(self, inputs: Sequence[Tensor], parts: Sequence[Part]) -> Underway[Tensor]:
        self.tensors.append(len(parts))
        return _Later(self.step_batch(torch.cat(list(inputs)), parts))

    def begin_raw(self, inputs: Sequence[bytearray], parts: Sequence[Part]) -> Underway[list[RawRows]] | None:
        sizes = [part.rows.batch for part in parts]
        if sum(sizes) > self.most_rows:
            return None
        self.raw.append(len(parts))
        if self.breaks:
            return _Later(self.breaks.pop())
        values = torch.frombuffer(bytearray(b"".join(inputs)), dtype=self.dtype).view(sum(sizes), -1)
        outputs = torch.split(self.step_batch(values, parts), sizes)
        return _Later([RawRows(x.numpy().tobytes(), bool(torch.isfinite(x.sum()))) for x in outputs])


@dataclass
class Device:
    server: BlockServer
    span: DeviceSpan = field(init=False)

    def __post_init__(self) -> None:
        self.span = DeviceSpan(self.server.span)
        for key in list(self.server._subspans):
            self.server._subspans[key] = self.span
        self.server.span = self.span


@pytest.fixture
async def device(make_server: Any) -> Device:
    return Device(await make_server(here=lambda function: function()))


async def test_decode_steps_go_as_bytes_and_prefills_do_not(tools: Any, device: Device) -> None:
    client = tools.Client(device.server)
    await client.open()
    x = tools.hidden(12)
    output = [await client.run(x[:, :5], 0, 0), await client.run(x[:, 5:8], 1, 5)]
    output += [await client.run(x[:, i : i + 1], i - 6, i) for i in range(8, 12)]
    torch.testing.assert_close(torch.cat(output, 1), tools.make_span()(x), **CLOSE)
    assert device.span.raw == [1, 1, 1, 1]
    assert device.span.tensors == [1, 1]


async def test_a_lone_step_is_with_the_device_at_once(tools: Any, device: Device, monkeypatch: Any) -> None:
    """From the second on: the first one tells how long they take."""
    executor, begun = device.server.executor, []
    add = executor.add

    def noted(job: Job) -> None:
        before = len(device.span.raw)
        add(job)
        begun.append(len(device.span.raw) - before)

    monkeypatch.setattr(executor, "add", noted)
    client = tools.Client(device.server)
    await client.open()
    x = tools.hidden(3)
    outputs = []
    for i in range(3):
        await trio.testing.wait_all_tasks_blocked()
        outputs.append(await client.run(x[:, i : i + 1], i, i))
    torch.testing.assert_close(torch.cat(outputs, 1), tools.make_span()(x), **CLOSE)
    assert begun == [0, 1, 1]


async def test_rows_of_several_sessions_share_a_batch(tools: Any, device: Device) -> None:
    clients = [tools.Client(device.server, peer) for peer in (tools.ALICE, tools.BOB)]
    inputs = [tools.hidden(6, batch=1 + i, seed=i) for i in range(2)]
    outputs: list[list[Tensor]] = [[], []]

    async def decode(i: int) -> None:
        await clients[i].open(batch=1 + i)
        for n in range(6):
            outputs[i].append(await clients[i].run(inputs[i][:, n : n + 1], n, n))

    async with trio.open_nursery() as nursery:
        for i in range(2):
            nursery.start_soon(decode, i)
    for i in range(2):
        torch.testing.assert_close(torch.cat(outputs[i], 1), tools.make_span()(inputs[i]), **CLOSE)
    assert 2 in device.span.raw


async def test_more_rows_than_a_device_takes_go_as_tensors(tools: Any, device: Device) -> None:
    device.span.most_rows = 0
    client = tools.Client(device.server)
    await client.open()
    x = tools.hidden(2)
    output = torch.cat([await client.run(x[:, i : i + 1], i, i) for i in range(2)], 1)
    torch.testing.assert_close(output, tools.make_span()(x), **CLOSE)
    assert device.span.tensors == [1, 1]


async def test_a_retry_gets_the_same_answer(tools: Any, device: Device) -> None:
    client = tools.Client(device.server)
    await client.open()
    x = tools.hidden(1)
    first, second = await client.step(x, 0, 0), await client.step(x, 0, 0)
    assert (first.head, b"".join(first.body)) == (second.head, b"".join(second.body))
    assert device.span.raw == [1]


async def test_what_is_not_finite_is_refused_and_leaves_the_cache_as_it_was(tools: Any, device: Device) -> None:
    client, plain = tools.Client(device.server), tools.make_span()
    await client.open()
    x = tools.hidden(4)
    bad = bytearray(x[:, :1].numpy().tobytes())
    bad[0:4] = b"\0\0\xc0\x7f"  # a NaN
    for i in range(3):
        await client.run(x[:, i : i + 1], i, i)
    for position in (3, 1):  # appending, and rolling back
        message, _ = tools.step_message(x[:, :1], 3, position)
        with pytest.raises(RequestError, match="NaN or infinity") as caught:
            await client.request("step", message, bad)
        assert caught.value.code == ErrorCode.TENSOR
    torch.testing.assert_close(await client.run(x[:, 3:], 3, 3), plain(x)[:, 3:], **CLOSE)


async def test_finite_numbers_whose_sum_is_not_are_looked_at(tools: Any, device: Device, monkeypatch: Any) -> None:
    monkeypatch.setattr(RawRows, "__init__", _never_finite)
    client = tools.Client(device.server)
    await client.open()
    x = tools.hidden(1)
    torch.testing.assert_close(await client.run(x, 0, 0), tools.make_span()(x), **CLOSE)


def _never_finite(rows: RawRows, data: bytes, finite: bool) -> None:
    object.__setattr__(rows, "data", data)
    object.__setattr__(rows, "finite", False)


async def test_steps_that_roll_back_or_reorder_go_as_tensors(tools: Any, device: Device) -> None:
    client = tools.Client(device.server)
    await client.open(batch=2)
    x = tools.hidden(3, batch=2)
    await client.run(x[:, :1], 0, 0)
    await client.run(x[:, 1:2], 1, 1)
    rolled = await client.run(x[:, 1:2], 2, 1)
    torch.testing.assert_close(rolled, tools.make_span()(x[:, :2])[:, 1:], **CLOSE)
    swapped = await client.run(x[:, 2:], 3, 2, hypo=(1, 0))
    torch.testing.assert_close(swapped, tools.make_span()(torch.cat([x[[1, 0], :2], x[:, 2:]], 1))[:, 2:], **CLOSE)
    assert device.span.raw == [1, 1]


async def test_a_batch_that_fails_on_the_device_is_run_again_one_by_one(tools: Any, device: Device) -> None:
    client = tools.Client(device.server)
    await client.open()
    device.span.breaks.append(RuntimeError("the device is in a bad mood"))
    x = tools.hidden(2)
    output = torch.cat([await client.run(x[:, i : i + 1], i, i) for i in range(2)], 1)
    torch.testing.assert_close(output, tools.make_span()(x), **CLOSE)
    assert (device.span.raw, device.span.tensors) == ([1, 1], [1])


async def test_the_loop_sleeps_while_a_worker_needs_the_interpreter(tools: Any, make_server: Any) -> None:
    """A prefill right behind decode steps: beside a loop that is awake, launching it takes several times as long."""
    device = Device(await make_server(here=lambda function: function(), runner=run_in_thread))
    client = tools.Client(device.server)
    await client.open(max_len=64)
    x = tools.hidden(60)
    outputs = [await client.run(x[:, i : i + 1], i, i) for i in range(10)]
    waits: list[float] = []

    class Waits(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            waits.append(timeout)

    instrument = Waits()
    trio.lowlevel.add_instrument(instrument)
    outputs.append(await client.run(x[:, 10:], 10, 10))
    trio.lowlevel.remove_instrument(instrument)
    torch.testing.assert_close(torch.cat(outputs, 1), tools.make_span()(x), **CLOSE)
    assert any(timeout > 0 for timeout in waits)
    assert len(waits) < 100
