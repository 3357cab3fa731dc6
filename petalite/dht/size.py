"""How many peers the network has, estimated from how densely ids lie (spec/09, "Network size").

The m-th nearest of N random ids lies at a distance of about m / N of the space; the median of that gamma law is m -
1/3, so (m - 1/3) / distance is an estimate that is too high as often as too low, and the median of several stays so.
Targets are of our own random choice: crowding one key moves at most one sample in eight. Content keys are never
sampled.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from petalite.dht.ids import SPACE
from petalite.limits import DHT_K

_SAMPLES = 7
_LEAST = 6  # ids in a sample: fewer say nothing


class SizeEstimate:
    """Median of the latest samples."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_SAMPLES)

    def sample(self, target: int, numbers: Sequence[int]) -> None:
        """Note the live peers nearest to a random `target`: their ids as numbers, nearest first, without gaps."""
        if len(numbers) >= _LEAST:
            self._samples.append(_estimate(target, numbers))

    def value(self, own: int, nearest: Sequence[int], known: int) -> float:
        """Estimated number of peers, ourselves included; at least the `known` ones.

        `nearest` are the ids of the peers nearest to `own`. With fewer than k peers known all of them are the
        network.
        """
        if known < DHT_K:
            return known + 1.0
        local = _estimate(own, nearest) if len(nearest) >= _LEAST else float(known)
        return max(float(statistics.median([*self._samples, local])), known + 1.0)


def _estimate(target: int, numbers: Sequence[int]) -> float:
    return (len(numbers) - 1 / 3) * SPACE / (numbers[-1] ^ target)


def radius(size: float, count: float) -> int:
    """The XOR distance within which `count` of `size` evenly spread peers are expected (PT-DHT-050)."""
    return SPACE if size <= count else int(SPACE / size * count)
