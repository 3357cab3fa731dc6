"""How many threads torch uses for this machine's blocks: measured, since more can be slower (spec/10, rates)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import trio

from petalite.bloom.span import Span
from petalite.server.measure import measure_rates

# A second thread must pay for itself: small products run as fast on one, and a busy machine punishes waiting.
WORTH_IT = 1.15


def best_threads(span: Span, most: int) -> tuple[int, tuple[float, float]]:
    """The number of threads, 1..most, with which `span` decodes fastest, and its rates then. Blocking."""
    best, rates = 1, _rates_with(span, 1)
    count = 2
    while count <= most and span.device.type == "cpu":
        more = _rates_with(span, count)
        if more[0] > WORTH_IT * rates[0]:
            best, rates = count, more
        count *= 2
    return best, rates


def _rates_with(span: Span, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    return measure_rates(span)


class CountedThreads:
    """Runs functions in worker threads in which torch uses `count` threads: torch keeps that number by thread."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def __call__(self, function: Callable[[], None], /) -> None:
        """A cancelled wait leaves the thread to run out: a matrix product cannot be stopped."""
        await trio.to_thread.run_sync(functools.partial(self.here, function), abandon_on_cancel=True)

    def here(self, function: Callable[[], None]) -> None:
        """Run `function` in this thread."""
        if torch.get_num_threads() != self.count:
            torch.set_num_threads(self.count)
        function()
