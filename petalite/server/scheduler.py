"""What the executor runs next: a pure queue (spec 07, rationale).

Short steps of all sessions go together as one batch. A long prefill goes in pieces, and lets short steps that wait in
between any two blocks; long ones take turns by peer, piece by piece. Time is an argument.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from petalite.server.blockcost import BlockCost
from petalite.server.gathering import Gathering

# A job of at most this many tokens (rows x new tokens) is short: a decode step, or a few drafted tokens.
SHORT_TOKENS = 32
# Tokens of all short steps in one batch.
BATCH_TOKENS = 128
# Tokens of the smallest piece: below, a matrix product costs nearly as much for fewer.
SMALLEST_PIECE = 16
# How long one block of a piece may hold the model, which is how long a short step may wait for it: half of what the
# short steps themselves take, but no less than this; if nobody decoded for RECENT_SECONDS, up to LONE_BLOCK_SECONDS.
BLOCK_SECONDS = 0.0005
LONE_BLOCK_SECONDS = 0.02
RECENT_SECONDS = 1.0
# While others use the model, training has it for one part of the time in this and one more: for a second of its own it
# pauses so many, so that few steps meet a block of it. What it lacks at last, it makes up for.
TRAINING_PAUSE = 3.8
# The most that it makes up for, counted in time of all.
TRAINING_CREDIT_SECONDS = 0.1
# It does not pause, but fills every gap, where a block of it takes no more than this part of a short step's time.
TRAINING_BRIEF = 0.2
# A short step runs in the event loop's own thread where such have lately taken no longer than this. One that comes
# alone: while the model runs several, the loop has their neighbours' messages to see to.
BRIEF_SECONDS = 0.01
# A clock that stands still (tests) must not make a token cost nothing.
LEAST_SECONDS = 1e-9


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One step of one session: `batch` rows of `tokens` new tokens each, through `blocks` blocks.

    `group` tells which jobs may share a batch (the same blocks), `owner` who is to be treated fairly. `prepare` and
    `finish` run in the worker thread, and `meanwhile` between them, while a device may be at work; `started` and
    `settled` in the event loop: when the model first takes the job, and when it has left the executor, whether
    finished, failed, or dropped.

    `finish_raw` is `finish` of what a device left as bytes.

    `done` tokens are through all blocks, the next `piece` ones through `at_block` of them. A `training` job is neither
    short nor long, and says itself when it is done. It came from `session`, if that will bring more, at `came_at`.
    """

    owner: Hashable
    group: Hashable
    batch: int
    tokens: int
    blocks: int
    started: Callable[[], None]
    settled: Callable[[], None]
    work: Any
    prepare: Callable[[], Any] = lambda: None
    meanwhile: Callable[[], None] = lambda: None
    finish: Callable[[Any], Any] = lambda result: result
    finish_raw: Callable[[bytes], Any] = lambda data: data
    training: bool = False
    session: Hashable = None
    came_at: float = 0.0
    done: int = 0
    piece: int = 0
    at_block: int = 0
    result: Any = None
    error: Exception | None = None
    abandoned: bool = False

    @property
    def size(self) -> int:
        return self.batch * self.tokens

    @property
    def short(self) -> bool:
        return not self.training and self.size <= SHORT_TOKENS

    @property
    def over(self) -> bool:
        """Nothing is left to run."""
        return self.done >= self.tokens or self.error is not None or self.abandoned


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs to run together. `tokens` of each, from its `done` on: all of them, or a piece of the one long job, which
    has `first_block` blocks behind it already. A training job may go on for `seconds` though others wait.
    """

    jobs: tuple[Job, ...]
    tokens: tuple[int, ...]
    first_block: int = 0
    seconds: float = 0.0

    @property
    def long(self) -> bool:
        return not self.jobs[0].short and not self.training

    @property
    def training(self) -> bool:
        """One training job, for at least a block."""
        return self.jobs[0].training


class Scheduler:
    """Jobs wait here. One batch at a time is out: `next_batch`, then `finished`."""

    def __init__(self) -> None:
        self._short: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._long: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._training: OrderedDict[Hashable, deque[Job]] = OrderedDict()
        self._passing: Job | None = None  # a training job that is amid its pass
        self._training_at = float("-inf")  # when training may have the model again
        self._block_seconds = 0.0  # of training, of late
        self._busy_at = float("-inf")  # when others last had it
        self._begun: Job | None = None  # a long job amid its piece: goes on before any other long one
        self._owed = 0.0  # seconds that short steps are to have before a long one may hold them up again
        self._load: Counter[Hashable] = Counter()
        self._block_cost = BlockCost()
        self._short_at = float("-inf")
        self._gathering = Gathering()
        self._gathered_at = float("inf")  # when the next batch of short steps begins, whoever has come
        self._answered: Batch | None = None  # the last one, until its sessions are seen off
        self.short_seconds = 0.0
        """What a batch of short steps takes, on a running average; 0 before the first."""

    def __len__(self) -> int:
        """Jobs that wait."""
        queues = (*self._short.values(), *self._long.values(), *self._training.values())
        return sum(map(len, queues)) + (self._begun is not None) + (self._passing is not None)

    @property
    def urgent(self) -> bool:
        """Short steps wait: a long piece should pause at its next block. Read from the worker thread too."""
        return bool(self._short)

    @property
    def wanted(self) -> bool:
        """Others wait: training should pause at its next block. Read from the worker thread too."""
        return bool(self._short or self._long or self._begun)

    @property
    def brief(self) -> bool:
        """A short step takes less than handing it to another thread and back."""
        return 0 < self.short_seconds <= BRIEF_SECONDS

    def alone(self, tokens: int, session: Hashable, now: float) -> bool:
        """Whether a step of so many tokens, over all rows, that `session` brings now may run without being queued: it
        is brief, nothing waits, and nobody is expected with another while it runs.
        """
        if not self.brief or tokens > SHORT_TOKENS or self.wanted or self._trains:
            return False
        if self._answered is not None:
            self._see_off(now)
        if session is not None:
            self._gathering.came(session, now)
        if self._gathering.expects_by(now + self.short_seconds):
            return False
        self._busy_at = self._short_at = now
        return True

    def ran_alone(self, session: Hashable, group: Hashable, seconds: float, now: float) -> None:
        """What `alone` let run took `seconds`, and has been answered."""
        self._short_took(seconds)
        if session is not None:
            self._gathering.left([session], group, now)

    def at_once(self, job: Job, now: float) -> Batch | None:
        """`job`, which is not queued, as a batch of its own if it may run `alone`; else it is to be added."""
        if job.training or not self.alone(job.size, job.session, now):
            return None
        self._load[job.owner] += job.size
        return Batch((job,), (job.tokens,))

    def load(self, owner: Hashable) -> int:
        """Tokens of `owner` that wait or run, training aside."""
        return self._load[owner]

    def _queues(self, job: Job) -> OrderedDict[Hashable, deque[Job]]:
        return self._training if job.training else self._short if job.short else self._long

    def add(self, job: Job) -> None:
        self._queues(job).setdefault(job.owner, deque()).append(job)
        if not job.training:
            self._load[job.owner] += job.size
        if job.session is not None:
            self._gathering.came(job.session, job.came_at)

    def remove(self, job: Job) -> bool:
        """Drop a job that waits; False if it is not waiting (it runs, or is through)."""
        queues = self._queues(job)
        queue = queues.get(job.owner, deque())
        if self._begun is job:
            self._begun = None
        elif self._passing is job:
            self._passing = None
        elif job in queue:
            queue.remove(job)
            if not queue:
                del queues[job.owner]
        else:
            return False
        self._forget(job)
        return True

    def _forget(self, job: Job) -> None:
        if job.training:
            return
        self._load[job.owner] -= job.size
        if not self._load[job.owner]:
            del self._load[job.owner]

    def next_batch(self, now: float) -> Batch | None:
        """Take what runs now; None when nothing waits. When short and long wait, the long ones get a third of the time:
        a block of theirs delays the short steps, twice as long nothing does.
        """
        self._see_off(now)
        if self._trains and now >= self._due_at():
            return self._training_slice(now)
        long_waits = self._begun is not None or bool(self._long)
        if self._short or long_waits:
            self._busy_at = now
        if self._short and not (long_waits and self._owed <= 0):
            self._gathered_at = float("inf") if long_waits else self._wait_for_others(now)
            if self._gathered_at != float("inf"):
                return None
            self._short_at = now
            return self._short_batch()
        if not self._short:
            self._owed = 0.0
            self._gathered_at = float("inf")
        return self._long_piece(now) if long_waits else None

    def wake_at(self) -> float:
        """When to call `next_batch` again though nothing has come: training waits for its share, a batch for others."""
        return min(self._gathered_at, self._due_at() if self._trains else float("inf"))

    def _see_off(self, now: float) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            sessions = [job.session for job in answered.jobs if job.session is not None]
            self._gathering.left(sessions, answered.jobs[0].group, now)

    def _wait_for_others(self, now: float) -> float:
        """When the batch of short steps that is due should begin, whoever has come; infinity for now."""
        waiting = [job for queue in self._short.values() for job in queue]
        if sum(job.size for job in waiting) >= BATCH_TOKENS:
            return float("inf")
        until = self._gathering.until(waiting[0].group, self.short_seconds, now)
        return until if until > now else float("inf")

    @property
    def _trains(self) -> bool:
        return bool(self._training or self._passing)

    def _due_at(self) -> float:
        """When training may have the model: at once where others have not used it for a while, or hardly notice."""
        if self.wanted:
            # What waits goes first, if it came just now.
            return self._training_at + (self._block_seconds if self._short else 0.0)
        if self._block_seconds <= TRAINING_BRIEF * self.short_seconds:
            return float("-inf")
        return min(self._training_at, self._busy_at + RECENT_SECONDS)

    def _training_slice(self, now: float) -> Batch:
        """Peers take turns, pass by pass: only one pass at a time takes working memory."""
        job, self._passing = self._passing, None
        if job is None:
            owner, queue = next(iter(self._training.items()))
            job = queue.popleft()
            del self._training[owner]
            if queue:
                self._training[owner] = queue
        # What it has had while nobody else was there is no debt.
        self._training_at = min(max(self._training_at, now - TRAINING_CREDIT_SECONDS), now)
        credit = (now - self._training_at) / TRAINING_PAUSE
        return Batch((job,), (job.tokens,), job.at_block, credit)

    def _short_batch(self) -> Batch:
        """Round robin over the peers, one job each, until the batch is full: a peer with many sessions is one peer.

        The first peer's first job says which blocks; peers that got something go behind those that did not.
        """
        group = next(iter(self._short.values()))[0].group
        taken: list[Job] = []
        room = BATCH_TOKENS
        for served in self._rounds(group):
            job = served[0]
            if job.size > room:
                break
            taken.append(served.popleft())
            room -= job.size
        for owner in dict.fromkeys(job.owner for job in taken):
            if self._short[owner]:
                self._short.move_to_end(owner)
            else:
                del self._short[owner]
        return Batch(tuple(taken), tuple(job.tokens for job in taken))

    def _rounds(self, group: Hashable) -> Any:
        """The peers' queues whose first job is of `group`, round after round, while there are any."""
        found = True
        while found:
            found = False
            for queue in self._short.values():
                if queue and queue[0].group == group:
                    found = True
                    yield queue

    def _long_piece(self, now: float) -> Batch:
        job, self._begun = self._begun, None
        if job is None:
            owner, queue = next(iter(self._long.items()))
            job = queue.popleft()
            del self._long[owner]
            if queue:
                self._long[owner] = queue  # behind the other peers
            job.piece = min(self._piece_tokens(job, now), job.tokens - job.done)
        return Batch((job,), (job.piece,), job.at_block)

    def _piece_tokens(self, job: Job, now: float) -> int:
        crowded = now - self._short_at < RECENT_SECONDS
        seconds = max(BLOCK_SECONDS, self.short_seconds / 2) if crowded else LONE_BLOCK_SECONDS
        return max(max(SMALLEST_PIECE, self._block_cost.tokens_within(seconds)) // job.batch, 1)

    def finished(self, batch: Batch, seconds: float) -> None:
        """`batch` took `seconds`; a training one, without the way to the worker. A long job that is not through goes
        back: amid a piece it stays the next of the long ones, at the end of one it is the first of its peer, and the
        peer the last.
        """
        if batch.training:
            job, seconds = batch.jobs[0], max(LEAST_SECONDS, seconds)
            self._training_at += (1 + TRAINING_PAUSE) * seconds
            blocks = max(1, job.at_block - batch.first_block)
            self._block_seconds += 0.2 * (seconds / blocks - self._block_seconds)
            self._passing = None if job.over else job
            return
        if not batch.long:
            self._short_took(seconds)
            self._answered = batch
        else:
            self._measure(batch, seconds)
        for job in batch.jobs:
            if job.over or not batch.long:
                self._forget(job)
            elif job.at_block:
                self._begun = job
            else:
                self._long.setdefault(job.owner, deque()).appendleft(job)

    def _short_took(self, seconds: float) -> None:
        self.short_seconds += (0.2 if self.short_seconds else 1.0) * (seconds - self.short_seconds)
        self._owed -= max(LEAST_SECONDS, seconds)

    def _measure(self, batch: Batch, seconds: float) -> None:
        job = batch.jobs[0]
        blocks = (job.at_block or job.blocks) - batch.first_block
        if blocks > 0 and job.error is None:
            # For the block that a short step may have waited for; those that ran while none waited are no debt.
            self._owed = max(2 * seconds / blocks, LEAST_SECONDS)
            self._block_cost.measured(job.batch * batch.tokens[0], seconds / blocks)
