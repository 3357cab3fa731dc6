"""A slow link between two network namespaces of this machine, made with ip and tc and deleted again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


class NoLink(Exception):
    """Why there can be no link here."""


@dataclass(frozen=True)
class Link:
    client_prefix: tuple[str, ...]
    server_prefix: tuple[str, ...]
    server_host: str


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoLink(f"`{' '.join(command)}` failed: {done.stderr.strip()}")


@contextlib.contextmanager
def slow_link(rate: str = "100mbit", queue: str = "50ms") -> Iterator[Link]:
    """Two namespaces joined by a veth pair, `rate` each way. Nothing is made in the namespace we are in."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise NoLink("needs root to make network namespaces")
    if not (shutil.which("ip") and shutil.which("tc")):
        raise NoLink("needs the commands ip and tc")
    a, b = f"petalite-a-{os.getpid()}", f"petalite-b-{os.getpid()}"
    made: list[str] = []
    try:
        for name in (a, b):
            _do("ip", "netns", "add", name)
            made.append(name)
        _do("ip", "-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b)
        for name, host in ((a, "10.231.77.1/24"), (b, "10.231.77.2/24")):
            _do("ip", "-n", name, "address", "add", host, "dev", "eth0")
            _do("ip", "-n", name, "link", "set", "eth0", "up")
            _do("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "32kb",
                "latency", queue)  # fmt: skip
        enter = ("ip", "netns", "exec")
        yield Link((*enter, a), (*enter, b), "10.231.77.2")
    finally:
        for name in made:
            subprocess.run(("ip", "netns", "delete", name), capture_output=True)
