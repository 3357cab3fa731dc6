"""Finding servers for a gap in a session's chain, and waiting for them within bounds (spec 07)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import trio

from petalite import limits
from petalite.client.calls import Terms
from petalite.client.given import Given
from petalite.client.hop import Hop
from petalite.client.pacing import Stage
from petalite.client.verdicts import Judge
from petalite.errors import PetaliteError
from petalite.identity import PeerId
from petalite.swarm.node import Node
from petalite.swarm.routing import Hop as RouteHop
from petalite.swarm.routing import Needs, NoRoute, Route, better_route, replay_seconds
from petalite.swarm.snapshot import Span

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
# So long servers of the session's compute class are waited for before another class will do.
CLASS_PATIENCE = 5.0
# So long another server is waited for when those that are there say that it is our fault.
ACCUSED_SECONDS = 1.0


class SessionError(PetaliteError):
    """The session cannot go on: names peers, blocks and cause."""


class Planner:
    """Plans for one session. The first route fixes the compute class, so that a failover does not change the text."""

    def __init__(
        self,
        node: Node,
        terms: Terms,
        judge: Judge,
        notice: Callable[[str], None],
        *,
        push: bool,
        given: Given | None = None,
    ) -> None:
        self.compute_class: tuple[str, str] | None = None
        self._node = node
        self._terms = terms
        self._judge = judge
        self._notice = notice
        self._push = push
        self._given = given or Given()
        self._pause = FIRST_PAUSE
        self._failed_at: dict[PeerId, float] = {}
        self._waiting_since: float | None = None

    def failed(self, peer: PeerId, error: PetaliteError) -> None:
        """`peer` let us down: nobody in this process plans with it for a while."""
        self._failed_at[peer] = trio.current_time()
        self._node.failed(peer, error)

    def progressed(self) -> None:
        """Some server did something for us."""
        self._waiting_since = None

    def step_done(self) -> None:
        self._pause = FIRST_PAUSE
        self._failed_at.clear()

    def pushing(self) -> frozenset[PeerId]:
        """Servers that pass their output on when asked."""
        snapshot = self._node.directory.snapshot(self._terms.model) if self._push else None
        return frozenset(server.peer for server in snapshot.servers if server.push) if snapshot else frozenset()

    # Now

    def find(
        self, blocks: Span, tokens: int, *, without: frozenset[PeerId] = frozenset(), any_class: bool = False
    ) -> Route | NoRoute | None:
        """The best route for `blocks` with room for `tokens` of cache (over all rows); None if nobody serves the model.

        Without a class so far, the best route of one class; only if no class covers the blocks alone, a mixed one.
        """
        needs = Needs(
            blocks=blocks,
            cache_tokens=tokens,
            codec=self._terms.codec,
            push=self._push,
            training_tokens=int(self._given.wanted),  # who trains takes additions to sessions too (PT-SES-080)
            adapter=self._given.adapter_name,
            without=without | self._judge.avoided(trio.current_time()),
        )
        if self.compute_class is not None:
            needs = replace(needs, compute_class=None if any_class else self.compute_class)
            return self._node.plan(self._terms.model, needs)
        snapshot = self._node.directory.snapshot(self._terms.model)
        classes = sorted({server.compute_class for server in snapshot.servers}) if snapshot else []
        plans = [self._node.plan(self._terms.model, replace(needs, compute_class=each)) for each in classes]
        routes = [plan for plan in plans if isinstance(plan, Route)]
        if routes:
            return min(routes, key=lambda route: route.seconds)
        return self._node.plan(self._terms.model, needs)

    def settle_class(self, route: Route) -> None:
        """The session computes as `route` does; a route of another class than before is told to the user."""
        snapshot = self._node.directory.snapshot(self._terms.model)
        found = [server.compute_class for hop in route.hops if snapshot and (server := snapshot.get(hop.peer))]
        if not found:
            return
        if self.compute_class is None:
            self.compute_class = found[0]
        odd = [each for each in found if each != self.compute_class]
        if odd:
            names = " and ".join(
                " ".join(word for word in each if word != "none") for each in (self.compute_class, odd[0])
            )
            self._notice(f"servers compute in {names}: the text may differ from that of one kind alone")

    def much_faster(self, hop: Hop, seconds: float, tokens: int, replayed: int, tokens_left: int) -> bool:
        """Whether to leave `hop`, which has worked on a step of `tokens` for `seconds`, for others."""
        candidate = self.find(hop.blocks, hop.max_len, without=frozenset({hop.peer}))
        snapshot = self._node.directory.snapshot(self._terms.model)
        if not isinstance(candidate, Route) or snapshot is None:
            return False
        current = Route((RouteHop(hop.peer, hop.blocks),), push=False, seconds=seconds / tokens)
        replay = replay_seconds(snapshot, current, candidate, replayed)
        return better_route(current, candidate, replay=replay, tokens_left=tokens + tokens_left)

    def stages(self, hops: Sequence[Hop]) -> list[Stage]:
        """What prompts cost on those of `hops` of which that is known."""
        snapshot, latencies = self._node.directory.snapshot(self._terms.model), self._node.directory.latencies()
        servers = [(hop, snapshot.get(hop.peer)) for hop in hops] if snapshot else []
        return [
            Stage(
                hop.blocks.size / server.batch_rate + snapshot.token_bits / server.network_rate,
                latencies.get(hop.peer, 0.0),
            )
            for hop, server in servers
            if snapshot and server
        ]

    # Later

    async def wait(self, blocks: Span, tokens: int, release: Callable[[], None]) -> Route:
        """A route for `blocks`, as soon as there is one.

        `release` is called when we have waited for cache room for ROOM_SECONDS: what the session holds elsewhere may
        be what somebody waits for who holds what we wait for.

        Raises SessionError when the caller's deadline comes, at the latest after REPLACE_SECONDS without progress; the
        RequestError of a server that says again that it is our fault, when there is no other.
        """
        if self._waiting_since is None:
            self._waiting_since = trio.current_time()
        released = False
        while True:
            waited = trio.current_time() - self._waiting_since
            changed = self._node.directory.changed
            found = self.find(blocks, tokens, any_class=waited >= CLASS_PATIENCE)
            if isinstance(found, Route):
                return found
            if waited >= ACCUSED_SECONDS and self._judge.retry_accusers():
                continue
            left = trio.current_effective_deadline() - trio.current_time()
            if min(left, limits.REPLACE_SECONDS - waited) <= self._pause:
                raise self._gave_up(found)
            if self._judge.short_of_room and waited >= limits.ROOM_SECONDS and not released:
                released = True
                release()
            await self._look_around(changed)

    async def _look_around(self, changed: trio.Event) -> None:
        """Ask the servers again, until there is news or the pause is over; those that answer are forgiven."""
        with trio.move_on_after(self._pause):
            await self._node.directory.refresh()
            await changed.wait()
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        snapshot = self._node.directory.snapshot(self._terms.model)
        for server in snapshot.servers if snapshot else ():
            if snapshot and snapshot.taken_at - server.age > self._failed_at.get(server.peer, float("inf")):
                self._node.succeeded(server.peer)

    def _gave_up(self, found: NoRoute | None) -> SessionError:
        why = "no server serves this model" if found is None else found.reason
        return SessionError("; ".join(dict.fromkeys([why, *self._judge.causes, *self._node.directory.problems()])))
