"""Search for chains of servers over block boundaries: the algorithms below `routing`.

A chain is a list of `(index of the stop, its blocks)` that covers a span in order, no stop twice.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from petalite.identity import PeerId
from petalite.swarm.snapshot import ServerInfo, Snapshot, Span

UNKNOWN_LATENCY_SECONDS = 0.15  # of a server nobody has pinged yet: between continents, so measured ones come first
SEARCH_LABELS = 100_000  # bounds the work that announcements can cause; then a chain of fewest hops must do

Chain = list[tuple[int, Span]]


@dataclass(frozen=True, slots=True)
class Stop:
    """A server as the search sees it."""

    server: ServerInfo
    start: int
    end: int
    limit: int  # blocks, by the room in its cache
    leg: float  # seconds from the client, one way
    fixed: float  # seconds per visit: queue and line
    per_block: float

    def reach(self, at: int) -> int:
        return min(self.end, at + self.limit)


def make_stop(
    snapshot: Snapshot, server: ServerInfo, part: Span, limit: int, latencies: Mapping[PeerId, float]
) -> Stop:
    return Stop(
        server=server,
        start=part.start,
        end=part.end,
        limit=limit,
        leg=latencies.get(server.peer, UNKNOWN_LATENCY_SECONDS) / 2,
        fixed=server.queue_seconds + 2 * snapshot.token_bits / server.network_rate,
        per_block=1 / server.decode_rate,
    )


def _link(one: Stop, two: Stop) -> float:
    """Seconds from server to server, one way: as measured by either, else as by way of the client."""
    known = one.server.next_hops.get(two.server.peer, two.server.next_hops.get(one.server.peer))
    return one.leg + two.leg if known is None else known / 2


def chain_seconds(used: Sequence[tuple[Stop, int]], *, push: bool) -> float:
    """Expected time per token of `(server, number of blocks)` in order."""
    total = used[0][0].leg + used[-1][0].leg
    for (one, _), (two, _) in pairwise(used):
        total += _link(one, two) if push else one.leg + two.leg
    return total + sum(stop.fixed + blocks * stop.per_block for stop, blocks in used)


def quickest(stops: list[Stop], span: Span, max_hops: int, *, push: bool) -> Chain | None:
    """The chain of least expected time per token, at most `max_hops` long; None if there is none."""
    return _Quickest(stops, span, max_hops, push=push).run()


class _Quickest:
    """The quickest chain over block boundaries.

    First a dynamic program from the last block backwards, in which a server may come twice: `to_go[b][i]` is the least
    time from entering server i at block b to the client. Then A* forwards with that as its bound, which it meets at
    once unless a server would come twice or the hops are too many.
    """

    def __init__(self, stops: list[Stop], span: Span, max_hops: int, *, push: bool) -> None:
        self.stops, self.span, self.max_hops, self.push = stops, span, max_hops, push
        self.at: dict[int, list[int]] = {
            block: [i for i, stop in enumerate(stops) if stop.start <= block < stop.end]
            for block in range(span.start, span.end)
        }
        index = {stop.server.peer: i for i, stop in enumerate(stops)}
        self.known: list[set[int]] = [set() for _ in stops]
        for i, stop in enumerate(stops):
            for peer in stop.server.next_hops:
                if peer in index:
                    self.known[i].add(index[peer])
                    self.known[index[peer]].add(i)

    def link(self, i: int, j: int) -> float:
        one, two = self.stops[i], self.stops[j]
        return _link(one, two) if self.push else one.leg + two.leg

    def run(self) -> Chain | None:
        if not all(self.at.values()):
            return None
        fewest = self.fewest_hops()
        if fewest[self.span.start] > self.max_hops:
            return None
        used = self.forwards(self.backwards(), fewest)
        if used is None:
            return None
        starts = [self.span.start, *(until for _, until in used)]
        return [(i, Span(start, until)) for (i, until), start in zip(used, starts, strict=False)]

    def fewest_hops(self) -> list[float]:
        """For each boundary, the least number of hops from there to the end."""
        fewest = [math.inf] * self.span.end + [0.0]
        for block in range(self.span.end - 1, self.span.start - 1, -1):
            fewest[block] = 1 + min(min(fewest[block + 1 : self.stops[i].reach(block) + 1]) for i in self.at[block])
        return fewest

    def backwards(self) -> dict[int, dict[int, float]]:
        """`to_go[block][server]`, O(layers x holders x span): see the class."""
        end = self.span.end
        onward: dict[int, dict[int, float]] = {end: {i: stop.leg for i, stop in enumerate(self.stops)}}
        to_go: dict[int, dict[int, float]] = {}
        for block in range(end - 1, self.span.start - 1, -1):
            to_go[block] = {}
            for i in self.at[block]:
                stop = self.stops[i]
                to_go[block][i] = stop.fixed + min(
                    (until - block) * stop.per_block + onward[until].get(i, math.inf)
                    for until in range(block + 1, stop.reach(block) + 1)
                )
            onward[block] = self.onward(block, to_go[block])
        return to_go

    def onward(self, block: int, to_go: Mapping[int, float]) -> dict[int, float]:
        """Least time from each server that has finished the block before, over whichever other server comes next."""
        ranking = sorted((self.stops[j].leg + seconds, j) for j, seconds in to_go.items())
        found = {}
        for i, stop in enumerate(self.stops):
            if not stop.start < block <= stop.end:
                continue
            special = self.known[i] if self.push else set()
            usual = next((stop.leg + cost for cost, j in ranking if j != i and j not in special), math.inf)
            found[i] = min([usual, *(self.link(i, j) + to_go[j] for j in special if j in to_go and j != i)])
        return found

    def forwards(self, to_go: dict[int, dict[int, float]], fewest: list[float]) -> list[tuple[int, int]] | None:
        """The best chain as `(server, end)`, no server twice, few enough hops."""
        first, end = self.span.start, self.span.end
        order = count()  # the tie-break, so that the heap never compares chains
        Entry = tuple[float, int, float, int, int, tuple[tuple[int, int], ...]]
        heap: list[Entry] = [
            (self.stops[i].leg + to_go[first][i], next(order), self.stops[i].leg, first, i, ()) for i in self.at[first]
        ]
        heapq.heapify(heap)
        seen: dict[tuple[int, int], list[tuple[float, int, frozenset[int]]]] = {}
        while heap and next(order) < SEARCH_LABELS:
            _, _, cost, block, i, chain = heapq.heappop(heap)
            if block == end:
                return list(chain)
            before = frozenset(j for j, _ in chain)
            if self.dominated(seen, block, i, cost, before):
                continue
            stop = self.stops[i]
            for until in range(block + 1, stop.reach(block) + 1):
                if len(chain) + 1 + fewest[until] > self.max_hops:
                    continue
                spent = cost + stop.fixed + (until - block) * stop.per_block
                longer = (*chain, (i, until))
                if until == end:
                    heapq.heappush(heap, (spent + stop.leg, next(order), spent + stop.leg, end, i, longer))
                    continue
                for j, rest in to_go[until].items():
                    if j != i and j not in before and rest < math.inf:
                        there = spent + self.link(i, j)
                        heapq.heappush(heap, (there + rest, next(order), there, until, j, longer))
        return self.shortest(fewest) if heap else None

    def dominated(
        self,
        seen: dict[tuple[int, int], list[tuple[float, int, frozenset[int]]]],
        block: int,
        i: int,
        cost: float,
        before: frozenset[int],
    ) -> bool:
        """Whether another chain got here no later, in no more hops, with no more servers used up that still matter."""
        spent = frozenset(j for j in before if self.stops[j].end > block)
        labels = seen.setdefault((block, i), [])
        if any(c <= cost and h <= len(before) and s <= spent for c, h, s in labels):
            return True
        labels.append((cost, len(before), spent))
        return False

    def shortest(self, fewest: list[float]) -> list[tuple[int, int]] | None:
        """A chain of fewest hops: not the best, but quickly found."""
        chain: list[tuple[int, int]] = []
        block = self.span.start
        while block < self.span.end:
            options = ((fewest[self.stops[i].reach(block)], self.stops[i].per_block, i) for i in self.at[block])
            i = min(options)[2]
            chain.append((i, self.stops[i].reach(block)))
            block = chain[-1][1]
        return chain if len({i for i, _ in chain}) == len(chain) <= self.max_hops else None


def widest(
    stops: list[Stop], span: Span, compute: list[float], line: list[float], max_hops: int
) -> tuple[float, Chain]:
    """The widest chain `(server, blocks)`; a little width is given up for fewer hops."""
    part: dict[tuple[int, int], tuple[float, int]] = {}  # (start, end) -> (width, server)
    for i, stop in enumerate(stops):
        for start in range(stop.start, stop.end):
            for end in range(start + 1, stop.end + 1):
                width = min(compute[i] / (end - start), line[i])
                part[start, end] = max(part.get((start, end), (0.0, i)), (width, i))
    # layers[h][b]: the widest way from b to the end in exactly h hops, and where its first hop ends.
    layer: dict[int, tuple[float, int]] = {span.end: (math.inf, span.end)}
    layers = [layer]
    best: tuple[float, float, Chain] = (0.0, 0.0, [])
    for hops in range(1, min(max_hops, span.size) + 1):
        layer = {}
        for (start, end), (width, _) in part.items():
            if end in layers[-1]:
                layer[start] = max(layer.get(start, (0.0, end)), (min(width, layers[-1][end][0]), end))
        layers.append(layer)
        if span.start in layer:
            chain, block = [], span.start
            for left in range(hops, 0, -1):
                end = layers[left][block][1]
                chain.append((part[block, end][1], Span(block, end)))
                block = end
            chain = _without_repeats(chain)
            width = min(min(compute[i] / used.size, line[i]) for i, used in chain)
            best = max(best, (width * 0.97 ** len(chain), width, chain))
    return best[1], best[2]


def _without_repeats(chain: Iterable[tuple[int, Span]]) -> Chain:
    """A server that comes twice runs what lies between as well: its span has no holes."""
    kept: Chain = []
    for i, blocks in chain:
        earlier = next((at for at, (j, _) in enumerate(kept) if j == i), None)
        if earlier is not None:
            blocks = Span(kept[earlier][1].start, blocks.end)
            del kept[earlier:]
        kept.append((i, blocks))
    return kept
