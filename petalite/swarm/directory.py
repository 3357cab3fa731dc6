"""Who serves which blocks, as far as this peer knows: asked of each server itself, kept with its age."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from petalite import limits
from petalite.errors import HandshakeError, PeerLost, PetaliteError, RequestError
from petalite.identity import Address, PeerId
from petalite.net.endpoint import Endpoint
from petalite.swarm.snapshot import ServerInfo, ServerState, Snapshot, Span
from petalite.wire.messages import InfoReply

# Until a server tells its own: only the proportions between servers matter.
ASSUMED_RATE = 1000.0
ASSUMED_NETWORK_RATE = 1e8
BITS_PER_VALUE = 16


@dataclass(slots=True)
class Entry:
    """One server: how to reach it, what it said last and when, or why it could not be asked."""

    peer: PeerId
    addresses: list[Address] = field(default_factory=list)
    info: InfoReply | None = None
    seen_at: float = 0.0
    round_trip: float | None = None
    problem: str = ""


class Directory:
    """What is known of the servers of a swarm. `refresh` asks them; `snapshot` is what the planners look at."""

    def __init__(self, endpoint: Endpoint, addresses: Iterable[Address] = ()) -> None:
        self.entries: dict[PeerId, Entry] = {}
        self._endpoint = endpoint
        for address in addresses:
            self.add(address)

    def add(self, address: Address) -> None:
        """Remember one more way to a peer."""
        entry = self.entries.setdefault(address.peer, Entry(address.peer))
        if address not in entry.addresses:
            entry.addresses.append(address)

    async def refresh(self) -> None:
        """Ask every known server what it serves; those that do not answer keep a `problem`."""
        async with trio.open_nursery() as nursery:
            for entry in self.entries.values():
                nursery.start_soon(self._ask, entry)

    async def _ask(self, entry: Entry) -> None:
        try:
            with trio.fail_after(limits.INFO_SECONDS):
                connection = await self._endpoint.connect(*entry.addresses)
                started = trio.current_time()
                reply = await connection.request("info")
                entry.round_trip = trio.current_time() - started
            entry.info = InfoReply.from_wire(reply.head)
            entry.seen_at = trio.current_time()
            entry.problem = ""
        except trio.TooSlowError:
            entry.problem = f"{entry.addresses[0]} did not answer within {limits.INFO_SECONDS:.0f} s"
        except (PeerLost, HandshakeError, RequestError) as error:
            entry.problem = str(error)
        if entry.problem:
            entry.info = None

    def models(self) -> dict[bytes, InfoReply]:
        """One description of each model that some server serves."""
        return {entry.info.model: entry.info for entry in self.entries.values() if entry.info is not None}

    def problems(self) -> list[str]:
        return [entry.problem for entry in self.entries.values() if entry.problem]

    def latencies(self) -> dict[PeerId, float]:
        """Measured round trips, seconds."""
        return {peer: e.round_trip for peer, e in self.entries.items() if e.round_trip is not None}

    def snapshot(self, model: bytes) -> Snapshot | None:
        """The servers of one model; None if nobody serves it."""
        now = trio.current_time()
        entries = [entry for entry in self.entries.values() if entry.info is not None and entry.info.model == model]
        if not entries or entries[0].info is None:
            return None
        layers, hidden = entries[0].info.layers, entries[0].info.hidden
        servers = [_server_info(entry, now) for entry in entries if entry.info and entry.info.layers == layers]
        return Snapshot(
            model=model.hex(), layers=layers, token_bits=hidden * BITS_PER_VALUE, servers=tuple(servers), taken_at=now
        )

    def addresses_of(self, peer: PeerId) -> list[Address]:
        entry = self.entries.get(peer)
        if entry is None or not entry.addresses:
            raise PetaliteError(f"no address is known for peer {peer.short}..")
        return entry.addresses


def _server_info(entry: Entry, now: float) -> ServerInfo:
    info = entry.info
    if info is None:
        raise ValueError("a server that has not answered")
    return ServerInfo(
        peer=entry.peer,
        model=info.model.hex(),
        blocks=Span(*info.blocks),
        state=ServerState(info.state),
        decode_rate=ASSUMED_RATE,
        batch_rate=ASSUMED_RATE,
        network_rate=ASSUMED_NETWORK_RATE,
        cache_left=info.cache_left * Span(*info.blocks).size,
        dtype=info.dtype,
        quant=info.quant or "none",
        codecs=info.codecs,
        addresses=tuple(str(address) for address in entry.addresses),
        software=info.version,
        age=now - entry.seen_at,
    )
