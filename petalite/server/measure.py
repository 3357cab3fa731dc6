"""How fast this machine runs blocks: what placement and routing plan with (spec/10, rates)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from petalite.bloom.cache import CachePool
from petalite.bloom.config import BloomConfig
from petalite.bloom.span import Span

BATCH_TOKENS = 64
PREFIX = 32
ROUNDS = 5
# A block's four products hold 12 C^2 weights; one of 4 C^2 stands for a third of them.
_PART_OF_BLOCK = 3


def estimate_rates(config: BloomConfig, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Block-tokens/s (decode, batch) before any weight is loaded: from one product of a block's size. Blocking."""
    C = config.hidden_size
    with torch.inference_mode():
        weight = torch.full((4 * C, C), 0.01, dtype=dtype, device=device)
        rates = []
        for tokens in (1, BATCH_TOKENS):
            x = torch.full((tokens, C), 0.01, dtype=dtype, device=device)
            seconds = _median_seconds(partial(torch.nn.functional.linear, x, weight), device)
            rates.append(tokens / (_PART_OF_BLOCK * seconds))
    return rates[0], rates[1]


def measure_rates(span: Span) -> tuple[float, float]:
    """Block-tokens/s (decode, batch) of loaded blocks, in steps of their own small cache. Blocking."""
    blocks = span.end - span.start
    pool = CachePool(span.config, blocks, PREFIX + BATCH_TOKENS, dtype=span.dtype, device=span.device)
    with torch.inference_mode():
        rows = pool.reserve(1, PREFIX + BATCH_TOKENS)
        rates = []
        for tokens in (1, BATCH_TOKENS):
            hidden = torch.full((1, tokens, span.config.hidden_size), 0.1, dtype=span.dtype, device=span.device)
            span.step(hidden, rows, position=0)
            at = PREFIX if tokens == 1 else 0
            seconds = _median_seconds(partial(span.step, hidden, rows, position=at), span.device)
            rates.append(tokens * blocks / seconds)
    return rates[0], rates[1]


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(1e-7, statistics.median(times))
