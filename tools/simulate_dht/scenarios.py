"""What is simulated, and what is measured. Each scenario is a function of a seed and its sizes; it returns a
`Report`.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from petalite.dht.contacts import Contact
from petalite.dht.ids import number
from petalite.dht.messages import FindNode, FindValue, Nodes, Ping, Reply, Request, Store, Stored, Values
from petalite.dht.operations import Found, ReadResult, Result, WriteResult
from petalite.identity import peer_id_of
from petalite.limits import DHT_K

from .network import Network, Node


@dataclass
class Report:
    """One line of the table: figures by name, the bars they must meet, and the trace hash."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    bars: dict[str, tuple[str, float]] = field(default_factory=dict)
    trace: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(
            self.figures[name] >= bar if relation == ">=" else self.figures[name] <= bar
            for name, (relation, bar) in self.bars.items()
        )


# ------------------------------------------------------------------------------------------------------ building
# blocks


def grow(network: Network, count: int, *, spacing: float = 0.1, quiet: float = 600.0) -> list[Node]:
    """Let `count` nodes join by the protocol, each through three of the first eight, then pass `quiet` seconds."""
    first = len(network.nodes)
    start = network.now
    for i in range(count):
        # the first ones one by one: a network of ten that starts in one instant is another experiment
        network.at(start + (i * 2.0 if i < 20 else 40.0 + (i - 20) * spacing), enter, network)
    network.run(start + 70.0 + count * spacing)
    network.run(network.now + quiet)
    return network.nodes[first:]


def enter(network: Network, public_key: bytes | None = None, host: str | None = None) -> Node:
    node = network.add(public_key, host=host)
    bootstraps = [other for other in network.nodes[:8] if other.alive and other is not node]
    network.join(node, network.rng.sample(bootstraps, min(3, len(bootstraps))))
    return node


