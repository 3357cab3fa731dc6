"""Hostile connections without end, in small: 10,000 of them, with a client that tells stories, by `tools/soak.py`."""

from __future__ import annotations

from zygote import Zygote

from tools.conformance.bench import describe
from tools.conformance.command import parse_address
from tools.conformance.soak import Soak
from tools.conformance.suite import load_cases

load_cases()


def soaked(zygote: Zygote, count: int, leak: str = "") -> list[str]:
    """What is wrong in the second half of so many connections."""
    with zygote.serve(leak, cache=4_096) as address:  # little, and so soon in use: only what is used is resident
        target = parse_address(address, b"petalite", None)
        soak = Soak(target, describe(target)[1], count, 200.0, 1, zygote.served, level_at=5, settle_seconds=3.0)
        return soak.run()


def test_a_server_is_what_it_was_after_hostile_connections(zygote: Zygote) -> None:
    assert soaked(zygote, 150) == []


def test_lost_memory_is_noticed(zygote: Zygote) -> None:
    (fault,) = soaked(zygote, 60, "remembers-every-connection")
    assert fault.startswith("memory grew by ")


def test_lost_descriptors_are_noticed(zygote: Zygote) -> None:
    (fault,) = soaked(zygote, 30, "leaves-sockets-open")
    assert " descriptors are open, " in fault
