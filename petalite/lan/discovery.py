"""Publish this peer on the local network and look for the others, for as long as it runs (spec/11)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import trio

from petalite import limits
from petalite.identity import PeerId, Random, SwarmKey
from petalite.lan.addresses import LocalAddress, published, to_dial
from petalite.lan.announcement import INSTANCE_CHARACTERS, Announcement, Kind, Membership, random_label
from petalite.lan.book import Book, Hint, Sighting
from petalite.lan.interfaces import usable_addresses
from petalite.lan.mdns import Mdns, MdnsError, Resolved, into_trio

__all__ = ["Hint", "Lan"]

log = logging.getLogger("petalite.lan")


class Lan:
    """Finds the peers of one swarm on the local network, and lets them find this one if it listens.

    Hints only: they come from whoever is on the network and may lie about everything. Dial them expecting
    `hint.peer`, or nobody in particular where that is None, and let the handshake decide; whoever takes them backs
    off from those that fail.

    Args:
        peer: this peer, whose own instance is not reported.
        port: where it listens; None publishes nothing (clients).
        network: network id. A `swarm_key` goes before it: then only the key's tag is shown and looked for.
        interfaces: addresses of this machine to use; None: all local networks, else loopback.
        bound: hosts that `port` is open on, as `published` understands them.
        on_hint: called with each hint, in Trio's thread; it must not wait.
        lifetime: seconds that an instance is believed without hearing from it.
    """

    def __init__(
        self,
        peer: PeerId,
        port: int | None = None,
        *,
        network: str,
        swarm_key: SwarmKey | None = None,
        interfaces: Sequence[str] | None = None,
        bound: Collection[str] = (),
        on_hint: Callable[[Hint], None],
        lifetime: float = limits.LAN_LIFETIME_SECONDS,
        random: Random = os.urandom,
    ) -> None:
        self.problem = ""
        """Why nothing can be found or published now, in words for a user; empty while all is well."""
        self.own: list[LocalAddress] = []
        """The addresses through which we look, as they are now."""
        self.registered = trio.Event()
        """Set when this peer has been announced for the first time."""
        self._membership = Membership.of(peer, network, swarm_key)
        self._label = random_label(random) if swarm_key else peer.text[:INSTANCE_CHARACTERS]
        self._host = random_label(random)
        self._port = port
        self._interfaces = interfaces
        self._bound = bound
        self._on_hint = on_hint
        self._lifetime = lifetime
        self._book = Book(lifetime)
        self._changes: list[tuple[str, bool]] = []
        self._wake = trio.Event()

    def sightings(self) -> Mapping[str, Sighting]:
        """Every instance that has answered lately, by label, the foreign ones too."""
        return self._book.sightings()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and be seen until cancelled; then say goodbye, within 2 s. Started at once, before anything is sent."""
        task_status.started()
        while True:
            self.own = await trio.to_thread.run_sync(usable_addresses, self._interfaces)
            if not self.own:
                self._complain("this machine has no usable address on a local network")
                await trio.sleep(limits.LAN_INTERFACE_SECONDS)
                continue
            try:
                await self._run_on(self.own)
            except MdnsError as error:
                self._complain(str(error))
                await trio.sleep(limits.LAN_INTERFACE_SECONDS)

    def _complain(self, text: str) -> None:
        if text != self.problem:
            log.info("%s", text)
        self.problem = text

    async def _run_on(self, own: list[LocalAddress]) -> None:
        """One life of the sockets: until the machine's addresses change. Raises MdnsError."""
        mdns = await trio.to_thread.run_sync(Mdns.open, own)
        try:
            self.problem = ""
            self._book.restart(trio.current_time())
            mdns.browse(into_trio(self._on_change))
            async with trio.open_nursery() as nursery:
                if self._port is not None:
                    nursery.start_soon(self._publish, mdns, own, self._port)
                nursery.start_soon(self._keep_book, mdns, own)
                await self._until_changed(own)
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(limits.LAN_GOODBYE_SECONDS, shield=True):
                await trio.to_thread.run_sync(mdns.close, abandon_on_cancel=True)

    async def _until_changed(self, own: list[LocalAddress]) -> None:
        while True:
            await trio.sleep(limits.LAN_INTERFACE_SECONDS)
            now = await trio.to_thread.run_sync(usable_addresses, self._interfaces)
            if set(now) != set(own):
                log.info("the addresses of this machine changed: looking for peers through the new ones")
                return

    async def _publish(self, mdns: Mdns, own: list[LocalAddress], port: int) -> None:
        addresses = published(own, self._bound)
        if not addresses:
            self._complain("this peer listens on no address of the local network, so it is not announced there")
            return
        txt = self._membership.announcement().to_txt()
        try:
            await mdns.publish(self._label, self._host, port, addresses, txt, max(1, round(self._lifetime)))
        except MdnsError as error:
            self._complain(str(error))
            return
        self.registered.set()

    def _on_change(self, label: str, there: bool) -> None:
        if len(self._changes) < limits.LAN_PENDING_EVENTS:
            self._changes.append((label, there))
            self._wake.set()

    async def _keep_book(self, mdns: Mdns, own: list[LocalAddress]) -> None:
        """Note what comes and goes, and ask whoever is due, a few at a time."""
        slots = trio.Semaphore(limits.LAN_RESOLVERS)
        async with trio.open_nursery() as nursery:
            while True:
                self._take_changes()
                now = trio.current_time()
                for hint in self._book.sweep(now):
                    self._on_hint(hint)
                while slots.value and (label := self._book.next_to_ask(now)) is not None:
                    slots.acquire_nowait()
                    nursery.start_soon(self._ask, mdns, own, label, slots)
                # With every slot taken, an answer wakes us
                until = self._book.next_at() if slots.value else float("inf")
                with trio.move_on_at(until):
                    await self._wake.wait()
                self._wake = trio.Event()

    def _take_changes(self) -> None:
        changes, self._changes = self._changes, []
        now = trio.current_time()
        for label, there in changes:
            if there:
                self._book.notice(label, now)
            elif (hint := self._book.remove(label, now)) is not None:
                self._on_hint(hint)

    async def _ask(self, mdns: Mdns, own: list[LocalAddress], label: str, slots: trio.Semaphore) -> None:
        known = label in self._book.sightings()
        resolved = await mdns.resolve(label, fresh=known)
        sighting = None if resolved is None else self._judge(mdns, own, label, resolved)
        hint = self._book.answered(label, sighting, trio.current_time())
        if hint is not None:
            self._on_hint(hint)
        slots.release()
        self._wake.set()

    def _judge(self, mdns: Mdns, own: list[LocalAddress], label: str, resolved: Resolved) -> Sighting:
        try:
            seen = Announcement.from_txt(resolved.txt)
        except ValueError:
            return Sighting(Kind.MALFORMED, ttl=resolved.ttl)
        kind = Kind.ITSELF if label == mdns.published else self._membership.judge(seen)
        addresses = tuple((host, resolved.port) for host in to_dial(resolved.addresses, own))
        return Sighting(kind, seen.peer, addresses, resolved.ttl)
