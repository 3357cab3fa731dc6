"""Speed of inference while servers fail (Borzunov et al. 2023, Table 1): 4 stages, a 24-block model.

At each sending of activations to a stage the stage fails with chance p: its cache is lost, and the client sees a
reset connection. We replay to that stage alone. Beside it, from the measured times of one step: starting the whole
text anew at each failure, and keeping no cache at all.

All chances generate at once, taking turns of a few tokens on one thread, and p = 0 with them: what else the machine
does slows them alike. A round's ratio is that of the two sums of seconds; the table has the median over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import torch
import trio
from torch import Tensor

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint
from petalite.client.session import InferenceSession
from petalite.net.call import Call, Handler, Reply
from tools.bench._result import Result, machine
from tools.simulate_sessions.world import Parts, Place, load_tiny, open_world

STAGES = ((0, 6), (6, 12), (12, 18), (18, 24))
PROBES = (1, 32, 128, 512, 1024)
# Tokens of one chance before it is the next one's turn.
TURN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024], metavar="N", help="default 128 1024")
    parser.add_argument(
        "--chances", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2], metavar="P", help="default 1e-4 1e-3 1e-2"
    )
    parser.add_argument("--hidden", type=int, default=256, metavar="C", help="hidden size of the model; default 256")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="default 3")
    parser.add_argument("--seed", type=int, default=1, metavar="S")


def run(arguments: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    config = BloomConfig(
        hidden_size=arguments.hidden,
        n_head=8,
        n_layer=24,
        vocab_size=64,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=3,
    )
    chances = [0.0, *sorted(chance for chance in arguments.chances if chance)]
    conditions = {**machine(), "stages": len(STAGES), "blocks": config.n_layer, "hidden": config.hidden_size}
    result = Result("faults", {**conditions, "rounds": arguments.rounds})
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory, config)
        parts = load_tiny(Path(directory))
    whole = {count: _forward_seconds(parts, count) for count in PROBES}
    for tokens in arguments.tokens:
        rounds: list[list[Run]] = []
        for i in range(arguments.rounds):
            rounds.append(trio.run(_round, parts, tokens, chances, arguments.seed + i))
            _tell(tokens, rounds[-1])
        calm = statistics.median(runs[0].total for runs in rounds)
        for at, chance in enumerate(chances):
            runs = [each[at] for each in rounds]
            speed = statistics.median(tokens / run.total for run in runs)
            kept = statistics.median(each[0].total / each[at].total for each in rounds)
            failures = sum(run.failures for run in runs)
            lost = sum(sum(run.extra(each[0])) for run, each in zip(runs, rounds, strict=True))
            result.rows.append(
                {
                    "tokens": tokens,
                    "p": f"{chance:g}",
                    "replay: steps/s": speed,
                    "of p = 0": kept,
                    "failures": failures,
                    "recovery ms": 1000 * lost / failures if failures else "-",
                    "restart: steps/s": _restarting(tokens, chance, calm / tokens),
                    "no cache: steps/s": _cacheless(tokens, chance, whole),
                }
            )
            if chance == 1e-2 and tokens == 1024:
                result.bars["p = 1e-2, 1,024 tokens: at least 35 % of the speed of p = 0"] = kept >= 0.35
    return result


class Run:
    """One generation through four stages, each with a second server; a stage fails with `chance` at each sending."""

    def __init__(self, chance: float, seed: int) -> None:
        self.failures = 0
        self.seconds: list[float] = []  # of each step
        self._failed: list[int] = []  # steps in which something failed
        self.chance = chance
        self._draw = random.Random(seed)
        self._session: InferenceSession | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds)

    def extra(self, calm: Run) -> list[float]:
        """Seconds that each step with a failure took beyond the same step of an undisturbed run."""
        return [self.seconds[step] - calm.seconds[step] for step in self._failed]

    async def open(self, parts: Parts, tokens: int, stack: AsyncExitStack) -> None:
        world = await stack.enter_async_context(open_world(parts, STAGES, STAGES, tap=self._failing, push=False))
        model = await stack.enter_async_context(world.client(push=False))
        session = await stack.enter_async_context(model.session(max_len=tokens))
        await session.step(torch.zeros(1, 1, parts.blocks.config.hidden_size))  # opens it everywhere, undisturbed
        session.truncate(0)
        self._session = session

    async def step(self, hidden: Tensor) -> None:
        assert self._session is not None
        before, started = self.failures, time.perf_counter()
        await self._session.step(hidden)
        if self.failures > before:
            self._failed.append(len(self.seconds))
        self.seconds.append(time.perf_counter() - started)

    async def _failing(self, place: Place, call: Call, handler: Handler) -> Reply:
        if call.method == "step" and self._session is not None and self._draw.random() < self.chance:
            self.failures += 1
            place.server.table.close(call.peer, call.head["sid"], trio.current_time())
            place.host.reset()
            await trio.sleep_forever()
        return await handler(call)


async def _round(parts: Parts, tokens: int, chances: list[float], seed: int) -> list[Run]:
    """`tokens` steps of one token for each of `chances`, in turns."""
    hidden = torch.randn(1, tokens, parts.blocks.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    runs = [Run(chance, seed) for chance in chances]
    async with AsyncExitStack() as stack:
        for run in runs:
            await run.open(parts, tokens, stack)
        order = list(runs)
        for start in range(0, tokens, TURN):
            for run in order:
                for at in range(start, min(start + TURN, tokens)):
                    await run.step(hidden[:, at : at + 1])
            order.append(order.pop(0))  # nobody always comes behind the same one
    return runs


def _tell(tokens: int, runs: list[Run]) -> None:
    """A round takes minutes: say how it went, lest all is lost to who cannot wait."""
    told = ", ".join(
        f"p={run.chance:g} {run.total:.1f} s ({runs[0].total / run.total:.0%}, {run.failures} failures)" for run in runs
    )
    print(f"{tokens} tokens: {told}", file=sys.stderr, flush=True)


def _forward_seconds(parts: Parts, count: int) -> float:
    """Of all blocks over `count` tokens at once, without a cache."""
    hidden = torch.randn(1, count, parts.blocks.config.hidden_size)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            parts.blocks(hidden)
            best = min(best, time.perf_counter() - started)
    return best


def _restarting(tokens: int, chance: float, step: float) -> float:
    """Expected steps/s if each failure begins the text anew: (1 - q^N) / (q^N (1 - q)) steps, q of them unharmed."""
    unharmed = (1 - chance) ** len(STAGES)
    needed = tokens if unharmed == 1 else (1 - unharmed**tokens) / (unharmed**tokens * (1 - unharmed))
    return tokens / (needed * step)


def _cacheless(tokens: int, chance: float, whole: dict[int, float]) -> float:
    """Expected steps/s if each step sends all tokens so far through all blocks; a failed stage is sent to again."""
    total = 0.0
    for length in range(1, tokens + 1):
        above = min((probe for probe in whole if probe >= length), default=max(whole))
        below = max(probe for probe in whole if probe <= length)
        share = 0.0 if above == below else (length - below) / (above - below)
        total += whole[below] + share * (whole[above] - whole[below])
    return tokens / (total / (1 - chance))
