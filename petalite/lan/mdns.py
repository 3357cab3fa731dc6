"""zeroconf as this package uses it: an instance to publish, names that come and go, one name looked up.

zeroconf runs its own asyncio loop in a thread. Its callbacks reach Trio by `token.run_sync_soon` and nothing else:
waiting for Trio inside of a callback would block that loop, and `close` waits for that loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import trio
import zeroconf
from zeroconf.asyncio import AsyncServiceInfo
from zeroconf.const import _CLASS_IN, _TYPE_SRV, _TYPE_TXT

from petalite.lan.addresses import LocalAddress, sockets_for
from petalite.lan.announcement import SERVICE_TYPE
from petalite.limits import LAN_RESOLVE_SECONDS

Result = TypeVar("Result")
OnChange = Callable[[str, bool], None]
"""Called in a thread of zeroconf's: an instance's label, and whether it is there (or changed) or has left."""


class MdnsError(Exception):
    """Multicast DNS cannot run here and now; the text says why in words for a user."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one instance answered: the raw TXT record, its addresses as text (scoped), and the SRV's port and TTL."""

    txt: bytes
    addresses: tuple[str, ...]
    port: int
    ttl: int


class Mdns:
    """zeroconf on given addresses of this machine. `open` and `close` block for up to 2 s: call them in a thread."""

    def __init__(self, zc: zeroconf.Zeroconf) -> None:
        self._zc = zc
        self.published = ""
        """The label under which our own instance stands, once it does."""

    @classmethod
    def open(cls, own: Sequence[LocalAddress]) -> Mdns:
        """Join the group on the links of `own`. Raises MdnsError."""
        # It warns of every packet that a network does not take; what a user should know, MdnsError says once
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        chosen = [str(each.ip) for each in sockets_for(own)]
        try:
            version = zeroconf.IPVersion.V4Only
            if any(each.ip.version == 6 for each in own):
                only = all(each.ip.version == 6 for each in own)
                version = zeroconf.IPVersion.V6Only if only else zeroconf.IPVersion.All
            return cls(zeroconf.Zeroconf(interfaces=list(chosen), ip_version=version, use_asyncio=False))
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise MdnsError(f"multicast DNS (UDP port 5353) cannot be used: {reason}") from error

    def close(self) -> None:
        """Say goodbye for what was published, and end zeroconf's threads."""
        try:
            self._zc.close()
        except (zeroconf.Error, OSError, TimeoutError):
            pass  # the network is gone, or this machine is busy: the record expires without a goodbye

    def browse(self, on_change: OnChange) -> None:
        """Call `on_change` for every instance from now on until closed."""
        self._zc.add_service_listener(SERVICE_TYPE, _Listener(on_change))

    async def publish(self, label: str, host: str, port: int, addresses: Sequence[str], txt: bytes, ttl: int) -> None:
        """Probe and announce, 1.7 s. A label that is taken gets a number. Raises MdnsError."""
        info = zeroconf.ServiceInfo(
            SERVICE_TYPE,
            f"{label}.{SERVICE_TYPE}",
            port=port,
            properties=txt,
            server=f"{host}.local.",
            host_ttl=ttl,
            parsed_addresses=list(addresses),
        )

        async def announce() -> None:
            finished = await self._zc.async_register_service(info, allow_name_change=True)
            self.published = _label(info.name)
            await finished

        try:
            await self._in_loop(announce())
        except (zeroconf.Error, OSError) as error:
            raise MdnsError(f"this peer cannot be published on the local network: {error}") from error

    async def resolve(self, label: str, *, fresh: bool) -> Resolved | None:
        """Ask one instance where it is; None if it does not answer. `fresh`: what was heard before does not count."""
        name = f"{label}.{SERVICE_TYPE}"

        async def ask() -> Resolved | None:
            try:
                info = AsyncServiceInfo(SERVICE_TYPE, name)
                if fresh:
                    old = self._zc.cache.async_entries_with_name(name)
                    self._zc.cache.async_remove_records([e for e in old if e.type in (_TYPE_SRV, _TYPE_TXT)])
                if not await info.async_request(self._zc, LAN_RESOLVE_SECONDS * 1000):
                    return None
            except (zeroconf.Error, ValueError, OSError):
                return None  # a name that cannot be asked for: over-long labels, bytes that are no text
            srv = self._zc.cache.get_by_details(name, _TYPE_SRV, _CLASS_IN)
            if srv is None or not info.port:
                return None
            return Resolved(info.text or b"", tuple(info.parsed_scoped_addresses()), info.port, int(srv.ttl))

        return await self._in_loop(ask())

    async def _in_loop(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` in zeroconf's loop; cancelled with the caller."""
        if self._zc.loop is None:
            work.close()
            raise MdnsError("multicast DNS is not running")
        done = trio.Event()
        wake = into_trio(done.set)
        future = asyncio.run_coroutine_threadsafe(work, self._zc.loop)
        future.add_done_callback(lambda _: wake())
        try:
            await done.wait()
        finally:
            future.cancel()
        return future.result()


def into_trio(call: Callable[..., None]) -> Callable[..., None]:
    """`call` as something that any thread may call at any time; nothing happens once Trio has ended."""
    token = trio.lowlevel.current_trio_token()

    def soon(*args: Any) -> None:
        try:
            token.run_sync_soon(call, *args)
        except trio.RunFinishedError:
            pass

    return soon


class _Listener(zeroconf.ServiceListener):
    def __init__(self, on_change: OnChange) -> None:
        self._on_change = on_change

    def add_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        self._on_change(_label(name), True)

    def update_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        self._on_change(_label(name), True)

    def remove_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        self._on_change(_label(name), False)


def _label(name: str) -> str:
    return name[: -len(SERVICE_TYPE) - 1]
