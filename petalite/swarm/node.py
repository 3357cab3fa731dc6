"""This peer in a swarm: its endpoint, how it finds the others, what it knows of them, and whom it distrusts for now."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from petalite.dht.contacts import Contact
from petalite.dht.guard import DialGuard
from petalite.dht.node import DhtNode, contact_of
from petalite.errors import HandshakeError, PeerLost, PeerSilent, PeerUnreachable, PetaliteError
from petalite.identity import Address, Identity, PeerId
from petalite.lan.discovery import Hint, Lan
from petalite.limits import GOODBYE_SECONDS
from petalite.net.call import Call, Reply
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import Endpoint, open_endpoint
from petalite.net.nursery import open_flat_nursery
from petalite.swarm.directory import Directory, Source, given, place_of
from petalite.swarm.reach import reach_handler
from petalite.swarm.routing import Bans, Needs, NoRoute, Route, plan_inference
from petalite.swarm.saved import load_contacts, save_contacts
from petalite.wire.messages import Unpushed


class Node:
    """Made by `open_node`. `dht` is None until a client or server has joined it (`join_dht`)."""

    def __init__(self, endpoint: Endpoint, nursery: trio.Nursery, peers: Sequence[Address]) -> None:
        self.endpoint = endpoint
        self.directory = Directory(endpoint)
        self.bans = Bans()
        self.dht: DhtNode | None = None
        self.lan: Lan | None = None
        self.peers = peers
        self.quick: set[PeerId] = set()
        """Servers that lately answered a long step within QUICK_SECONDS: the next may be longer."""
        self.unpushed: dict[tuple[PeerId, bytes, int], Callable[[], None]] = {}
        """(server, session, step) -> who wants to hear that the server could not push that step on."""
        endpoint.handlers["unpushed"] = self._note_unpushed
        self._nursery = nursery
        self._contacts: Path | None = None
        self._joined: set[PeerId] = set()
        self._strangers = DialGuard(hosts=False)  # instances whose tag is ours and whose handshake is not
        self._met: dict[str, PeerId] = {}  # members of a private swarm, by their instance on the LAN

    # Finding others

    async def start(
        self,
        *,
        lan: bool,
        lan_interface: str | None = None,
        addresses: Sequence[Address] = (),
        contacts: Path | None = None,
    ) -> None:
        """Search for others: through the peers given by hand, the DHT behind them, and the LAN unless told not to.

        `addresses`: where others reach us; a server has some, a client has none and is not asked anything. `contacts`:
        a file in which DHT contacts are kept between runs; they are tried before the peers given by hand.
        """
        self.dht = DhtNode(
            self.endpoint,
            addrs=[place_of(address) for address in addresses if "%" not in address.host],  # a scope is this machine's
            lan=not any(is_global(a.host) for a in (*addresses, *self.peers)),
        )
        self.directory.dht = self.dht
        await self._nursery.start(self.dht.run)
        await self._nursery.start(self.directory.run)
        if addresses:
            self.endpoint.handlers["reach"] = reach_handler(self.endpoint)
        given(self.directory, self.peers)
        self._contacts = contacts
        saved = load_contacts(contacts) if contacts else []
        if saved:
            self.dht.join([*saved, *contacts_of(self.peers)])
            self._joined.update(address.peer for address in self.peers)
        self._join_dht(self.peers)
        if lan:
            self.lan = Lan(
                self.endpoint.peer_id,
                addresses[0].port if addresses else None,
                network=self.endpoint.network,
                swarm_key=self.endpoint.swarm_key,
                interfaces=[lan_interface] if lan_interface else None,
                bound=[address.host for address in addresses],
                on_hint=self._hinted,
            )
            await self._nursery.start(self.lan.run)

    def _join_dht(self, addresses: Iterable[Address]) -> None:
        """Enter the DHT through peers not tried before."""
        new = [address for address in addresses if address.peer not in self._joined]
        contacts = contacts_of(new)
        self._joined.update(address.peer for address in new)
        if contacts and self.dht is not None:
            self.dht.join(contacts)

    def _hinted(self, hint: Hint) -> None:
        """The LAN says that somebody is there; a handshake will tell whether it is true."""
        peer = hint.peer or self._met.get(hint.instance)
        if not hint.addresses:
            if peer is not None:
                self.directory.lost(peer)  # it has left, or fell silent: asking it will tell
            return
        if peer is None:
            if not self._strangers.backed_off(hint.instance, trio.current_time()):
                self._nursery.start_soon(self._meet, hint)
            return
        addresses = [Address(peer, host, port) for host, port in hint.addresses]
        for address in addresses:
            self.directory.add(address, Source.LAN)
        self._join_dht(addresses)

    async def _meet(self, hint: Hint) -> None:
        """Dial a member of our private swarm, who does not show its id on the LAN."""
        for host, port in hint.addresses:
            try:
                connection = await self.endpoint.meet(host, port)
            except (PeerLost, HandshakeError):
                continue
            self._strangers.succeeded(hint.instance)
            self._met[hint.instance] = connection.peer
            address = Address(connection.peer, host, port)
            self.directory.add(address, Source.LAN)
            self._join_dht([address])
            return
        self._strangers.failed(hint.instance, trio.current_time())

    @property
    def lan_running(self) -> bool:
        """Whether the LAN is searched, and can be."""
        return self.lan is not None and not self.lan.problem

    @property
    def may_find_more(self) -> bool:
        """Whether waiting can bring servers that are not known yet: somebody answers, or the LAN is searched."""
        return self.lan_running or any(not entry.problem for entry in self.directory.entries.values())

    async def _note_unpushed(self, call: Call) -> Reply:
        message = Unpushed.from_wire(call.head)
        heard = self.unpushed.get((call.peer, message.sid, message.n))
        if heard is not None:
            heard()
        return Reply()

    # Using others

    async def connect(self, peer: PeerId) -> PeerConnection:
        """The connection to a known peer. Raises PeerUnreachable, HandshakeError."""
        self.directory.touch()
        addresses = self.directory.addresses_of(peer)
        if not addresses:
            raise PeerUnreachable(f"no address is known for peer {peer.short}..")
        return await self.endpoint.connect(*addresses)

    def plan(self, model: bytes, needs: Needs) -> Route | NoRoute | None:
        """The best route now; None if nobody serves the model."""
        self.directory.touch()
        snapshot = self.directory.snapshot(model)
        if snapshot is None:
            return None
        return plan_inference(
            snapshot, needs, latencies=self.directory.latencies(), bans=self.bans, now=trio.current_time()
        )

    def failed(self, peer: PeerId, error: PetaliteError | None = None) -> None:
        """`peer` let us down: it is out of the routes for a while, and asked whether it still serves.

        Where the `error` says that it gives no sign of life, it is out until it does.
        """
        self.bans = self.bans.failed(peer, trio.current_time())
        if isinstance(error, (PeerSilent, PeerUnreachable)):
            self.directory.suspect(peer, str(error))
        self.directory.lost(peer)

    def succeeded(self, peer: PeerId) -> None:
        """`peer` did what was asked."""
        self.directory.touch()
        if peer in self.bans.entries:
            self.bans = self.bans.succeeded(peer)

    async def leave(self) -> None:
        """Withdraw what we published, and keep the contacts for next time; bounded."""
        if self.dht is not None:
            if self._contacts is not None and (known := self.dht.contacts()):
                save_contacts(self._contacts, known)
            with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                await self.dht.leave()


def contacts_of(addresses: Iterable[Address]) -> list[Contact]:
    """Addresses by peer, as contacts."""
    by_peer: dict[PeerId, list[Address]] = {}
    for address in addresses:
        by_peer.setdefault(address.peer, []).append(address)
    return [contact for found in by_peer.values() if (contact := contact_of(found)) is not None]


def is_global(host: str) -> bool:
    """Whether an address is one of the public internet; a name is taken for one."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_global
    except ValueError:
        return True


@asynccontextmanager
async def open_node(identity: Identity, *, peers: Sequence[Address] = (), **options: Any) -> AsyncIterator[Node]:
    """A node that lives as long as the block; `options` as for `Endpoint`. It finds nobody before `start`."""
    async with open_endpoint(identity, **options) as endpoint, open_flat_nursery() as nursery:
        yield Node(endpoint, nursery, peers)
        nursery.cancel_scope.cancel()
