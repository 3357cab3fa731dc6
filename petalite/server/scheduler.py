"""What the executor runs next: a pure queue (spec 07, rationale).

Short steps of all sessions go together as one batch; a long prefill goes in pieces, sized by measured time, with the
short steps of others in between; long ones take turns by peer. Time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

# A job of at most this many tokens (rows x new tokens) is short: a decode step, or a few drafted tokens.
SHORT_TOKENS = 32
# Tokens of all short steps in one batch.
BATCH_TOKENS = 128
SMALLEST_PIECE = 16
# How long a piece of a prefill may hold the model: while others decode, and when nobody has for a second.
PIECE_SECONDS = 0.02
LONE_PIECE_SECONDS = 0.2
RECENT_SECONDS = 1.0


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One step of one session: `batch` rows of `tokens` new tokens each.

    `group` tells which jobs may share a batch (the same blocks), `owner` who is to be treated fairly. `prepare` and
    `finish` and `run` run in the worker thread; `settled` runs in the event loop when the job has left the executor,
    whether finished, failed, or cancelled while it waited.
    """

    owner: Hashable
    group: Hashable
    batch: int
    tokens: int
    prepare: Callable[[], Any]
    finish: Callable[[Any], Any]
    settled: Callable[[], None]
    work: Any
    done: int = 0
    hidden: Any = None
    outputs: list[Any] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None
    abandoned: bool = False

    @property
    def short(self) -> bool:
        return self.batch * self.tokens <= SHORT_TOKENS


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs to run together. `tokens` of each, from its `done` on: all of them, or a piece of the one long job."""

    jobs: tuple[Job, ...]
    tokens: tuple[int, ...]


class Scheduler:
    def __init__(self) -> None:
        self._short: deque[Job] = deque()
        self._long: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._long_turn = False
        self._seconds_per_token = 1e-3
        self._short_at = float("-inf")
        self._short_seconds = 0.0

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._short) + sum(map(len, self._long.values()))

    def add(self, job: Job) -> None:
        if job.short:
            self._short.append(job)
        else:
            self._long.setdefault(job.owner, deque()).append(job)

    def remove(self, job: Job) -> bool:
        """Drop a job that waits; False if it is not waiting (it runs, or is through)."""
        queue = self._short if job.short else self._long.get(job.owner, deque())
        if job not in queue:
            return False
        queue.remove(job)
        if not job.short and not queue:
            del self._long[job.owner]
        return True

    def next_batch(self, now: float) -> Batch | None:
        """Take what runs now; None when nothing waits. Short and long take turns when both wait."""
        if self._short and not (self._long and self._long_turn):
            self._long_turn = True
            return self._short_batch(now)
        self._long_turn = False
        return self._long_piece(now) if self._long else None

    def _short_batch(self, now: float) -> Batch:
        self._short_at = now
        group = self._short[0].group
        taken: list[Job] = []
        kept: deque[Job] = deque()
        room = BATCH_TOKENS
        for job in self._short:
            size = job.batch * job.tokens
            if job.group == group and size <= room:
                taken.append(job)
                room -= size
            else:
                kept.append(job)
        self._short = kept
        return Batch(tuple(taken), tuple(job.tokens for job in taken))

    def _long_piece(self, now: float) -> Batch:
        owner, queue = next(iter(self._long.items()))
        job = queue.popleft()
        del self._long[owner]
        if queue:
            self._long[owner] = queue  # behind the other peers
        crowded = now - self._short_at < RECENT_SECONDS
        seconds = max(PIECE_SECONDS, self._short_seconds) if crowded else LONE_PIECE_SECONDS
        piece = max(SMALLEST_PIECE, int(seconds / self._seconds_per_token)) // job.batch
        return Batch((job,), (min(max(piece, 1), job.tokens - job.done),))

    def finished(self, batch: Batch, seconds: float) -> None:
        """`batch` took `seconds`; a long job that is not through goes back, first of its peer, last of the peers."""
        tokens = sum(job.batch * count for job, count in zip(batch.jobs, batch.tokens, strict=True))
        if batch.jobs[0].short:
            self._short_seconds += 0.2 * (seconds - self._short_seconds)
        else:
            self._seconds_per_token += 0.5 * (seconds / tokens - self._seconds_per_token)
            job = batch.jobs[0]
            if job.done < job.tokens and job.error is None and not job.abandoned:
                self._long.setdefault(job.owner, deque()).appendleft(job)
