"""Where a server listens: as told, or on the private addresses of this machine."""

from __future__ import annotations

import errno

from petalite.cli.options import HostPort
from petalite.errors import PetaliteError
from petalite.identity import Address
from petalite.net.endpoint import Endpoint
from petalite.swarm.interfaces import private_addresses

DEFAULT_PORT = 31337


async def listen_as_told(endpoint: Endpoint, listen: HostPort | None, announce: HostPort | None) -> list[Address]:
    """Bind, and say where others can reach us: what was announced, or each bound address.

    Raises PetaliteError when the port is taken or the host is not ours.
    """
    if listen is not None:
        bound = await _bind(endpoint, listen.host, listen.port)
    else:
        bound = await _bind_private(endpoint)
    if announce is not None:
        return [Address(endpoint.peer_id, announce.host, announce.port)]
    return [reachable for address in bound for reachable in _reachable(address)]


async def _bind_private(endpoint: Endpoint) -> list[Address]:
    """The usual port, or any that is free, on every private address and loopback: never on a public one."""
    hosts = [*private_addresses(), "127.0.0.1"]
    for port in (DEFAULT_PORT, 0):
        bound: list[Address] = []
        for host in hosts:
            try:
                bound += await endpoint.listen(host, bound[0].port if bound else port)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue  # an address that is going, or not ready yet
                if error.errno != errno.EADDRINUSE:
                    raise PetaliteError(f"cannot listen on {host}: {error.strerror or error}") from error
                if not bound:
                    break
        if bound:
            return bound
    raise PetaliteError("no address of this machine can be listened on")


async def _bind(endpoint: Endpoint, host: str, port: int) -> list[Address]:
    try:
        return await endpoint.listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PetaliteError(f"port {port} of {host} is in use") from error
        raise PetaliteError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _reachable(address: Address) -> list[Address]:
    """A wildcard address stands for all of this machine's."""
    if address.host not in ("0.0.0.0", "::"):
        return [address]
    version = 6 if ":" in address.host else 4
    hosts = [host for host in private_addresses() if (":" in host) == (version == 6)]
    return [Address(address.peer, host, address.port) for host in [*hosts, "127.0.0.1" if version == 4 else "::1"]]
