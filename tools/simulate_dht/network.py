"""A simulated network: a heap of events, virtual time, one seed. The same seed gives the same trace, and so the same
hash.

Signatures are a cheap deterministic stand-in (two SHA-256), handed to the core as arguments; ids are honest hashes of
random "public keys". Everything else is the code that real nodes run.
"""

from __future__ import annotations

import hashlib
import heapq
import ipaddress
import random
import struct
from collections.abc import Callable

from petalite.dht import core as dht
from petalite.dht.contacts import Contact
from petalite.dht.ids import number
from petalite.dht.messages import METHOD_OF, Reply, Request, reply_from_map, request_from_map, to_map
from petalite.dht.operations import Result
from petalite.errors import ErrorCode, RequestError
from petalite.identity import peer_id_of
from petalite.wire.packing import decode, encode

RTT_LEAST = 0.020
RTT_MEAN_MORE = 0.060
PORT = 31337
EPOCH_MS = 1_700_000_000_000

Behaviour = Callable[["Node", Request], Reply | None]
"""What a dishonest node answers; None: what an honest one would."""


def sign_with(public_key: bytes, message: bytes) -> bytes:
    """The stand-in for a signature: anybody could make it, and the simulated attackers do not."""
    first = hashlib.sha256(public_key + message).digest()
    return first + hashlib.sha256(first).digest()


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    return sign_with(public_key, message) == signature


class Node:
    """One simulated peer: its core, its only address, and whether it is up."""

    __slots__ = ("alive", "behaviour", "contact", "core", "host", "index", "peer", "timer", "waiting")

    def __init__(self, index: int, core: dht.Core, host: str, contact: Contact, public_key: bytes) -> None:
        self.index = index
        self.core = core
        self.host = host
        self.contact = contact
        self.peer = dht.Peer(contact.id, host, public_key)
        self.alive = True
        self.behaviour: Behaviour | None = None
        self.timer = float("inf")
        self.waiting: dict[int, Callable[[Result], None]] = {}


