"""What a node knows, and what it says of it: table, store, marks, network size (spec/09, "Answering"; spec/10,
"Storing").

`core` asks others; this is the part that answers them. Times are monotonic seconds, `wall_ms` unix milliseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from petalite.dht.contacts import Contact, Reach, claimed_contact, reach_of_host, subnet_of_host
from petalite.dht.guard import DialGuard, Marks, Rates
from petalite.dht.ids import number, puzzle_bits
from petalite.dht.messages import FindNode, FindValue, Nodes, Pong, Reply, Request, Store, Stored, Values
from petalite.dht.records import Record, RecordError, StoreCode, Verify, check_times, read_record
from petalite.dht.routing import RoutingTable
from petalite.dht.size import SizeEstimate, radius
from petalite.dht.store import Quotas, RecordStore
from petalite.errors import ErrorCode, RequestError
from petalite.limits import DHT_K, DHT_REMEMBERED_RECORDS

_SIZE_SECONDS = 10.0  # for so long one estimate is used


@dataclass(frozen=True, slots=True)
class Config:
    """`lan`: loopback and private addresses are good and subnets are not counted. `puzzle`: bits peers' keys
    must show.
    """

    network_id: str
    lan: bool = False
    puzzle: int = 0


@dataclass(frozen=True, slots=True)
class Self:
    """Who we are: id, Ed25519 public key and a function that signs with it."""

    id: bytes
    public_key: bytes
    sign: Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection: proven id and key, and the IP address we see it at."""

    id: bytes
    host: str
    public_key: bytes = b""


