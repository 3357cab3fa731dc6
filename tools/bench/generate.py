"""Generation through two server processes against transformers on the same weights, with the same threads.

24 blocks of 1,024 in float32, 559 million parameters with random weights; servers, client and transformers share this
machine's cores. Each round times ours and theirs, one after the other: greedy decoding of one row behind a prompt, and
a prefill of several rows. The head is part of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import torch
import trio

from petalite.cli.processes import running_servers
from petalite.client.api import RemoteModel, join
from petalite.client.generation import Generation, decode_tokens, prefill
from petalite.identity import Address
from tools.bench._cache import WIDE, kept_checkpoint
from tools.bench._result import Result, machine

PROMPT = 128
ROWS = 4
WARM_UP = (2, 1)  # tokens and rows of the first round, which does not count
BAR = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement; one more warms up")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that each process may use")
    parser.add_argument("--transformers", metavar="DIRECTORY", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Result | None:
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    if arguments.transformers:
        _be_transformers(arguments.transformers)
        return None
    result = Result(
        "generate",
        {**machine(), "threads": arguments.threads, "torch": torch.__version__, "prompt": PROMPT,
         "tokens": arguments.tokens, "rounds": arguments.rounds, "model": "24 blocks of 1,024, float32, 2 servers"},
    )  # fmt: skip
    directory = kept_checkpoint(WIDE)
    with _transformers(directory, arguments) as theirs:
        rounds = trio.run(_measure, directory, theirs, arguments)
    for at, name in ((0, "decode 1 row"), (1, f"prefill {ROWS} x {PROMPT}")):
        ours, other = ([each[side][at] for each in rounds] for side in (0, 1))
        ratio = statistics.median(mine / others for mine, others in zip(ours, other, strict=True))
        result.rows.append(
            {
                "what": name,
                "petalite tokens/s": statistics.median(ours),
                "transformers tokens/s": statistics.median(other),
                "ratio": ratio,
            }
        )
        result.bars[f"{name}: at least {BAR} of transformers: {ratio:.2f}"] = ratio >= BAR
    return result


Rates = tuple[float, float]
"""Tokens/s of decoding and of the prefill."""


async def _measure(
    directory: Path, theirs: subprocess.Popen[str], arguments: argparse.Namespace
) -> list[tuple[Rates, Rates]]:
    half = WIDE.n_layer // 2
    async with running_servers(str(directory), ((0, half), (half, WIDE.n_layer))) as servers:
        peers: list[str | Address] = [server.address for server in servers]
        async with join(peers, lan=False) as swarm:
            model = await swarm.load(str(directory))
            rounds = []
            for number in range(arguments.rounds + 1):
                tokens, rows = (arguments.tokens, ROWS) if number else WARM_UP
                ours = await _ours(model, tokens, rows)
                rounds.append((ours, await trio.to_thread.run_sync(_ask, theirs, tokens, rows)))
    return rounds[1:]


def _prompt(rows: int) -> list[list[int]]:
    return [[4 + (7 * row + at) % 3000 for at in range(PROMPT)] for row in range(rows)]


async def _ours(model: RemoteModel, tokens: int, count: int) -> Rates:
    async with model.session(max_len=PROMPT + tokens + 1) as session:
        rows = _prompt(1)
        logits = await prefill(model, session, rows)
        async with aclosing(decode_tokens(model, session, logits, rows, Generation())) as decoding:
            await anext(decoding)
            started = time.perf_counter()
            for _ in range(tokens):
                await anext(decoding)
            decode = tokens / (time.perf_counter() - started)
    async with model.session(max_len=PROMPT, batch=count) as session:
        started = time.perf_counter()
        await prefill(model, session, _prompt(count))
        return decode, count * PROMPT / (time.perf_counter() - started)


# transformers, in a process of its own: its libraries' threads are none of ours


@contextmanager
def _transformers(directory: Path, arguments: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).parent), "generate", "--transformers", str(directory)]
    command += ["--threads", str(arguments.threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], tokens: int, count: int) -> Rates:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{tokens} {count}\n")
    process.stdin.flush()
    decode, prefills = json.loads(process.stdout.readline())
    return decode, prefills


def _be_transformers(directory: str) -> None:
    """Measure once for each line on stdin."""
    from transformers import BloomForCausalLM

    model: Any = BloomForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for line in sys.stdin:
        with torch.inference_mode():
            print(json.dumps(_theirs(model, *map(int, line.split()))), flush=True)


def _theirs(model: Any, tokens: int, count: int) -> Rates:
    out = model(torch.tensor(_prompt(1)), use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(dim=-1)
    started = time.perf_counter()
    for _ in range(tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(dim=-1)
    decode = tokens / (time.perf_counter() - started)
    ids = torch.tensor(_prompt(count))
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return decode, count * PROMPT / (time.perf_counter() - started)
