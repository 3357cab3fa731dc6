"""One swarm in memory for all tests here, and the blocking client of its model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from petalite.client.api import BlockingModel
from petalite.client.blocking import open_portal
from tools.simulate_sessions.world import World, load_parts, open_world


@dataclass(frozen=True)
class Here:
    """Two servers share the embedded model, float32 on the wire."""

    world: World
    model: BlockingModel


@pytest.fixture(scope="package")
def here() -> Iterator[Here]:
    @asynccontextmanager
    async def swarm() -> AsyncIterator[tuple[World, Any]]:
        async with open_world(load_parts(), [(0, 3), (3, 8)]) as world, world.client() as model:
            yield world, model

    with open_portal(swarm) as (portal, (world, model)):
        yield Here(world, BlockingModel(portal, model))


@pytest.fixture
def model(here: Here) -> BlockingModel:
    return here.model
