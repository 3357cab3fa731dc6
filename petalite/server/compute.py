"""One batch through the model, in whatever thread: results and errors end up in its jobs, and an error of one job costs
only that job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from petalite.bloom.cache import Rows
from petalite.bloom.span import Part, RawRows, Span, Underway
from petalite.errors import ErrorCode, RequestError
from petalite.server.scheduler import Batch, Job

log = logging.getLogger("petalite.server")


@dataclass(slots=True)
class StepWork:
    """What a step needs, and its `hidden` states (rows x tokens, C) once they are decoded. From the `cut` on the cache
    is not what it was before the step; once `reordered`, that cannot be made good by another step.

    `raw`: the hidden states of a decode step as bytes of the span's dtype, where they have come so and go so.
    """

    span: Span
    rows: Rows
    position: int
    pad: Sequence[int] | None
    reorder: Sequence[int] | None
    prompts: Tensor | None = None
    raw: bytearray | None = None
    reordered: bool = False
    hidden: Tensor | None = None
    passing: Iterator[Tensor] | None = None  # the piece of a long job that is amid the blocks
    outputs: list[Tensor] = field(default_factory=list)


def compute(batch: Batch, urgent: Callable[[], bool]) -> None:
    """Run one batch in this thread; results and errors end up in the jobs. An error of one job costs only that job.

    A long job, or a training pass, returns after a block where `urgent()` says that others wait.
    """
    if batch.training:
        if not batch.jobs[0].abandoned:
            _guard(batch.jobs[0], lambda job: _run_training(job, urgent))
        return
    with torch.inference_mode():
        ready = [job for job in batch.jobs if not job.abandoned and _guard(job, _prepare)]
        if batch.long:
            for job in ready:
                _guard(job, lambda job: _run_long(job, urgent))
        else:
            _run_short(ready)
        _finish_all(ready)


class DeviceBatch:
    """`compute` of short steps in two halves, between which a device works: `begin`, and once it is `done`, `end`."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._ready: list[Job] = []
        self._underway: Underway[Tensor] | None = None
        self._raw: Underway[list[RawRows]] | None = None

    def begin(self) -> None:
        """Hand the inputs over, as the bytes that came where that will do."""
        with torch.inference_mode():
            self._ready = [job for job in self._batch.jobs if not job.abandoned]
            try:
                self._raw = _begin_raw(self._ready)
                if self._raw is None:
                    self._ready = [job for job in self._ready if _guard(job, _prepare)]
                    self._underway = _begin_whole(self._ready) if self._ready else None
            except Exception as error:  # as in `_run_short`: each alone
                log.warning("a batch of %d steps failed, running them one by one", len(self._ready), exc_info=error)
                self._run_again()

    def done(self) -> bool:
        underway = self._underway or self._raw
        return underway is None or underway.done()

    def end(self) -> None:
        """Take the results; as with `compute`, they or errors end up in the jobs."""
        with torch.inference_mode():
            try:
                if self._raw is not None:
                    self._ready = _take_raw(self._ready, self._raw.result())
                elif self._underway is not None:
                    _take_whole(self._ready, self._underway.result())
            except Exception as error:
                log.warning("a batch of %d steps failed on the device", len(self._ready), exc_info=error)
                self._run_again()
            else:
                if self._raw is not None and self._ready:
                    self._run_again()
            _finish_all(self._ready)

    def _run_again(self) -> None:
        self._ready = [job for job in self._ready if _guard(job, _prepare)]
        _run_short(self._ready)


def _guard(job: Job, action: Callable[[Job], None]) -> bool:
    try:
        action(job)
    except Exception as error:  # noqa: BLE001  whatever torch raises ends this job alone, see `as_answer`
        job.error = as_answer(error, "training pass" if job.training else "step")
    return job.error is None


def as_answer(error: Exception, what: str = "step") -> RequestError:
    """What the peer hears of an error in the model; one that is not meant for it is logged whole."""
    if isinstance(error, RequestError):
        return error
    log.warning("a %s failed in the model", what, exc_info=error)
    return RequestError(ErrorCode.INTERNAL, f"the {what} failed in the model ({type(error).__name__})")


