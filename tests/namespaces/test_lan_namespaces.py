"""Discovery between machines apart: found, not found, lied to, killed (spec/11)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from petalite.identity import Identity
from tests.namespaces.network import Network, lan, routed
from tests.namespaces.processes import ENVIRONMENT, Lines, start_lan_peer

IDS = [Identity(bytes([seed]) * 32).peer_id.text for seed in range(8)]
KEY = bytes(range(32)).hex()


def found(peer: str | None) -> object:
    return lambda line: line["event"] == "hint" and line["peer"] == peer and line["addresses"]


def withdrawn(line: dict[str, object]) -> bool:
    return line["event"] == "hint" and not line["addresses"]


def hints(lines: list[dict[str, object]]) -> list[object]:
    """Whom the hints are about; the same one comes again when an address was heard later than the others."""
    return list(dict.fromkeys(line["peer"] for line in lines if line["event"] == "hint" and line["addresses"]))


@pytest.mark.parametrize("versions", ["both", "ipv4", "ipv6"])
def test_two_machines_find_each_other_and_notice_a_goodbye(versions: str) -> None:
    with lan("a", "b", ipv4=versions != "ipv6", ipv6=versions != "ipv4") as net:
        one = start_lan_peer(net, "a", "1", "--port", "4001")
        two = start_lan_peer(net, "b", "2", "--port", "4002")
        assert one.event("started")["seconds"] < 0.5  # before anything was sent
        seen = two.wait_for(found(IDS[1]), 10.0)
        expected = [[net.address.get("a"), 4001], [f"{net.link_local.get('a')}%eth0", 4001]]
        keep = {"both": expected, "ipv4": expected[:1], "ipv6": expected[1:]}[versions]
        assert seen["addresses"] == keep
        one.wait_for(found(IDS[2]), 10.0)
        started = time.monotonic()
        ended = one.finish()
        assert ended[-1]["seconds"] < 2.0
        assert two.wait_for(withdrawn, 5.0)["peer"] == IDS[1]
        assert time.monotonic() - started < 4.0
        assert hints(two.finish()) == [IDS[1]]  # itself is no hint


def test_machines_on_networks_apart_do_not_find_each_other() -> None:
    with routed("a", "b") as net:
        one = start_lan_peer(net, "a", "1", "--port", "4001")
        two = start_lan_peer(net, "b", "2", "--port", "4002")
        one.event("registered")
        two.event("registered")
        time.sleep(1.0)  # time to be wrong in
        assert hints(one.finish()) == hints(two.finish()) == []


def test_swarms_on_one_lan_keep_apart_and_a_private_one_shows_its_tag_only() -> None:
    with lan("a", "b", "c") as net:
        private = start_lan_peer(net, "a", "1", "--port", "4001", "--swarm-key", KEY)
        public = start_lan_peer(net, "b", "2", "--port", "4002")
        member = start_lan_peer(net, "c", "3", "--swarm-key", KEY)
        seen = member.wait_for(found(None), 10.0)
        assert seen["addresses"][0] == [net.address["a"], 4001]
        assert IDS[1][:8] not in seen["instance"]
        public.event("registered")
        time.sleep(0.3)  # its own announcement and the private one come at about the same time
        lines = public.finish()
        assert hints(lines) == []
        assert "other network" in {line.get("kind") for line in lines}
        assert private.finish()[-1]["problem"] == ""
        assert hints(member.finish()) == [None]


def test_a_killed_peer_is_forgotten_when_its_time_is_over() -> None:
    with lan("a", "b") as net:
        one = start_lan_peer(net, "a", "1", "--port", "4001")
        two = start_lan_peer(net, "b", "2", "--lifetime", "3")
        two.wait_for(found(IDS[1]), 10.0)
        two.wait_for(found(IDS[1]), 10.0)  # asked again in time, and there
        one.process.kill()
        assert two.wait_for(withdrawn, 8.0)["peer"] == IDS[1]
        two.finish()


def test_a_new_address_is_used_and_published(tmp_path: Path) -> None:
    with lan("a", "b") as net:
        net.ip("a", "addr", "flush", "dev", "eth0")
        one = start_lan_peer(net, "a", "1", "--port", "4001")
        two = start_lan_peer(net, "b", "2")
        one.event("registered")  # on loopback, as there is nothing else
        net.ip("a", "addr", "add", "10.231.1.77/24", "dev", "eth0")
        assert two.wait_for(found(IDS[1]), 15.0)["addresses"] == [["10.231.1.77", 4001]]
        net.ip("a", "link", "del", "eth0")
        time.sleep(0.5)
        assert one.finish()[-1]["seconds"] < 2.5
        two.finish()


# What a liar on the network may say: script for `python -c`, which publishes until its stdin closes
LIAR = """
import sys, zeroconf
zc = zeroconf.Zeroconf(interfaces=[sys.argv[1]])
kind = "_petalite._tcp.local."
good = bytes.fromhex(sys.argv[2])
lies = {
    "spoofed": (good, ["8.8.8.8", "127.0.0.1", "224.0.0.251", sys.argv[1]], 4001, 120),
    "nowhere": (good, ["8.8.8.8", "127.0.0.1", "0.0.0.0"], 4001, 120),
    "long": ((b"\\xff" + b"x" * 255) * 30, [sys.argv[1]], 4001, 120),
    "rubbish": (b"\\xffv=" + b"\\xff" * 253, [sys.argv[1]], 4001, 120),
    "no port": (good, [sys.argv[1]], 0, 120),
    "eternal": (good, [sys.argv[1]], 4009, 2**31 - 1),
    "b\\u00e4d \\U0001f600": (good, [sys.argv[1]], 4010, 120),
}
for name, (txt, addresses, port, ttl) in lies.items():
    info = zeroconf.ServiceInfo(kind, name + "." + kind, port=port, properties=txt, parsed_addresses=addresses,
                                server=f"host-{port}-{len(addresses)}-{ttl}.local.", host_ttl=ttl, other_ttl=ttl)
    zc.register_service(info, cooperating_responders=True, strict=False)
