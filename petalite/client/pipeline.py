"""The state of one inference session over its hops: pure, no I/O, no clock (spec 07).

The owner asks `ready()` what can be done now, does it, and says how it went. The rule behind it all: a hop that
stands at position p and should stand at q gets the kept inputs p..q of its first block. So a decode step, a prefill,
a replay to a fresh server and a rollback are the same act, and a lost server is only a gap to be planned again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petalite import limits
from petalite.client.hidden import Hidden, as_tensor
from petalite.client.history import History
from petalite.client.hop import Hop, HopEvent, HopState
from petalite.errors import LocalProtocolError
from petalite.identity import PeerId
from petalite.swarm.snapshot import Span


@dataclass(frozen=True, slots=True)
class Plan:
    """These blocks have no server: find hops and `assign` them."""

    blocks: Span


@dataclass(frozen=True, slots=True)
class Open:
    hop: Hop


@dataclass(frozen=True, slots=True)
class Check:
    """Ask the server where the hop's session stands, and say so with `checked`."""

    hop: Hop


@dataclass(frozen=True, slots=True)
class Extend:
    """The hop's cache is too short for what is coming: make it `max_len` tokens long, or at least `least`."""

    hop: Hop
    max_len: int
    least: int


@dataclass(frozen=True, slots=True)
class Send:
    """Run the kept inputs `start`..`end` as step `n` of the hop's session.

    `last`: how many of its last tokens are wanted of the output, if not all.
    """

    hop: Hop
    n: int
    start: int
    end: int
    reorder: tuple[int, ...] | None
    last: int | None = None

    @property
    def answered(self) -> int:
        """Tokens of each row that the output must have at least."""
        return self.end - self.start if self.last is None else self.last

    @property
    def done(self) -> bool:
        """The hop stands behind it, as far as we know."""
        return self.hop.state is HopState.OPEN and self.hop.position == self.end


@dataclass(frozen=True, slots=True)
class Push:
    """One step through a row of hops: the first gets its inputs from us, each next one from the hop before it."""

    sends: tuple[Send, ...]


@dataclass(frozen=True, slots=True)
class Relay:
    """One step through a row of hops, each of which gets from us what the hop before it answers, and nothing else."""

    sends: tuple[Send, ...]


@dataclass(frozen=True, slots=True)
class Intervene:
    """All of the step's tokens have come out of the blocks before `border`: `hidden` (B, T, C), to be changed."""

    border: int
    hidden: Tensor


Action = Plan | Open | Check | Extend | Send | Push | Relay | Intervene


