"""Memory of a server that holds some of a model's blocks, before anything is in its cache (Linux).

A process of `petalite serve` for each number of blocks, one after the other; 24 blocks of 1,024 in float32 on disk.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import trio

from petalite.bloom.checkpoint import block_shapes
from petalite.cli.processes import running_servers
from tools.bench._cache import WIDE, kept_checkpoint
from tools.bench._result import Result, machine

FACTOR, BESIDES_MIB = 1.2, 350
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 6, 12], metavar="K", help="default 1 6 12")


def run(arguments: argparse.Namespace) -> Result:
    directory = kept_checkpoint(WIDE)
    result = Result("memory", {**machine(), "model": "24 blocks of 1,024, float32"})
    for count in arguments.blocks:
        resident, peak = trio.run(_measure, directory, count)
        held = count * sum(map(math.prod, block_shapes(WIDE).values())) * 4 / MIB
        limit = FACTOR * held + BESIDES_MIB
        result.rows.append(
            {
                "blocks": f"{count} of {WIDE.n_layer}",
                "weights MiB": held,
                "resident MiB": resident,
                "peak MiB": peak,
                "limit MiB": limit,
            }
        )
        result.bars[f"{count} blocks: resident at most {FACTOR} x weights + {BESIDES_MIB} MiB"] = resident <= limit
    return result


async def _measure(directory: Path, count: int) -> tuple[float, float]:
    """Resident MiB once ready, and the most on the way there."""
    async with running_servers(str(directory), ((0, count),)) as (server,):
        status = await trio.Path(f"/proc/{server.process.pid}/status").read_text()
    kib = {name: int(value) for name, value in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
    return kib["VmRSS"] / 1024, kib["VmHWM"] / 1024