class Network:
    """Nodes, virtual time and the messages under way. `wire`: encode and decode each message as a connection
    would.
    """

    def __init__(self, seed: int, *, wire: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.nodes: list[Node] = []
        self.rpcs = 0
        self._by_place: dict[str, Node] = {}
        self._events: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._count = 0
        self._trace = hashlib.sha256()
        self._wire = wire
        self._hosts: set[str] = set()
        self._config = dht.Config("simulation")

    @property
    def trace(self) -> str:
        """Hash of every event so far: when, from whom, to whom, what."""
        return self._trace.hexdigest()[:16]

    # ------------------------------------------------------------------------------------------------------ nodes

    def public_key(self) -> bytes:
        return self.rng.randbytes(32)

    def add(self, public_key: bytes | None = None, *, host: str | None = None) -> Node:
        """A new node that is up and knows nobody. Its address lies in a random /24, or is `host`."""
        public_key = public_key or self.public_key()
        host = host or self._random_host()
        self._hosts.add(host)
        place = f"{host}:{PORT}"
        contact = Contact(bytes(peer_id_of(public_key)), (place,))
        own = dht.Self(contact.id, public_key, lambda message: sign_with(public_key, message))
        core = dht.Core(self._config, own, random.Random(self.rng.getrandbits(64)), addrs=(place,), verify=verify)
        core.wall_offset_ms = EPOCH_MS
        node = Node(len(self.nodes), core, host, contact, public_key)
        self.nodes.append(node)
        self._by_place[place] = node
        return node

    def _random_host(self) -> str:
        while True:
            host = str(ipaddress.IPv4Address(self.rng.randrange(0x14000000, 0x60000000)))
            if host not in self._hosts and ipaddress.IPv4Address(host).is_global:
                return host

    def host_in_own_sixteen(self) -> str:
        """A host in a /16 in which nobody else is: what an attacker with many providers has."""
        taken = {host.rsplit(".", 2)[0] for host in self._hosts}
        while (host := self._random_host()).rsplit(".", 2)[0] in taken:
            pass
        return host

    def kill(self, node: Node) -> None:
        """The node falls silent, without a word."""
        node.alive = False
        node.timer = float("inf")
        self._by_place.pop(node.contact.addrs[0], None)

    def alive(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    def join(self, node: Node, seeds: list[Node]) -> None:
        node.core.join(self.now, [seed.contact for seed in seeds])
        self._after(node)

    def read(self, node: Node, key: bytes, then: Callable[[Result], None]) -> None:
        node.waiting[node.core.read(self.now, key)] = then
        self._after(node)

    def lookup(self, node: Node, target: bytes, paths: int, then: Callable[[Result], None]) -> None:
        node.waiting[node.core.lookup(self.now, target, paths)] = then
        self._after(node)

    def publish(self, node: Node, key: bytes, then: Callable[[Result], None], expiry: float = 600.0) -> None:
        node.waiting[node.core.publish(self.now, key, {"by": node.index}, expiry)] = then
        self._after(node)

    def leave(self, node: Node) -> None:
        """Withdraw, and be gone a second later."""
        node.core.leave(self.now)
        self._after(node)
        self.at(self.now + 1.0, self.kill, node)

    # ----------------------------------------------------------------------------------------------------- events

    def at(self, when: float, what: Callable[..., object], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what, arguments))

    def run(self, until: float) -> None:
        """Let virtual time pass."""
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, what, arguments = heapq.heappop(events)
            what(*arguments)
        self.now = until

    def _note(self, kind: int, source: int, target: int) -> None:
        self._trace.update(struct.pack("<dBII", self.now, kind, source, target))

    def _after(self, node: Node) -> None:
        """Carry out what a core wants done, and see when it wants to be woken."""
        for effect in node.core.take():
            if isinstance(effect, dht.Done):
                then = node.waiting.pop(effect.number, None)
                if then is not None:
                    then(effect.result)
                continue
            self.rpcs += 1
            rtt = RTT_LEAST + self.rng.expovariate(1 / RTT_MEAN_MORE)
            self.at(self.now + rtt / 2, self._deliver, node, effect, rtt)
        when = node.core.timer()
        if when < node.timer:
            node.timer = when
            self.at(when, self._wake, node, when)

    def _wake(self, node: Node, when: float) -> None:
        if node.timer != when or not node.alive:
            return
        node.timer = float("inf")
        self._note(0, node.index, node.index)
        node.core.wake(self.now)
        self._after(node)

    def _deliver(self, source: Node, ask: dht.Ask, rtt: float) -> None:
        node = self._by_place.get(ask.contact.addrs[0])
        if node is None:
            return  # nobody there: silence, the worst case for a dialler
        self._note(1, source.index, node.index)
        if node.contact.id != ask.contact.id:
            self.at(self.now + rtt / 2, self._answer, source, ask, None)
            return
        request = ask.request
        if self._wire:
            request = request_from_map(METHOD_OF[type(request)], decode(encode(to_map(request))))
        try:
            reply = node.behaviour(node, request) if node.behaviour is not None else None
            if reply is None:
                reply = node.core.handle(self.now, source.peer, request)
                self._after(node)
        except RequestError as error:
            self.at(self.now + rtt / 2, self._answer, source, ask, error.code)
            return
        self.at(self.now + rtt / 2, self._answer, source, ask, reply)

    def _answer(self, source: Node, ask: dht.Ask, reply: Reply | ErrorCode | None) -> None:
        if not source.alive:
            return
        self._note(2, source.index, number(ask.contact.id) & 0xFFFFFFFF)
        if reply is None:
            source.core.failed(self.now, ask.number)
        elif isinstance(reply, ErrorCode):
            source.core.refused(self.now, ask.number, reply)
        else:
            if self._wire:
                reply = reply_from_map(ask.request, decode(encode(to_map(reply))))
            source.core.replied(self.now, ask.number, reply)
        self._after(source)
