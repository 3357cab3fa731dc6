"""Small networks of Linux network namespaces, for tests that need machines apart from each other.

Nothing is made in the machine's own namespace: the bridge or router lives in a namespace too, so that no test can
reach a network that is not its own. Needs root and iproute2. Use it as

    with lan("a", "b") as net:
        net.run("a", "ip", "addr")              # wait for a command
        net.popen("b", sys.executable, "x.py")  # start one; it is killed at the end
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_COMMAND_SECONDS = 20.0
_numbers = itertools.count()


def why_not() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "needs iproute2"
    if os.geteuid() != 0:
        return "needs root"
    name = f"pt-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Network:
    """Machines by name. IPv4 addresses are in `address`, link-local IPv6 ones in `link_local`."""

    def __init__(self, *machines: str) -> None:
        prefix = f"pt-{os.getpid()}-{next(_numbers)}"
        self.machines = machines
        self.hub = f"{prefix}-hub"
        self.names = {machine: f"{prefix}-{machine}" for machine in machines}
        self.address: dict[str, str] = {}
        self.link_local: dict[str, str] = {}
        self._processes: list[subprocess.Popen[Any]] = []

    def ip(self, machine: str, *words: str) -> None:
        """`ip` in the namespace of `machine` ("hub" is that of the bridge)."""
        _ip("-n", self.hub if machine == "hub" else self.names[machine], *words)

    def command(self, machine: str, *words: str) -> list[str]:
        """The command line that runs `words` on `machine`."""
        return ["ip", "netns", "exec", self.names[machine], *words]

    def run(self, machine: str, *words: str, seconds: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run to the end; output as text. subprocess.TimeoutExpired when it takes too long."""
        return subprocess.run(
            self.command(machine, *words), capture_output=True, text=True, timeout=seconds, check=False, **options
        )

    def popen(self, machine: str, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start; killed at the latest when the network is taken down."""
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process: subprocess.Popen[str] = subprocess.Popen(self.command(machine, *words), text=True, **options)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass
        for name in (*self.names.values(), self.hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=_COMMAND_SECONDS, check=False)

    # How they are wired

    def _add(self, machine: str, number: int, subnet: int, ipv4: bool, ipv6: bool) -> str:
        """A namespace with loopback and `eth0`, whose other end is the port `p<number>` of the hub."""
        _ip("netns", "add", self.names[machine])
        self.ip(machine, "link", "set", "lo", "up")
        port = f"p{number}"
        self.ip("hub", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self.names[machine])
        # Addresses by hand, without duplicate address detection, so that no test waits two seconds for it
        self.ip(machine, "link", "set", "eth0", "addrgenmode", "none")
        self.ip("hub", "link", "set", port, "addrgenmode", "none")
        self.ip(machine, "link", "set", "eth0", "up")
        self.ip("hub", "link", "set", port, "up")
        if ipv4:
            self.address[machine] = f"10.231.{subnet}.{number}"
            self.ip(machine, "addr", "add", f"{self.address[machine]}/24", "dev", "eth0")
        if ipv6:
            self.link_local[machine] = f"fe80::{subnet:x}:{number:x}"
            self.ip(machine, "addr", "add", f"{self.link_local[machine]}/64", "dev", "eth0", "nodad")
        return port


def _open_hub(net: Network) -> None:
    _ip("netns", "add", net.hub)
    net.ip("hub", "link", "set", "lo", "up")


@contextmanager
def lan(*machines: str, ipv4: bool = True, ipv6: bool = True) -> Iterator[Network]:
    """Machines on one Ethernet."""
    net = Network(*machines)
    try:
        _open_hub(net)
        net.ip("hub", "link", "add", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
        net.ip("hub", "link", "set", "br0", "up")
        for number, machine in enumerate(machines, 1):
            port = net._add(machine, number, 1, ipv4, ipv6)
            net.ip("hub", "link", "set", port, "master", "br0")
        yield net
    finally:
        net.close()


@contextmanager
def routed(*machines: str) -> Iterator[Network]:
    """Machines each in an IPv4 network of its own, joined by a router that forwards no multicast."""
    net = Network(*machines)
    try:
        _open_hub(net)
        for number, machine in enumerate(machines, 1):
            port = net._add(machine, 1, 10 + number, True, False)
            net.ip("hub", "link", "set", port, "down")
            net.ip("hub", "link", "set", port, "name", f"r{number}", "up")
            net.ip("hub", "addr", "add", f"10.231.{10 + number}.254/24", "dev", f"r{number}")
            net.ip(machine, "route", "add", "default", "via", f"10.231.{10 + number}.254")
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run(["ip", "netns", "exec", net.hub, "sh", "-c", forward], check=True, timeout=_COMMAND_SECONDS)
        yield net
    finally:
        net.close()
