"""The DHT on Trio: does what `core.Core` says over our encrypted connections, and brings it the answers (spec/09)."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import trio

from petalite import limits
from petalite.dht.contacts import Contact, Reach, parse_place
from petalite.dht.core import Ask, Config, Core, Done, Peer, Self
from petalite.dht.messages import METHOD_OF, METHODS, reply_from_map, request_from_map, to_map
from petalite.dht.operations import Found, ReadResult, Result, WriteResult
from petalite.dht.records import Record
from petalite.errors import (
    ErrorCode,
    HandshakeError,
    LocalProtocolError,
    PeerLost,
    RemoteProtocolError,
    RequestError,
)
from petalite.identity import Address, PeerId
from petalite.net.call import Call, Reply
from petalite.net.endpoint import Endpoint
from petalite.wire.writer import Priority

log = logging.getLogger("petalite.dht")


class DhtNode:
    """Our node in the DHT of the endpoint's network. `run` must be running.

    `addrs` ("host:port") is where others can dial us; without any we are a client, which asks and is never asked.
    `lan`: private and loopback addresses are good. `rng` decides all that is random, `wall_clock` is unix seconds.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        addrs: Iterable[str] = (),
        lan: bool = False,
        rng: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        identity = endpoint.identity
        own = Self(identity.peer_id, identity.public_key, identity.sign)
        listed = tuple(addrs)[: limits.MAX_CONTACT_ADDRESSES]
        # The system's randomness: an attacker who could foresee targets could prepare for them.
        self.core = Core(
            Config(endpoint.network, lan=lan), own, rng or random.SystemRandom(), addrs=listed, client=not listed
        )
        self.core.connected = self._connected
        self._endpoint = endpoint
        self._wall_clock = wall_clock
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()
        self._waiting: dict[int, tuple[trio.Event, list[Result]]] = {}
        self._set_clock()
        if listed:
            for method in METHODS:
                endpoint.handlers[method] = self._answer

    def _set_clock(self) -> None:
        self.core.wall_offset_ms = int(self._wall_clock() * 1000) - int(trio.current_time() * 1000)

    def _connected(self, peer: bytes) -> bool:
        connection = self._endpoint.connections.get(PeerId(peer))
        return connection is not None and not connection.leaving

    # What others use

    def join(self, seeds: Iterable[Contact]) -> None:
        """Enter through `seeds`, in the background; while nobody answers it is tried again."""
        self.core.join(trio.current_time(), seeds)
        self._act()

    def contacts(self) -> list[Contact]:
        """Verified contacts, the nearest to us first."""
        return self.core.table.nearest(self.core.n, limits.MAX_SAVED_CONTACTS)

    async def read(self, key: bytes) -> tuple[Record, ...]:
        """The newest good record of each publisher under `key`, withdrawn ones left out."""
        result = await self._await(self.core.read(trio.current_time(), key))
        if not isinstance(result, ReadResult):
            raise LocalProtocolError("a read ends with its records")
        return tuple(record for record in result.records if record.val is not None)

    async def publish(self, key: bytes, val: dict[str, Any]) -> int:
        """Say `val` under `key`, now and again until `withdraw`; how many peers hold it now."""
        result = await self._await(self.core.publish(trio.current_time(), key, val))
        return len(result.holders) if isinstance(result, WriteResult) else 0

    async def lookup(self, target: bytes) -> tuple[Contact, ...]:
        """The peers nearest to `target`."""
        result = await self._await(self.core.lookup(trio.current_time(), target))
        return result.contacts if isinstance(result, Found) else ()

    async def leave(self) -> None:
        """Withdraw what we said. Bound it with a deadline: others may not answer."""
        for number in self.core.leave(trio.current_time()):
            await self._await(number)

    async def _await(self, number: int) -> Result:
        event = trio.Event()
        results: list[Result] = []
        self._waiting[number] = (event, results)
        try:
            self._act()
            await event.wait()
        finally:
            self._waiting.pop(number, None)
        return results[0]

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the clocks and send what the core asks, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            self._act()
            while True:
                self._wake = trio.Event()
                with trio.move_on_at(self.core.timer()):
                    await self._wake.wait()
                if trio.current_time() >= self.core.timer():
                    self._set_clock()
                    self.core.wake(trio.current_time())
                    self._act()

    # Effects

    def _act(self) -> None:
        """Do what the core wants; call after everything that is told to it."""
        if self._nursery is None:
            return  # `run` begins with this
        for effect in self.core.take():
            if isinstance(effect, Ask):
                self._nursery.start_soon(self._ask, effect)
            elif isinstance(effect, Done) and effect.number in self._waiting:
                event, results = self._waiting[effect.number]
                results.append(effect.result)
                event.set()
        self._wake.set()

    async def _ask(self, ask: Ask) -> None:
        """Send one request and tell the core how it went."""
        core = self.core
        try:
            with trio.fail_after(ask.seconds):
                connection = await self._endpoint.connect(*addresses_of(ask.contact))
                answer = await connection.request(
                    METHOD_OF[type(ask.request)], to_map(ask.request), priority=Priority.DHT
                )
            reply = reply_from_map(ask.request, answer.head)
        except (trio.TooSlowError, PeerLost, HandshakeError):
            core.failed(trio.current_time(), ask.number)
        except RequestError as error:
            core.refused(trio.current_time(), ask.number, error.code)
        except RemoteProtocolError as error:
            log.info("peer %s: %s", PeerId(ask.contact.id).short, error)
            core.misbehaved(trio.current_time(), ask.number)
        else:
            core.replied(trio.current_time(), ask.number, reply)
        self._act()

    async def _answer(self, call: Call) -> Reply:
        connection = self._endpoint.connections.get(call.peer)
        if connection is None:
            raise RequestError(ErrorCode.UNAVAILABLE, "the connection is closing", {"retry": True})
        peer = Peer(call.peer, connection.address.rpartition(":")[0].strip("[]"))
        reply = self.core.handle(trio.current_time(), peer, request_from_map(call.method, call.head))
        self._act()
        return Reply(to_map(reply), priority=Priority.DHT)


def addresses_of(contact: Contact) -> list[Address]:
    """Where to dial a contact."""
    places = [parse_place(text) for text in contact.addrs]
    return [Address(PeerId(contact.id), place.host, place.port) for place in places]


def contact_of(addresses: Iterable[Address]) -> Contact | None:
    """One peer's addresses as a contact; None where none is an IP address that can be dialled."""
    found: list[str] = []
    peer = b""
    for address in addresses:
        text = f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
        try:
            if parse_place(text).reach is not Reach.NOWHERE:
                found.append(text)
                peer = address.peer
        except ValueError:
            continue  # a name: bootstraps may be given by name, and are dialled as such, but no contact has one
    return Contact(peer, tuple(found[: limits.MAX_CONTACT_ADDRESSES])) if found else None
