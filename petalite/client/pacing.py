"""How large the pieces of a prompt are, so that the servers of a chain work at the same time: pure (spec 07)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Tokens, over all rows, of the smallest piece: a matrix product costs little less for fewer.
LEAST_TOKENS = 64
# What a piece costs besides its tokens and its way.
PIECE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Stage:
    """One server of a chain: what a token takes there, its way included, and the round trip to it, in seconds."""

    token_seconds: float
    round_trip: float


def piece_length(tokens: int, batch: int, stages: Sequence[Stage], most: int) -> int:
    """Tokens of a row in one step, at most `most`, when `tokens` of each of `batch` rows go through all `stages`.

    In k pieces, h stages of which the slowest needs C seconds for all tokens are through after (k + h - 1) (C / k + R)
    seconds, R being what a piece costs besides (as in Huang et al. 2019, GPipe, with its "bubble"); that is least for
    k = sqrt((h - 1) C / R).
    """
    whole = tokens * batch * max((stage.token_seconds for stage in stages), default=0.0)
    cost = PIECE_SECONDS + max((stage.round_trip for stage in stages), default=0.0)
    pieces = max(1.0, math.sqrt(max(0, len(stages) - 1) * whole / cost))
    return min(most, max(math.ceil(tokens / pieces), math.ceil(LEAST_TOKENS / batch)))
