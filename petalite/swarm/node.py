"""This peer in a swarm: its endpoint, what it knows of the others, and whom it distrusts for now."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio

from petalite.identity import Address, Identity, PeerId
from petalite.net.connection import PeerConnection
from petalite.net.endpoint import Endpoint, open_endpoint
from petalite.swarm.directory import Directory
from petalite.swarm.routing import Bans, Needs, NoRoute, Route, plan_inference


class Node:
    """Made by `open_node`."""

    def __init__(self, endpoint: Endpoint, peers: Iterable[Address]) -> None:
        self.endpoint = endpoint
        self.directory = Directory(endpoint, peers)
        self.bans = Bans()

    async def connect(self, peer: PeerId) -> PeerConnection:
        """The connection to a known peer. Raises PeerUnreachable, HandshakeError."""
        return await self.endpoint.connect(*self.directory.addresses_of(peer))

    def plan(self, model: bytes, needs: Needs) -> Route | NoRoute | None:
        """The best route now; None if nobody serves the model."""
        snapshot = self.directory.snapshot(model)
        if snapshot is None:
            return None
        return plan_inference(
            snapshot, needs, latencies=self.directory.latencies(), bans=self.bans, now=trio.current_time()
        )

    def failed(self, peer: PeerId) -> None:
        """`peer` let us down: it is out of the routes for a while."""
        self.bans = self.bans.failed(peer, trio.current_time())

    def succeeded(self, peer: PeerId) -> None:
        if peer in self.bans.entries:
            self.bans = self.bans.succeeded(peer)


@asynccontextmanager
async def open_node(identity: Identity, *, peers: Iterable[Address] = (), **options: Any) -> AsyncIterator[Node]:
    """A node that lives as long as the block; `options` as for `Endpoint`."""
    async with open_endpoint(identity, **options) as endpoint:
        yield Node(endpoint, peers)
