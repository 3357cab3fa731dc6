"""Look at a swarm as a doctor does: who is heard, how far each dial comes, what each says; `diagnosis` judges it."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

import trio

from petalite.errors import GoAwayCode, HandshakeError, HandshakeFault, PeerLost, RequestError
from petalite.identity import Address, PeerId
from petalite.lan.addresses import LocalAddress
from petalite.lan.announcement import Kind
from petalite.lan.book import Sighting
from petalite.lan.interfaces import all_addresses, usable_addresses
from petalite.limits import HANDSHAKE_SECONDS, REACH_SECONDS
from petalite.net.connection import PeerConnection
from petalite.swarm.diagnosis import Findings, Outcome, PeerFinding, Served, Wanted
from petalite.swarm.node import Node
from petalite.swarm.reach import ask_reach
from petalite.wire.messages import InfoReply

LOOK_SECONDS = 4.0
"""How long the LAN and the DHT are listened to; announcements come within 2 s, answers within 0.5 s."""
DIAL_SECONDS = 4.0
MOST_PEERS = 64
_AT_ONCE = 16

_FAULTS = {
    HandshakeFault.OTHER_NETWORK: Outcome.OTHER_NETWORK,
    HandshakeFault.VERSION: Outcome.OTHER_VERSION,
    HandshakeFault.CLOCK: Outcome.CLOCK,
    HandshakeFault.WRONG_PEER: Outcome.WRONG_PEER,
    HandshakeFault.NOT_PETALITE: Outcome.NOT_PETALITE,
    HandshakeFault.MALFORMED: Outcome.NOT_PETALITE,
}
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EADDRNOTAVAIL})

Place = tuple[PeerId | None, str, int]
"""Whom to expect (None: whoever is there), host, port."""


async def examine(
    node: Node, *, wanted: Wanted | None = None, own: Collection[PeerId] = (), seconds: float = LOOK_SECONDS
) -> Findings:
    """Look around for `seconds` with a started `node`, dial everybody found, and ask what they serve.

    `own` are the ids of servers that run on this machine.
    """
    if wanted is not None:
        node.directory.watch(wanted.model)
    await _look(node, seconds)
    sightings = dict(node.lan.sightings()) if node.lan else {}
    neighbours = await trio.to_thread.run_sync(all_addresses)
    usable = await trio.to_thread.run_sync(usable_addresses)
    heard = {place for each in sightings.values() if each.kind is Kind.OURS for place in each.addresses}
    found: list[PeerFinding] = []
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def visit(places: list[Place]) -> None:
        async with limiter:
            found.extend(await _visit(node, places))

    async with trio.open_nursery() as nursery:
        for places in _places(node, sightings)[:MOST_PEERS]:
            nursery.start_soon(visit, places)
    known = {each.peer for each in sightings.values() if each.kind is Kind.OURS}
    peers = [_described(each, neighbours, own, known, heard) for each in found]
    using = node.lan.own if node.lan else []
    return Findings(
        lan=node.lan is not None,
        lan_problem=node.lan.problem if node.lan else "",
        interfaces=tuple(each.scoped for each in using),
        loopback_only=node.lan is not None and all(each.ip.is_loopback for each in usable),
        seconds=seconds,
        seen=Counter(each.kind for each in sightings.values()),
        peers=tuple(await _dialled_back(node, peers)),
        asked_for_peers=bool(node.peers),
        private=node.endpoint.swarm_key is not None,
        wanted=wanted,
        own_running=tuple(own),
    )


async def _look(node: Node, seconds: float) -> None:
    """Give the LAN its time, and the DHT behind the given peers meanwhile."""
    with trio.move_on_after(seconds):
        if node.peers:
            await node.directory.refresh()
            for model in await node.directory.read_models():
                node.directory.watch(model)
            await node.directory.refresh()
        if node.lan is not None:
            await trio.sleep_forever()


def _places(node: Node, sightings: Mapping[str, Sighting]) -> list[list[Place]]:
    """Where to dial, one list a peer: any of its places will do. What the user named comes first, each by itself."""
    given: list[list[Place]] = [[(address.peer, address.host, address.port)] for address in node.peers]
    named = {(host, port) for [(_, host, port)] in given}
    ways: dict[PeerId | str, list[Place]] = {}
    for label, sighting in sightings.items():
        if sighting.kind is Kind.OURS:
            ways[sighting.peer or label] = [(sighting.peer, host, port) for host, port in sighting.addresses]
    met = {(host, port) for places in ways.values() for _, host, port in places}
    for peer, entry in node.directory.entries.items():
        if not {(address.host, address.port) for address in entry.addresses} & met:
            ways.setdefault(peer, [(peer, address.host, address.port) for address in entry.addresses])
    found = [places for places in ways.values() if places and not {(h, p) for _, h, p in places} & named]
    return [*given, *found]


async def _visit(node: Node, places: list[Place]) -> list[PeerFinding]:
    """The place of one peer that answers, or how each failed."""
    failed: list[PeerFinding] = []
    for peer, host, port in places:
        finding = await _dial(node, peer, host, port)
        if finding.outcome is Outcome.ANSWERED:
            return [finding]
        failed.append(finding)
    return failed


async def _dial(node: Node, peer: PeerId | None, host: str, port: int) -> PeerFinding:
    finding = PeerFinding(place=_place(host, port), outcome=await _knock(host, port), peer=peer)
    if finding.outcome is not Outcome.ANSWERED:
        return finding
    try:
        with trio.fail_after(HANDSHAKE_SECONDS + 1):
            if peer is None:
                connection = await node.endpoint.meet(host, port)
            else:
                connection = await node.endpoint.connect(Address(peer, host, port))
            return await _question(connection, finding)
    except HandshakeError as error:
        return replace(finding, outcome=_FAULTS[error.fault])
    except (PeerLost, trio.TooSlowError) as error:
        # The port took a connection a moment ago, so a deadline that passed was the handshake's
        late = isinstance(error, trio.TooSlowError) or error.__cause__ is None
        return replace(finding, outcome=Outcome.NO_HANDSHAKE if late else Outcome.BROKEN)


async def _knock(host: str, port: int) -> Outcome:
    """How far a plain TCP connection comes; errors are told by number here, so that no text is read."""
    with trio.move_on_after(DIAL_SECONDS):
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror:
            return Outcome.NO_SUCH_NAME
        outcome = Outcome.SILENT
        for family, kind, protocol, _, where in found:
            with trio.socket.socket(family, kind, protocol) as knocker:
                try:
                    await knocker.connect(where)
                    return Outcome.ANSWERED
                except OSError as error:
                    outcome = _outcome_of(error)
        return outcome
    return Outcome.SILENT


def _outcome_of(error: OSError) -> Outcome:
    if error.errno == errno.ECONNREFUSED:
        return Outcome.REFUSED
    if error.errno == errno.ETIMEDOUT:
        return Outcome.SILENT
    return Outcome.NO_ROUTE if error.errno in _NO_ROUTE else Outcome.BROKEN


async def _question(connection: PeerConnection, finding: PeerFinding) -> PeerFinding:
    """Clock and model, from the peer's own mouth."""
    try:
        hello = await connection.peer_hello()
        skew = hello.time - time.time() if hello.time else 0.0
        finding = replace(finding, peer=connection.peer, skew=skew)
        info = InfoReply.from_wire(dict((await connection.request("info")).head))
    except RequestError:
        return finding  # a peer without a model, or one that does not say
    except PeerLost:
        refused = connection.goaway_code == GoAwayCode.FORBIDDEN
        return replace(finding, outcome=Outcome.FORBIDDEN if refused else Outcome.BROKEN)
    served = Served(model=info.model, name=info.name, blocks=info.blocks, layers=info.layers, state=info.state)
    return replace(finding, served=served)


