"""The session's state machine, driven synchronously against made-up servers that fail as told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from petalite.client.hop import HOP_TRANSITIONS, Hop, HopEvent, HopState
from petalite.client.pipeline import Check, Extend, Open, Pipeline, Plan, Push, Relay, Send
from petalite.errors import LocalProtocolError
from petalite.identity import PeerId
from petalite.swarm.snapshot import Span

LAYERS, BATCH, PIECE = 6, 2, 4


def layer(index: int, hidden: Tensor) -> Tensor:
    """Block `index` of a made-up model: causal, so every position depends on all before it."""
    return torch.cumsum(hidden, dim=1) % 97 + index


def run_layers(start: int, end: int, hidden: Tensor) -> Tensor:
    for index in range(start, end):
        hidden = layer(index, hidden)
    return hidden


@dataclass
class Server:
    """What a server holds of one session: the inputs so far stand for its cache."""

    blocks: Span
    inputs: Tensor
    max_len: int
    n: int = 0
    given: int = 0
    last: tuple[int, tuple[int, ...] | None, Tensor, Tensor] | None = None

    def run(self, send: Send, inputs: Tensor) -> Tensor | None:
        """The output; None for another step than that of this number, as a server answers with conflict."""
        if send.n == self.n - 1 and self.last is not None:
            start, reorder, done, output = self.last
            same = (start, reorder) == (send.start, send.reorder) and torch.equal(done, inputs)
            return output if same and output.shape[1] >= send.answered else None
        assert send.n == self.n
        assert send.start <= self.inputs.shape[1]
        assert send.end <= self.max_len
        kept = self.inputs[:, : send.start]
        if send.reorder is not None:
            kept = kept[list(send.reorder)]
        self.inputs = torch.cat([kept, inputs], dim=1)
        self.n += 1
        output = run_layers(self.blocks.start, self.blocks.end, self.inputs)[:, -send.answered :]
        self.given += send.answered
        self.last = (send.start, send.reorder, inputs.clone(), output)
        return output


@dataclass
class World:
    """Does what the pipeline asks for. `fail` decides about each action: "" or what goes wrong with it."""

    pipeline: Pipeline
    servers: dict[bytes, Server] = field(default_factory=dict)
    peers: itertools.count[int] = field(default_factory=itertools.count)
    splits: list[int] = field(default_factory=lambda: [2, 4])
    steps: int = 0

    def perform(self, action: object, failure: str = "") -> None:
        pipeline = self.pipeline
        if isinstance(action, Plan):
            borders = [b for b in self.splits if action.blocks.start < b < action.blocks.end]
            cuts = [action.blocks.start, *borders, action.blocks.end]
            made = [(self.new_peer(), Span(a, b)) for a, b in itertools.pairwise(cuts)]
            pipeline.assign(made, frozenset(PeerId(i.to_bytes(32, "big")) for i in range(100)))
        elif isinstance(action, Push | Relay):
            carried: Tensor | None = None
            self.steps += 1
            for i, send in enumerate(action.sends):
                if failure and i == self.steps % len(action.sends):
                    self.fail(send, failure)
                    if isinstance(action, Push):
                        for later in action.sends[i + 1 :]:
                            pipeline.cut_off(later)
                    return
                pipeline.started(send)
                # What a hop is pushed we do not send; what we pass on we could also send from what is kept.
                inputs = pipeline.inputs(send) if carried is None or isinstance(action, Relay) else carried
                carried = self.run(send, inputs)
                if carried is None:
                    return
        elif failure:
            self.fail(action, failure)
        elif isinstance(action, Open):
            hop = action.hop
            self.servers[hop.sid] = Server(hop.blocks, torch.empty(BATCH, 0, 1), hop.max_len)
            pipeline.opened(hop)
        elif isinstance(action, Check):
            server = self.servers.get(action.hop.sid)
            if server is None:
                pipeline.forgotten(action.hop)
            else:
                pipeline.checked(action.hop, server.n, server.inputs.shape[1])
        elif isinstance(action, Extend):
            self.servers[action.hop.sid].max_len = action.max_len
            pipeline.extended(action.hop, action.max_len)
        else:
            assert isinstance(action, Send)
            self.steps += 1
            pipeline.started(action)
            self.run(action, pipeline.inputs(action))

    def run(self, send: Send, inputs: Tensor) -> Tensor | None:
        """Ask the server and tell the pipeline."""
        output = self.servers[send.hop.sid].run(send, inputs)
        if output is None:
            self.pipeline.forgotten(send.hop)
        else:
            self.pipeline.replied(send, output)
        return output

    def fail(self, action: object, failure: str) -> None:
        assert isinstance(action, Open | Check | Extend | Send)
        hop, pipeline = action.hop, self.pipeline
        if failure == "lost":
            pipeline.lost(hop)
        elif failure == "forgotten":
            self.servers.pop(hop.sid, None)
            pipeline.forgotten(hop)
        elif failure in ("done, but cut off", "done, but late") and isinstance(action, Send):
            if action.end <= pipeline._history_at(hop.blocks.start).length:
                pipeline.started(action)
                self.servers[hop.sid].run(action, pipeline.inputs(action))
            if failure == "done, but cut off":
                pipeline.cut_off(action)
        elif isinstance(action, Send):
            pipeline.cut_off(action)

    def new_peer(self) -> PeerId:
        return PeerId(next(self.peers).to_bytes(32, "big"))

    def step(self, hidden: Tensor, failures: Sequence[str] = (), push: bool = False, last: int | None = None) -> Tensor:
        """A whole step; the i-th action fails as `failures` say."""
        self.pipeline.feed(hidden, last)
        told = iter(failures)
        for _ in range(1000):
            if self.pipeline.complete:
                output = self.pipeline.output
                self.pipeline.finish()
                return output
            for action in self.pipeline.ready(push):
                failure = "" if isinstance(action, Plan) else next(told, "")
                self.perform(action, failure)
        raise AssertionError("the step does not end")


def new_pipeline(max_len: int = 100) -> Pipeline:
    sids = itertools.count()
    return Pipeline(
        LAYERS, batch=BATCH, max_len=max_len, piece=PIECE, new_sid=lambda: next(sids).to_bytes(16, "big"), short=32
    )


def values(seed: int, tokens: int) -> Tensor:
    made = torch.randint(0, 90, (BATCH, tokens, 1), generator=torch.Generator().manual_seed(seed))
    return made.to(torch.float32)


# The state table


@pytest.mark.parametrize("state", HopState)
@pytest.mark.parametrize("event", HopEvent)
def test_each_state_takes_the_events_of_its_row_and_no_other(state: HopState, event: HopEvent) -> None:
    hop = Hop(PeerId(bytes(32)), Span(0, 1), b"", 1, state=state)
    after = HOP_TRANSITIONS[state].get(event)
    if after is None:
        with pytest.raises(LocalProtocolError, match="cannot be"):
            hop.happened(event)
    else:
        hop.happened(event)
        assert hop.state is after


def test_every_state_is_reached_and_only_gone_is_final() -> None:
    reached, fresh = set(), {HopState.NEW}
    while fresh:
        reached |= fresh
        fresh = {after for state in fresh for after in HOP_TRANSITIONS[state].values()} - reached
    assert reached == set(HopState)
    assert [state for state, row in HOP_TRANSITIONS.items() if not row] == [HopState.GONE]


# What is asked for


def test_hops_are_opened_in_block_order_one_after_the_other() -> None:
    pipeline = new_pipeline()
    world = World(pipeline)
    pipeline.feed(values(0, 1))
    asked: list[str] = []
    while not pipeline.complete:
        actions = pipeline.ready()
        asked += [f"{type(action).__name__} {getattr(action, 'hop', '')}"[:4] for action in actions]
        for action in actions:
            world.perform(action)
    assert asked == ["Plan", "Open", "Open", "Open", "Rela"]


def test_a_long_prefill_is_cut_into_pieces_that_follow_each_other_through_the_hops() -> None:
    world = World(new_pipeline())
    output = world.step(values(0, 3 * PIECE + 1))
    assert torch.equal(output, run_layers(0, LAYERS, values(0, 3 * PIECE + 1)))
    assert world.steps == 3 * 4


@pytest.mark.parametrize("push", [False, True])
def test_of_the_last_hop_only_what_is_wanted_is_asked_for(push: bool) -> None:
    world = World(new_pipeline())
    output = world.step(values(0, 3 * PIECE + 1), push=push, last=6)
    assert torch.equal(output, run_layers(0, LAYERS, values(0, 3 * PIECE + 1))[:, -6:])
    given = [world.servers[hop.sid].given for hop in world.pipeline.hops]
    assert given == [13, 13, 1 + 1 + 4 + 1]  # a piece before what is wanted is answered with the least there can be
    assert world.pipeline._output.end == 13


def test_a_replay_at_the_last_hop_asks_only_for_what_is_wanted() -> None:
    world = World(new_pipeline())
    sent = values(0, 9)
    world.step(sent)
    world.pipeline.lost(world.pipeline.hops[2])
    output = world.step(values(1, 2))
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([sent, values(1, 2)], dim=1))[:, 9:])
    assert world.pipeline.replayed_tokens == 9
    assert world.servers[world.pipeline.hops[2].sid].given == 1 + 1 + 2  # 4, 4 and 3 tokens


def test_a_step_done_for_its_last_token_and_cut_off_is_done_again_where_all_are_wanted() -> None:
    world = World(new_pipeline())
    world.splits = []
    world.step(values(0, 2))
    pipeline = world.pipeline
    pipeline.feed(values(1, 3), 1)
    (action,) = pipeline.ready()
    world.perform(action, "done, but late")
    pipeline.abandon()
    output = world.step(values(1, 3))
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([values(0, 2), values(1, 3)], dim=1))[:, 2:])


def test_a_lost_hop_is_replayed_from_its_own_inputs_and_the_others_are_not_asked() -> None:
    world = World(new_pipeline())
    sent = values(0, 9)
    world.step(sent)
    pipeline = world.pipeline
    first, middle, last = pipeline.hops
    pipeline.feed(values(1, 1))
    pipeline.lost(middle)
    while not pipeline.complete:
        for action in pipeline.ready():
            world.perform(action)
    assert torch.equal(pipeline.output, run_layers(0, LAYERS, torch.cat([sent, values(1, 1)], dim=1))[:, 9:])
    assert pipeline.replayed_tokens == 9
    assert (pipeline.hops[0], pipeline.hops[2]) == (first, last)
    assert (first.n, last.n) == (4, 4)


def test_two_hops_lost_with_one_between_keep_the_inputs_behind_it() -> None:
    world = World(new_pipeline())
    sent = values(0, 6)
    world.step(sent)
    pipeline = world.pipeline
    pipeline.lost(pipeline.hops[2])
    pipeline.lost(pipeline.hops[0])
    output = world.step(values(1, 2))
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([sent, values(1, 2)], dim=1))[:, 6:])


def test_replacements_that_split_elsewhere_rebuild_the_boundary_between_them() -> None:
    world = World(new_pipeline())
    sent = values(0, 6)
    world.step(sent)
    world.splits = [1, 3, 5]
    for hop in list(world.pipeline.hops):
        world.pipeline.lost(hop)
    output = world.step(values(1, 2))
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([sent, values(1, 2)], dim=1))[:, 6:])
    assert [hop.blocks.start for hop in world.pipeline.hops] == [0, 1, 3, 5]
    assert world.pipeline.borders == 4


def test_a_session_that_outgrows_its_room_is_extended_with_some_to_spare() -> None:
    world = World(new_pipeline(max_len=4))
    output = torch.cat([world.step(values(i, 1)) for i in range(40)], dim=1)
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([values(i, 1) for i in range(40)], dim=1)))
    assert {hop.max_len for hop in world.pipeline.hops} <= set(range(40, 51))


def test_a_step_done_but_cut_off_is_found_by_a_check_and_done_again_without_replay() -> None:
    world = World(new_pipeline())
    sent = values(0, 5)
    world.step(sent)
    pipeline = world.pipeline
    pipeline.feed(values(1, 1))
    (action,) = pipeline.ready()
    world.perform(action, "done, but cut off")
    pipeline.truncate(5)
    output = world.step(values(2, 1))
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([sent, values(2, 1)], dim=1))[:, 5:])
    assert pipeline.replayed_tokens == 0


def test_a_server_that_stands_where_it_cannot_is_opened_anew() -> None:
    world = World(new_pipeline())
    world.step(values(0, 5))
    pipeline = world.pipeline
    pipeline.feed(values(1, 1))
    (relay,) = pipeline.ready()
    assert isinstance(relay, Relay)
    send = relay.sends[0]
    pipeline.cut_off(send)
    pipeline.checked(send.hop, 17, 5)
    assert (send.hop.state, send.hop.position) == (HopState.NEW, 0)


def test_an_answer_to_a_step_that_was_given_up_never_passes_for_one_to_the_next() -> None:
    """Its number may be taken: the server is asked before that number is used again."""
    world = World(new_pipeline())
    sent = values(0, 5)
    world.step(sent)
    pipeline = world.pipeline
    pipeline.feed(values(1, 1))
    (action,) = pipeline.ready()
    assert isinstance(action, Relay)
    world.fail(action.sends[0], "done, but late")
    pipeline.abandon()
    pipeline.feed(values(2, 1))
    (action,) = pipeline.ready(push=True)
    assert isinstance(action, Check)


def test_after_a_step_was_given_up_the_next_is_not_pushed_since_an_old_push_may_still_come() -> None:
    world = World(new_pipeline())
    world.step(values(0, 5), push=True)
    world.step(values(1, 1), push=True)
    pipeline = world.pipeline
    pipeline.feed(values(2, 1))
    (action,) = pipeline.ready(push=True)
    assert isinstance(action, Push)
    for send in action.sends:
        pipeline.started(send)
    pipeline.abandon()
    kinds: list[str] = []
    pipeline.feed(values(3, 1))
    while not pipeline.complete:
        for action in pipeline.ready(push=True):
            kinds.append(type(action).__name__)
            world.perform(action)
    assert "Push" not in kinds
    pipeline.finish()
    pipeline.feed(values(4, 1))
    assert isinstance(pipeline.ready(push=True)[0], Push)


# Pushing


def test_a_short_step_is_pushed_through_all_hops_and_a_long_one_is_not() -> None:
    world = World(new_pipeline())
    world.step(values(0, 20))
    world.pipeline.feed(values(1, 1))
    (action,) = world.pipeline.ready(push=True)
    assert isinstance(action, Push)
    assert [send.hop for send in action.sends] == world.pipeline.hops
    assert len(world.pipeline.ready(push=False)) == 1
    world.pipeline.truncate(20)
    world.pipeline.feed(values(1, 17))
    assert not any(isinstance(action, Push) for action in world.pipeline.ready(push=True))


def test_without_pushes_a_short_step_is_passed_on_by_us_through_all_hops() -> None:
    world = World(new_pipeline())
    world.step(values(0, 20))
    world.pipeline.feed(values(1, 1))
    (action,) = world.pipeline.ready(push=False)
    assert isinstance(action, Relay)
    assert [send.hop for send in action.sends] == world.pipeline.hops


def test_we_pass_on_up_to_where_pushes_can_begin() -> None:
    world = World(new_pipeline())
    world.step(values(0, 2), push=True)
    pipeline = world.pipeline
    pipeline.hops[1].source = None
    pipeline.feed(values(1, 1))
    (first,) = pipeline.ready(push=True)
    assert isinstance(first, Send)
    assert first.hop is pipeline.hops[0]
    world.perform(first)
    (second,) = pipeline.ready(push=True)
    assert isinstance(second, Push)
    assert [send.hop for send in second.sends] == pipeline.hops[1:]


def test_we_pass_nothing_on_to_a_hop_that_has_other_things_to_do_first() -> None:
    world = World(new_pipeline())
    world.step(values(0, 2))
    pipeline = world.pipeline
    pipeline.feed(values(1, 1))
    pipeline.hops[2].max_len = 2
    (action,) = pipeline.ready()
    assert isinstance(action, Relay)
    assert [send.hop for send in action.sends] == pipeline.hops[:2]


def test_a_replaced_hop_cannot_push_into_one_that_was_opened_for_its_predecessor() -> None:
    world = World(new_pipeline())
    world.step(values(0, 2), push=True)
    pipeline = world.pipeline
    pipeline.lost(pipeline.hops[1])
    world.step(values(1, 1), push=True)
    pipeline.feed(values(2, 1))
    (action,) = pipeline.ready(push=True)
    assert isinstance(action, Push)
    assert [send.hop for send in action.sends] == pipeline.hops[:2]
    assert [send.n for send in action.sends] == [2, 2]
    assert pipeline.hops[2].source not in (None, pipeline.hops[1].peer)


def test_no_hop_is_given_two_things_to_do_at_once() -> None:
    world = World(new_pipeline())
    world.step(values(0, 2), push=True)
    pipeline = world.pipeline
    pipeline.feed(values(1, 2))
    for hop in pipeline.hops:
        hop.position = 0  # as after a step that was cut off: all have inputs of their own
    actions = pipeline.ready(push=True)
    hops = [
        send.hop for action in actions for send in (action.sends if isinstance(action, Push | Relay) else (action,))
    ]  # type: ignore[union-attr]
    assert len(hops) == len(set(map(id, hops))) == 3


# Handing over


def test_a_retired_hop_is_kept_until_others_have_caught_up() -> None:
    world = World(new_pipeline())
    world.step(values(0, 5))
    pipeline = world.pipeline
    old = pipeline.hops[1]
    pipeline.retire(old)
    output = world.step(values(1, 1))
    assert torch.equal(output, run_layers(0, LAYERS, torch.cat([values(0, 5), values(1, 1)], dim=1))[:, 5:])
    assert pipeline.take_retired() == [old]
    assert old not in pipeline.hops


def test_a_retired_hop_comes_back_when_nobody_can_take_over() -> None:
    world = World(new_pipeline())
    world.step(values(0, 5))
    pipeline = world.pipeline
    old = pipeline.hops[1]
    pipeline.retire(old)
    pipeline.feed(values(1, 1))
    (plan,) = pipeline.ready()
    assert isinstance(plan, Plan)
    world.splits = [3]
    world.perform(plan)
    displaced = [hop for hop in pipeline.hops if hop.blocks.end == 3 or hop.blocks.start == 3]
    pipeline.lost(displaced[1])
    assert pipeline.restore(Span(3, 4)) == displaced[:1]
    while not pipeline.complete:
        for action in pipeline.ready():
            world.perform(action)
    assert torch.equal(pipeline.output, run_layers(0, LAYERS, torch.cat([values(0, 5), values(1, 1)], dim=1))[:, 5:])
    assert pipeline.replayed_tokens == 0
    assert pipeline.restore(Span(0, 6)) is None


# Misuse


def test_wrong_use_is_refused_and_changes_nothing() -> None:
    world = World(new_pipeline())
    world.step(values(0, 5))
    pipeline = world.pipeline
    for wrong in (torch.zeros(BATCH + 1, 1, 1), torch.zeros(BATCH, 0, 1), torch.zeros(BATCH, 1)):
        with pytest.raises(LocalProtocolError, match="shape"):
            pipeline.feed(wrong)
    for position in (-1, 6):
        with pytest.raises(LocalProtocolError, match="roll back"):
            pipeline.truncate(position)
    for sources in ([0], [0, 2], [-1, 0]):
        with pytest.raises(LocalProtocolError, match="reorder"):
            pipeline.reorder(sources)
    pipeline.feed(values(1, 1))
    with pytest.raises(LocalProtocolError, match="one at a time"):
        pipeline.feed(values(1, 1))
    with pytest.raises(LocalProtocolError, match="between steps"):
        pipeline.reorder([0, 1])


# Anything in any order


class Sessions(RuleBasedStateMachine):
    """Steps with failures, rollbacks, reorders and given-up steps; the oracle runs all blocks on all that was sent."""

    @initialize(max_len=st.sampled_from([2, 100]))
    def begin(self, max_len: int) -> None:
        self.world = World(new_pipeline(max_len))
        self.sent = torch.empty(BATCH, 0, 1)
        self.seed = 0

    failures = st.lists(
        st.sampled_from(["", "", "lost", "forgotten", "cut off", "done, but cut off", "done, but late"]), max_size=8
    )

    def fresh(self, tokens: int) -> Tensor:
        self.seed += 1
        return values(self.seed, tokens)

    @rule(
        tokens=st.integers(1, 9),
        failures=failures,
        push=st.booleans(),
        splits=st.lists(st.integers(1, 5), max_size=3),
        last=st.none() | st.integers(1, 9),
    )
    def step(self, tokens: int, failures: list[str], push: bool, splits: list[int], last: int | None) -> None:
        self.world.splits = sorted(set(splits))
        hidden = self.fresh(tokens)
        self.sent = torch.cat([self.sent, hidden], dim=1)
        last = None if last is None else min(last, tokens)
        output = self.world.step(hidden, failures, push, last)
        assert torch.equal(output, run_layers(0, LAYERS, self.sent)[:, -(last or tokens) :])

    @rule(
        tokens=st.integers(1, 9),
        failures=failures,
        rounds=st.integers(0, 6),
        push=st.booleans(),
        last=st.none() | st.just(1),
    )
    def give_up(self, tokens: int, failures: list[str], rounds: int, push: bool, last: int | None) -> None:
        pipeline = self.world.pipeline
        pipeline.feed(self.fresh(tokens), last)
        told = iter(failures)
        for _ in range(rounds):
            if pipeline.complete:
                break
            for action in pipeline.ready(push):
                self.world.perform(action, "" if isinstance(action, Plan) else next(told, ""))
        pipeline.abandon()

    @precondition(lambda self: self.sent.shape[1])
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, self.sent.shape[1]))
        self.world.pipeline.truncate(position)
        self.sent = self.sent[:, :position]

    @rule(sources=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, sources: list[int]) -> None:
        self.world.pipeline.reorder(sources)
        self.sent = self.sent[sources]

    @rule(which=st.integers(0, 5))
    def retire(self, which: int) -> None:
        hops = [hop for hop in self.world.pipeline.hops if hop.state is HopState.OPEN]
        if hops:
            self.world.pipeline.retire(hops[which % len(hops)])

    @rule()
    def forget_retired(self) -> None:
        self.world.pipeline.take_retired()

    @invariant()
    def stands_where_it_should(self) -> None:
        assert self.world.pipeline.position == self.sent.shape[1]


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
