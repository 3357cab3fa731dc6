"""Tokens a second with speculation and without: texts that repeat themselves and that do not, over lines with a delay.

Real servers and a real client in memory under the real clock: every byte needs DELAY one way, and the embedded model
computes. Without delay a round trip costs next to nothing and a longer pass all the more: there speculation must know
when to keep still. The two ways take turns; a row has the medians over the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
import trio

from petalite.bloom.packed import pack
from petalite.client.api import RemoteModel, generation_of
from petalite.client.draft import load_draft
from petalite.client.generation import decode_tokens, prefill
from tools.bench._result import Result, machine
from tools.bench.latency import BLOCKS, FarHost
from tools.simulate_sessions.world import load_parts, open_world

REPEATING = "The old king said to the wolf: go into the dark forest and bring me the golden apple. " * 4
FRESH = "Once upon a time"
# A greedy text of this model soon repeats itself, so the text that does not is drawn.
TEXTS = {
    "repeats itself": (REPEATING, {"temperature": 0.0}),
    "greedy": (FRESH, {"temperature": 0.0}),
    "does not repeat": (FRESH, {"temperature": 1.0, "seed": 1}),
}
FAR_MS = 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0, 5, 50], metavar="MS", help="one way; default 0 5 50"
    )
    parser.add_argument("--hops", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each text; default 64")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="without delay; fewer with; default 8")
    parser.add_argument("--draft", metavar="MODEL", help="a small model that guesses too")


@dataclass(frozen=True)
class Told:
    """One text: its new tokens, and the seconds and passes that all but the first took."""

    tokens: list[int]
    seconds: float
    passes: int


def run(arguments: argparse.Namespace) -> Result:
    torch.set_num_threads(1)
    conditions = machine() | {"hops": arguments.hops, "tokens": arguments.tokens, "draft": arguments.draft or "none"}
    result = Result("speculate", conditions)
    pack(load_parts().blocks)  # as servers do
    for delay in arguments.delays:
        rounds = max(1, round(arguments.rounds / (1 + delay / 5)))
        for name, (plain, ahead) in trio.run(_measure, arguments, delay / 1000, rounds).items():
            speeds = [(len(told[0].tokens) - 1) / statistics.median(t.seconds for t in told) for told in (plain, ahead)]
            ratio = statistics.median(a.seconds / b.seconds for a, b in zip(plain, ahead, strict=True))
            result.rows.append(
                {
                    "one way ms": delay,
                    "text": name,
                    "rounds": rounds,
                    "plain tokens/s": speeds[0],
                    "speculative": speeds[1],
                    "ratio": ratio,
                    "tokens a pass": (len(ahead[-1].tokens) - 1) / ahead[-1].passes,
                    "same tokens": all(a.tokens == b.tokens for a, b in zip(plain, ahead, strict=True)),
                }
            )
            if delay == FAR_MS and name == "repeats itself":
                result.bars[f"{FAR_MS:g} ms, a text that repeats itself: at least 1.5 times as fast"] = ratio >= 1.5
            if name == "does not repeat":
                result.bars[f"{delay:g} ms, a text that does not: at least 0.95 of the speed"] = ratio >= 0.95
    return result


async def _measure(
    arguments: argparse.Namespace, delay: float, rounds: int
) -> dict[str, tuple[list[Told], list[Told]]]:
    """Each text told plainly and with speculation, by turns."""
    borders = [BLOCKS * i // arguments.hops for i in range(arguments.hops + 1)]
    parts = load_parts()
    told: dict[str, tuple[list[Told], list[Told]]] = {name: ([], []) for name in TEXTS}
    async with trio.open_nursery() as lines:
        async with (
            open_world(
                parts, list(itertools.pairwise(borders)), host=lambda net, name: FarHost(net, name, delay, lines)
            ) as world,
            world.client(wire="f16") as model,
        ):
            if arguments.draft:
                model.draft = load_draft(arguments.draft, parts.local)
            await _tell(model, FRESH, 4, {}, speculate=False)  # servers dial each other
            for number, (name, (prompt, options)) in itertools.product(range(rounds), TEXTS.items()):
                for speculate in (False, True) if number % 2 == 0 else (True, False):
                    told[name][speculate].append(
                        await _tell(model, prompt, arguments.tokens, options, speculate=speculate)
                    )
        lines.cancel_scope.cancel()
    return told


async def _tell(model: RemoteModel, prompt: str, count: int, options: dict[str, Any], *, speculate: bool) -> Told:
    generation = generation_of(max_new_tokens=count, speculate=speculate, **options)
    ids: Sequence[int] = model.encode(prompt)
    seen = list(ids)
    async with model.session(max_len=len(ids) + count) as session:
        logits = await prefill(model, session, [ids])
        async with aclosing(decode_tokens(model, session, logits, [seen], generation)) as decoding:
            started, passes = trio.current_time(), set[int]()
            async for _ in decoding:
                passes.add(session.position)
                if len(seen) == len(ids) + count:
                    break
            seconds = trio.current_time() - started
    return Told(seen[len(ids) :], seconds, len(passes) - 1)