@dataclass(slots=True)
class _Output:
    """What has come out of a block in this step, up to position `end`; kept is what is `wanted`: from there on."""

    end: int = 0
    wanted: int = 0
    pieces: list[Hidden] = field(default_factory=list)

    def add(self, start: int, end: int, output: Hidden) -> None:
        """Take what is new, and wanted, of `output` (B, T, C): that of the last T of the tokens `start`..`end`."""
        if not start <= self.end < end:
            return
        new = end - max(self.end, self.wanted)
        if new > 0:
            self.pieces.append(as_tensor(output)[:, -new:] if new < output.shape[1] else output)
        self.end = end

    def whole(self) -> Tensor:
        pieces = [as_tensor(piece) for piece in self.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


class Pipeline:
    """One session of `batch` rows through blocks [0, layers).

    `piece`: the most tokens of a row in one step, which the owner may change; `short`: the most tokens, over all rows,
    of a step that may be pushed from server to server; `new_sid` makes session ids. At the `cuts`, borders before a
    block, the owner changes what passes: no hop reaches across one, and what goes on from there is what `intervened`
    was given.
    """

    def __init__(
        self,
        layers: int,
        *,
        batch: int,
        max_len: int,
        piece: int,
        new_sid: Callable[[], bytes],
        short: int = 0,
        cuts: Collection[int] = (),
    ) -> None:
        self.layers = layers
        self.batch = batch
        self.max_len = max_len
        self.position = 0
        self.target = 0
        self.hops: list[Hop] = []
        self.retired: list[Hop] = []
        self.replayed_tokens = 0
        self.piece = piece
        self._short = short
        self._new_sid = new_sid
        self._cuts = frozenset(cuts)
        self._histories: dict[int, History] = {border: History() for border in (0, *self._cuts)}
        self._output = _Output()
        self._reached: dict[int, _Output] = {}
        self._under_way: dict[Hop, Send] = {}

    # What the caller of the session does

    def feed(self, hidden: Hidden, last: int | None = None) -> None:
        """Begin a step: `hidden` (B, T, C), which must not change any more, enters block 0 at the current position.

        `last`: how many of its last tokens, 1..T, are wanted of the output, if not all.
        """
        if not self.complete:
            raise LocalProtocolError("a step is running: one at a time")
        shape = tuple(hidden.shape)
        if len(shape) != 3 or shape[0] != self.batch or shape[1] < 1:
            raise LocalProtocolError(f"hidden states of shape {shape}, due is ({self.batch}, T, C)")
        self._histories[0].truncate(self.position)
        self._histories[0].write(self.position, hidden)
        self.target = self.position + shape[1]
        self._begin_output(last)

    def _begin_output(self, last: int | None = None) -> None:
        self._output = _Output(self.position, self.position if last is None else self.target - last)
        if self._cuts:
            self._reached = {cut: _Output(self.position) for cut in self._cuts}

    @property
    def complete(self) -> bool:
        """The step's output has come out of the last block."""
        return self._output.end >= self.target

    @property
    def due(self) -> int:
        """Tokens of a row that the hop furthest behind has still to do."""
        least = self.target
        for hop in self.hops:
            least = min(least, hop.position)
        return self.target - least

    @property
    def done_tokens(self) -> int:
        """Tokens of the step whose output has come so far."""
        return self._output.end - self.position

    @property
    def output(self) -> Tensor:
        """(B, T, C), what the last block gave for the step's tokens that are wanted, once it is complete."""
        return self._output.whole()

    def finish(self) -> None:
        """End the step, which is complete."""
        self.position = self.target
        self._begin_output()

    def abandon(self) -> None:
        """End a step that was begun and not completed: the session stays at its position.

        What was asked and not answered may have been done: an answer to it, coming later, must not pass for one to
        the step that follows.
        """
        for send in list(self._under_way.values()):
            self.cut_off(send)
        self.truncate(self.position)

    def truncate(self, position: int) -> None:
        """Forget every token at or behind `position`."""
        if not 0 <= position <= self.position:
            raise LocalProtocolError(f"cannot roll back to {position}, the session holds {self.position} tokens")
        self.position = self.target = position
        self._begin_output()
        for history in self._histories.values():
            history.truncate(position)
        for hop in (*self.hops, *self.retired):
            hop.position = min(hop.position, position)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was; each server learns it with its next step."""
        if not self.complete:
            raise LocalProtocolError("a step is running: reorder between steps")
        if len(sources) != self.batch or any(not 0 <= source < self.batch for source in sources):
            raise LocalProtocolError(f"cannot reorder {self.batch} rows as {list(sources)}")
        for history in self._histories.values():
            history.reorder(sources)
        for hop in (*self.hops, *self.retired):
            if hop.position:
                before = hop.reorder or tuple(range(self.batch))
                hop.reorder = tuple(before[source] for source in sources)

    @property
    def history_bytes(self) -> int:
        """Memory that the kept inputs take."""
        return sum(history.nbytes for history in self._histories.values())

    @property
    def borders(self) -> int:
        """How many block boundaries inputs are kept for."""
        return len(self._histories)

    # What the owner's loop asks

    def ready(self, push: bool = False) -> list[Action]:
        """Everything that can be done now, at most one action a hop; empty when the step is complete or all wait.

        `push`: short steps may go from server to server where the sessions were opened for it.
        """
        gap = self._first_gap()
        if gap is not None:
            return [Plan(gap)]
        for hop in self.hops:
            if hop.state is HopState.NEW and not hop.busy:
                return [Open(hop)]  # in block order: waiting for room while holding room further on would be a deadlock
        actions: list[Action] = []
        for cut, reached in self._reached.items():
            if reached.pieces and reached.end >= self.target > self._histories[cut].length:
                actions.append(Intervene(cut, reached.whole()))
        for i, hop in enumerate(self.hops):
            action = None if hop.busy else self._action_of(hop)
            if isinstance(action, Send):
                action = self._row_from(i, action, push)
            if action is not None:
                actions.append(action)
        return actions

    def _first_gap(self) -> Span | None:
        at = 0
        for hop in self.hops:
            if hop.blocks.start > at:
                return Span(at, self._next_cut(at, hop.blocks.start))
            at = hop.blocks.end
        return Span(at, self._next_cut(at, self.layers)) if at < self.layers else None

    def _next_cut(self, start: int, end: int) -> int:
        """`end`, or the first cut between the two."""
        return min([end, *(cut for cut in self._cuts if cut > start)])

    def _action_of(self, hop: Hop) -> Action | None:
        start = hop.position
        end = min(self.target, self._history_at(hop.blocks.start).length)
        if start >= end:
            return self._again(hop, end)
        if hop.state is HopState.UNSURE:
            return Check(hop)
        if end > hop.max_len:
            return Extend(hop, self._room_for(self.target), self.target)
        return self._step_of(hop, start, min(end, start + self.piece))

    def _step_of(self, hop: Hop, start: int, end: int) -> Send:
        """What comes out of the last block is input of nothing, so no more of it is asked for than is wanted."""
        last = None
        if hop.blocks.end == self.layers and self._output.wanted > start:
            last = max(1, end - self._output.wanted)
        return Send(hop, hop.n, start, end, hop.reorder, last if last != end - start else None)

    def _again(self, hop: Hop, end: int) -> Action | None:
        """Where a hop has done tokens whose output we do not have (it went with a boundary that nobody needed for a
        while): run them once more.
        """
        if hop.blocks.end == self.layers:
            known = self._output.end
        elif hop.blocks.end in self._reached:
            known = self._reached[hop.blocks.end].end
        else:
            known = self._known(hop.blocks.end)
        if known >= end:
            return None
        if hop.state is HopState.UNSURE:
            return Check(hop)
        return self._step_of(hop, known, min(end, known + self.piece))

    def _known(self, border: int) -> int:
        return self._histories[border].length if border in self._histories else 0

    def _room_for(self, tokens: int) -> int:
        """Length to ask for: what was planned, or a quarter more than needed, so that few requests extend it."""
        return self.max_len if tokens <= self.max_len else min(tokens + tokens // 4, limits.MAX_SESSION_LENGTH)

    def _row_from(self, first: int, send: Send, push: bool) -> Send | Push | Relay:
        """A short step goes through the hops behind too, as far as they wait for nothing else."""
        if send.end != self.target or self.batch * (send.end - send.start) > self._short:
            return send
        row = [send]
        pushed = push and self._joined(first + 1)
        for i in range(first + 1, len(self.hops)):
            # A row of pushes goes as far as they can; one that we feed ends where pushes can begin.
            here, hop = (self._joined(i) if pushed else not (push and self._joined(i + 1))), self.hops[i]
            if not here or not self._follows(hop, send) or (pushed and any(hop.peer == s.hop.peer for s in row)):
                break
            row.append(self._step_of(hop, send.start, send.end))
        if len(row) == 1:
            return send
        return Push(tuple(row)) if pushed else Relay(tuple(row))

    def _joined(self, i: int) -> bool:
        """Whether hop i lets the one before push into it."""
        if i >= len(self.hops):
            return False
        hop = self.hops[i]
        # Haunted: what we send ourselves is told from a late push by its content, an await is not.
        return hop.source == self.hops[i - 1].peer and not hop.haunted

    def _follows(self, hop: Hop, send: Send) -> bool:
        """Whether the hop can do the same step, once it has its inputs."""
        return (
            hop.blocks.start not in self._cuts
            and hop.state is HopState.OPEN
            and not hop.busy
            and self._action_of(hop) is None
            and (hop.position, hop.reorder) == (send.start, send.reorder)
            and hop.max_len >= send.end
        )

    def _history_at(self, border: int) -> History:
        history = self._histories.get(border)
        if history is None:
            history = self._histories[border] = History()
        return history

    def inputs(self, action: Send) -> Hidden:
        """(B, T, C): what to send."""
        return self._history_at(action.hop.blocks.start).read(action.start, action.end)

    # How it went

    def assign(self, hops: Sequence[tuple[PeerId, Span]], pushing: frozenset[PeerId] = frozenset()) -> list[Hop]:
        """Fill the first gap with fresh servers, in block order. Peers in `pushing` pass outputs on when asked."""
        made = [Hop(peer, blocks, self._new_sid(), self.max_len) for peer, blocks in hops]
        for hop in made:
            hop.max_len = self._room_for(max(self.max_len, self.position, self.target))
        self.hops = sorted([*self.hops, *made], key=lambda hop: hop.blocks.start)
        for before, hop in zip(self.hops, self.hops[1:], strict=False):
            border = hop.blocks.start
            joined = before.blocks.end == border and border not in self._cuts and before.peer != hop.peer
            if hop.state is HopState.NEW:
                hop.source = before.peer if joined and {before.peer, hop.peer} <= pushing else None
        self._keep_borders()
        return made

    def _keep_borders(self) -> None:
        # Ends too: what lies behind a living hop is a gap that will need these inputs.
        hops = (*self.hops, *self.retired)
        borders = {0, *self._cuts, *(hop.blocks.start for hop in hops), *(hop.blocks.end for hop in hops)}
        self._histories = {start: kept for start, kept in self._histories.items() if start in borders}

    def opened(self, hop: Hop) -> None:
        hop.happened(HopEvent.OPENED)

    def extended(self, hop: Hop, max_len: int) -> None:
        """The server's cache is `max_len` tokens long now."""
        hop.happened(HopEvent.EXTENDED)
        hop.max_len = max_len

    def started(self, action: Send) -> None:
        """The server is being asked, or will be by the hop before it."""
        self._under_way[action.hop] = action

    def replied(self, action: Send, output: Hidden) -> None:
        """`output` (B, T, C) of the hop's last block for the tokens that were sent, or the last T of them."""
        hop = action.hop
        hop.happened(HopEvent.REPLIED)
        self._under_way.pop(hop, None)
        hop.n = action.n + 1
        hop.position = action.end
        hop.reorder = None
        hop.haunted = False
        self.replayed_tokens += max(0, min(action.end, self.position) - action.start)
        if hop.blocks.end == self.layers:
            self._output.add(action.start, action.end, output)
        elif hop.blocks.end in self._reached:
            self._reached[hop.blocks.end].add(action.start, action.end, output)
        else:
            history = self._history_at(hop.blocks.end)
            if action.start <= history.length:  # else the tokens between are asked for first, see `_again`
                history.write(action.start, output)

    def intervened(self, action: Intervene, hidden: Tensor) -> None:
        """`hidden` (B, T, C) goes on from the border in place of what had come there."""
        self._histories[action.border].write(self.position, hidden)

    def cut_off(self, action: Send) -> None:
        """The reply to `action` is not awaited any more; the server may have done it or not."""
        self._under_way.pop(action.hop, None)
        action.hop.haunted = True
        if action.hop.state is not HopState.OPEN:
            return
        if action.reorder is not None:
            self.forgotten(action.hop)  # rows were mixed or not, and no answer tells which
        else:
            action.hop.happened(HopEvent.CUT_OFF)

    def checked(self, hop: Hop, n: int, position: int) -> None:
        """The server says which step is next and where it stands."""
        hop.happened(HopEvent.CHECKED)
        if n not in (hop.n, hop.n + 1) or (n == hop.n and position < hop.position):
            self.forgotten(hop)
            return
        hop.n = n
        hop.position = min(hop.position, position)

    def forgotten(self, hop: Hop) -> None:
        """The server lives but has no such session any more: open a new one there and replay."""
        hop.happened(HopEvent.FORGOTTEN)
        self._under_way.pop(hop, None)
        hop.sid = self._new_sid()
        hop.max_len = max(hop.max_len, self._room_for(self.target))
        hop.n = hop.position = 0
        hop.reorder = None
        hop.haunted = False

    def lost(self, hop: Hop) -> None:
        """The server is out: its blocks become a gap."""
        hop.happened(HopEvent.LOST)
        self._under_way.pop(hop, None)
        self.hops.remove(hop)

    # Handing over from a server that is leaving

    def retire(self, hop: Hop) -> None:
        """The hop's blocks become a gap, but it stays at hand until the step is complete: see `restore`."""
        self.hops.remove(hop)
        self.retired.append(hop)

    def restore(self, gap: Span) -> list[Hop] | None:
        """Put a retired hop of these blocks back, since nobody else took them over; gives the hops that it displaces.

        None if no retired hop held any of them.
        """
        for hop in self.retired:
            if _overlap(hop.blocks, gap):
                displaced = [other for other in self.hops if _overlap(other.blocks, hop.blocks)]
                for other in displaced:
                    self.lost(other)
                self.retired.remove(hop)
                self.hops = sorted([*self.hops, hop], key=lambda each: each.blocks.start)
                return displaced
        return None

    def take_retired(self) -> list[Hop]:
        """Hops that nobody needs any more: others have caught up."""
        done, self.retired = self.retired, []
        for hop in done:
            hop.happened(HopEvent.LOST)
        return done


def _overlap(one: Span, other: Span) -> bool:
    return one.start < other.end and other.start < one.end
