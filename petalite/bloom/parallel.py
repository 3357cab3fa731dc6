"""Several tensors at a time, each in a thread: reading, hashing, converting and packing let others run meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

# One reads while the other hashes. Each may hold a copy of a matrix, and the largest of a block are a third of it: more
# threads would come to more than a block's copy with what threads take themselves.
THREADS = 2


def in_order(jobs: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """The results of `jobs` in their order, or the first exception. Closed early, it waits for those that are running.

    Few are begun ahead, so that little is left to do when this is given up.
    """
    left = iter(jobs)
    begun: deque[Future[T]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            while True:
                begun.extend(threads.submit(job) for job in islice(left, 2 * THREADS - len(begun)))
                if not begun:
                    return
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
