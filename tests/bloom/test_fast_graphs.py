"""What goes into graphs and comes out of them, by graphs that compute on the host when replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from petalite.bloom import graphs
from petalite.bloom.cache import CachePool, Rows
from petalite.bloom.config import BloomConfig
from petalite.bloom.fast import FastSpan, _with_sums
from petalite.bloom.graphs import BATCHES, Graph, capture
from petalite.bloom.span import Part, Span
from petalite.bloom.synthetic import random_span

CONFIG = BloomConfig(hidden_size=64, n_head=4, n_layer=2, vocab_size=101)


class _Replayed:
    """Computes on the rows that `given` tells of, found as the kernels find them."""

    def __init__(self, span: FastSpan, pool: CachePool, given: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
        self.span, self.pool, self.given, self.taken = span, pool, given, taken

    def replay(self) -> None:
        hidden, meta = self.given
        parts = []
        for base, length, position, first in meta.T.tolist():
            offset = base // CONFIG.hidden_size
            views = self.pool._views(offset, 1, length, slice(None))
            rows = Rows(self.pool, offset, 1, length, [position], views, slice(None))
            parts.append(Part(rows, 1, position, [first]))
        outputs = [Span.step_batch(self.span, hidden[i : i + 1], [part]) for i, part in enumerate(parts)]
        for into, result in zip(self.taken, _with_sums(torch.cat(outputs)), strict=True):
            into.copy_(result)


class _Over:
    """An event that has come when it has been asked for twice."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self, stream: object) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None:
        self.asked = 2


def _pool() -> CachePool:
    return CachePool(CONFIG, CONFIG.n_layer, 512, dtype=torch.bfloat16)


@pytest.fixture
def fast() -> tuple[FastSpan, CachePool]:
    pool = _pool()
    span = FastSpan(random_span(CONFIG, 0, 2, dtype=torch.bfloat16, device="cpu"), pool, None)
    for arena in pool.arenas:
        arena.normal_()
    span._spare = pool.reserve(1, 1).offset
    for batch in BATCHES:
        given = (torch.zeros(batch, 64, dtype=torch.bfloat16), torch.zeros(4, batch, dtype=torch.int64))
        taken = (torch.zeros(batch, 64, dtype=torch.bfloat16), torch.zeros(batch))
        span._graphs[batch] = Graph(given, taken, _Replayed(span, pool, given, taken), _Over(), None, None)
    return span, pool


def _parts(pool: CachePool, sizes: Sequence[int]) -> list[Part]:
    return [Part(pool.reserve(size, 20 + i), 1, 3 + i, [i % 3] * size) for i, size in enumerate(sizes)]


def _host_kernel(span: FastSpan, pool: CachePool, spoil: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(hidden: Tensor, meta: Tensor) -> Tensor:
        taken = (torch.zeros_like(hidden), torch.zeros(len(hidden)))
        _Replayed(span, pool, (hidden, meta), taken).replay()
        return spoil(taken[0])

    return run


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_kernel_is_tried_before_it_is_used(fast: tuple[FastSpan, CachePool], batch: int) -> None:
    span, pool = fast
    free = pool.free
    span._prove(_host_kernel(span, pool, lambda output: output), batch)
    spoilt: list[Callable[[Tensor], Tensor]] = [
        torch.zeros_like, lambda output: 1.2 * output, lambda output: output * float("nan"),
        lambda output: output.roll(1, dims=1), lambda output: torch.cat([output[:-1], -output[-1:]]),
    ]  # fmt: skip
    for spoil in spoilt:
        with pytest.raises(RuntimeError, match="off by"):
            span._prove(_host_kernel(span, pool, spoil), batch)
    assert pool.free == free


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (2, 1), (3, 4, 1), (5, 6), (16,)])
def test_bytes_and_tensors_come_to_the_same(fast: tuple[FastSpan, CachePool], sizes: tuple[int, ...]) -> None:
    span, pool = fast
    parts = _parts(pool, sizes)
    inputs = [torch.randn(size, 64).to(torch.bfloat16) for size in sizes]
    wanted = Span.step_batch(span, torch.cat(inputs), parts)
    bodies = [bytearray(x.view(torch.int16).numpy().tobytes()) for x in inputs]
    raw = span.begin_raw(bodies, parts)
    assert raw is not None
    assert not raw.done()
    assert raw.done()
    outputs = raw.result()
    assert [len(rows.data) for rows in outputs] == [128 * size for size in sizes]
    assert all(rows.finite for rows in outputs)
    output = torch.frombuffer(bytearray(b"".join(rows.data for rows in outputs)), dtype=torch.bfloat16).view(-1, 64)
    torch.testing.assert_close(output, wanted, rtol=0, atol=0.1)
    assert torch.equal(span.begin_batch(inputs, parts).result(), output)


