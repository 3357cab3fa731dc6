"""What runs in the process of one target: python fuzz/engine.py TARGET LIBFUZZER-FLAGS... CORPUS"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz import targets

MEMORY_MB = 200  # beyond what the libraries take; the largest body that a target can reserve is 1 MiB


CPU_SECONDS = 2.0  # for one input, on any machine and however busy it is


def limit_time(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`target`, which fails when one input costs too much; a wait without end is libFuzzer's to notice."""

    def timed(data: bytes) -> None:
        before = time.process_time()
        target(data)
        spent = time.process_time() - before
        if spent > CPU_SECONDS:
            raise TimeoutError(f"{spent:.1f} s of CPU time for one input")

    return timed


def limit_memory() -> None:
    """An allocation that a peer could choose fails here as MemoryError, which no target documents."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_MB * 2**20,) * 2)


def main() -> None:
    if any(name.startswith("petalite") for name in sys.modules):
        raise RuntimeError("petalite was imported before it could be instrumented: the fuzzer would be blind")
    with atheris.instrument_imports(include=["petalite"]):
        target = targets.find(sys.argv[1])
    limit_memory()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], limit_time(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
