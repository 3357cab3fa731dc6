"""Start-up: loading blocks, every tensor's hash checked, against plainly reading the same files.

Linux only. Each is measured from the disk, with the system made to forget what it has cached of the files, and with the
files cached. Also making the manifest, which happens once a checkpoint; loading as a server does, which packs the
weights for this processor; and how long `import petalite` and the command's help take beside an interpreter that does
nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import MANIFEST_FILE, load_or_make, make_manifest
from tools.bench._cache import kept_checkpoint
from tools.bench._result import Result, machine

HIDDEN = 4096
READING, LOADING = "read the files", "load and check"
CONDITIONS = ("from disk", "cached")
BAR = 0.8
HELP_BAR = 6
PLAIN_BYTES = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=5, metavar="N", help="of 0.75 GiB; default 5")
    parser.add_argument("--rounds", type=int, default=3)


def run(arguments: argparse.Namespace) -> Result:
    config = BloomConfig(hidden_size=HIDDEN, n_head=32, n_layer=arguments.blocks, vocab_size=1024)
    directory = kept_checkpoint(config, shards=arguments.blocks)
    files = sorted(directory.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    os.sync()
    result = Result("load", {**machine(), "GiB": round(size / 2**30, 2), "rounds": arguments.rounds})
    found = [_round(directory, files) for _ in range(arguments.rounds)]
    for where in CONDITIONS:
        for name in found[0][where]:
            seconds = [each[where][name] for each in found]
            ratios = sorted(each[where][READING] / each[where][name] for each in found)
            ratio = statistics.median(ratios)
            result.rows.append(
                {
                    "what": f"{name}, {where}",
                    "GB/s": size / statistics.median(seconds) / 1e9,
                    "of plain reading": ratio,
                    "from": ratios[0],
                    "to": ratios[-1],
                }
            )
            if (name, where) == (LOADING, "from disk"):
                result.bars[f"load and check from disk: at least {BAR} of plain reading: {ratio:.2f}"] = ratio >= BAR
    _start_up(result, arguments.rounds)
    return result


def _round(directory: Path, files: list[Path]) -> dict[str, dict[str, float]]:
    """Seconds for each thing that is done with all of the weights, in turns with plain reading."""
    manifest = load_or_make(directory)
    actions: dict[str, Callable[[], object]] = {
        READING: lambda: _read(files),
        "make the manifest": lambda: make_manifest(directory),
        LOADING: lambda: load_span(directory, 0, len(files), manifest=manifest),
        "load, check and pack": lambda: load_span(directory, 0, len(files), pack=True, manifest=manifest),
    }
    prepare = {"from disk": _forget, "cached": _read}
    return {
        where: {name: _seconds(partial(prepare[where], files), act) for name, act in actions.items()}
        for where in CONDITIONS
    }


def _seconds(prepare: Callable[[], None], action: Callable[[], object]) -> float:
    prepare()
    started = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - started
    del result  # giving the weights back takes time of its own
    return seconds


def _forget(files: list[Path]) -> None:
    """Have the system drop what it has cached of `files`."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(files: list[Path]) -> None:
    buffer = bytearray(PLAIN_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _start_up(result: Result, rounds: int) -> None:
    """CPU seconds of small commands, which another busy process does not change much."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "import petalite": ["-c", "import petalite"],
        "petalite --help": ["-m", "petalite", "--help"],
        "petalite serve --help": ["-m", "petalite", "serve", "--help"],
    }
    times = {name: [_cpu_seconds(command) for _ in range(2 * rounds + 1)][1:] for name, command in commands.items()}
    nothing = statistics.median(times["python -c pass"])
    for name, found in times.items():
        ratio = statistics.median(found) / nothing
        result.rows.append({"command": name, "CPU ms": 1e3 * statistics.median(found), "times doing nothing": ratio})
        if name.endswith("--help"):
            result.bars[f"{name}: at most {HELP_BAR} times doing nothing: {ratio:.1f}"] = ratio <= HELP_BAR


def _cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
