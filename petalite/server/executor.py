"""The one place that has the model run: one batch at a time, in a worker thread, so that the event loop stays free.

Save for what takes less time than a thread costs: handing a step over and back is two wake-ups of a sleeping thread,
0.3 to 0.7 ms on a small virtual machine (`tools/bench step`), and no ping minds waiting for what the scheduler calls
brief.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Protocol, TypeVar

import trio

from petalite.net.awake import Awake
from petalite.server.compute import DeviceBatch, compute
from petalite.server.scheduler import Batch, Job, Scheduler

T = TypeVar("T")

# How long the end of the executor waits for what is in the worker.
STOP_SECONDS = 0.5


class Here(Protocol):
    """Runs a brief function in the event loop's thread."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


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


class Executor:
    """Runs jobs in the scheduler's order while `run` is running. A job ends with its `settled`, exactly once.

    `runner` runs a function off the event loop; `here`, if there is one, runs a brief one in the loop's thread.
    """

    def __init__(self, runner: ThreadRunner = run_in_thread, here: Here | None = None) -> None:
        self._runner = runner
        self._here = here
        self._scheduler = Scheduler()
        self._wake = trio.Event()
        self._resting = False  # `run` waits for jobs
        # What was handed to a device before `run` was awake, and when.
        self._begun: tuple[Batch, DeviceBatch, Here, float] | None = None
        self._stopping = False
        self._awake = Awake()
        self._worked = 0.0  # seconds that the last batch was in the worker, without the way there

    @property
    def queued(self) -> int:
        """Jobs that wait for their turn."""
        return len(self._scheduler)

    def load(self, owner: Hashable) -> int:
        """Tokens of `owner` that wait or run, training aside."""
        return self._scheduler.load(owner)

    async def aside(self, function: Callable[[], T]) -> T:
        """Run what needs torch but not its turn off the event loop."""
        results: list[T] = []
        self._awake.rest()
        await self._runner(lambda: results.append(function()))
        return results[0]

    def alone(self, tokens: int, session: Hashable, now: float) -> bool:
        """Whether a step of so many tokens, over all rows, that `session` brings now may be `run_alone`: it is brief,
        and nobody will share the model with it. Waking `run` for such a step would take two turns of the loop.
        """
        return self._here is not None and self._resting and self._scheduler.alone(tokens, session, now)

    def run_alone(self, function: Callable[[], T]) -> T:
        """What `function` gives, which is the whole of a step that `alone` lets run. `ran_alone` is due afterwards."""
        return function() if self._here is None else self._here(function)

    def ran_alone(self, session: Hashable, group: Hashable, seconds: float, now: float) -> None:
        """Say, once the step is answered, that it took `seconds`, and that `session` may come back from `now` on."""
        self._scheduler.ran_alone(session, group, seconds, now)

    def add(self, job: Job) -> None:
        """Queue `job`. Then its `result` is what `finish` returned, or its `error` a RequestError: what `prepare` or
        `finish` raised, INTERNAL for anything else that went wrong.

        Where a device does the work, a brief one that nobody will share it with has begun when this returns.
        """
        if not self._begin_at_once(job):
            self._scheduler.add(job)
        self._wake.set()

    def _begin_at_once(self, job: Job) -> bool:
        if self._here is None or not self._resting or job.training or not job.work.span.asynchronous:
            return False
        now = trio.current_time()
        batch = self._scheduler.at_once(job, now)
        if batch is None:
            return False
        self._resting = False
        self._begin(batch)
        device = DeviceBatch(batch)
        self._here(device.begin)
        self._begun = (batch, device, self._here, now)
        return True

    def cancel(self, job: Job) -> None:
        """Nobody wants `job`: one that waits leaves at once, one that runs at its next block, its result dropped."""
        job.abandoned = True
        if self._scheduler.remove(job):
            job.settled()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run batches until cancelled."""
        task_status.started()
        while True:
            if self._begun is not None:
                await self._end_begun(*self._begun)
                continue
            batch = self._scheduler.next_batch(trio.current_time())
            if batch is None:
                await self._rest()
                continue
            self._begin(batch)
            begun = trio.current_time()
            await self._run_batch(batch)
            self._end(batch, self._worked if batch.training else trio.current_time() - begun)

    async def _end_begun(self, batch: Batch, device: DeviceBatch, here: Here, begun: float) -> None:
        self._begun = None
        await self._see_through(device, here)
        self._end(batch, trio.current_time() - begun)

    async def _rest(self) -> None:
        self._wake = trio.Event()
        self._resting = True
        with trio.move_on_at(self._scheduler.wake_at()):
            await self._wake.wait()
        self._resting = False

    def _begin(self, batch: Batch) -> None:
        for job in batch.jobs:
            job.started()

    def _end(self, batch: Batch, seconds: float) -> None:
        self._scheduler.finished(batch, seconds)
        for job in batch.jobs:
            if job.over:
                job.settled()

    def _interrupted(self, batch: Batch, begun: float) -> bool:
        if batch.training:
            return self._scheduler.wanted and time.perf_counter() - begun >= batch.seconds
        return self._scheduler.urgent

    async def _run_batch(self, batch: Batch) -> None:
        if self._here is None or batch.long or batch.training:
            await self._run_in_worker(batch)
            return
        if batch.jobs[0].work.span.asynchronous:
            await self._run_on_device(batch, self._here)
            return
        if len(batch.jobs) > 1 or not self._scheduler.brief:
            await self._run_in_worker(batch)
            return
        self._here(lambda: compute(batch, _never))
        if len(self._scheduler):
            await trio.lowlevel.checkpoint()  # others first; where nothing waits, `run` itself will

    async def _run_on_device(self, batch: Batch, here: Here) -> None:
        device = DeviceBatch(batch)
        here(device.begin)
        await self._see_through(device, here)

    async def _see_through(self, device: DeviceBatch, here: Here) -> None:
        """The loop's thread looks until the device is through, others first: a thread that waited would have to
        wake it.
        """
        while not device.done():
            await trio.lowlevel.checkpoint()
        here(device.end)
        self._awake.came()

    async def _run_in_worker(self, batch: Batch) -> None:
        """Cancelled, give it the time of a block or a step to come back: an interpreter that ends while
        a thread of it is in torch ends by an abort.
        """
        in_worker = False

        def work() -> None:
            nonlocal in_worker
            in_worker = True
            begun = time.perf_counter()
            try:
                compute(batch, lambda: self._stopping or self._interrupted(batch, begun))
            finally:
                self._worked = time.perf_counter() - begun
                in_worker = False

        self._awake.rest()
        try:
            await self._runner(work)
        except trio.Cancelled:
            self._stopping = True
            with trio.move_on_after(STOP_SECONDS, shield=True):
                while in_worker:  # noqa: ASYNC110 - an abandoned thread announces nothing
                    await trio.sleep(STOP_SECONDS / 50)
            raise


def _never() -> bool:
    return False
