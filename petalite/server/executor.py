"""The one place that runs the model: one batch at a time, in a worker thread, so that the event loop stays free."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import trio
from torch import Tensor

from petalite.bloom.cache import Rows
from petalite.bloom.span import Part, Span
from petalite.errors import ErrorCode, PetaliteError, RequestError
from petalite.server.scheduler import Batch, Job, Scheduler

log = logging.getLogger("petalite.server")


class ThreadRunner(Protocol):
    """`trio.to_thread.run_sync`, or anything that runs a function off the event loop (inline, in tests)."""

    def __call__(self, function: Callable[[], None], /) -> Awaitable[None]: ...


async def run_in_thread(function: Callable[[], None], /) -> None:
    """A cancelled wait leaves the thread to run out: a matrix product cannot be stopped and must not delay an exit."""
    await trio.to_thread.run_sync(function, abandon_on_cancel=True)


async def run_inline(function: Callable[[], None], /) -> None:
    """For tests under a mock clock, where a thread would let virtual time run away."""
    await trio.lowlevel.checkpoint()
    function()


@dataclass(slots=True)
class StepWork:
    """What a step needs besides its hidden states."""

    span: Span
    rows: Rows
    position: int
    pad: Sequence[int] | None
    reorder: Sequence[int] | None


class Executor:
    """Runs jobs in the scheduler's order. `run` must be running."""

    def __init__(self, runner: ThreadRunner = run_in_thread) -> None:
        self._runner = runner
        self._scheduler = Scheduler()
        self._wake = trio.Event()
        self._waiting: dict[Job, trio.Event] = {}

    @property
    def queued(self) -> int:
        """Jobs that wait for their turn."""
        return len(self._scheduler)

    async def submit(self, job: Job) -> Any:
        """Run `job` and return what its `finish` returned.

        Raises what `prepare`, the model or `finish` raised (anything that is not petalite's own becomes RequestError
        INTERNAL). Cancelled: a waiting job leaves the queue at once, a running one is finished and dropped.
        """
        done = self._waiting[job] = trio.Event()
        self._scheduler.add(job)
        self._wake.set()
        try:
            await done.wait()
        except trio.Cancelled:
            job.abandoned = True
            if self._scheduler.remove(job):
                self._settle(job)
            raise
        if job.error is not None:
            raise job.error
        return job.result

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run batches until cancelled."""
        task_status.started()
        while True:
            batch = self._scheduler.next_batch(trio.current_time())
            if batch is None:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            started = trio.current_time()
            await self._runner(functools.partial(compute, batch))
            self._scheduler.finished(batch, trio.current_time() - started)
            for job in batch.jobs:
                if job.done >= job.tokens or job.error is not None or job.abandoned:
                    self._settle(job)

    def _settle(self, job: Job) -> None:
        job.settled()
        self._waiting.pop(job).set()


def compute(batch: Batch) -> None:
    """Run one batch in this thread; results and errors end up in the jobs. An error of one job costs only that job."""
    with torch.inference_mode():
        ready = [(job, count) for job, count in zip(batch.jobs, batch.tokens, strict=True) if _guard(job, _prepare)]
        if len(ready) > 1:
            try:
                _run(ready)
            except RuntimeError as error:  # out of memory, say: each alone may still go
                log.warning("a batch of %d steps failed, running them one by one: %s", len(ready), error)
                for job, count in ready:
                    _guard(job, lambda job, count=count: _run([(job, count)]))
        else:
            for job, count in ready:
                _guard(job, lambda job, count=count: _run([(job, count)]))
        for job, _ in ready:
            if job.error is None and job.done >= job.tokens:
                _guard(job, _finish)


def _guard(job: Job, action: Callable[..., None]) -> bool:
    try:
        action(job)
    except PetaliteError as error:
        job.error = error
    except Exception as error:  # whatever torch raises: it ends this job with INTERNAL, and is logged whole
        log.exception("a step failed in the model")
        job.error = RequestError(ErrorCode.INTERNAL, f"the step failed in the model ({type(error).__name__})")
    return job.error is None


def _prepare(job: Job) -> None:
    if job.hidden is None:
        job.hidden = job.prepare()
        work: StepWork = job.work
        if work.reorder is not None:
            work.rows.reorder(work.reorder)


def _run(ready: Sequence[tuple[Job, int]]) -> None:
    """One pass through the blocks: `count` tokens of each job, behind those it has done."""
    pieces = [job.hidden[:, job.done : job.done + count] for job, count in ready]
    span: Span = ready[0][0].work.span
    parts = [Part(job.work.rows, count, job.work.position + job.done, job.work.pad) for job, count in ready]
    flat = [piece.reshape(-1, piece.shape[-1]) for piece in pieces]
    output: Tensor = span.step_batch(flat[0] if len(flat) == 1 else torch.cat(flat), parts)
    for (job, count), piece, result in zip(
        ready, pieces, torch.split(output, [part.shape[0] for part in flat]), strict=True
    ):
        job.outputs.append(result.view(piece.shape))
        job.done += count


def _finish(job: Job) -> None:
    outputs = job.outputs
    job.result = job.finish(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))
    job.hidden, job.outputs = None, []
