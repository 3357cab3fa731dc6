"""Captured passes on CUDA: one call of the host each, to and from its pinned memory, which nobody waits for."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

BATCHES = (1, 2, 4, 8, 16)
"""Rows of the graphs that there are: shapes are fixed, so fewer rows take the next larger one."""
_WARM_UP_RUNS = 3
_ONE_AT_A_TIME = threading.Lock()
R = TypeVar("R")


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[Any, str]:
    """The module of kernels, and "" or why it is of no use here."""
    if device.type != "cuda":
        return None, "not on a CUDA device"
    if dtype == torch.float32:
        return None, "float32 goes the plain way"
    try:
        from petalite.bloom import kernels
    except ImportError as error:
        return None, f"Triton is missing: {error}"
    return kernels, ""


@dataclass(slots=True)
class Graph:
    """One captured pass: fill `given`, replay, read `taken` once `over` has come. Both are pinned.

    Between two steps the caches forget how to do what torch does for convenience: as little of that as possible.
    """

    given: tuple[Tensor, ...]
    taken: tuple[Tensor, ...]
    graph: Any
    over: Any
    stream: Any
    kept: Any  # what the graph reads and writes beside them, which would be given to others
    running: bool = False

    def fill(self, inputs: Sequence[Tensor]) -> None:
        """The first of `given` with `inputs`, one after the other."""
        self.wait()  # what was given before is read
        into, at = self.given[0], 0
        for tensor in inputs:
            rows = tensor.shape[0]
            (into if rows == into.shape[0] else into.narrow(0, at, rows)).copy_(tensor)
            at += rows

    def fill_raw(self, inputs: Sequence[bytearray]) -> None:
        """The same from bytes."""
        self.wait()
        into, at = bytes_of(self.given[0]), 0
        for data in inputs:
            into[at : at + len(data)] = data
            at += len(data)

    def replay(self) -> None:
        self.graph.replay()
        self.over.record(self.stream)
        self.running = True

    def done(self) -> bool:
        if self.running and self.over.query():
            self.running = False
        return not self.running

    def wait(self) -> None:
        if self.running:
            self.over.synchronize()
            self.running = False


@dataclass(slots=True)
class Replay(Generic[R]):
    """A graph that was replayed; `take` copies what it has left in `taken`, which the next replay overwrites."""

    graph: Graph
    take: Callable[[Graph], R]

    def done(self) -> bool:
        return self.graph.done()

    def result(self) -> R:
        self.graph.wait()
        return self.take(self.graph)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the host."""
    return memoryview((c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


@contextmanager
def uncollected() -> Iterator[None]:
    """A block during which the garbage collector does not run, one such block at a time in the process.

    It would destroy whatever has become garbage, and CUDA permits neither a graph nor its memory to be destroyed while
    a stream is captured: the process is aborted. So what is garbage already goes before.
    """
    with _ONE_AT_A_TIME:
        enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def capture(
    device: torch.device, given: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> Graph:
    """Capture `run`, from copies of the pinned `given` on the device to results there. Raises RuntimeError."""
    with uncollected():
        return _capture(device, given, run)


def _capture(
    device: torch.device, given: Sequence[Tensor], run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> Graph:
    inputs = [tensor.to(device) for tensor in given]
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP_RUNS):
            results = run(inputs)
    torch.cuda.synchronize(device)
    taken = tuple(_pinned_like(result) for result in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for tensor, source in zip(inputs, given, strict=True):
            tensor.copy_(source, non_blocking=True)
        for into, result in zip(taken, run(inputs), strict=True):
            into.copy_(result, non_blocking=True)
    over = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return Graph(tuple(given), taken, graph, over, torch.cuda.current_stream(device), (inputs, run))


def _pinned_like(result: Tensor) -> Tensor:
    return torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
