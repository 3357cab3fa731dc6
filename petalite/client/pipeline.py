"""The state of one inference session over its hops: pure, no I/O, no clock (spec 07).

The owner asks `ready()` what can be done now, does it, and says how it went. The rule behind it all: a hop that
stands at position p and should stand at q gets the kept inputs p..q of its first block. So a decode step, a prefill,
a replay to a fresh server and a rollback are the same act, and a lost server is only a gap to be planned again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petalite.client.history import History
from petalite.identity import PeerId
from petalite.swarm.snapshot import Span


@dataclass(slots=True, eq=False)
class Hop:
    """One server's part: what it holds for us, as far as we know."""

    peer: PeerId
    blocks: Span
    sid: bytes
    max_len: int
    opened: bool = False
    n: int = 0
    position: int = 0
    reorder: tuple[int, ...] | None = None
    busy: bool = False

    def __str__(self) -> str:
        return f"{self.peer.short}.. (blocks {self.blocks})"


@dataclass(frozen=True, slots=True)
class Plan:
    """These blocks have no server: find hops and `assign` them."""

    blocks: Span


@dataclass(frozen=True, slots=True)
class Open:
    hop: Hop


@dataclass(frozen=True, slots=True)
class Extend:
    """The hop's cache is too short for what is coming."""

    hop: Hop
    max_len: int


@dataclass(frozen=True, slots=True)
class Send:
    """Run the kept inputs `start`..`end` as step `n` of the hop's session."""

    hop: Hop
    n: int
    start: int
    end: int
    reorder: tuple[int, ...] | None


Action = Plan | Open | Extend | Send


class Pipeline:
    """One session of `batch` rows through blocks [0, layers).

    `piece`: the most tokens in one step; `new_sid` makes session ids.
    """

    def __init__(self, layers: int, *, batch: int, max_len: int, piece: int, new_sid: Callable[[], bytes]) -> None:
        self.layers = layers
        self.batch = batch
        self.max_len = max_len
        self.position = 0
        self.target = 0
        self.hops: list[Hop] = []
        self.replayed_tokens = 0
        self._piece = piece
        self._new_sid = new_sid
        self._histories: dict[int, History] = {0: History()}
        self._output: list[Tensor] = []
        self._output_end = 0

    # What the caller of the session does

    def feed(self, hidden: Tensor) -> None:
        """Begin a step: `hidden` (B, T, C) enters block 0 at the current position."""
        self._histories[0].truncate(self.position)
        self._histories[0].write(self.position, hidden)
        self.target = self.position + hidden.shape[1]
        self._output, self._output_end = [], self.position

    @property
    def complete(self) -> bool:
        """The step's output has come out of the last block."""
        return self._output_end >= self.target

    @property
    def done_tokens(self) -> int:
        """Tokens of the step whose output has come so far."""
        return self._output_end - self.position

    def take_output(self) -> Tensor:
        """End the step: (B, T, C), what the last block gave for its tokens."""
        output = self._output[0] if len(self._output) == 1 else torch.cat(self._output, dim=1)
        self.position = self.target
        self._output = []
        return output

    def truncate(self, position: int) -> None:
        """Forget every token at or behind `position`, also of a step that was begun and not completed."""
        self.position = self.target = position
        for history in self._histories.values():
            history.truncate(position)
        for hop in self.hops:
            hop.position = min(hop.position, position)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was; each server learns it with its next step."""
        for history in self._histories.values():
            history.reorder(sources)
        for hop in self.hops:
            if hop.position:
                before = hop.reorder or tuple(range(self.batch))
                hop.reorder = tuple(before[source] for source in sources)

    @property
    def history_bytes(self) -> int:
        """Memory that the kept inputs take."""
        return sum(history.nbytes for history in self._histories.values())

    # What the owner's loop asks

    def ready(self) -> list[Action]:
        """Everything that can be done now, at most one action a hop; empty when the step is complete or all wait."""
        gap = self._first_gap()
        if gap is not None:
            return [Plan(gap)]
        unopened: list[Action] = [Open(hop) for hop in self.hops if not hop.opened and not hop.busy]
        if unopened:
            return unopened[:1]  # in block order: waiting for room while holding room further on would be a deadlock
        actions = (self._action_of(hop) for hop in self.hops if not hop.busy)
        return [action for action in actions if action is not None]

    def _first_gap(self) -> Span | None:
        at = 0
        for hop in self.hops:
            if hop.blocks.start > at:
                return Span(at, hop.blocks.start)
            at = hop.blocks.end
        return Span(at, self.layers) if at < self.layers else None

    def _action_of(self, hop: Hop) -> Action | None:
        # The last tokens go through again where a hop is ahead: its output for them was lost with a server behind it.
        start = hop.position
        end = min(self.target, self._history(hop).length)
        if start >= end:
            return None
        if end > hop.max_len:
            return Extend(hop, max(self.max_len, self.target))
        return Send(hop, hop.n, start, min(end, start + self._piece), hop.reorder)

    def _history(self, hop: Hop) -> History:
        return self._histories.setdefault(hop.blocks.start, History())

    def inputs(self, action: Send) -> Tensor:
        """(B, T, C): what to send."""
        return self._history(action.hop).read(action.start, action.end)

    # How it went

    def assign(self, hops: Sequence[tuple[PeerId, Span]]) -> list[Hop]:
        """Fill the first gap with fresh servers, in block order."""
        made = [Hop(peer, blocks, self._new_sid(), self.max_len) for peer, blocks in hops]
        self.hops = sorted([*self.hops, *made], key=lambda hop: hop.blocks.start)
        borders = {0, *(hop.blocks.start for hop in self.hops)}
        self._histories = {start: kept for start, kept in self._histories.items() if start in borders}
        return made

    def opened(self, hop: Hop) -> None:
        hop.opened = True

    def extended(self, hop: Hop, max_len: int) -> None:
        hop.max_len = max_len

    def replied(self, action: Send, output: Tensor) -> None:
        """`output` (B, T, C) of the hop's last block for the tokens that were sent."""
        hop = action.hop
        if hop not in self.hops:
            return
        hop.n = action.n + 1
        hop.position = action.end
        hop.reorder = None
        self.replayed_tokens += max(0, min(action.end, self.position) - action.start)
        if hop.blocks.end < self.layers:
            self._histories.setdefault(hop.blocks.end, History()).write(action.start, output)
        elif action.end > self._output_end:
            self._output.append(output[:, max(0, self._output_end - action.start) :])
            self._output_end = action.end

    def forgotten(self, hop: Hop) -> None:
        """The server lives but has no such session any more: open a new one there and replay."""
        hop.sid = self._new_sid()
        hop.opened = False
        hop.n = hop.position = 0
        hop.reorder = None

    def lost(self, hop: Hop) -> None:
        """The server is out: its blocks become a gap."""
        if hop in self.hops:
            self.hops.remove(hop)
