"""What holds for every test: one thread a library, no network, reproducible examples, no process left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch: server processes of the tests inherit these too, and share few cores
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PETALITE_NO_LAN": "1",  # only tests that bring their own network look around in one
}.items():
    os.environ.setdefault(_name, _value)

from hypothesis import HealthCheck, settings  # noqa: E402 - the variables above come first

# A shell has what it runs in the background ignore it, and children inherit that: interrupts are tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a busy machine is slow, not wrong. In CI the same examples every time, so that red means a change.
settings.register_profile("dev", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def children() -> dict[int, str]:
    """Living child processes of ours, pid -> command line; nothing where /proc cannot tell."""
    found: dict[int, str] = {}
    for listing in Path("/proc/self/task").glob("*/children"):
        try:
            pids = [int(text) for text in listing.read_text().split()]
        except OSError:  # that thread has ended
            continue
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:  # gone meanwhile
                continue
            if state not in "ZX":
                found[pid] = command.strip()
    return found


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail the test that leaves a child process running, and end that process.

    Children of module or session fixtures are there before this one looks, so they count for nobody.
    """
    before = children()
    yield
    # multiprocessing keeps one helper of its own for the life of the process
    left = {pid: line for pid, line in children().items() if pid not in before and "resource_tracker" not in line}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if left:
        pytest.fail("child processes left behind: " + "; ".join(f"{pid} {line}" for pid, line in left.items()))