def _described(
    finding: PeerFinding,
    neighbours: Collection[LocalAddress],
    own: Collection[PeerId],
    known: Collection[PeerId | None],
    heard: Collection[tuple[str, int]],
) -> PeerFinding:
    """The finding with what this machine knows of the place: whether it is a neighbour, was heard, or is our own."""
    host, _, port = finding.place.rpartition(":")
    host = host.strip("[]")
    return replace(
        finding,
        near=_is_near(host, neighbours),
        own=finding.peer in own,
        heard=(host, int(port)) in heard or (finding.peer is not None and finding.peer in known),
    )


def _is_near(host: str, neighbours: Collection[LocalAddress]) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name: where it leads may change
    return any(
        address in each.network
        for each in neighbours
        if each.ip.version == address.version and not each.ip.is_loopback and each.prefix < address.max_prefixlen
    )


async def _dialled_back(node: Node, peers: list[PeerFinding]) -> list[PeerFinding]:
    """Have another peer dial each of our own servers that answers from here."""
    others = [node.endpoint.connections.get(p.peer) for p in peers if p.peer is not None and not p.own]
    helper = next((connection for connection in others if connection is not None), None)
    if helper is None:
        return peers
    asked: list[PeerFinding] = []
    for peer in peers:
        if peer.own and peer.outcome is Outcome.ANSWERED and not _is_loopback(peer.place):
            try:
                with trio.move_on_after(REACH_SECONDS + 1):
                    port = int(peer.place.rpartition(":")[2])
                    peer = replace(peer, dialled_back=await ask_reach(helper, port))
            except PeerLost:
                pass  # then we do not know
        asked.append(peer)
    return asked


def _is_loopback(place: str) -> bool:
    return place.startswith(("127.", "[::1]"))


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