class Knowledge:
    """See the module."""

    def __init__(self, config: Config, own: Self, verify: Verify, quotas: Quotas | None) -> None:
        self.config = config
        self.n = number(own.id)
        self.table = RoutingTable(own.id, diverse=not config.lan)
        self.store = RecordStore(self.n, quotas or (Quotas(subnet=None) if config.lan else Quotas()))
        self.guard = DialGuard(hosts=not config.lan)
        self.marks = Marks()
        self.shirks = Marks()
        self.samples = SizeEstimate()
        self._rates = Rates()
        self._verify = verify
        self._good: OrderedDict[bytes, Record] = OrderedDict()
        self._least = Reach.HOST if config.lan else Reach.GLOBAL
        self._size = (float("-inf"), 1.0)

    # ------------------------------------------------------------------------------------------------- answering

    def admit(self, now: float, peer: Peer, request: Request) -> None:
        """Charge a request to its peer: one token, and one more for each record to store.

        Raises:
            RequestError: RATE, with `after` in ms.
        """
        cost = 1.0 + len(request.records) if isinstance(request, Store) else 1.0
        if wait := self._rates.take(peer.id, now, cost):
            raise RequestError(ErrorCode.RATE, "too many DHT requests", {"retry": True, "after": int(wait * 1000) + 1})

    def introduced(self, now: float, peer: Peer, request: Request) -> Contact | None:
        """The contact of a peer that asks, if it can be dialled and is wanted: its id is proven by the connection."""
        if request.client or not request.addrs or self.unwanted(number(peer.id), now):
            return None
        if not self.worthy(peer):
            return None
        return claimed_contact(peer.id, request.addrs, peer.host, self.config.lan)

    def worthy(self, peer: Peer) -> bool:
        """Whether the peer's key solves the network's puzzle (PT-DHT-070)."""
        return not self.config.puzzle or puzzle_bits(peer.public_key) >= self.config.puzzle

    def answer(self, now: float, wall_ms: int, peer: Peer, request: Request) -> Reply:
        """The reply to an admitted request."""
        if isinstance(request, FindNode):
            return Nodes(contacts=self._nearest_for(request.target, peer))
        if isinstance(request, FindValue):
            records, cursor = self.store.page(request.key, request.cursor, wall_ms)
            contacts = () if request.cursor else self._nearest_for(request.key, peer)
            return Values(records=tuple(records), contacts=contacts, cursor=cursor)
        if isinstance(request, Store):
            subnet = subnet_of_host(peer.host)
            return Stored(codes=tuple([self.keep(now, wall_ms, raw, subnet) for raw in request.records]))
        return Pong()

    def _nearest_for(self, target: bytes, peer: Peer) -> tuple[Contact, ...]:
        """The k nearest verified contacts, without the asker, and without what it could not dial from where it is."""
        found = self.table.nearest(number(target), DHT_K + 1)
        asker = peer.id
        if not self.config.lan:
            return tuple([contact for contact in found if contact.id != asker][:DHT_K])
        least = min(Reach.LINK, reach_of_host(peer.host))
        return tuple([c for c in found if c.id != asker and c.reach >= least and not c.scoped][:DHT_K])

    # --------------------------------------------------------------------------------------------------- records

    def keep(self, now: float, wall_ms: int, raw: bytes, subnet: bytes) -> StoreCode:
        """Store a record brought by a peer of `subnet`, if it is good and ours to hold."""
        try:
            record = self._read(raw)
        except RecordError as error:
            return error.code
        if not self.is_ours(now, number(record.key)):
            return StoreCode.NOT_CLOSEST
        return self.store.put(record, subnet, wall_ms)

    def check(self, key: bytes, raw: bytes, wall_ms: int) -> Record:
        """The record, good now and of this key.

        Raises:
            RecordError
        """
        record = self._read(raw)
        if record.key != key:
            raise RecordError(StoreCode.MALFORMED, "record of another key")
        check_times(record, wall_ms)
        return record

    def _read(self, raw: bytes) -> Record:
        """`read_record`, remembering what was good: a client reads the same announcements each few seconds."""
        record = self._good.get(raw)
        if record is None:
            record = read_record(raw, self.config.network_id, verify=self._verify)
            if len(self._good) >= DHT_REMEMBERED_RECORDS:
                self._good.popitem(last=False)
            self._good[record.raw] = record
        return record

    def is_ours(self, now: float, key: int) -> bool:
        """Whether we should hold a key: we are among the k nearest we know, or within twice the radius of its region.

        The second, because sybils that crowd a key would else push every honest peer out (PT-REC-021).
        """
        distance = key ^ self.n
        nearest = self.table.nearest(key, DHT_K)
        if len(nearest) < DHT_K or distance < nearest[-1].n ^ key:
            return True
        return distance <= 2 * self.radius(now)

    # ------------------------------------------------------------------------------------------------------ size

    def size(self, now: float) -> float:
        """Estimated number of peers in the network, ourselves included."""
        at, value = self._size
        if now - at >= _SIZE_SECONDS:
            nearest = [contact.n for contact in self.table.nearest(self.n, DHT_K)]
            value = self.samples.value(self.n, nearest, len(self.table))
            self._size = (now, value)
        return value

    def radius(self, now: float) -> int:
        """The distance within which k peers are expected."""
        return radius(self.size(now), DHT_K)

    # ------------------------------------------------------------------------------------------------- listening

    def filtered(self, now: float, reply: Reply) -> Reply:
        """The reply with at most k contacts, and without those we would not dial (PT-DHT-012, -014, -062).

        That is: addresses out of place, addresses that failed lately, peers with too many marks.
        """
        if not isinstance(reply, (Nodes, Values)) or not reply.contacts:
            return reply
        least, guard = self._least, self.guard
        kept = [contact for contact in reply.contacts[:DHT_K] if contact.reach >= least]
        if guard or self.marks or self.shirks:
            kept = [
                contact
                for contact in kept
                if not self.unwanted(contact.n, now) and not guard.backed_off(contact.addrs[0], now)
            ]
        if len(kept) == len(reply.contacts):
            return reply
        excess = reply.excess or len(reply.contacts) > DHT_K
        if isinstance(reply, Nodes):
            return Nodes(contacts=tuple(kept), excess=excess)
        return Values(records=reply.records, contacts=tuple(kept), cursor=reply.cursor, excess=excess)

    def unwanted(self, n: int, now: float) -> bool:
        """Whether a peer offended so often that it has no place in the table for now."""
        return self.marks.unwanted(n, now) or self.shirks.unwanted(n, now)

    def mark(self, now: float, n: int) -> None:
        """Note an offence of a peer; too many cost it its place for a while (PT-DHT-024)."""
        if self.marks.mark(n, now):
            self.table.remove(n)

    def shirked(self, now: float, n: int) -> None:
        """Note a store or read that a peer did not serve; lookups it answers do not make up for it (PT-DHT-025)."""
        if self.shirks.mark(n, now):
            self.table.remove(n)
