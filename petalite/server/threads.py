"""How many threads torch uses for this machine's blocks: measured, since more can be slower (spec/10, rates)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import trio

from petalite.bloom.span import Span
from petalite.server.measure import measure_rates

T = TypeVar("T")

# More threads must pay for themselves: small products run as fast on one, and a busy machine punishes waiting.
WORTH_IT = 1.15
# What they may cost a decode step if they pay for prefills only.
BEARABLE = 0.95


def best_threads(span: Span, most: int) -> tuple[int, tuple[float, float]]:
    """The number of threads, 1..most, with which `span` decodes fastest, and its rates then. Blocking.

    Of numbers with which it decodes about as fast, the one with which it reads a prompt fastest.
    """
    best, rates = 1, _rates_with(span, 1)
    count = 2
    while count <= most and span.device.type == "cpu":
        more = _rates_with(span, count)
        if _better(more, rates):
            best, rates = count, more
        count *= 2
    return best, rates


def _better(more: tuple[float, float], rates: tuple[float, float]) -> bool:
    """Whether rates (decode, batch) with more threads are worth these."""
    decode, batch = more[0] / rates[0], more[1] / rates[1]
    return decode > WORTH_IT or (decode > BEARABLE and batch > WORTH_IT)


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

    def here(self, function: Callable[[], T]) -> T:
        """Run `function` in this thread."""
        if torch.get_num_threads() != self.count:
            torch.set_num_threads(self.count)
        return function()
