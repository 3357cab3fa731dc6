"""Which servers take a piece of a training pass: several routes side by side, shared by their speed (spec/15)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import trio

from petalite.client.calls import Terms
from petalite.client.planning import Planner
from petalite.client.verdicts import Judge
from petalite.identity import PeerId
from petalite.swarm.node import Node
from petalite.swarm.routing import Needs, NoRoute, Route, plan_batch
from petalite.swarm.snapshot import ServerState, Snapshot, Span


class BatchPlanner(Planner):
    """As `Planner`, for requests without a cache. `adapter`: only servers that hold this one."""

    def __init__(
        self, node: Node, terms: Terms, judge: Judge, notice: Callable[[str], None], adapter: str | None = None
    ) -> None:
        super().__init__(node, terms, judge, notice, push=False)
        self._adapter = adapter
        self._load: Counter[PeerId] = Counter()

    def routes(
        self, blocks: Span, tokens: int, *, without: frozenset[PeerId] = frozenset(), any_class: bool = False
    ) -> tuple[Route, ...] | NoRoute | None:
        """All routes to use now for pieces of `tokens`, of one compute class if one covers the blocks; None if nobody
        serves the model.
        """
        self._node.directory.touch()
        snapshot = self._node.directory.snapshot(self._terms.model)
        if snapshot is None:
            return None
        needs = Needs(
            blocks=blocks,
            codec=self._terms.codec,
            training_tokens=tokens,
            adapter=self._adapter,
            without=without | self._judge.avoided(trio.current_time()),
        )
        if self.compute_class is not None:
            return self._plan(snapshot, replace(needs, compute_class=None if any_class else self.compute_class))
        classes = sorted({server.compute_class for server in snapshot.servers})
        plans = [self._plan(snapshot, replace(needs, compute_class=each)) for each in classes]
        found = [plan for plan in plans if not isinstance(plan, NoRoute)]
        if found:
            return max(found, key=lambda routes: sum(route.tokens_per_second for route in routes))
        return self._plan(snapshot, needs)

    def _plan(self, snapshot: Snapshot, needs: Needs) -> tuple[Route, ...] | NoRoute:
        return plan_batch(
            snapshot,
            needs,
            latencies=self._node.directory.latencies(),
            bans=self._node.bans,
            now=trio.current_time(),
        )

    def find(
        self, blocks: Span, tokens: int, *, without: frozenset[PeerId] = frozenset(), any_class: bool = False
    ) -> Route | NoRoute | None:
        """The route that would be through first with `tokens` more, after what it has from us already."""
        routes = self.routes(blocks, tokens, without=without, any_class=any_class)
        snapshot = self._node.directory.snapshot(self._terms.model)
        if not isinstance(routes, tuple) or snapshot is None:
            return None if isinstance(routes, tuple) else routes
        rates = {server.peer: server.batch_rate for server in snapshot.servers}

        def seconds(route: Route) -> float:
            return max((self._load[hop.peer] + tokens * hop.blocks.size) / rates[hop.peer] for hop in route.hops)

        return min(routes, key=seconds)

    def takes(self, peer: PeerId, blocks: Span) -> bool:
        """Whether `peer` can be asked for `blocks` now."""
        snapshot = self._node.directory.snapshot(self._terms.model)
        server = snapshot.get(peer) if snapshot else None
        now = trio.current_time()
        return (
            server is not None
            and server.state is ServerState.ONLINE
            and server.blocks.holds(blocks)
            and not self._node.bans.banned(peer, now)
            and peer not in self._judge.avoided(now)
        )

    @contextmanager
    def claimed(self, route: Route, tokens: int) -> Iterator[None]:
        """While `tokens` are on their way along `route`, others are sent elsewhere where that is quicker."""
        claim = Counter({hop.peer: tokens * hop.blocks.size for hop in route.hops})
        self._load += claim
        try:
            yield
        finally:
            self._load -= claim

    def offers(self) -> list[int]:
        """How many tokens servers take in one request, the most first."""
        snapshot = self._node.directory.snapshot(self._terms.model)
        found = {server.training_tokens for server in snapshot.servers} if snapshot else set()
        return sorted(found - {0}, reverse=True)
