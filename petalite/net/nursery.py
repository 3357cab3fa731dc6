"""A nursery for functions that promise plain errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_flat_nursery() -> AsyncIterator[trio.Nursery]:
    """Like `trio.open_nursery`, but the first failure leaves as itself, not wrapped in a group.

    For children whose errors all mean the same to the caller; what else failed meanwhile is dropped, so not for
    children that hide bugs of each other.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        first = _first_failure(group)
        raise first from first.__cause__


def _first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf that is no Cancelled, else the first leaf."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(reversed(error.exceptions))
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)), leaves[0])
