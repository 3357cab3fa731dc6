"""Start-up: loading blocks, every tensor's hash checked, against plainly reading the same files.

Linux only: before each measurement the system forgets what it has cached of the files. Also making the manifest, which
happens once a checkpoint; loading as a server does, which packs the weights for this processor; and how long
`import petalite` and the command's help take beside an interpreter that does nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from petalite.bloom.checkpoint import READ_BYTES
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import MANIFEST_FILE, load_or_make, make_manifest
from tools.bench._cache import kept_checkpoint
from tools.bench._result import Result, machine

HIDDEN = 4096
READING, LOADING = "read the files", "load and check"
BAR = 0.8
HELP_BAR = 6


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
    rounds = [_round(directory, files) for _ in range(arguments.rounds)]
    seconds = {name: [each[name] for each in rounds] for name in rounds[0]}
    for name, found in seconds.items():
        ratio = statistics.median(read / other for read, other in zip(seconds[READING], found, strict=True))
        result.rows.append({"what": name, "GB/s": size / statistics.median(found) / 1e9, "of plain reading": ratio})
        if name == LOADING:
            result.bars[f"load and check: at least {BAR} of plain reading: {ratio:.2f}"] = ratio >= BAR
    _start_up(result, arguments.rounds)
    return result


def _round(directory: Path, files: list[Path]) -> dict[str, float]:
    """Seconds for each thing that is done with all of the weights."""
    reading = _cold(files, lambda: _read(files))
    hashing = _cold(files, lambda: make_manifest(directory))
    manifest = load_or_make(directory)
    started = _forget(files)
    span = load_span(directory, 0, len(files), manifest=manifest)
    loading = time.perf_counter() - started
    del span
    packing = _cold(files, lambda: load_span(directory, 0, len(files), pack=True, manifest=manifest))
    return {READING: reading, "make the manifest": hashing, LOADING: loading, "load, check and pack": packing}


def _cold(files: list[Path], action: Callable[[], object]) -> float:
    _forget(files)
    return _timed(action)


def _forget(files: list[Path]) -> float:
    """Have the system drop what it has cached of `files`; the time then."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return time.perf_counter()


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _read(files: list[Path]) -> None:
    buffer = bytearray(READ_BYTES)
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
