"""Who runs next: batches of short steps, pieces of long ones, and nobody in front of everybody else."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.server import scheduler as module
from petalite.server.gathering import AWAY_SECONDS, GATHER_SHARE, Gathering
from petalite.server.scheduler import BATCH_TOKENS, BRIEF_SECONDS, SHORT_TOKENS, SMALLEST_PIECE, Batch, Job, Scheduler

BLOCKS = 4


def job(tokens: int = 1, *, owner: str = "a", group: str = "0:4", batch: int = 1) -> Job:
    return Job(
        owner=owner,
        group=group,
        batch=batch,
        tokens=tokens,
        blocks=BLOCKS,
        prepare=lambda: None,
        finish=lambda output: None,
        started=lambda: None,
        settled=lambda: None,
        work=None,
    )


def run(batch: Batch, scheduler: Scheduler, seconds: float = 0.0, blocks: int = BLOCKS) -> None:
    """What the executor does with a batch; `blocks`: how many of a long piece it gets through."""
    for each, count in zip(batch.jobs, batch.tokens, strict=True):
        if batch.long:
            each.at_block += blocks
            if each.at_block < BLOCKS:
                continue
            each.at_block = 0
        each.done += count
    scheduler.finished(batch, seconds)


def take(scheduler: Scheduler, now: float = 0.0) -> Batch:
    batch = scheduler.next_batch(now)
    assert batch is not None
    return batch


def test_nothing_waits() -> None:
    scheduler = Scheduler()
    assert scheduler.next_batch(0) is None
    assert (len(scheduler), scheduler.urgent) == (0, False)


def test_short_steps_of_all_sessions_are_one_batch() -> None:
    scheduler = Scheduler()
    jobs = [job(1, owner="a"), job(3, owner="b"), job(1, owner="c", batch=2), job(2, owner="a")]
    for each in jobs:
        scheduler.add(each)
    assert scheduler.urgent
    batch = take(scheduler)
    assert set(batch.jobs) == set(jobs)
    assert dict(zip(batch.jobs, batch.tokens, strict=True)) == {each: each.tokens for each in jobs}
    assert (len(scheduler), scheduler.urgent) == (0, False)


def test_only_steps_through_the_same_blocks_share_a_batch() -> None:
    scheduler = Scheduler()
    whole, part, other = job(owner="a"), job(owner="b", group="1:3"), job(owner="c")
    for each in (whole, part, other):
        scheduler.add(each)
    first = take(scheduler)
    assert first.jobs == (whole, other)
    run(first, scheduler)
    late = job(owner="a")
    scheduler.add(late)
    assert take(scheduler).jobs == (part,)  # it was first in line, so its blocks are next


def test_a_batch_is_bounded_and_shared_by_peers() -> None:
    """One peer with a hundred sessions gets as much of a batch as the peer with three, once that is served."""
    scheduler = Scheduler()
    crowd = [job(8, owner="crowd") for _ in range(100)]
    few = [job(8, owner="few") for _ in range(3)]
    for each in (*crowd, *few):
        scheduler.add(each)
    batch = take(scheduler)
    assert sum(each.size for each in batch.jobs) == BATCH_TOKENS
    assert set(few) <= set(batch.jobs)
    assert [each for each in batch.jobs if each.owner == "crowd"] == crowd[: BATCH_TOKENS // 8 - 3]


def test_peers_that_found_no_room_are_first_in_the_next_batch() -> None:
    scheduler = Scheduler()
    for owner in range(10):
        scheduler.add(job(SHORT_TOKENS, owner=f"peer {owner}"))
    seen = []
    while (batch := scheduler.next_batch(0)) is not None:
        seen.append([str(each.owner) for each in batch.jobs])
        run(batch, scheduler)
        scheduler.add(job(SHORT_TOKENS, owner="peer 0")) if len(seen) == 1 else None
    assert seen == [
        ["peer 0", "peer 1", "peer 2", "peer 3"],
        ["peer 4", "peer 5", "peer 6", "peer 7"],
        ["peer 8", "peer 9", "peer 0"],
    ]


def test_a_long_prefill_goes_in_pieces_that_add_up() -> None:
    scheduler = Scheduler()
    long = job(1000)
    scheduler.add(long)
    pieces = []
    while (batch := scheduler.next_batch(0)) is not None:
        assert (batch.jobs, batch.first_block) == ((long,), 0)
        pieces.append(batch.tokens[0])
        run(batch, scheduler, seconds=batch.tokens[0] * BLOCKS * 1e-4)  # 0.1 ms a token and block
    assert sum(pieces) == long.done == 1000
    assert pieces[:4] == [int(module.LONE_BLOCK_SECONDS / 1e-4)] * 4


def test_pieces_are_smaller_while_others_decode() -> None:
    scheduler = Scheduler()
    prefill = job(100_000)
    scheduler.add(prefill)
    for _ in range(20):
        run(take(scheduler), scheduler, seconds=prefill.piece * BLOCKS * 1e-5)
    assert prefill.piece == pytest.approx(module.LONE_BLOCK_SECONDS / 1e-5, rel=0.1)
    for _ in range(40):
        scheduler.add(job(1, owner="b"))
        short = take(scheduler, now=5.0)
        assert not short.long
        run(short, scheduler, seconds=0.004)
        piece = take(scheduler, now=5.0)
        run(piece, scheduler, seconds=prefill.piece * BLOCKS * 1e-5)
    assert prefill.piece == pytest.approx(0.004 / 2 / 1e-5, rel=0.1)


def test_a_piece_is_never_less_than_worth_its_while() -> None:
    scheduler = Scheduler()
    long = job(1000, batch=4)
    scheduler.add(long)
    for _ in range(5):
        batch = take(scheduler)
        run(batch, scheduler, seconds=10.0 * batch.tokens[0])
    assert batch.tokens == (SMALLEST_PIECE // 4,)


def test_a_clock_that_stands_still_is_survived() -> None:
    scheduler = Scheduler()
    for _ in range(3000):
        scheduler.add(job(100))
        run(take(scheduler), scheduler, seconds=0.0)
    assert len(scheduler) == 0


def test_short_steps_get_in_between_two_blocks_and_a_piece_goes_on_where_it_was() -> None:
    scheduler = Scheduler()
    long, other = job(100, owner="a"), job(100, owner="z")
    scheduler.add(long)
    scheduler.add(other)
    piece = take(scheduler)
    run(piece, scheduler, blocks=1)  # it paused, because this came:
    short = job(1, owner="b")
    scheduler.add(short)
    assert len(scheduler) == 3
    batch = take(scheduler)
    assert batch.jobs == (short,)
    scheduler.add(job(1, owner="c"))  # more short ones come without end
    run(batch, scheduler)
    again = take(scheduler)  # but the long one gets its block
    assert (again.jobs, again.tokens, again.first_block) == ((long,), piece.tokens, 1)
    run(again, scheduler, blocks=BLOCKS - 1)
    assert long.done == piece.tokens[0]


def test_long_ones_take_turns_by_peer_not_by_job() -> None:
    scheduler = Scheduler()
    mine = [job(64, owner="greedy") for _ in range(10)]
    yours = job(64, owner="modest")
    for each in (*mine, yours):
        scheduler.add(each)
    order = []
    for _ in range(8):
        batch = take(scheduler, now=0.0)
        batch.jobs[0].piece = 16
        batch = Batch(batch.jobs, (16,))
        order.append(batch.jobs[0].owner)
        run(batch, scheduler)
    assert order == ["greedy", "modest"] * 4
    assert (mine[0].done, yours.done) == (64, 64)


def test_cancelled_work_leaves_the_queue() -> None:
    scheduler = Scheduler()
    short, long, begun = job(1), job(100), job(100, owner="b")
    for each in (short, long):
        scheduler.add(each)
    assert scheduler.load("a") == 101
    assert scheduler.remove(short)
    assert scheduler.remove(long)
    assert not scheduler.remove(long)
    assert (len(scheduler), scheduler.load("a")) == (0, 0)
    scheduler.add(begun)
    batch = take(scheduler)
    assert not scheduler.remove(begun)  # it runs
    run(batch, scheduler, blocks=2)
    assert scheduler.remove(begun)  # it paused amid its piece
    assert scheduler.next_batch(0) is None
    assert scheduler.load("b") == 0


def test_a_failed_or_unwanted_long_job_does_not_come_back() -> None:
    scheduler = Scheduler()
    for spoil in ("error", "abandoned"):
        long = job(1000)
        scheduler.add(long)
        batch = take(scheduler)
        setattr(long, spoil, ValueError() if spoil == "error" else True)
        scheduler.finished(batch, 0.1)
        assert (scheduler.next_batch(0), scheduler.load("a")) == (None, 0)


@given(
    st.lists(st.tuples(st.integers(1, 200), st.sampled_from("abc"), st.sampled_from(["0:4", "1:2"])), max_size=30),
    st.randoms(use_true_random=False),
)
def test_every_job_runs_exactly_once_whatever_comes(plan, rng) -> None:
    """Against a plain account of tokens: each runs whole, in order within a session's step, and the load ends at 0."""
    scheduler = Scheduler()
    waiting = [job(tokens, owner=owner, group=group) for tokens, owner, group in plan]
    account: Counter[Job] = Counter()
    added: list[Job] = []
    removed: set[Job] = set()
    now = 0.0
    while waiting or len(scheduler):
        if waiting and rng.random() < 0.6:
            added.append(waiting.pop())
            scheduler.add(added[-1])
            continue
        if added and rng.random() < 0.1:
            victim = rng.choice(added)
            if scheduler.remove(victim):
                removed.add(victim)
            continue
        batch = scheduler.next_batch(now)
        if batch is None:
            continue
        assert len({each.group for each in batch.jobs}) == 1
        assert batch.long or sum(each.size for each in batch.jobs) <= BATCH_TOKENS
        done = {each: each.done for each in batch.jobs}
        run(batch, scheduler, seconds=0.001, blocks=rng.randint(1, BLOCKS - batch.first_block))
        for each in batch.jobs:
            account[each] += each.done - done[each]
        now += 0.3
    assert all(account[each] == each.tokens for each in added if each not in removed)
    assert all(scheduler.load(owner) == 0 for owner in "abc")


