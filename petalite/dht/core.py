"""One DHT node that never waits: requests, replies and time in; replies and effects out (spec/09, "Node").

The shell around it (`node`) does what `take()` returns and reports back:

- `Ask`: dial the contact if there is no connection, check that the handshake proves `contact.id`, send the request,
  give up after `seconds`. Then `replied`, `failed` (no answer), `refused` (an ERR: it lives) or `misbehaved`
  (RemoteProtocolError).
- `Done`: the operation with that number has ended.

and it calls `wake` at the time that `timer()` gives, `handle` for each request, and sets `wall_offset_ms` at the
start and now and then: unix time in ms minus `now` in ms. Times are monotonic seconds, in any order that does not go
back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from petalite.dht.contacts import Contact
from petalite.dht.ids import ID_BITS, SPACE, number, random_in_bucket
from petalite.dht.knowledge import Config, Knowledge, Peer, Self
from petalite.dht.lookup import Lookup
from petalite.dht.messages import FindNode, FindValue, Ping, Reply, Request, Store, Stored, Values
from petalite.dht.operations import (
    JoinOperation,
    JoinResult,
    LookupOperation,
    Operation,
    PingOperation,
    ReadOperation,
    Result,
    WriteOperation,
    WriteResult,
    id_bytes,
)
from petalite.dht.pending import Pending, PendingRequests
from petalite.dht.records import Verify, make_record
from petalite.dht.region import RegionSearch
from petalite.dht.store import Quotas
from petalite.errors import ErrorCode
from petalite.identity import verify
from petalite.limits import (
    ANNOUNCEMENT_EXPIRY_SECONDS,
    DHT_K,
    DHT_MAX_SEEDS,
    DHT_MAX_TIMEOUT,
    DHT_PATHS,
    DHT_SAMPLE_SECONDS,
    DHT_TICK_SECONDS,
)

__all__ = ["Ask", "Config", "Core", "Done", "Peer", "Self"]

_THIN = 8  # a bucket with fewer contacts is looked up on joining; also the width of such lookups
_REJOIN_SECONDS = (1.0, 60.0)  # first and longest wait before a join that nobody answered is tried again
_RETRY_SECONDS = 10.0  # before a publication that nobody took is offered again


@dataclass(frozen=True, slots=True)
class Ask:
    """Effect: send this request, and wait at most `seconds` for the reply."""

    number: int
    contact: Contact
    request: Request
    seconds: float


@dataclass(frozen=True, slots=True)
class Done:
    """Effect: an operation ended."""

    number: int
    result: Result


@dataclass(slots=True)
class _Publication:
    val: dict[str, Any]
    expiry: float
    at: float  # when to store it again
    exp_ms: int = 0
    holders: tuple[Contact, ...] = ()


class Core:
    """See the module. `addrs` and `client` may be changed when we learn how others reach us."""

    def __init__(
        self, config: Config, own: Self, rng: random.Random, *, addrs: tuple[str, ...] = (), client: bool = False,
        verify: Verify = verify, quotas: Quotas | None = None,
    ) -> None:  # fmt: skip
        self.own = own
        self.n = number(own.id)
        self.addrs = addrs
        self.client = client
        self.wall_offset_ms = 0
        self.known = Knowledge(config, own, verify, quotas)
        self.table = self.known.table
        self.connected: Callable[[bytes], bool] | None = None
        self._rng = rng
        self._numbers = 0
        self._seq = 0
        self._operations: dict[int, Operation] = {}
        self._pending = PendingRequests()
        self._publications: dict[bytes, _Publication] = {}
        self._writing: dict[int, bytes] = {}
        self._quiet: set[int] = set()  # operations whose end interests nobody
        self._checking: set[int] = set()  # peers that are being pinged
        self._seeds: tuple[Contact, ...] = ()
        self._rejoin_wait = 0.0
        self._rejoin_at = self._tick_at = self._sample_at = float("inf")
        self._out: list[Ask | Done] = []

    def take(self) -> list[Ask | Done]:
        """What to do now; each effect is given once. Call it after every other method."""
        out, self._out = self._out, []
        return out

    def wall(self, now: float) -> int:
        return int(now * 1000) + self.wall_offset_ms

    # ------------------------------------------------------------------------------------------------- answering

    def handle(self, now: float, peer: Peer, request: Request) -> Reply:
        """Answer a request.

        Raises:
            RequestError: RATE, with `after` in ms, from a peer that asks too much.
        """
        self.known.admit(now, peer, request)
        contact = self.known.introduced(now, peer, request)
        if contact is not None:
            self._heard(now, contact)
        return self.known.answer(now, self.wall(now), peer, request)

    # ------------------------------------------------------------------------------------------------ operations

    def join(self, now: float, seeds: Iterable[Contact]) -> int:
        """Enter the network through `seeds`: contacts saved from before, then bootstraps, all of them tried.

        Returns the number of the operation, whose JoinResult follows. While nobody answers it is tried again for
        ever, with rising waits, and each try ends with a Done of its own number.
        """
        new = tuple(seeds)
        self._seeds = (*new, *(seed for seed in self._seeds if seed not in new))[:DHT_MAX_SEEDS]
        self._tick_at = min(self._tick_at, now + self._rng.uniform(0.5, 1.0) * DHT_TICK_SECONDS)
        self._sample_at = now + self._rng.uniform(0.75, 1.25) * DHT_SAMPLE_SECONDS
        return self._join(now)

    def _join(self, now: float) -> int:
        self._rejoin_at = float("inf")
        buckets: list[int] | None = None

        def thin() -> int | None:
            nonlocal buckets
            if buckets is None:
                buckets = list(range(self.table.deepest(), ID_BITS))
            while buckets:
                index = buckets.pop()
                if self.table.size_of(index) < _THIN:
                    self.table.touch(self.n ^ (1 << index), now)
                    return random_in_bucket(self.n, index, self._rng)
                self.table.touch(self.n ^ (1 << index), now)
            return None

        start = [*self.table.nearest(self.n, DHT_K), *self._seeds]
        own = self._find(self.n, self._make(self.n, start, DHT_PATHS, 0))
        return self._start(now, JoinOperation(own, thin, self._thin_lookup, self._sample))

    def lookup(self, now: float, target: bytes, paths: int = DHT_PATHS) -> int:
        """Find the k peers nearest to `target`; ends with Found."""
        n = number(target)
        self.table.touch(n, now)
        return self._start(now, self._find(n, self._make(n, self.table.nearest(n, DHT_K), paths, 0)))

    def read(self, now: float, key: bytes) -> int:
        """Ask the region of `key` for its records; ends with ReadResult."""
        self.table.touch(number(key), now)
        wall = self.wall(now)  # a read takes seconds: one clock reading serves it
        return self._start(
            now,
            ReadOperation(
                self._search(now, key, 1), key, self._find_value(key), self._find_node,
                lambda raw: self.known.check(key, raw, wall), self.known.store.records(key, wall),
                lambda cursor: self._find_value(key, cursor),
            ),
        )  # fmt: skip

    def publish(self, now: float, key: bytes, val: dict[str, Any], expiry: float = ANNOUNCEMENT_EXPIRY_SECONDS) -> int:
        """Store what we say under `key`, and again each third of `expiry` until `withdraw`; each ends with
        WriteResult.

        Raises:
            LocalProtocolError: `val` makes the record too long.
        """
        old = self._publications.get(key)
        self._publications[key] = _Publication(val, expiry, now, holders=old.holders if old else ())
        return self._republish(now, key)

    def _republish(self, now: float, key: bytes) -> int:
        publication = self._publications[key]
        publication.at = now + publication.expiry / 3 * self._rng.uniform(0.9, 1.0)
        publication.exp_ms = self.wall(now) + int(publication.expiry * 1000)
        store = self._signed(now, key, publication.val, publication.exp_ms)
        self.table.touch(number(key), now)
        self._writing[self._numbers + 1] = key  # the number it will have: it may end before `_start` returns
        return self._start(now, WriteOperation(key, store, self._search(now, key, DHT_PATHS), self._find_node))

    def withdraw(self, now: float, key: bytes) -> int | None:
        """Take back what we published: those who hold it get a newer record without a value. None if there
        is nothing.
        """
        publication = self._publications.pop(key, None)
        if publication is None:
            return None
        store = self._signed(now, key, None, max(publication.exp_ms, self.wall(now) + 1000))
        return self._start(now, WriteOperation(key, store, None, self._find_node, publication.holders))

    def leave(self, now: float) -> list[int]:
        """Withdraw everything and stop all upkeep; the shell may wait for these operations a little while."""
        self._tick_at = float("inf")
        self._rejoin_at = float("inf")
        self._seeds = ()
        return [done for key in list(self._publications) if (done := self.withdraw(now, key)) is not None]

    def _signed(self, now: float, key: bytes, val: dict[str, Any] | None, exp_ms: int) -> Store:
        self._seq = max(self._seq + 1, self.wall(now))  # two within one millisecond are still in order
        raw = make_record(
            self.known.config.network_id, key, val,
            seq=self._seq, exp=exp_ms, public_key=self.own.public_key, sign=self.own.sign,
        )  # fmt: skip
        self.known.keep(now, self.wall(now), raw, b"")  # we answer for our own key too, if it is ours to hold
        return Store(records=(raw,), addrs=self.addrs, client=self.client)

    def _find_node(self, target: int) -> FindNode:
        return FindNode(target=id_bytes(target), addrs=self.addrs, client=self.client)

    def _find_value(self, key: bytes, cursor: bytes = b"") -> FindValue:
        return FindValue(key=key, cursor=cursor, addrs=self.addrs, client=self.client)

    def _find(self, target: int, lookup: Lookup, count: int = DHT_K) -> LookupOperation:
        return LookupOperation(lookup, self._find_node(target), count)

    def _thin_lookup(self, target: int) -> LookupOperation:
        start = self.table.nearest(target, DHT_K)
        lookup = Lookup(target, self.n, start, k=_THIN, diverse=not self.known.config.lan, connected=self.connected)
        return self._find(target, lookup, _THIN)

    def _make(self, target: int, start: Iterable[Contact], paths: int, within: int) -> Lookup:
        diverse, connected = not self.known.config.lan, self.connected
        return Lookup(target, self.n, start, paths=paths, within=within, diverse=diverse, connected=connected)

    def _search(self, now: float, key: bytes, paths: int) -> RegionSearch:
        radius = self.known.radius(now)
        return RegionSearch(number(key), radius, lambda target: self.table.nearest(target, DHT_K), self._make, paths)

    def _sample(self, lookup: Lookup) -> None:
        self.known.samples.sample(lookup.target, [contact.n for contact in lookup.nearest(_THIN)])

    # --------------------------------------------------------------------------------------------------- sending

    def _start(self, now: float, operation: Operation) -> int:
        self._numbers += 1
        self._operations[self._numbers] = operation
        name = self._numbers
        self._pump(now, name)
        return name

    def _pump(self, now: float, name: int) -> None:
        """Let an operation ask until it has to wait; end it if it is done."""
        operation = self._operations.get(name)
        if operation is None:
            return
        while asks := operation.asks():
            for contact, target, request in asks:
                if not self._send(now, name, contact, target, request):
                    operation.failed(contact, target)
        if operation.done:
            del self._operations[name]
            self._finish(now, name, operation)

    def _send(self, now: float, name: int, contact: Contact, target: int, request: Request) -> bool:
        if self.connected is None or not self.connected(contact.id):
            address = contact.addrs[0]
            guard = self.known.guard
            if guard.backed_off(address, now) or not guard.allow(address.rpartition(":")[0], now):
                return False
        self._numbers += 1
        entry = self.table.entry(contact.n)
        pending = Pending(name, contact, target, request, now)
        self._pending.add(self._numbers, pending, entry.rtt if entry is not None else 0.0)
        self._out.append(Ask(self._numbers, contact, request, DHT_MAX_TIMEOUT))
        return True

    def _finish(self, now: float, name: int, operation: Operation) -> None:
        if name in self._quiet:
            self._quiet.discard(name)
            if isinstance(operation, PingOperation):
                self._checking.discard(operation.contact.n)
            elif isinstance(operation, LookupOperation):
                self._sample(operation.lookup)
            return
        result = operation.result
        if isinstance(result, WriteResult):
            publication = self._publications.get(self._writing.pop(name, b""))
            if publication is not None:
                publication.holders = result.holders
                if not result.holders:  # alone, or cut off: do not wait a third of the expiry
                    publication.at = min(publication.at, now + _RETRY_SECONDS)
        if isinstance(result, JoinResult):
            self._joined(now, result)
        self._out.append(Done(name, result))

    def _joined(self, now: float, result: JoinResult) -> None:
        if result.answered or not self._seeds:
            self._rejoin_wait = 0.0
            return
        self._rejoin_wait = min(_REJOIN_SECONDS[1], max(_REJOIN_SECONDS[0], 2 * self._rejoin_wait))
        self._rejoin_at = now + self._rejoin_wait * self._rng.uniform(0.8, 1.2)

    # ------------------------------------------------------------------------------------------------- answers in

    def replied(self, now: float, ask: int, reply: Reply, peer: Peer | None = None) -> None:
        """A reply came; `peer`, if given, has its key checked against the network's puzzle."""
        pending = self._pending.pop(ask)
        if pending is None:
            return
        contact = pending.contact
        self.known.guard.succeeded(contact.addrs[0])
        if peer is None or self.known.worthy(peer):
            self._heard(now, contact)
        self._measure(contact, now - pending.sent)
        if isinstance(reply, (Stored, Values)):
            self.known.shirks.clear(contact.n)
        operation = self._operations.get(pending.operation)
        if operation is not None:
            if not operation.replied(contact, pending.target, self.known.filtered(now, reply)):
                self.known.mark(now, contact.n)
            self._pump(now, pending.operation)

    def failed(self, now: float, ask: int) -> None:
        """No answer: the dial failed, another id answered, the connection broke, or `seconds` passed."""
        pending = self._pending.pop(ask)
        if pending is None:
            return
        contact = pending.contact
        self.known.guard.failed(contact.addrs[0], now)
        self.table.failed(contact.n)
        if isinstance(pending.request, (Store, FindValue)):
            self.known.shirked(now, contact.n)
        self._drop(now, pending)

    def refused(self, now: float, ask: int, code: ErrorCode) -> None:
        """The peer sent ERR: it lives, but this request got nothing."""
        pending = self._pending.pop(ask)
        if pending is None:
            return
        self._heard(now, pending.contact)
        if isinstance(pending.request, (Store, FindValue)) and code not in (ErrorCode.RATE, ErrorCode.BUSY):
            self.known.shirked(now, pending.contact.n)
        self._drop(now, pending)

    def misbehaved(self, now: float, ask: int) -> None:
        """The reply broke the protocol."""
        pending = self._pending.pop(ask)
        if pending is not None:
            self.known.mark(now, pending.contact.n)
            self._drop(now, pending)

    def _drop(self, now: float, pending: Pending) -> None:
        operation = self._operations.get(pending.operation)
        if operation is not None:
            operation.failed(pending.contact, pending.target)
            self._pump(now, pending.operation)

    def _heard(self, now: float, contact: Contact) -> None:
        if self.known.unwanted(contact.n, now):
            return
        doubtful = self.table.seen(contact, now)
        if doubtful is not None:
            self._check_alive(now, doubtful)

    def _measure(self, contact: Contact, seconds: float) -> None:
        self._pending.measure(seconds)
        entry = self.table.entry(contact.n)
        if entry is not None:
            entry.rtt = seconds if not entry.rtt else 0.75 * entry.rtt + 0.25 * seconds

    # ---------------------------------------------------------------------------------------------------- upkeep

    def timer(self) -> float:
        """When to call `wake`; infinity: only after something else happened."""
        times = [self._pending.next_deadline(), self._tick_at, self._rejoin_at]
        times += [publication.at for publication in self._publications.values()]
        return min(times)

    def wake(self, now: float) -> None:
        """Time has passed: time-outs, republishing, refreshing."""
        while (due := self._pending.due(now)) is not None:
            ask, pending, final = due
            if final:
                self.failed(now, ask)
            elif (operation := self._operations.get(pending.operation)) is not None:
                operation.slow(pending.contact, pending.target)
                self._pump(now, pending.operation)
        for key, publication in list(self._publications.items()):
            if publication.at <= now:
                self._republish(now, key)
        if self._rejoin_at <= now:
            for seed in self._seeds:  # the rising wait is their back-off
                self.known.guard.succeeded(seed.addrs[0])
            self._join(now)
        if self._tick_at <= now:
            self._tick_at = now + self._rng.uniform(0.75, 1.25) * DHT_TICK_SECONDS
            self._tick(now)

    def _tick(self, now: float) -> None:
        """Upkeep, a little each time and so without bursts: one bucket refresh, one sample of the size, one ping."""
        self.known.store.expire(self.wall(now))
        if not len(self.table):
            if self._seeds and self._rejoin_at == float("inf"):
                self._rejoin_at = now
            return
        for index in self.table.due(now)[-1:]:
            target = random_in_bucket(self.n, index, self._rng)
            self.table.touch(target, now)
            self._run_quietly(now, self._thin_lookup(target))
        if self._sample_at <= now:
            self._sample_at = now + self._rng.uniform(0.75, 1.25) * DHT_SAMPLE_SECONDS
            self._run_quietly(now, self._thin_lookup(self._rng.randrange(SPACE)))
        stalest = self.table.stalest(now)
        if stalest is not None:
            self._check_alive(now, stalest)

    def _check_alive(self, now: float, contact: Contact) -> None:
        if len(self._checking) < DHT_K and contact.n not in self._checking:  # newcomers cannot make us ping the world
            self._checking.add(contact.n)
            self._run_quietly(now, PingOperation(contact, Ping(addrs=self.addrs, client=self.client)))

    def _run_quietly(self, now: float, operation: Operation) -> None:
        self._quiet.add(self._numbers + 1)
        self._start(now, operation)