def look_up(network: Network, count: int, paths: int, nodes: list[Node]) -> dict[str, float]:
    """`count` lookups of random targets from random honest nodes, compared with a full sort of the honest nodes."""
    numbers = {node.core.n: node for node in nodes if node.alive}
    hits, recalls, hops, asked, times = [], [], [], [], []
    for _ in range(count):
        asker = network.rng.choice([node for node in nodes if node.alive])
        target = network.rng.randbytes(32)
        n, started = number(target), network.now

        def done(result: Result, n: int = n, asker: Node = asker, started: float = started) -> None:
            assert isinstance(result, Found)
            right = sorted((other for other in numbers if other != asker.core.n), key=n.__xor__)[:DHT_K]
            found = [contact.n for contact in result.contacts if contact.n in numbers]
            hits.append(found[:1] == right[:1])
            recalls.append(len(set(found) & set(right)) / len(right))
            hops.append(result.hops)
            asked.append(result.asked)
            times.append(network.now - started)

        network.lookup(asker, target, paths, done)
        network.run(network.now + 1.0)
    network.run(network.now + 30.0)
    times.sort()
    return {
        "lookups": len(hits),
        "nearest": statistics.mean(hits),
        "recall": statistics.mean(recalls),
        "hops": statistics.mean(hops),
        "rpcs": statistics.mean(asked),
        "p50": times[len(times) // 2],
        "p95": times[int(len(times) * 0.95)],
    }


def publish(network: Network, publishers: list[Node], keys: list[bytes], expiry: float = 600.0) -> dict[str, float]:
    """Each publisher stores under its key; how many hold it, and at what cost."""
    holders, asked = [], []

    def done(result: Result) -> None:
        assert isinstance(result, WriteResult)
        holders.append(len(result.holders))
        asked.append(result.asked)

    for publisher, key in zip(publishers, keys, strict=True):
        network.publish(publisher, key, done, expiry)
        network.run(network.now + 0.5)
    network.run(network.now + 20.0)
    return {"holders": statistics.mean(holders), "write rpcs": statistics.mean(asked)}


@dataclass
class Reads:
    """Reads of values that must be there."""

    network: Network
    found: list[bool] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    quorum: list[bool] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def read(self, reader: Node, key: bytes, publisher: Node) -> None:
        started = self.network.now

        def done(result: Result) -> None:
            assert isinstance(result, ReadResult)
            self.found.append(any(record.publisher == publisher.contact.id for record in result.records))
            self.asked.append(result.asked)
            self.quorum.append(result.quorum)
            self.times.append(self.network.now - started)

        self.network.read(reader, key, done)

    def figures(self) -> dict[str, float]:
        times = sorted(self.times)
        return {
            "reads": len(self.found),
            "found": statistics.mean(self.found),
            "quorum": statistics.mean(self.quorum),
            "read rpcs": statistics.mean(self.asked),
            "read p50": times[len(times) // 2],
            "read p95": times[int(len(times) * 0.95)],
        }


def colluders(gang: list[Node], fakes: int = 0) -> Callable[[Node, Request], Reply | None]:
    """Answer with the gang members nearest to the target and nobody else; take stores and keep nothing.

    `fakes` of each answer's contacts are made up: ids next to the target at addresses where nobody is.
    """
    numbers = {node.core.n: node for node in gang}

    def behave(node: Node, request: Request) -> Reply | None:
        if isinstance(request, Ping):
            return None
        if isinstance(request, Store):
            return Stored(codes=(0,) * len(request.records))
        target = number(request.target if isinstance(request, FindNode) else request.key)
        near = sorted(numbers, key=target.__xor__)[: DHT_K - fakes]
        contacts = [numbers[n].contact for n in near if n != node.core.n]
        contacts += [_made_up(target, node, i) for i in range(fakes)]
        if isinstance(request, FindValue):
            return Values(records=(), contacts=tuple(contacts))
        return Nodes(contacts=tuple(contacts))

    return behave


def _made_up(target: int, node: Node, i: int) -> Contact:
    near = target ^ (number(hashlib.sha256(bytes(node.contact.id) + bytes([i])).digest()) >> 20)
    return Contact(near.to_bytes(32, "big"), (f"98.{node.index % 200}.{i}.{node.index // 200}:1",))


def liars_of(network: Network, nodes: list[Node], share: float, fakes: int) -> list[Node]:
    """Turn a share of the nodes, but no bootstrap, into colluding liars. Returns the liars."""
    gang = network.rng.sample(nodes[8:], int(share * len(nodes)))
    behave = colluders(gang, fakes)
    for node in gang:
        node.behaviour = behave
    return gang


# ------------------------------------------------------------------------------------------------------------
# scenarios


def healthy(seed: int, nodes: int = 1000, lookups: int = 300, spacing: float = 0.1, quiet: float = 600.0) -> Report:
    """Nobody fails or lies: is the nearest node found, and in how few hops?"""
    network = Network(seed)
    members = grow(network, nodes, spacing=spacing, quiet=quiet)
    joined = network.rpcs / nodes
    figures = look_up(network, lookups, 1, members)
    sizes = sorted(node.core.known.size(network.now) / nodes for node in members)
    figures |= {"join rpcs": joined, "size p5": sizes[nodes // 20], "size p95": sizes[nodes * 19 // 20]}
    figures["size p50"] = sizes[nodes // 2]
    return Report(
        f"{nodes} nodes, no faults", figures, {"nearest": (">=", 0.999), "hops": ("<=", 4.0)}, network.trace
    )  # fmt: skip


def dead(seed: int, nodes: int = 1000, values: int = 200, share: float = 0.2) -> Report:
    """A share of all nodes falls silent at once, among them publishers and holders; then every value is read."""
    network = Network(seed)
    members = grow(network, nodes)
    publishers = network.rng.sample(members, values)
    keys = [network.rng.randbytes(32) for _ in publishers]
    figures = publish(network, publishers, keys)
    for node in network.rng.sample(members, int(share * nodes)):
        network.kill(node)
    reads = Reads(network)
    for key, publisher in zip(keys, publishers, strict=True):
        reads.read(network.rng.choice(network.alive()), key, publisher)
        network.run(network.now + 0.5)
    network.run(network.now + 30.0)
    figures |= reads.figures()
    figures |= look_up(network, 100, 1, members)
    return Report(f"{nodes} nodes, {share:.0%} dead at once", figures, {"found": (">=", 0.99)}, network.trace)


def churn(seed: int, nodes: int = 1000, values: int = 40, hours: float = 6.0, rate: float = 0.3) -> Report:
    """Nodes leave (half of them politely) and others join, `rate` of all an hour; publishers stay and republish.

    One value is read each 20 s by a node that may have joined a second ago, if its join has ended.
    """
    network = Network(seed)
    members = grow(network, nodes)
    publishers = network.rng.sample(members, values)
    pinned = {*members[:8], *publishers}
    keys = [network.rng.randbytes(32) for _ in publishers]
    figures = publish(network, publishers, keys)
    reads = Reads(network)
    end = network.now + hours * 3600

    def step() -> None:
        victim = network.rng.choice([node for node in network.alive() if node not in pinned])
        if network.rng.random() < 0.5:
            network.leave(victim)
        else:
            network.kill(victim)
        enter(network)
        later = network.now + network.rng.expovariate(rate * nodes / 3600)
        if later < end:
            network.at(later, step)

    def read() -> None:
        which = network.rng.randrange(values)
        ready = [node for node in network.alive() if len(node.core.table) >= DHT_K]
        reads.read(network.rng.choice(ready), keys[which], publishers[which])
        if network.now + 20.0 < end:
            network.at(network.now + 20.0, read)

    network.at(network.now, step)
    network.at(network.now, read)
    network.run(end + 30.0)
    figures |= reads.figures() | {"came and went": len(network.nodes) - nodes}
    return Report(f"{nodes} nodes, {rate:.0%}/h churn, {hours:g} h", figures, {"found": (">=", 0.99)}, network.trace)


def liars(seed: int, nodes: int = 1000, values: int = 200, share: float = 0.3, fakes: int = 0) -> Report:
    """A share of all nodes colludes: they name only each other (and made-up peers), keep nothing and give nothing."""
    network = Network(seed)
    members = grow(network, nodes)
    gang = liars_of(network, members, share, fakes)
    honest = [node for node in members if node not in set(gang)]
    network.run(network.now + 600.0)
    publishers = network.rng.sample(honest, values)
    keys = [network.rng.randbytes(32) for _ in publishers]
    figures = publish(network, publishers, keys)
    reads = Reads(network)
    for key, publisher in zip(keys, publishers, strict=True):
        reads.read(network.rng.choice(honest), key, publisher)
        network.run(network.now + 0.5)
    network.run(network.now + 30.0)
    figures |= reads.figures() | look_up(network, 100, 4, members)
    what = f" naming {fakes} made-up peers each" if fakes else ""
    return Report(f"{nodes} nodes, {share:.0%} colluding liars{what}", figures, {"found": (">=", 0.99)}, network.trace)


def sybils(seed: int, nodes: int = 1000, values: int = 100, count: int = 16, batch: int = 5) -> Report:
    """Around each key `count` sybils, ground nearer to it than any honest node, each in a /16 of its own.

    They join honestly, then lie as `liars` do, before the value is stored. `batch` keys are attacked at a time.
    """
    network = Network(seed)
    members = grow(network, nodes)
    reads = Reads(network)
    figures: dict[str, float] = {"holders": 0.0, "write rpcs": 0.0}
    for _ in range(values // batch):
        keys = [network.rng.randbytes(32) for _ in range(batch)]
        gangs = [_surround(network, members, key, count) for key in keys]
        network.run(network.now + 60.0)
        for gang in gangs:
            for node in gang:
                node.behaviour = colluders(gang)
        publishers = network.rng.sample(members, batch)
        wrote = publish(network, publishers, keys)
        for name in figures:
            figures[name] += wrote[name] * batch / values
        for key, publisher in zip(keys, publishers, strict=True):
            reads.read(network.rng.choice(members), key, publisher)
            network.run(network.now + 0.5)
        network.run(network.now + 30.0)
        for gang in gangs:
            for node in gang:
                network.kill(node)
        for publisher, key in zip(publishers, keys, strict=True):
            publisher.core.withdraw(network.now, key)
    figures |= reads.figures()
    return Report(f"{nodes} nodes, {count} sybils at each key", figures, {"found": (">=", 0.95)}, network.trace)


def _surround(network: Network, members: list[Node], key: bytes, count: int) -> list[Node]:
    """Grind keys until `count` ids are nearer to `key` than every honest one; let these nodes join."""
    target = number(key)
    edge = min(node.core.n ^ target for node in members)
    gang: list[Node] = []
    while len(gang) < count:
        public_key = network.public_key()
        if number(peer_id_of(public_key)) ^ target < edge:
            gang.append(enter(network, public_key, network.host_in_own_sixteen()))
            network.run(network.now + 0.2)
    return gang