print('{"event": "lied"}', flush=True)
sys.stdin.read()
import os; os._exit(0)
"""


def test_lies_are_ignored_or_passed_on_as_the_hints_they_are() -> None:
    spoofed = bytes([55]) + b"id=" + IDS[5].encode() + b"\x03v=1\x0cnet=44502574"
    with lan("a", "b") as net:
        honest = start_lan_peer(net, "b", "2", "--lifetime", "4")
        honest.event("started")
        liar = Lines(
            net.popen("a", sys.executable, "-c", LIAR, net.address["a"], spoofed.hex(), env=ENVIRONMENT)
        )  # fmt: skip
        liar.event("lied", 20.0)
        first = honest.wait_for(lambda line: line["event"] == "hint" and line["instance"] == "eternal", 10.0)
        assert first["addresses"] == [[net.address["a"], 4009]]
        honest.wait_for(lambda line: line["event"] == "hint" and "b" in line["instance"][:1], 10.0)
        liar.finish()
        gone = honest.wait_for(lambda line: withdrawn(line) and line["instance"] == "eternal", 20.0)
        assert gone["peer"] == IDS[5]
        lines = honest.finish()
    given = {line["instance"]: line["addresses"] for line in reversed(lines) if line["event"] == "hint"}
    assert given["spoofed"] == [[net.address["a"], 4001]]
    assert not {"nowhere", "long", "rubbish", "no port"} & set(given)


def test_a_peer_on_the_same_machine_is_found_without_any_network() -> None:
    net: Network
    with lan("a") as net:
        net.ip("a", "link", "set", "eth0", "down")
        net.ip("a", "addr", "flush", "dev", "eth0")
        one = start_lan_peer(net, "a", "1", "--port", "4001")
        two = start_lan_peer(net, "a", "2")
        assert two.wait_for(found(IDS[1]), 10.0)["addresses"] == [["127.0.0.1", 4001]]
        one.finish()
        two.finish()
