"""What a node does over several requests: search, read, write, join, ping (spec/09, "Operations").

An operation says whom to ask what, takes what came back, and ends with a result. It never waits and knows neither
time nor table; `core` sends, measures and times out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from petalite.dht.contacts import Contact
from petalite.dht.ids import ID_BYTES
from petalite.dht.lookup import Lookup
from petalite.dht.messages import FindNode, FindValue, Nodes, Ping, Reply, Request, Store, Stored, Values
from petalite.dht.records import Record, RecordError, StoreCode, newer
from petalite.dht.region import RegionSearch
from petalite.limits import DHT_K, DHT_QUORUM, DHT_TAIL_ALPHA, MAX_RECORD_PAGES

Ask = tuple[Contact, int, Request]
"""Whom, on which target's behalf, what."""


class Operation(Protocol):
    """Call `asks` after every input; when it gives nothing and `done` is true, `result` holds."""

    def asks(self) -> list[Ask]: ...

    def replied(self, contact: Contact, target: int, reply: Reply) -> bool:
        """Take a reply. False: the peer offended with it."""

    def slow(self, contact: Contact, target: int) -> None: ...

    def failed(self, contact: Contact, target: int) -> None: ...

    @property
    def done(self) -> bool: ...

    @property
    def result(self) -> Result: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Result of a lookup: the nearest peers that answered (nearest first), hops to the nearest, requests spent."""

    contacts: tuple[Contact, ...]
    hops: int
    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadResult:
    """Result of a read: the newest good record of each publisher, tombstones included.

    `quorum`: enough peers of different subnets answered that absence means something; without it, ask again later.
    """

    key: bytes
    records: tuple[Record, ...]
    answered: int
    quorum: bool
    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """Result of a write: who holds it now, and how many peers were offered it."""

    key: bytes
    holders: tuple[Contact, ...]
    offered: int
    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinResult:
    """Result of a join: how many peers answered; 0: nobody did, and the core tries again by itself."""

    answered: int
    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PingResult:
    alive: bool


Result = Found | ReadResult | WriteResult | JoinResult | PingResult


def id_bytes(n: int) -> bytes:
    return n.to_bytes(ID_BYTES, "big")


class PingOperation:
    """One ping."""

    def __init__(self, contact: Contact, request: Ping) -> None:
        self.contact = contact
        self._waiting: list[Ask] = [(contact, contact.n, request)]
        self.done = False
        self.result = PingResult(alive=False)

    def asks(self) -> list[Ask]:
        asks, self._waiting = self._waiting, []
        return asks

    def replied(self, contact: Contact, target: int, reply: Reply) -> bool:
        self.done = True
        self.result = PingResult(alive=True)
        return True

    def slow(self, contact: Contact, target: int) -> None:
        pass

    def failed(self, contact: Contact, target: int) -> None:
        self.done = True


class LookupOperation:
    """A lookup of a target by find_node alone."""

    def __init__(self, lookup: Lookup, request: FindNode, count: int = DHT_K) -> None:
        self.lookup = lookup
        self._request = request
        self._count = count

    def asks(self) -> list[Ask]:
        return [(contact, self.lookup.target, self._request) for contact in self.lookup.next()]

    def replied(self, contact: Contact, target: int, reply: Reply) -> bool:
        if not isinstance(reply, Nodes):
            self.lookup.failed(contact.n)
            return False
        self.lookup.replied(contact.n, reply.contacts)
        return not reply.excess

    def slow(self, contact: Contact, target: int) -> None:
        self.lookup.slow(contact.n)

    def failed(self, contact: Contact, target: int) -> None:
        self.lookup.failed(contact.n)

    @property
    def done(self) -> bool:
        return self.lookup.done

    @property
    def result(self) -> Found:
        found = self.lookup.nearest(self._count)
        return Found(contacts=tuple(found), hops=self.lookup.hops(), asked=self.lookup.asked)


class JoinOperation:
    """Look up our own id, then a random id in each bucket that this left thin (Kademlia, section 2.3).

    `thin()` names one such target after another and None when there is no more; `lookup(target)` makes the lookup,
    `sample(lookup)` sees each when it has ended.
    """

    def __init__(
        self, own: LookupOperation, thin: Callable[[], int | None], lookup: Callable[[int], LookupOperation],
        sample: Callable[[Lookup], None], parallel: int = 3,
    ) -> None:  # fmt: skip
        self._own: LookupOperation | None = own
        self._thin = thin
        self._lookup = lookup
        self._sample = sample
        self._parallel = parallel
        self._running: dict[int, LookupOperation] = {}
        self._answered = 0
        self._asked = 0

    def asks(self) -> list[Ask]:
        if self._own is not None:
            if (asks := self._own.asks()) or not self._own.done:
                return asks
            found = self._own.result
            self._answered, self._asked = len(found.contacts), found.asked
            self._own = None
        asks = []
        for target, running in list(self._running.items()):
            asks += (more := running.asks())
            if not more and running.done:
                self._sample(running.lookup)
                self._asked += running.lookup.asked
                del self._running[target]
        while len(self._running) < self._parallel and self._answered and (next_target := self._thin()) is not None:
            started = self._running[next_target] = self._lookup(next_target)
            asks += started.asks()
        return asks

    def _part(self, target: int) -> LookupOperation | None:
        return self._own or self._running.get(target)

    def replied(self, contact: Contact, target: int, reply: Reply) -> bool:
        part = self._part(target)
        return part is None or part.replied(contact, target, reply)

    def slow(self, contact: Contact, target: int) -> None:
        if (part := self._part(target)) is not None:
            part.slow(contact, target)

    def failed(self, contact: Contact, target: int) -> None:
        if (part := self._part(target)) is not None:
            part.failed(contact, target)

    @property
    def done(self) -> bool:
        return self._own is None and not self._running

    @property
    def result(self) -> JoinResult:
        return JoinResult(answered=self._answered, asked=self._asked)


class ReadOperation:
    """Ask the whole region of a key for its records; every page of every peer; the newest of each publisher counts.

    `check(raw)` gives the record of this key or raises RecordError; the same bytes are checked once.
    """

    def __init__(
        self, search: RegionSearch, key: bytes, find_value: FindValue, find_node: Callable[[int], FindNode],
        check: Callable[[bytes], Record], own: Iterable[Record], next_page: Callable[[bytes], FindValue],
    ) -> None:  # fmt: skip
        self._search = search
        self._key = key
        self._find_value = find_value
        self._find_node = find_node
        self._next_page = next_page
        self._check = check
        self._good: dict[bytes, Record] = {}
        self._records: dict[bytes, Record] = {record.publisher: record for record in own}
        self._contacts: dict[int, tuple[Contact, ...]] = {}  # of first pages whose peer has more pages to give
        self._cursors: dict[int, tuple[int, bytes]] = {}
        self._paging: list[Ask] = []
        self._answered: dict[int, Contact] = {}

    def asks(self) -> list[Ask]:
        asks, self._paging = self._paging, []
        for contact, target in self._search.next():
            request = self._find_value if target == self._search.target else self._find_node(target)
            asks.append((contact, target, request))
        return asks

    def replied(self, contact: Contact, target: int, reply: Reply) -> bool:
        if isinstance(reply, Nodes) and target != self._search.target:
            self._search.replied(contact.n, target, reply.contacts)
            return not reply.excess
        if not isinstance(reply, Values) or not self._take(reply.records):
            self._search.failed(contact.n, target)
            return False
        contacts = self._contacts.setdefault(contact.n, reply.contacts)
        if reply.cursor is not None and self._turn_page(contact, target, reply.cursor):
            return not reply.excess
        self._answered[contact.n] = contact
        self._search.replied(contact.n, target, contacts)
        return not reply.excess

    def _take(self, raws: Iterable[bytes]) -> bool:
        for raw in raws:
            record = self._good.get(raw)
            if record is None:
                try:
                    record = self._good[raw] = self._check(raw)
                except RecordError as error:
                    if error.code is StoreCode.EXPIRED:
                        continue  # it lapsed on the way, or clocks differ a little
                    return False
            known = self._records.get(record.publisher)
            self._records[record.publisher] = newer(known, record) if known else record
        return True

    def _turn_page(self, contact: Contact, target: int, cursor: bytes) -> bool:
        """Ask for the next page, unless there were too many or the cursor does not move on."""
        pages, last = self._cursors.get(contact.n, (1, b""))
        if pages >= MAX_RECORD_PAGES or cursor <= last:
            return False
        self._cursors[contact.n] = (pages + 1, cursor)
        self._paging.append((contact, target, self._next_page(cursor)))
        return True

    def slow(self, contact: Contact, target: int) -> None:
        self._search.slow(contact.n, target)

    def failed(self, contact: Contact, target: int) -> None:
        self._search.failed(contact.n, target)

    @property
    def done(self) -> bool:
        return not self._paging and self._search.done

    @property
    def result(self) -> ReadResult:
        members = self._search.members()
        subnets = {self._answered[contact.n].subnet for contact in members if contact.n in self._answered}
        return ReadResult(
            key=self._key,
            records=tuple(self._records[name] for name in sorted(self._records)),
            answered=len(self._answered),
            quorum=len(subnets) >= DHT_QUORUM or 0 < len(members) == len(self._answered) < DHT_K,
            asked=self._search.main.asked,
        )


class WriteOperation:
    """Find the region of a key, then offer the records to every peer in it. Without a search: to the given peers."""

    def __init__(
        self, key: bytes, store: Store, search: RegionSearch | None, find_node: Callable[[int], FindNode],
        offer_to: Iterable[Contact] = (),
    ) -> None:  # fmt: skip
        self._key = key
        self._store = store
        self._search = search
        self._asked = 0
        self._find_node = find_node
        self._to_offer = deque(offer_to)
        self._offering: set[int] = set()
        self._offered = 0
        self._holders: list[Contact] = []

    def asks(self) -> list[Ask]:
        if self._search is not None:
            asks: list[Ask] = [(contact, target, self._find_node(target)) for contact, target in self._search.next()]
            if asks or not self._search.done:
                return asks
            self._asked = self._search.main.asked
            self._to_offer.extend(self._search.members())
            self._search = None
        asks = []
        while self._to_offer and len(self._offering) < DHT_TAIL_ALPHA:
            contact = self._to_offer.popleft()
            self._offering.add(contact.n)
            self._offered += 1
            asks.append((contact, contact.n, self._store))
        return asks

    def replied(self, contact: Contact, target: int, reply: Reply) -> bool:
        if isinstance(reply, Nodes):
            if self._search is not None:
                self._search.replied(contact.n, target, reply.contacts)
            return not reply.excess
        self._offering.discard(contact.n)
        if not isinstance(reply, Stored):
            self.failed(contact, target)
            return False
        if reply.codes and all(code in (StoreCode.STORED, StoreCode.KNOWN) for code in reply.codes):
            self._holders.append(contact)
        return True

    def slow(self, contact: Contact, target: int) -> None:
        if self._search is not None:
            self._search.slow(contact.n, target)
        else:
            self._offering.discard(contact.n)

    def failed(self, contact: Contact, target: int) -> None:
        if self._search is not None:
            self._search.failed(contact.n, target)
        else:
            self._offering.discard(contact.n)

    @property
    def done(self) -> bool:
        return self._search is None and not self._to_offer and not self._offering

    @property
    def result(self) -> WriteResult:
        return WriteResult(
            key=self._key, holders=tuple(self._holders), offered=self._offered, asked=self._asked + self._offered
        )
