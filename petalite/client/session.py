"""An inference session over a chain of servers, any of which may be replaced at any token (spec 07).

The shell around `pipeline.Pipeline`: it plans routes, opens, sends and judges. Only a fault of the peer or of the
way to it bans a peer; an error of our own propagates.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any

import trio
from torch import Tensor

from petalite import bridge, limits
from petalite.client.calls import Asked, Calls, Outcome, Step, Terms
from petalite.client.given import Given
from petalite.client.hidden import Hidden, as_tensor
from petalite.client.hop import Hop, HopState
from petalite.client.pacing import LEAST_TOKENS, piece_length
from petalite.client.pipeline import Action, Check, Extend, Intervene, Open, Pipeline, Plan, Push, Relay, Send
from petalite.client.planning import Planner, SessionError
from petalite.client.pushing import FRESH_PUSH_SECONDS, PUSH_SECONDS, Part, PushTrust, parts_of
from petalite.client.runner import Runner, run_in_thread
from petalite.client.verdicts import Judge, Verdict, retry_after
from petalite.errors import (
    HandshakeError,
    LocalProtocolError,
    PeerLost,
    PeerUnreachable,
    PetaliteError,
    ReplyLate,
    RequestError,
)
from petalite.identity import PeerId
from petalite.net.connection import Reply
from petalite.net.nursery import open_flat_nursery
from petalite.swarm.node import Node
from petalite.swarm.routing import Route
from petalite.swarm.snapshot import Span

__all__ = ["InferenceSession", "SessionError"]

log = logging.getLogger("petalite.client")

# Between two looks for a server that could take over from one that is leaving.
HAND_OVER_SECONDS = 1.0
# A step that is worked on for longer may be worth taking elsewhere.
SLOW_SECONDS = 2.0
SLOW_AVOID_SECONDS = 30.0
# Bytes a second of an adapter, on a path that is still worth opening a session over.
SLOWEST_UPLOAD = 2**20

Intervention = Callable[[Tensor], Tensor]
"""Hidden states (B, T, C) that are about to enter a block -> what enters it instead."""


class InferenceSession:
    """A KV cache of `batch` rows x `max_len` tokens spread over a chain of servers.

    Use it as an async context manager: leaving it tells the servers to forget. `dtype` and `codec` are those of the
    activations on the wire; `pad` is the left padding of each row. `notice` gets a quiet line when a server is lost.
    `push`: let servers pass activations on among themselves where all can. `history_limit`: bytes of inputs that may
    be kept for replay.

    `interventions`: border -> function that gets the new tokens' hidden states (B, T, C) where they would enter block
    `border` (`layers`: where they leave the last one), and returns what goes on instead, of the same shape. It runs in
    a worker thread, once for each token, all tokens of one `step` together: history keeps what it gave, so a replay
    does not call it again. Its errors leave `step`, and the session stays at its position. To read along, return what
    came. Each costs a trip over this machine, even between blocks of one server.

    `given`: deep prompts (layers, P, C) and an adapter, which every server gets when the session is opened there.
    """

    def __init__(
        self,
        node: Node,
        model: bytes,
        *,
        layers: int,
        hidden: int,
        batch: int,
        max_len: int,
        dtype: str,
        codec: str,
        pad: Sequence[int] | None = None,
        notice: Callable[[str], None] | None = None,
        push: bool = True,
        history_limit: int = limits.MAX_HISTORY_BYTES,
        interventions: Mapping[int, Intervention] | None = None,
        given: Given | None = None,
        runner: Runner = run_in_thread,
    ) -> None:
        self._interventions = dict(interventions or {})
        self._run = runner
        for border in self._interventions:
            if not 0 <= border <= layers:
                raise ValueError(
                    f"no intervention can be at border {border}: a model of {layers} blocks has 0..{layers}"
                )
        terms = Terms(model=model, layers=layers, hidden=hidden, batch=batch, dtype=dtype, codec=codec)
        self._longest_piece = min(limits.PREFILL_TOKENS, max(1, limits.PREFILL_BYTES // terms.descriptor(1).nbytes))
        self._pipeline = Pipeline(
            layers,
            batch=batch,
            max_len=max_len,
            piece=self._longest_piece,
            new_sid=lambda: os.urandom(limits.SESSION_ID_BYTES),
            short=limits.SHORT_STEP_TOKENS,
            cuts=[border for border in self._interventions if 0 < border < layers],
        )
        self._notice = notice or (lambda line: log.info("%s", line))
        self._judge = Judge()
        self._given = given or Given()
        self._calls = Calls(node, terms, self._given)
        self._planner = Planner(node, terms, self._judge, self._notice, push=push, given=self._given)
        self._node = node
        self._terms = terms
        self._pad = tuple(pad) if pad is not None and any(pad) else None
        self._token_bytes = batch * hidden * bridge.torch_dtype(dtype).itemsize  # that are kept at each border
        self._history_limit = history_limit
        self._leftover: list[Hop] = []
        self._lost: list[str] = []
        self._lost_at: float | None = None
        self._told_waiting = False
        self._hand_over_at = 0.0
        self._trust = PushTrust(push)
        self._paced_for: object = None
        self._step_seconds: dict[PeerId, float] = {}
        self._met: set[tuple[PeerId, PeerId]] = set()  # servers of which one has pushed to the other
        self.failovers = 0
        self.failover_seconds = 0.0

    # Verbs

    @property
    def position(self) -> int:
        """Tokens cached so far."""
        return self._pipeline.position

    @property
    def history_bytes(self) -> int:
        """Memory that the inputs kept for replay take."""
        return self._pipeline.history_bytes

    @property
    def replayed_tokens(self) -> int:
        """Tokens sent again, summed over hops."""
        return self._pipeline.replayed_tokens

    @property
    def upsets(self) -> tuple[int, int]:
        """Changes when servers were replaced: the steps of then took longer than steps do."""
        return self.failovers, self.replayed_tokens

    @property
    def route(self) -> list[tuple[PeerId, tuple[int, int]]]:
        """Who holds which blocks now."""
        return [(hop.peer, (hop.blocks.start, hop.blocks.end)) for hop in self._pipeline.hops]

    @property
    def trouble(self) -> str:
        """Why the current step is not through: what servers failed with, the newest last; "" if none did."""
        return "; ".join(dict.fromkeys(self._judge.causes))

    async def step(
        self, hidden: Tensor, progress: Callable[[int], None] | None = None, *, last: int | None = None
    ) -> Tensor:
        """Send `hidden` (B, T, C) through all blocks; returns (B, T, C) in the wire's dtype, of the `last` tokens only
        where that is given: a prefill needs no more than one, and the others do not travel then.

        Survives the loss of servers until the caller's deadline. Cancelled or failed, the session stays at its
        position and can be used on. `progress` hears how many tokens have come out so far.

        Raises SessionError (no way to go on within the deadline), RequestError of our own fault, LocalProtocolError.
        """
        pipeline = self._pipeline
        self._check_size(hidden, last)
        values = self._calls.own(hidden)
        if self._interventions:
            values = await self._intervene(0, as_tensor(values))
        self._hand_over()
        # Whoever intervenes behind the last block gets all.
        pipeline.feed(values, None if self._terms.layers in self._interventions else last)
        try:
            while not pipeline.complete:
                self._pace()
                await self._advance(pipeline.ready(push=self._may_push()))
                if progress is not None:
                    progress(pipeline.done_tokens)
            output = pipeline.output
            if self._interventions:
                output = await self._intervene(self._terms.layers, output)
        except BaseException:
            pipeline.abandon()
            raise
        pipeline.finish()
        self._step_done()
        retired = pipeline.take_retired()
        if retired:
            await self._close_all(retired)
        return output if last is None else output[:, -last:]

    async def _intervene(self, border: int, hidden: Tensor) -> Tensor:
        """What goes on from `border` instead of `hidden` (B, T, C)."""
        change = self._interventions.get(border)
        if change is None:
            return hidden
        changed = await self._run(lambda: change(hidden))
        if not isinstance(changed, Tensor) or changed.shape != hidden.shape:
            shape = f" of shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else ""
            raise ValueError(
                f"the intervention at border {border} returned a {type(changed).__name__}{shape}, "
                f"due is a tensor of shape {tuple(hidden.shape)}"
            )
        return changed.detach().to(hidden, copy=True)

    def _check_size(self, hidden: Tensor, last: int | None) -> None:
        if hidden.dim() != 3 or hidden.shape[2] != self._terms.hidden:
            raise LocalProtocolError(
                f"hidden states of shape {tuple(hidden.shape)}, due is (B, T, {self._terms.hidden})"
            )
        if last is not None and not 1 <= last <= hidden.shape[1]:
            raise LocalProtocolError(f"the last {last} of {hidden.shape[1]} tokens are asked for")
        tokens = self._pipeline.position + hidden.shape[1]
        if tokens > limits.MAX_SESSION_LENGTH:
            raise LocalProtocolError(f"a session of {tokens} tokens, the limit is {limits.MAX_SESSION_LENGTH}")
        kept = tokens * self._token_bytes * self._pipeline.borders
        if kept > self._history_limit:
            raise SessionError(
                f"keeping {tokens} tokens for replay would take {kept / 2**20:.0f} MiB, "
                f"the limit is {self._history_limit / 2**20:.0f} MiB"
            )

    def _step_done(self) -> None:
        self._judge.step_done()
        self._planner.step_done()
        self._lost.clear()
        self._told_waiting = False
        if self._lost_at is not None:
            self.failover_seconds += trio.current_time() - self._lost_at
            self._lost_at = None

    def truncate(self, position: int) -> None:
        """Forget the tokens at and behind `position`; the servers learn it with the next step."""
        self._pipeline.truncate(position)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was (beam search)."""
        self._pipeline.reorder(sources)
        if self._pad is not None:
            self._pad = tuple(self._pad[source] for source in sources)

    async def __aenter__(self) -> InferenceSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Tell the servers that they may forget; bounded, and silent about those that are gone."""
        pipeline = self._pipeline
        await self._close_all([*pipeline.hops, *pipeline.retired, *self._leftover])
        self._leftover.clear()

    async def _close_all(self, hops: Sequence[Hop]) -> None:
        with trio.move_on_after(limits.GOODBYE_SECONDS, shield=True):
            async with trio.open_nursery() as nursery:
                for hop in hops:
                    nursery.start_soon(self._calls.close, hop)

    # Acting

    def _pace(self) -> None:
        """Cut a prompt, or a replay, so that the servers it goes through work on it at the same time."""
        pipeline = self._pipeline
        if pipeline.batch * pipeline.due <= LEAST_TOKENS:
            return
        quick = self._node.quick.issuperset(hop.peer for hop in pipeline.hops)
        paced_for = (pipeline.target, quick, [hop.sid for hop in pipeline.hops])
        if paced_for == self._paced_for:
            return
        self._paced_for = paced_for
        behind = [hop for hop in pipeline.hops if 2 * (pipeline.target - hop.position) > pipeline.due]
        stages = self._planner.stages(behind)
        most = self._longest_piece * (limits.QUICK_FACTOR if quick else 1)
        pipeline.piece = piece_length(pipeline.due, pipeline.batch, stages, most)

    async def _advance(self, actions: list[Action]) -> None:
        if not actions:
            raise LocalProtocolError("the step is not complete, and nothing can be done")
        if len(actions) == 1:
            await self._perform(actions[0])
            return
        async with open_flat_nursery() as nursery:
            for action in actions:
                nursery.start_soon(self._perform, action)

    async def _perform(self, action: Action) -> None:
        if isinstance(action, Relay):
            await self._relay(action)
        elif isinstance(action, Push):
            await self._push(action)
        elif isinstance(action, Send):
            await self._attempt(action.hop, "step", lambda: self._send(self._step_of(action)))
        elif isinstance(action, Plan):
            await self._plan(action)
        elif isinstance(action, Intervene):
            self._pipeline.intervened(action, await self._intervene(action.border, action.hidden))
        elif isinstance(action, Open):
            await self._attempt(action.hop, "open", lambda: self._open(action.hop))
        elif isinstance(action, Check):
            await self._attempt(action.hop, "status", lambda: self._check(action.hop))
        else:
            await self._attempt(action.hop, "extend", lambda: self._extend(action))

    async def _attempt(self, hop: Hop, method: str, call: Callable[[], Awaitable[None]]) -> bool:
        """Do it, and judge the hop if it fails; whether it went well."""
        hop.busy = True
        try:
            self._check_alive(hop)
            await call()
        except RequestError as error:
            await self._refused(hop, method, error)
        except (PeerLost, HandshakeError) as error:
            self._lose(hop, str(error), ban=error)
        else:
            return True
        finally:
            hop.busy = False
        return False

    def _check_alive(self, hop: Hop) -> None:
        """Raises PeerUnreachable where we should have to dial a server that was found silent, and others are there."""
        problem = "" if self._calls.connected(hop) else self._node.directory.suspicion(hop.peer)
        tokens = self._pipeline.batch * hop.max_len
        if problem and isinstance(self._planner.find(hop.blocks, tokens, without=frozenset({hop.peer})), Route):
            raise PeerUnreachable(problem)

    async def _open(self, hop: Hop) -> None:
        """Waits for cache room, but not for long: holding some elsewhere meanwhile, others wait for us."""
        seconds = limits.ROOM_SECONDS + self._given.block_bytes * hop.blocks.size / SLOWEST_UPLOAD
        with trio.move_on_after(seconds):
            await self._calls.open(hop)
            self._pipeline.opened(hop)
            return
        self._judge.no_room(hop.peer, trio.current_time())
        self._lose(hop, f"no answer to open within {seconds:.0f} s")

    async def _check(self, hop: Hop) -> None:
        self._pipeline.checked(hop, *await self._calls.status(hop))

    async def _extend(self, action: Extend) -> None:
        try:
            length = await self._calls.extend(action.hop, action.max_len)
        except RequestError:
            if action.least == action.max_len:
                raise
            length = await self._calls.extend(action.hop, action.least)  # less to spare, but enough
        self._pipeline.extended(action.hop, length)

    def _step_of(self, send: Send, following: Sequence[Send] = (), inputs: Hidden | None = None) -> Step:
        look = partial(self._look, send, trio.current_time())
        return Step(send, self._pipeline.inputs(send) if inputs is None else inputs, self._pad, following, look)

    def _begin(self, send: Send, begin: Callable[[], Asked | None]) -> Asked | None:
        """Let a request about `send` leave at once, if it can; whoever waits for it then meets again what is wrong."""
        self._pipeline.started(send)
        try:
            return begin()
        except PetaliteError as error:
            log.debug("%s: %s", send.hop, error)
            return None

    async def _send(self, step: Step, asked: Asked | None = None) -> None:
        send, started = step.send, trio.current_time()
        self._pipeline.started(send)
        try:
            outcome = await self._calls.step(step, asked)
        except ReplyLate:
            now = trio.current_time()
            self._judge.avoid(send.hop.peer, SLOW_AVOID_SECONDS, now)
            self._lose(send.hop, f"too slow: {now - started:.1f} s for one step")
            return
        self._took(send, outcome)
        self._note_seconds(send, trio.current_time() - started)

    def _look(self, send: Send, started: float, head: Mapping[str, Any]) -> None:
        """At each sign of progress. Raises ReplyLate where the step should be taken elsewhere."""
        if self._worth_leaving(send, trio.current_time() - started):
            raise ReplyLate("others would be quicker")

    def _took(self, send: Send, outcome: Outcome) -> None:
        self._pipeline.replied(send, outcome.output)
        send.hop.draining = outcome.draining
        self._judge.succeeded(send.hop.peer)
        self._planner.progressed()
        self._node.succeeded(send.hop.peer)

    def _note_seconds(self, send: Send, seconds: float) -> None:
        peer, pieces = send.hop.peer, (send.end - send.start) / self._longest_piece
        if pieces >= 0.5:
            # A clock that stands still (tests) says nothing.
            (self._node.quick.add if 0 < seconds <= limits.QUICK_SECONDS * pieces else self._node.quick.discard)(peer)
        if send.end - send.start <= limits.SHORT_STEP_TOKENS:
            usual = self._step_seconds.get(send.hop.peer, seconds)
            self._step_seconds[send.hop.peer] = usual + 0.2 * (seconds - usual)

    def _worth_leaving(self, send: Send, seconds: float) -> bool:
        """Whether a server that is merely busy should be left for a clearly faster one."""
        if seconds < max(SLOW_SECONDS, 4 * self._step_seconds.get(send.hop.peer, 0.0)):
            return False
        left = max(1, self._pipeline.max_len - self._pipeline.target)
        return self._planner.much_faster(send.hop, seconds, send.end - send.start, send.end, left)

    # Planning

    async def _plan(self, action: Plan) -> None:
        """Give the gap to the best servers; while there are none, to the one that is leaving, or wait."""
        pipeline = self._pipeline
        tokens = pipeline.batch * max(pipeline.max_len, pipeline.target)
        route = self._planner.find(action.blocks, tokens)
        if not isinstance(route, Route):
            displaced = pipeline.restore(action.blocks)
            if displaced is not None:
                self._leftover += displaced
                self._hand_over_at = trio.current_time() + HAND_OVER_SECONDS
                return
            self._tell_waiting(action.blocks)
            route = await self._planner.wait(action.blocks, tokens, lambda: self._release_behind(action.blocks.end))
        self._planner.settle_class(route)
        made = pipeline.assign([(hop.peer, hop.blocks) for hop in route.hops], self._planner.pushing())
        names = ", ".join(str(hop) for hop in made)
        if pipeline.position:
            self._notice(
                ", ".join(filter(None, [self._take_lost(), f"replaying {pipeline.position} tokens on {names}"]))
            )
        elif self._lost:
            self._notice(f"{self._take_lost()}, taking {names}")

    def _tell_waiting(self, blocks: Span) -> None:
        """Once a step; before anything has worked, the error at the end says it all."""
        if self._lost or (self._pipeline.position and not self._told_waiting):
            self._told_waiting = True
            self._notice(", ".join(filter(None, [self._take_lost(), f"waiting for a server of blocks {blocks}"])))

    def _take_lost(self) -> str:
        lost, self._lost = self._lost, []
        return "; ".join(lost)

    def _release_behind(self, block: int) -> None:
        """Give up cache room behind `block`: others may wait for it while they hold what we wait for."""
        for hop in [hop for hop in self._pipeline.hops if hop.blocks.start >= block]:
            self._pipeline.lost(hop)
            self._leftover.append(hop)

    def _hand_over(self) -> None:
        """Let others take over from servers that are leaving, if there are any; the old ones stay at hand meanwhile."""
        if not any(hop.draining for hop in self._pipeline.hops) or trio.current_time() < self._hand_over_at:
            return
        self._hand_over_at = trio.current_time() + HAND_OVER_SECONDS
        for hop in [hop for hop in self._pipeline.hops if hop.draining and hop.state is HopState.OPEN]:
            self._judge.avoid(hop.peer, HAND_OVER_SECONDS, trio.current_time())
            if isinstance(self._planner.find(hop.blocks, self._pipeline.batch * hop.max_len), Route):
                self._pipeline.retire(hop)
                self._lost.append(f"peer {hop} is leaving")

    # Rows of hops

    async def _relay(self, action: Relay) -> None:
        """One step through a row of hops. The task that reads a hop's reply passes it on to the next; this one hears of
        each afterwards, while the next is at work.
        """
        sends, deadline = action.sends, trio.current_effective_deadline()
        begun: list[tuple[Step, Asked | None]] = []
        done = 0

        def begin(inputs: Hidden | None) -> None:
            i = len(begun)
            step = self._step_of(sends[i], inputs=inputs)
            on_reply = None if i + 1 == len(sends) else partial(pass_on, i)
            begun.append((step, self._begin(sends[i], partial(self._calls.begin_step, step, deadline, on_reply))))

        def pass_on(i: int, reply: Reply) -> None:
            output = self._calls.passed_on(sends[i], reply)
            if output is not None:
                begin(output)

        begin(None)
        try:
            for send in sends:
                step, asked = begun[done] if done < len(begun) else (self._step_of(send), None)
                await self._attempt(send.hop, "step", partial(self._send, step, asked))
                if not send.done:
                    break
                done += 1
        finally:
            for step, asked in begun[done:]:
                if asked is not None:
                    asked.drop()  # nothing is passed on any more
                if step is not begun[done][0]:  # the hop before has answered, and was left all the same
                    self._pipeline.cut_off(step.send)

    def _may_push(self) -> bool:
        """Not in the step that wakes a parked session: everybody would have to dial everybody one after the other."""
        return self._trust.holds(trio.current_time()) and all(map(self._calls.connected, self._pipeline.hops))

    async def _push(self, action: Push) -> None:
        """One step through a row of hops: asked of the first, awaited at the others.

        A hop that does not get it in time, and those behind it, are served by ourselves afterwards: the same step
        sent twice is done once.
        """
        deadline = trio.current_effective_deadline()
        step = self._step_of(action.sends[0], action.sends[1:])
        parts = parts_of(action.sends)
        # First of all: nobody waits for the rest.
        parts[0].asked = self._begin(step.send, partial(self._calls.begin_step, step, deadline))
        told = {(part.send.hop.peer, part.send.hop.sid, part.send.n): part.note_unpushed for part in parts}
        self._node.unpushed.update(told)
        try:
            for part in parts[1:]:
                part.asked = self._begin(part.send, partial(self._calls.begin_await, part.send, deadline))
            await self._take_parts(parts, step)
        finally:
            for key in told:
                del self._node.unpushed[key]
            for part in parts:
                part.end()
        # A lost server says nothing about pushing, nor does a step after it that we carried ourselves.
        if self._lost_at is None and not any(part.gone or part.send.hop.state is HopState.GONE for part in parts):
            self._trust.pushed(all(part.done for part in parts), trio.current_time())

    async def _take_parts(self, parts: Sequence[Part], step: Step) -> None:
        """Each when the one before is through, for what comes out of a hop counts only where its inputs were good."""
        for part, before in zip(parts, (None, *parts), strict=False):
            hop, started = part.send.hop, trio.current_time()
            if before is None:
                await self._attempt(hop, "step", partial(self._send, step, part.asked))
                part.done = part.send.done
            else:
                with part.scope:
                    await self._attempt(hop, "await", partial(self._take_pushed, before, part))
            if not part.done:
                break  # a hop that is just late, its inputs being good, gets the very same step from us
            if part.behind is not None:
                patience = self._patience(hop, part.behind.send.hop, trio.current_time() - started)
                part.behind.scope.deadline = trio.current_time() + (0.0 if part.unpushed else patience)
                part.unwatch = self._calls.watch(hop, part.note_gone)
        for before, part in pairwise(parts):
            if not before.done:
                self._pipeline.cut_off(part.send)

    def _patience(self, before: Hop, hop: Hop, took: float) -> float:
        """Seconds that a push from `before`, which `took` so long itself, to `hop` is waited for before we send the
        step ourselves.

        Not at all while a lost server has us late already: the two may have to meet first, or cannot. Servers that
        were brought together by a loss have to show in little time that they can.
        """
        if self._lost_at is not None:
            return 0.0
        least = PUSH_SECONDS if not self.failovers or (before.peer, hop.peer) in self._met else FRESH_PUSH_SECONDS
        # One that was never timed should not take much longer than those before it.
        return least + 3 * self._step_seconds.get(hop.peer, took)

    async def _take_pushed(self, before: Part, part: Part) -> None:
        """The outcome of a pushed step."""
        self._took(part.send, await self._calls.await_pushed(part.send, part.asked))
        self._met.add((before.send.hop.peer, part.send.hop.peer))
        part.done = True

    # Judging

    async def _refused(self, hop: Hop, method: str, error: RequestError) -> None:
        """The server answered with an error: wait, open anew, or let others do it."""
        if method == "await":
            log.debug("%s: %s; sending the step ourselves", hop, error)
            return
        verdict = self._judge.refused(hop.peer, method, error, trio.current_time())
        if verdict is Verdict.AGAIN:
            await trio.sleep(min(retry_after(error.detail, 0.1), limits.ROOM_SECONDS))
        elif verdict is Verdict.REOPEN:
            if hop.position:
                self._notice(f"peer {hop} has dropped the session, replaying {hop.position} tokens there")
            self._pipeline.forgotten(hop)
        else:
            self._lose(hop, error.text, ban=error if verdict is Verdict.BAN else None)

    def _lose(self, hop: Hop, why: str, *, ban: PetaliteError | None = None) -> None:
        """The hop is out; `ban` is what its peer is banned for."""
        why = why.removeprefix(f"connection to peer {hop.peer.short}.. ended: ")
        self._judge.note(f"peer {hop}: {why}")
        if ban is not None:
            self._planner.failed(hop.peer, ban)
        if hop.state is not HopState.NEW:
            self.failovers += 1
            self._lost.append(f"peer {hop} lost ({why})")
            if self._lost_at is None:
                self._lost_at = trio.current_time()
        self._pipeline.lost(hop)
        self._leftover = [*self._leftover[-63:], hop]