@pytest.mark.parametrize(
    ("blocks", "step", "gap"), [(8, 0.001, 0.0005), (24, 0.1, 0.002), (70, 0.06, 0.01), (1, 0.005, 0.0)]
)
def test_greedy_prefills_do_not_double_anybodys_step(blocks, step, gap) -> None:
    """Simulated: a victim decodes, `gap` seconds of its own between steps, while another peer prefills without end.

    A block costs what one token costs (its weights are read once), and a quarter of that more for every 16 tokens.
    """
    scheduler = Scheduler()
    now, due = 0.0, 0.0
    waits: list[float] = []
    prefilled = 0
    decode: Job | None = None
    sent_at = 0.0
    while len(waits) < 200:
        if not scheduler._long and scheduler._begun is None:
            scheduler.add(job(2048, owner="greedy"))
        if decode is None and now >= due:
            decode, sent_at = job(1, owner="victim"), due
            scheduler.add(decode)
        batch = take(scheduler, now)
        begun = now
        if not batch.long:
            now += step
            run(batch, scheduler, seconds=step)
            waits.append(now - sent_at)
            decode, due = None, now + gap
            continue
        each = batch.jobs[0]
        each.blocks = blocks
        block_seconds = step / blocks * (1 + batch.tokens[0] / 64)
        while each.at_block < blocks:
            now += block_seconds
            each.at_block += 1
            if decode is None and now >= due:
                decode, sent_at = job(1, owner="victim"), due
                scheduler.add(decode)
            if scheduler.urgent:
                break
        if each.at_block == blocks:
            each.at_block, each.done = 0, each.done + batch.tokens[0]
            prefilled += batch.tokens[0]
        scheduler.finished(batch, now - begun)
    settled = sorted(waits[50:])
    assert settled[len(settled) // 2] + gap <= 2 * (step + gap)
    assert prefilled > 200  # and the prefills go on


# --- training


def training(owner: str = "t", blocks: int = 10**9) -> Job:
    """A pass of so many blocks."""
    made = job(512, owner=owner)
    made.training = True
    made.work = blocks
    return made


def run_training(batch: Batch, scheduler: Scheduler, now: float, block: float, until: float) -> float:
    """A slice: blocks until others wait (from `until` on) and it has had its seconds, or the pass is through. The time
    after it.
    """
    (each,) = batch.jobs
    end = now
    while each.work and (end == now or end < until or end - now < batch.seconds):
        each.work -= 1
        each.at_block += 1
        end += block
    if not each.work:
        each.done = each.tokens
    scheduler.finished(batch, end - now)
    return end


def share_beside_decoding(step: float, think: float, block: float, seconds: float = 60.0) -> tuple[float, list[float]]:
    """One peer decodes, thinking between steps, one trains without end: training's share, and each step's seconds."""
    scheduler, now = Scheduler(), 0.0
    scheduler.add(training())
    while now < 5.0:  # alone at first, which must not count against it
        now = run_training(some(scheduler.next_batch(now)), scheduler, now, block, until=now + 0.1)
    start, trained, seconds = now, 0.0, now + seconds
    arrives, waits, taken = now, False, []
    while now < seconds:
        if not waits and now >= arrives:
            scheduler.add(job(1))
            waits = True
        batch = scheduler.next_batch(now)
        if batch is None:
            now = min(arrives if not waits else float("inf"), scheduler.wake_at())
        elif batch.training:
            end = run_training(batch, scheduler, now, block, now if waits else arrives)
            trained, now = trained + end - now, end
        else:
            run(batch, scheduler, step)
            now += step
            taken.append(now - arrives)
            arrives, waits = now + think, False
    return trained / (now - start), taken


@pytest.mark.parametrize("block", [0.0003, 0.002, 0.01, 0.05])
@pytest.mark.parametrize(("step", "think"), [(0.002, 0.001), (0.002, 0.0), (0.05, 0.01), (0.02, 0.1)])
def test_training_gets_a_fifth_of_the_time_and_half_of_the_steps_do_not_notice(
    step: float, think: float, block: float
) -> None:
    share, taken = share_beside_decoding(step, think, block)
    assert share >= 0.19
    assert sorted(taken)[len(taken) // 2] <= 1.3 * step
    assert max(taken) <= step + block + module.TRAINING_CREDIT_SECONDS  # and none waits for long


def test_training_fills_the_gaps_between_steps_that_hardly_notice() -> None:
    share, taken = share_beside_decoding(step=0.05, think=0.1, block=0.005)
    assert share > 0.6
    assert sorted(taken)[len(taken) // 2] <= 1.2 * 0.05


def test_training_alone_runs_without_a_pause() -> None:
    scheduler, now = Scheduler(), 0.0
    scheduler.add(training(blocks=100))
    while len(scheduler):
        now = run_training(some(scheduler.next_batch(now)), scheduler, now, 0.01, until=now)
    assert now == pytest.approx(1.0)


def test_training_has_the_model_again_soon_after_the_others_have_gone() -> None:
    scheduler = Scheduler()
    scheduler.add(training())
    scheduler.add(job(1))
    run_training(some(scheduler.next_batch(0.0)), scheduler, 0.0, 10.0, until=0.0)  # a slow block
    run(some(scheduler.next_batch(10.0)), scheduler, 0.01)
    assert scheduler.next_batch(10.01) is None
    assert scheduler.wake_at() == 10.0 + module.RECENT_SECONDS
    assert some(scheduler.next_batch(scheduler.wake_at())).training


def test_training_peers_take_turns_pass_by_pass_and_leave_when_cancelled() -> None:
    scheduler = Scheduler()
    jobs = [training("a", 2), training("a", 2), training("b", 2)]
    for each in jobs:
        scheduler.add(each)
    seen = []
    for number in range(5):
        batch = some(scheduler.next_batch(float(number)))
        seen.append(batch.jobs[0])
        run_training(batch, scheduler, float(number), 0.5, until=0.0)
    assert seen == [jobs[0], jobs[0], jobs[2], jobs[2], jobs[1]]  # one has working memory at a time
    last = training("b")
    scheduler.add(last)
    assert len(scheduler) == 2
    assert scheduler.remove(last)
    assert scheduler.remove(jobs[1])
    assert (len(scheduler), scheduler.next_batch(9.0)) == (0, None)
    assert scheduler.load("a") == 0


def some(batch: Batch | None) -> Batch:
    assert batch is not None
    return batch


STEP = 0.1
SOON = 0.001


def decode(session: str, now: float, group: str = "0:4") -> Job:
    made = job(1, owner=session, group=group)
    made.session, made.came_at = session, now
    return made


def alone(scheduler: Scheduler, now: float, meanwhile: Job) -> float:
    """Run the batch that is due, which one session has for itself, while `meanwhile` comes; the time after it."""
    batch = take(scheduler, now)
    assert len(batch.jobs) == 1
    scheduler.add(meanwhile)
    run(batch, scheduler, STEP)
    return now + STEP


def taking_turns(scheduler: Scheduler, other: str = "0:4") -> float:
    """The steps of a and b have each come while the other's ran, and b's waits now; `other`: the blocks of b."""
    scheduler.add(decode("a", 0.0))
    now = alone(scheduler, 0.0, decode("b", SOON, other))
    now = alone(scheduler, now, decode("a", now + SOON))
    return alone(scheduler, now, decode("b", now + SOON, other))


def test_sessions_that_take_turns_at_the_same_pace_come_to_share_their_batches() -> None:
    scheduler = Scheduler()
    now = taking_turns(scheduler)
    assert scheduler.next_batch(now) is None
    assert scheduler.wake_at() == pytest.approx(now + GATHER_SHARE * STEP)
    scheduler.add(decode("a", now + SOON))
    assert len(take(scheduler, now + SOON).jobs) == 2
    assert scheduler.wake_at() == float("inf")


def test_who_stays_away_is_waited_for_once() -> None:
    scheduler = Scheduler()
    now = taking_turns(scheduler)
    assert scheduler.next_batch(now) is None
    now = scheduler.wake_at()
    run(take(scheduler, now), scheduler, STEP)
    scheduler.next_batch(now + STEP)
    scheduler.add(decode("b", now + STEP + SOON))
    assert len(take(scheduler, now + STEP + SOON).jobs) == 1


def test_who_needs_long_between_two_steps_is_not_waited_for() -> None:
    scheduler = Scheduler()
    scheduler.add(decode("a", 0.0))
    now = alone(scheduler, 0.0, decode("b", SOON))
    for _ in range(3):
        now = alone(scheduler, now, decode("a", now + 0.9 * STEP))
        now = alone(scheduler, now, decode("b", now + 0.9 * STEP))


def test_who_comes_back_in_time_again_is_waited_for_again() -> None:
    gathering = Gathering()
    due = GATHER_SHARE * STEP
    for left_at, away, patience in ((0.0, SOON, 0.0), (0.2, 2 * STEP, due), (0.6, SOON, 0.0), (0.8, SOON, due)):
        gathering.left(["a"], "0:4", left_at)
        assert gathering.until("0:4", STEP, left_at) == pytest.approx(left_at + patience)
        came_at = left_at + away
        assert gathering.until("0:4", STEP, came_at) <= left_at + max(due, away)
        gathering.came("a", came_at)


def test_a_batch_that_was_waited_for_and_left_wakes_nobody() -> None:
    scheduler = Scheduler()
    now = taking_turns(scheduler)
    assert scheduler.next_batch(now) is None
    (waiting,) = scheduler._short["b"]
    scheduler.remove(waiting)
    assert scheduler.next_batch(now + SOON) is None
    assert scheduler.wake_at() == float("inf")


def test_sessions_of_other_blocks_are_not_waited_for() -> None:
    scheduler = Scheduler()
    now = taking_turns(scheduler, other="4:8")
    assert len(take(scheduler, now).jobs) == 1


def test_sessions_that_went_away_are_forgotten() -> None:
    gathering = Gathering()
    for number in range(1000):
        gathering.left([number], "0:4", number * AWAY_SECONDS)
        gathering.came(number, number * AWAY_SECONDS)
        gathering.left([number], "0:4", number * AWAY_SECONDS)
    assert len(gathering._away) == len(gathering._usual) == 2


QUICK = BRIEF_SECONDS / 2


def lone(scheduler: Scheduler, step: Job, seconds: float = QUICK) -> float:
    """Run `step`, which waits for nobody; the time after it."""
    scheduler.add(step)
    run(take(scheduler, step.came_at), scheduler, seconds)
    assert scheduler.next_batch(step.came_at + seconds) is None
    return step.came_at + seconds


@pytest.mark.parametrize(("due_in", "at_once"), [(0.5 * QUICK, False), (1.5 * QUICK, True)])
def test_a_step_runs_at_once_unless_another_is_expected_meanwhile(due_in: float, at_once: bool) -> None:
    """`due_in`: when the other session should be back, as it was the last time."""
    scheduler = Scheduler()
    now = lone(scheduler, decode("other", 0.0))
    now = lone(scheduler, decode("other", now + 4 * QUICK))
    step = decode("mine", now + 4 * QUICK - due_in)
    batch = scheduler.at_once(step, step.came_at)
    assert (batch is not None) == at_once
    if batch is not None:
        assert batch.jobs == (step,) and scheduler.load(step.owner) == 1
        run(batch, scheduler, QUICK)
    assert (len(scheduler), scheduler.load(step.owner)) == (0, 0)


def test_what_is_not_known_to_be_brief_does_not_run_at_once() -> None:
    scheduler = Scheduler()
    assert scheduler.at_once(decode("a", 0.0), 0.0) is None  # nobody knows yet how long steps take
    now = lone(scheduler, decode("a", 0.0)) + AWAY_SECONDS
    assert scheduler.at_once(job(SHORT_TOKENS + 1), now) is None
    slow = Scheduler()
    now = lone(slow, decode("a", 0.0), 2 * BRIEF_SECONDS) + AWAY_SECONDS
    assert slow.at_once(decode("a", now), now) is None


@pytest.mark.parametrize("waiting", [1, SHORT_TOKENS + 1])
def test_nothing_runs_at_once_before_what_waits(waiting: int) -> None:
    scheduler = Scheduler()
    now = lone(scheduler, decode("a", 0.0)) + 4 * QUICK
    scheduler.add(job(waiting, owner="b"))
    assert scheduler.at_once(decode("a", now), now) is None
