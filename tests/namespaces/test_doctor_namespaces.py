"""Faults that only a network can have, and what `petalite doctor` says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.namespaces.network import Network, lan, routed
from tests.namespaces.processes import ENVIRONMENT, Lines


def bootstrap(net: Network, machine: str, state: Path, *words: str) -> str:
    """Start a node without a model; its address on the network."""
    command = ("-m", "petalite", "bootstrap", "--json", *words)
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(state / machine)}
    ready = Lines(net.popen(machine, sys.executable, *command, env=environment)).wait_for(lambda x: x["ready"], 30.0)
    return next(text for text in ready["addresses"] if "@10." in text)


def doctor(net: Network, machine: str, state: Path, *words: str) -> list[str]:
    """The codes of what is wrong."""
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(state / machine)}
    command = ("-m", "petalite", "doctor", "--json", "--seconds", "1", *words)
    done: subprocess.CompletedProcess[str] = net.run(machine, sys.executable, *command, env=environment)
    assert done.stdout, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if said["wrong"] else 0)
    assert done.stderr == "" or done.stderr.startswith("petalite: ")
    return [verdict["code"] for verdict in said["verdicts"] if verdict["severity"] == "wrong"]


def test_doctor_tells_the_faults_of_one_lan(tmp_path: Path) -> None:
    with lan("a", "b", ipv6=False) as net:
        assert doctor(net, "a", tmp_path) == ["lan_silent"]
        address = bootstrap(net, "b", tmp_path)
        assert doctor(net, "a", tmp_path) == ["no_server"]  # found, but it has no model
        # The switch floods no multicast to b: unicast alone passes
        for port in ("p1", "p2"):
            net.ip("hub", "link", "set", port, "type", "bridge_slave", "mcast_flood", "off")
        net.ip("hub", "link", "set", "br0", "type", "bridge", "mcast_snooping", "1")
        assert doctor(net, "a", tmp_path) == ["lan_silent"]
        assert doctor(net, "a", tmp_path, "--peer", address) == ["no_multicast", "no_server"]
        assert doctor(net, "a", tmp_path, "--network", "elsewhere", "--peer", address) == ["other_network"]
        # b's answers go nowhere, as behind a firewall that drops
        net.ip("b", "route", "add", "blackhole", f"{net.address['a']}/32")
        assert doctor(net, "a", tmp_path, "--peer", address) == ["firewalled"]
        net.ip("a", "link", "set", "eth0", "down")
        assert doctor(net, "a", tmp_path, "--peer", address) == ["no_interface", "no_route"]


def test_doctor_finds_that_this_machines_own_server_cannot_be_dialled(tmp_path: Path) -> None:
    with routed("a", "b") as net:
        own = bootstrap(net, "a", tmp_path)
        other = bootstrap(net, "b", tmp_path, "--peer", own)
        words = ("--no-lan", "--peer", own, "--peer", other)
        assert doctor(net, "a", tmp_path, *words) == ["no_server"]
        # Outgoing connections come through, incoming ones do not: what listens on 31337 answers others into nothing
        net.ip("a", "rule", "add", "sport", "31337", "ipproto", "tcp", "to", "10.231.12.0/24", "blackhole")
        assert doctor(net, "a", tmp_path, *words) == ["own_server_firewalled", "no_server"]