def _prepare(job: Job) -> None:
    """Decode the input, then touch the cache: a step that is dropped or malformed leaves it as it was."""
    work: StepWork = job.work
    if work.hidden is not None:
        return
    hidden = job.prepare()
    if job.abandoned:
        raise RequestError(ErrorCode.CANCELLED, "cancelled")
    work.hidden = hidden
    work.rows.truncate(work.position)
    if work.reorder is not None:
        work.reordered = True
        work.rows.reorder(work.reorder)


def _run_short(jobs: Sequence[Job]) -> None:
    """All of `jobs` as one pass through the blocks; if that fails, each alone, so that only the culprit fails."""
    if len(jobs) > 1:
        try:
            _run_whole(jobs)
            return
        except Exception as error:  # out of memory, say: nothing is committed, each alone may still go
            log.warning("a batch of %d steps failed, running them one by one", len(jobs), exc_info=error)
    for job in jobs:
        _guard(job, lambda job: _run_whole((job,)))


def _run_whole(jobs: Sequence[Job]) -> None:
    _take_whole(jobs, _begin_whole(jobs).result())


def _begin_whole(jobs: Sequence[Job]) -> Underway[Tensor]:
    span: Span = jobs[0].work.span
    underway = span.begin_batch([job.work.hidden for job in jobs], [_part(job) for job in jobs])
    for job in jobs:
        job.meanwhile()
    return underway


def _begin_raw(jobs: Sequence[Job]) -> Underway[list[RawRows]] | None:
    """Decode steps from the bytes they came as; None where one is something else. Such a step only appends: what is
    found wrong with it afterwards has touched nothing that counts.
    """
    if not all(map(_appends_raw, jobs)) or not jobs:
        return None
    span: Span = jobs[0].work.span
    underway = span.begin_raw([job.work.raw for job in jobs], [_part(job) for job in jobs])
    if underway is not None:
        for job in jobs:
            job.meanwhile()
    return underway


def _appends_raw(job: Job) -> bool:
    work: StepWork = job.work
    rows = work.rows
    return work.raw is not None and work.reorder is None and rows.positions.count(work.position) == rows.batch


def _take_raw(jobs: Sequence[Job], outputs: Sequence[RawRows]) -> list[Job]:
    """Finish the jobs; those whose numbers have to be looked at come back."""
    strange = []
    for job, output in zip(jobs, outputs, strict=True):
        if output.finite:
            job.done = job.tokens
            _guard(job, partial(_finish_raw, output.data))
        else:
            strange.append(job)
    return strange


def _finish_raw(data: bytes, job: Job) -> None:
    job.result = job.finish_raw(data)


def _take_whole(jobs: Sequence[Job], output: Tensor) -> None:
    results = (output,) if len(jobs) == 1 else torch.split(output, [job.size for job in jobs])
    for job, result in zip(jobs, results, strict=True):
        job.work.outputs.append(result)
        job.done = job.tokens


def _run_long(job: Job, urgent: Callable[[], bool]) -> None:
    """The job's piece through at least one block, and through the rest while nothing urgent waits."""
    work: StepWork = job.work
    if work.hidden is None:
        return
    if work.passing is None:
        piece = work.hidden.view(job.batch, job.tokens, -1)[:, job.done : job.done + job.piece]
        work.passing = work.span.step_blocks(piece.reshape(job.batch * job.piece, -1), (_part(job),))
    for output in work.passing:
        job.at_block += 1
        if job.at_block == job.blocks:
            work.outputs.append(output.view(job.batch, job.piece, -1))
            work.passing, job.at_block, job.done = None, 0, job.done + job.piece
            if job.done >= job.tokens:
                job.meanwhile()
            return
        if job.abandoned or urgent():
            return


def _run_training(job: Job, urgent: Callable[[], bool]) -> None:
    """The pass, a generator, through at least one block, and on while nobody else waits; its value is the result."""
    passing: Iterator[None] = job.work
    with torch.inference_mode(False), torch.no_grad():
        while not job.abandoned:
            try:
                next(passing)
            except StopIteration as ended:
                job.result, job.done = ended.value, job.tokens
                return
            job.at_block += 1
            if urgent():
                return


def _part(job: Job) -> Part:
    work: StepWork = job.work
    return Part(work.rows, job.piece or job.tokens, work.position + job.done, work.pad, work.prompts)


def _finish_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.error is None and job.done >= job.tokens:
            _guard(job, _finish)


def _finish(job: Job) -> None:
    work: StepWork = job.work
    outputs, work.outputs = work.outputs, []
    job.result = job.finish(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))
    work.hidden = None
