"""Who serves which blocks, as far as this peer knows: told by peers given by hand, the LAN and the DHT, then asked of
each server itself, and kept with its age (spec/10).

What a server says itself, over its own connection, outweighs what a record says of it. A server that cannot be asked
is out at once and asked again with growing pauses.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from petalite import limits
from petalite.dht.ids import model_key, models_key
from petalite.dht.node import DhtNode
from petalite.errors import ErrorCode, HandshakeError, PeerLost, RequestError
from petalite.identity import Address, PeerId
from petalite.net.endpoint import Endpoint
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span
from petalite.wire.messages import InfoReply

log = logging.getLogger("petalite.swarm")

# Of a server that has not measured itself yet: only the proportions between servers matter.
ASSUMED_RATE = 1000
ASSUMED_NETWORK_RATE = 10**8
BITS_PER_VALUE = 16

NEAR_SECONDS = 2.0
FAR_SECONDS = 10.0
ACTIVE_SECONDS = 10.0
MOST_AT_ONCE = 16
BACK_OFF_SECONDS = (1.0, 60.0)


class Source(StrEnum):
    """Who told us of a server."""

    GIVEN = "given"
    LAN = "lan"
    DHT = "dht"


@dataclass(slots=True)
class Entry:
    """One peer: how to reach it, what it serves by its own word or its record, and how asking it went."""

    peer: PeerId
    addresses: list[Address] = field(default_factory=list)
    sources: set[Source] = field(default_factory=set)
    info: InfoReply | None = None
    heard_at: float = float("-inf")
    record_seq: int = 0
    record_only: bool = False
    record_ends_at: float = 0.0
    round_trip: float | None = None
    failures: int = 0
    ask_at: float = 0.0
    problem: str = ""
    no_server: bool = False
    agent: str = ""
    clock_skew: float = 0.0

    @property
    def near(self) -> bool:
        """On this machine or its networks, where asking often costs nothing."""
        return Source.LAN in self.sources or any(_is_private(address.host) for address in self.addresses)


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_private
    except ValueError:
        return False


class Directory:
    """What is known of the servers of a swarm.

    `run` keeps it fresh while somebody is interested, `refresh` does so now; `snapshot` is what the planners look at.
    """

    def __init__(
        self, endpoint: Endpoint, dht: DhtNode | None = None, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.entries: dict[PeerId, Entry] = {}
        self.dht = dht
        self.changed = trio.Event()
        self._endpoint = endpoint
        self._wall_clock = wall_clock
        self._watched: dict[bytes, tuple[int, int] | None] = {}
        self._active_until = 0.0
        self._woken = trio.Event()
        self._read_at = 0.0
        self._limiter = trio.CapacityLimiter(MOST_AT_ONCE)
        self._asking: set[PeerId] = set()

    # What others tell it

    def add(self, address: Address, source: Source) -> None:
        """Remember one more way to a peer, and ask it soon."""
        if address.peer == self._endpoint.peer_id:
            return
        entry = self.entries.get(address.peer)
        if entry is None:
            if len(self.entries) >= limits.MAX_DIRECTORY and not self._forget_one():
                return
            entry = self.entries[address.peer] = Entry(address.peer)
        if source not in entry.sources:
            entry.sources.add(source)
            entry.ask_at = 0.0
        if address not in entry.addresses:
            # The newest word on where somebody is comes first; a machine has few addresses.
            entry.addresses = [address, *entry.addresses][: limits.MAX_ANNOUNCED_ADDRESSES]
            entry.ask_at = 0.0
        self._woken.set()

    def _forget_one(self) -> bool:
        """Make room: the peer that has failed most goes first. False if all are well."""
        worst = max(self.entries.values(), key=lambda entry: entry.failures)
        if not worst.failures:
            return False
        del self.entries[worst.peer]
        return True

    def watch(self, model: bytes, layers: int | None = None, hidden: int | None = None) -> None:
        """Read this model's records from now on. A server that says it has another geometry is not one of its; for
        those who do not know the model themselves, the first server's word decides.
        """
        if self._watched.get(model) is None:
            self._watched[model] = (layers, hidden) if layers is not None and hidden is not None else None
            self._read_at = 0.0
            self._woken.set()

    def touch(self) -> None:
        """Somebody uses what this directory says: keep it fresh for a while."""
        now = trio.current_time()
        if now >= self._active_until:
            self._woken.set()
        self._active_until = now + ACTIVE_SECONDS

    def lost(self, peer: PeerId) -> None:
        """`peer` let somebody down: ask it again right away, to know whether it still serves."""
        entry = self.entries.get(peer)
        if entry is not None:
            entry.ask_at = 0.0
            self._woken.set()

    def suspect(self, peer: PeerId, problem: str) -> None:
        """`peer` gave somebody no sign of life: nobody plans with it before it has answered."""
        entry = self.entries.get(peer)
        if entry is not None:
            self._ask_failed(entry, problem)

    def suspicion(self, peer: PeerId) -> str:
        """What came of the last that was asked of `peer`, if that was nothing; else ""."""
        entry = self.entries.get(peer)
        return entry.problem if entry is not None and entry.failures else ""

    # Keeping fresh

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask servers and read records while somebody is interested, until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                now = trio.current_time()
                if now < self._active_until:
                    for entry in self._due(now):
                        nursery.start_soon(self._ask, entry)
                    if self._should_read(now):
                        self._read_at = now + FAR_SECONDS
                        nursery.start_soon(self._read_records)
                self._woken = trio.Event()
                with trio.move_on_after(0.25 if now < self._active_until else float("inf")):
                    await self._woken.wait()
                await trio.sleep(0.02)  # what comes in bursts is taken together

    def _due(self, now: float) -> list[Entry]:
        """Those to ask now; each is marked as asked."""
        due = [e for e in self.entries.values() if e.ask_at <= now and e.addresses and e.peer not in self._asking]
        due.sort(key=lambda entry: (entry.failures, entry.ask_at))
        due = due[: MOST_AT_ONCE - len(self._asking)]
        self._asking.update(entry.peer for entry in due)
        return due

    def _should_read(self, now: float) -> bool:
        return self.dht is not None and bool(self._watched) and now >= self._read_at

    async def refresh(self) -> None:
        """Ask every known server and read the records now; returns when all have answered or failed."""
        self.touch()
        async with trio.open_nursery() as nursery:
            if self.dht is not None and self._watched:
                self._read_at = trio.current_time() + FAR_SECONDS
                nursery.start_soon(self._read_records)
            for entry in self.entries.values():
                if entry.addresses and entry.peer not in self._asking:
                    self._asking.add(entry.peer)
                    nursery.start_soon(self._ask, entry)

    async def _ask(self, entry: Entry) -> None:
        seconds = limits.NEAR_INFO_SECONDS if entry.near else limits.INFO_SECONDS
        try:
            async with self._limiter:
                with trio.fail_after(seconds):
                    await self._ask_info(entry)
        except trio.TooSlowError:
            self._ask_failed(entry, f"{entry.addresses[0]} did not answer within {seconds:.0f} s")
        except RequestError as error:
            entry.no_server = error.code is ErrorCode.UNSUPPORTED  # a peer without a model: a bootstrap, say
            if entry.no_server:
                entry.info = None
                entry.ask_at = trio.current_time() + BACK_OFF_SECONDS[1]
            else:
                self._ask_failed(entry, str(error))
        except (PeerLost, HandshakeError) as error:
            self._ask_failed(entry, str(error))
        finally:
            self._asking.discard(entry.peer)

    async def _ask_info(self, entry: Entry) -> None:
        connection = await self._endpoint.connect(*entry.addresses)
        hello = await connection.peer_hello()
        entry.agent = hello.agent
        entry.clock_skew = hello.time - self._wall_clock() if hello.time else 0.0
        started = trio.current_time()
        reply = await connection.request("info")
        now = trio.current_time()
        measured = now - started
        entry.round_trip = measured if entry.round_trip is None else 0.7 * entry.round_trip + 0.3 * measured
        before = entry.info
        entry.info = InfoReply.from_wire(dict(reply.head))
        entry.heard_at = now
        entry.record_only = False
        entry.failures, entry.problem, entry.no_server = 0, "", False
        entry.ask_at = now + (NEAR_SECONDS if entry.near else FAR_SECONDS)
        if before is None or (before.blocks, before.state) != (entry.info.blocks, entry.info.state):
            self._tell_change()

    def _ask_failed(self, entry: Entry, problem: str) -> None:
        first, longest = BACK_OFF_SECONDS
        entry.problem = problem
        entry.failures += 1
        entry.ask_at = trio.current_time() + min(longest, first * 2.0 ** min(entry.failures - 1, 10))
        if entry.info is not None:
            entry.info = None
            self._tell_change()

    def _tell_change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def _read_records(self) -> None:
        """Take in what servers published under the models we watch."""
        if self.dht is None:
            return
        for model in list(self._watched):
            with trio.move_on_after(limits.INFO_SECONDS):
                for record in await self.dht.read(model_key(self._endpoint.network, model)):
                    if record.val is not None:
                        self._take_record(record.publisher, record.seq, record.exp, record.val, model)

    def _take_record(self, peer: PeerId, seq: int, exp_ms: int, val: dict[str, object], model: bytes) -> None:
        try:
            info = InfoReply.from_wire(val)
        except RequestError as error:
            log.info("record of peer %s is no announcement: %s", peer.short, error.text)
            return
        if info.model != model or peer == self._endpoint.peer_id:
            return
        for text in info.addrs or ():
            try:
                self.add(Address.parse(f"petalite://{peer.text}@{text}"), Source.DHT)
            except ValueError:
                continue  # an address that is none: the record's other ones may be good
        entry = self.entries.get(peer)
        if entry is None or seq <= entry.record_seq:
            return
        entry.record_seq = seq
        if entry.info is None and not entry.failures:
            entry.info = info
            entry.record_only = True
            entry.record_ends_at = trio.current_time() + max(0.0, exp_ms / 1000 - self._wall_clock())
            entry.heard_at = trio.current_time()
            self._tell_change()

    async def read_models(self) -> dict[bytes, str]:
        """Models that the DHT lists: id -> name."""
        if self.dht is None:
            return {}
        found: dict[bytes, str] = {}
        for record in await self.dht.read(models_key(self._endpoint.network)):
            value = record.val or {}
            model, name = value.get("model"), value.get("name")
            if type(model) is bytes and len(model) == 32 and type(name) is str and len(name) <= limits.MAX_WORD:
                found[model] = name
        return found

    # What it says

    def models(self) -> dict[bytes, InfoReply]:
        """One description of each model that some server serves."""
        found: dict[bytes, InfoReply] = {}
        for entry in self.entries.values():
            if entry.info is not None:
                found.setdefault(entry.info.model, entry.info)
        return found

    def problems(self) -> list[str]:
        return [entry.problem for entry in self.entries.values() if entry.problem]

    def latencies(self) -> dict[PeerId, float]:
        """Measured round trips, seconds."""
        return {peer: e.round_trip for peer, e in self.entries.items() if e.round_trip is not None}

    def snapshot(self, model: bytes) -> Snapshot | None:
        """The servers of a model; None if there are none now."""
        geometry = self._watched.get(model) or self._first_geometry(model)
        if geometry is None:
            return None
        layers, hidden = geometry
        now = trio.current_time()
        servers = []
        for entry in self.entries.values():
            info = self._believed(entry, now)
            if info is not None and (info.model, info.layers, info.hidden) == (model, layers, hidden):
                servers.append(server_info(entry.peer, info, self._hops(info), now - entry.heard_at))
        if not servers:
            return None
        return Snapshot(
            model=model.hex(),
            layers=layers,
            token_bits=hidden * BITS_PER_VALUE,
            servers=tuple(servers),
            taken_at=now,
        )

    def _first_geometry(self, model: bytes) -> tuple[int, int] | None:
        described = self.models().get(model)
        return None if described is None else (described.layers, described.hidden)

    def _believed(self, entry: Entry, now: float) -> InfoReply | None:
        """A server's own word counts until asking it fails, a record's until it ends."""
        return None if entry.info is None or (entry.record_only and now >= entry.record_ends_at) else entry.info

    def _hops(self, info: InfoReply) -> dict[PeerId, float]:
        """Announced latencies to servers that we know; a prefix of an id names no other."""
        if not info.next_hops:
            return {}
        known = {bytes(peer[:8]): peer for peer in self.entries}
        return {known[hop.id]: hop.us / 1e6 for hop in info.next_hops if hop.id in known}

    def addresses_of(self, peer: PeerId) -> list[Address]:
        """Ways to a peer, the newest first; empty for a stranger."""
        entry = self.entries.get(peer)
        return [] if entry is None else entry.addresses


def server_info(peer: PeerId, info: InfoReply, hops: dict[PeerId, float], age: float) -> ServerInfo:
    """What the planners see of a server."""
    return ServerInfo(
        peer=peer,
        model=info.model.hex(),
        blocks=Span(*info.blocks),
        state=ServerState(info.state),
        moving_to=Span(*info.moving_to) if info.moving_to else None,
        pinned=bool(info.pinned),
        decode_rate=info.decode_rate or ASSUMED_RATE,
        batch_rate=info.batch_rate or ASSUMED_RATE,
        network_rate=info.net_rate or ASSUMED_NETWORK_RATE,
        cache_left=info.cache_left,
        queue_seconds=(info.queue or 0) / 1000,
        dtype=info.dtype,
        quant=info.quant or "none",
        codecs=info.codecs,
        training_tokens=info.train or 0,
        adapters=info.adapters or (),
        push=bool(info.push),
        next_hops=hops,
        addresses=info.addrs or (),
        software=info.version,
        age=max(0.0, age),
    )


def given(directory: Directory, addresses: Iterable[Address]) -> None:
    """Add peers that a user named."""
    for address in addresses:
        directory.add(address, Source.GIVEN)


def place_of(address: Address) -> str:
    """host:port, as records and contacts have it."""
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