def test_rows_that_are_not_finite_are_told_from_others(fast: tuple[FastSpan, CachePool]) -> None:
    span, pool = fast
    parts = _parts(pool, (1, 2, 1))
    inputs = torch.randn(4, 64).to(torch.bfloat16)
    inputs[2, 5] = float("inf")
    body = inputs.view(torch.int16).numpy().tobytes()
    bodies = [bytearray(body[:128]), bytearray(body[128:384]), bytearray(body[384:])]
    raw = span.begin_raw(bodies, parts)
    assert raw is not None
    assert [rows.finite for rows in raw.result()] == [True, False, True]


def test_what_is_no_decode_step_is_not_begun(fast: tuple[FastSpan, CachePool]) -> None:
    span, pool = fast
    (part,) = _parts(pool, (1,))
    body = bytearray(128)
    prompts = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    assert span.begin_raw([body], [Part(part.rows, 1, 3, None, prompts)]) is None
    assert span.begin_raw([body], [Part(_pool().reserve(1, 20), 1, 3)]) is None
    assert span.begin_raw([body] * 2, [Part(pool.reserve(2, 20), 2, 3)]) is None
    assert span.begin_raw([body] * 17, _parts(pool, (9, 8))) is None


class _Device:
    """Stands for `torch.cuda`, and knows whether a stream is captured, during which no graph may be destroyed."""

    def __init__(self) -> None:
        self.capturing = False
        self.destroyed_while_capturing: list[bool] = []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.cuda = SimpleNamespace(
            Stream=lambda device: stream,
            Event=_Over,
            CUDAGraph=object,
            current_stream=lambda device: stream,
            stream=lambda aside: nullcontext(),
            synchronize=lambda device: None,
            graph=self.graph,
        )

    @contextmanager
    def graph(self, graph: object, capture_error_mode: str) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


class _Span:
    """Of the way a span is that nobody uses any more: in a cycle, with graphs that go with it."""

    def __init__(self, device: _Device) -> None:
        self.device, self.itself = device, self

    def __del__(self) -> None:
        self.device.destroyed_while_capturing.append(self.device.capturing)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> _Device:
    made = _Device()
    monkeypatch.setattr(graphs, "torch", made)
    monkeypatch.setattr(graphs, "_pinned_like", torch.empty_like)
    return made


def _capture(run: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Graph:
    return capture(torch.device("cpu"), (torch.zeros(1),), run)


def test_nothing_is_destroyed_by_the_garbage_collector_while_a_stream_is_captured(device: _Device) -> None:
    _Span(device)

    def run(given: Sequence[Tensor]) -> tuple[Tensor]:
        assert not gc.isenabled()
        _Span(device)
        kept: list[Any] = [[] for _ in range(50_000)]  # enough for the collector to have a look
        return (given[0] + len(kept),)

    graph = _capture(run)
    assert graph.taken[0] == 50_000
    assert device.destroyed_while_capturing == [False]  # the one from before
    gc.collect()
    assert len(device.destroyed_while_capturing) == 5
    assert not any(device.destroyed_while_capturing)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_garbage_collector_is_as_it_was_after_a_capture(device: _Device, enabled: bool, fails: bool) -> None:
    def run(given: Sequence[Tensor]) -> Sequence[Tensor]:
        if fails and device.capturing:
            raise RuntimeError("not permitted while a stream is captured")
        return given

    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError, match="not permitted") if fails else nullcontext():
            _capture(run)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
