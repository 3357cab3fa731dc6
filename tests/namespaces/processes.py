"""Processes whose stdout is JSON lines, read with a limit on the wait."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.namespaces.network import Network

ROOT = Path(__file__).parent.parent.parent
# Other tests keep off the LAN of the machine; here every LAN is the test's own
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PETALITE_NO_LAN"}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class Lines:
    """The objects that `process` prints, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.seen: list[dict[str, Any]] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self._queue.put(line)
        self._queue.put(None)

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
        """The next object that `wanted` is true of; AssertionError if none comes in time."""
        while True:
            try:
                line = self._queue.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError(f"nothing of the kind within {seconds} s; seen: {self.seen}") from None
            if line is None:
                error = self.process.stderr.read() if self.process.stderr else ""
                raise AssertionError(f"the process ended; seen: {self.seen}; stderr: {error}")
            self.seen.append(json.loads(line))
            if wanted(self.seen[-1]):
                return self.seen[-1]

    def event(self, name: str, seconds: float = 15.0) -> dict[str, Any]:
        return self.wait_for(lambda line: line.get("event") == name, seconds)

    def finish(self, seconds: float = 15.0) -> list[dict[str, Any]]:
        """Close its stdin, wait for its end; everything it printed."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=seconds)
        self._reader.join(timeout=seconds)
        while (line := self._queue.get(timeout=seconds)) is not None:
            self.seen.append(json.loads(line))
        error = self.process.stderr.read() if self.process.stderr else ""
        assert self.process.returncode == 0, error
        return self.seen


def start_lan_peer(net: Network, machine: str, *words: str) -> Lines:
    """`lan_peer.py` on `machine`."""
    script = str(Path(__file__).parent / "lan_peer.py")
    return Lines(net.popen(machine, sys.executable, script, *words, env=ENVIRONMENT))
