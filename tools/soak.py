"""A real server under thousands of hostile connections: `python tools/soak.py [--connections 10000] [--rate 25]`.

`petalite serve` on loopback, `tools/conformance soak` against it, and meanwhile an honest client that tells the same
story again and again. The story must stay what it was, at half its speed at least; memory must end within 10 MiB of
its level after the first tenth of the connections, with as many descriptors open. Ends with `passed` or what is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import petalite
from petalite.client.api import RemoteModel
from petalite.identity import Address
from petalite.models import FAIRYTALE

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time there was a king who had three daughters, and"
TOKENS = 60
CACHE = "32M"  # what hostile sessions have filled long before the first tenth is over: resident only where it was used
SLOWEST = 0.5  # of the undisturbed speed


@dataclass
class Told:
    """What an honest client got: the texts, and the seconds that each took."""

    texts: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return TOKENS * len(self.seconds) / sum(self.seconds)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Address, int]]:
    """A server of the whole embedded model; its address and process id."""
    words = ["serve", FAIRYTALE, "--listen", "127.0.0.1:0", "--no-lan", "--cache", CACHE, "--json"]
    with tempfile.TemporaryDirectory() as state:
        environment = {**os.environ, "XDG_STATE_HOME": state, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "petalite", *words]
        process = await trio.lowlevel.open_process(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        try:
            line = b""
            while process.stdout is not None and b"\n" not in line:
                more = await process.stdout.receive_some()
                if not more:
                    raise SystemExit("the server did not start")
                line += more
            yield Address.parse(json.loads(line)["addresses"][0]), process.pid
        finally:
            process.kill()
            with trio.CancelScope(shield=True):  # a killed process ends at once
                await process.wait()


async def tell(model: RemoteModel, done: Callable[[], bool]) -> Told:
    """The same story, each time in a session of its own, until `done`; once at least."""
    told = Told()
    while not told.seconds or not done():
        started = time.perf_counter()
        told.texts.add(await model.generate_text(PROMPT, max_new_tokens=TOKENS))
        told.seconds.append(time.perf_counter() - started)
    return told


async def soak(connections: int, rate: float, seed: int, undisturbed_seconds: float = 10.0) -> list[str]:
    """What was found wrong."""
    async with serving() as (address, pid), petalite.join(peers=[address], lan=False) as swarm:
        model = await swarm.load(FAIRYTALE, wire="f32")
        await tell(model, lambda: True)
        end = time.perf_counter() + undisturbed_seconds
        before = await tell(model, lambda: time.perf_counter() > end)
        words = ["soak", str(address), "--pid", str(pid), "--connections", str(connections), "--rate", str(rate)]
        command = [sys.executable, str(ROOT / "tools" / "conformance"), *words, "--seed", str(seed), "--verbose"]
        process = await trio.lowlevel.open_process(command, cwd=ROOT)
        try:
            during = await tell(model, lambda: process.poll() is not None)
        finally:
            process.kill()
            await process.wait()
    print(f"undisturbed {before.speed:.0f} tokens/s; beside hostile connections {during.speed:.0f} tokens/s, ", end="")
    print(f"{len(during.seconds)} stories, the slowest in {max(during.seconds):.2f} s ({before.seconds[0]:.2f} s)")
    faults = [] if process.returncode == 0 else ["tools/conformance soak found something, see above"]
    if during.texts != before.texts or len(before.texts) != 1:
        faults.append("the honest client's text changed")
    if during.speed < SLOWEST * before.speed:
        faults.append(f"the honest client was slowed down to {during.speed / before.speed:.2f} of its speed")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=25.0, help="connections a second")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    found = trio.run(soak, arguments.connections, arguments.rate, arguments.seed)
    print(*found or ["passed"], sep="\n")
    sys.exit(1 if found else 0)
