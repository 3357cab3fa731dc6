"""Whole forward passes through two server processes against transformers on the same weights, with the same threads.

Requests of `forward` (spec/15): nothing is cached, and nothing is kept between two of them. 24 blocks of 1,024 in
float32, hidden states in and out; each round times ours and theirs, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import trio
from torch import Tensor

from petalite.cli.processes import running_servers
from petalite.client.api import join
from petalite.identity import Address
from tools.bench._cache import WIDE, kept_checkpoint
from tools.bench._result import Result, machine

BAR = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement; one more warms up")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="in a row")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that each process may use")


def run(arguments: argparse.Namespace) -> Result:
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    rows, tokens = arguments.rows, arguments.tokens
    result = Result("forward", {**machine(), "threads": arguments.threads, "rounds": arguments.rounds})
    times = trio.run(_measure, kept_checkpoint(WIDE), arguments)[1:]
    ours, theirs = (statistics.median(each) for each in zip(*times, strict=True))
    ratio = statistics.median(other / mine for mine, other in times)
    result.rows.append(
        {
            "batch": f"{rows} x {tokens}",
            "petalite tokens/s": rows * tokens / ours,
            "transformers tokens/s": rows * tokens / theirs,
            "ratio": ratio,
        }
    )
    result.bars[f"forward: at least {BAR} of transformers: {ratio:.2f}"] = ratio >= BAR
    return result


async def _measure(directory: Path, arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of ours and theirs, round by round."""
    oracle = await trio.to_thread.run_sync(_transformers, directory)
    half = WIDE.n_layer // 2
    ids = torch.arange(arguments.rows * arguments.tokens).view(arguments.rows, -1) % 3000 + 4
    times = []
    async with running_servers(str(directory), ((0, half), (half, WIDE.n_layer))) as servers:
        peers: list[str | Address] = [server.address for server in servers]
        async with join(peers, lan=False) as swarm:
            model = await swarm.load(str(directory), wire="f32")
            hidden = await model.embed(ids.tolist())
            for _ in range(arguments.rounds + 1):
                started = time.perf_counter()
                output = await model.blocks.forward_async(hidden)
                ours = time.perf_counter() - started
                started = time.perf_counter()
                expected = await trio.to_thread.run_sync(oracle, hidden)
                times.append((ours, time.perf_counter() - started))
    assert isinstance(output, Tensor)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    return times


def _transformers(directory: Path) -> Any:
    """Hidden states before the first block -> those behind the last one, by transformers."""
    from transformers import BloomForCausalLM

    whole: Any = BloomForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().transformer
    whole.word_embeddings_layernorm = torch.nn.Identity()  # both begin and end with the blocks
    whole.ln_f = torch.nn.Identity()

    def forward(hidden: Tensor) -> Tensor:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch keeps that number by thread
        with torch.inference_mode():
            output: Tensor = whole(inputs_embeds=hidden, use_cache=False).last_hidden_state
            return output

    return forward
