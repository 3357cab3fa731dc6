"""One verdict a fault, from findings made by hand; and no verdict without one."""

from __future__ import annotations

from collections import Counter

import pytest

from petalite.identity import Identity
from petalite.lan.announcement import Kind
from petalite.swarm.diagnosis import (
    Findings,
    Outcome,
    PeerFinding,
    Served,
    Severity,
    Wanted,
    diagnose,
    is_wrong,
)

ONE, TWO, THREE = (Identity(bytes([seed]) * 32).peer_id for seed in (1, 2, 3))
MODEL = bytes([5]) * 32
WANTED = Wanted(model=MODEL, name="tale", layers=8)


def served(start: int, end: int, state: str = "online", model: bytes = MODEL) -> Served:
    return Served(model=model, name="tale", blocks=(start, end), layers=8, state=state)


def peer(outcome: Outcome = Outcome.ANSWERED, **fields: object) -> PeerFinding:
    given = {"place": "10.0.0.2:4000", "peer": ONE, "heard": True, "served": served(0, 8), **fields}
    return PeerFinding(outcome=outcome, **given)  # type: ignore[arg-type]


def findings(*peers: PeerFinding, **fields: object) -> Findings:
    seen = Counter({Kind.OURS: len(peers)})
    return Findings(**{"peers": peers, "seen": seen, "interfaces": ("10.0.0.1",), "seconds": 4.0, **fields})  # type: ignore[arg-type]


def wrong(found: Findings) -> list[str]:
    return [verdict.code for verdict in diagnose(found) if verdict.severity is Severity.WRONG]


@pytest.mark.parametrize("wanted", [None, WANTED])
def test_a_swarm_that_works_gets_no_complaint(wanted: Wanted | None) -> None:
    found = findings(peer(), wanted=wanted)
    assert not is_wrong(diagnose(found))
    assert [v.what for v in diagnose(found)] == [
        "1 peer of this swarm on the local network",
        "tale: all 8 blocks, 1 server",
    ]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome.REFUSED, "refused_port"),
        (Outcome.NO_ROUTE, "no_route"),
        (Outcome.SILENT, "firewalled"),
        (Outcome.BROKEN, "broken"),
        (Outcome.NO_SUCH_NAME, "no_such_name"),
        (Outcome.NO_HANDSHAKE, "no_handshake"),
        (Outcome.OTHER_NETWORK, "other_network"),
        (Outcome.OTHER_VERSION, "other_version"),
        (Outcome.CLOCK, "clock_skew"),
        (Outcome.WRONG_PEER, "wrong_peer"),
        (Outcome.NOT_PETALITE, "not_petalite"),
        (Outcome.FORBIDDEN, "forbidden"),
    ],
)
def test_each_way_a_dial_can_fail_has_its_verdict(outcome: Outcome, code: str) -> None:
    assert wrong(findings(peer(outcome, served=None), asked_for_peers=True)) == [code]
    assert wrong(findings(peer(outcome, served=None, own=True))) == ["own_server_unreachable"]


def test_every_outcome_has_a_verdict_with_advice() -> None:
    for outcome in Outcome:
        if outcome is not Outcome.ANSWERED:
            verdict = diagnose(findings(peer(outcome, served=None)))[0]
            assert "10.0.0.2:4000" in verdict.what
            assert verdict.advice


def nobody(**fields: object) -> Findings:
    return findings(**fields)


@pytest.mark.parametrize(
    ("found", "codes"),
    [
        (nobody(), ["lan_silent"]),
        (nobody(lan=False), ["nowhere_to_look"]),
        (nobody(lan_problem="multicast DNS (UDP port 5353) cannot be used: address in use"), ["mdns_unavailable"]),
        (nobody(loopback_only=True), ["no_interface", "lan_silent"]),
        (nobody(seen=Counter({Kind.OTHER_NETWORK: 2})), ["other_network"]),
        (nobody(seen=Counter({Kind.OTHER_VERSION: 1})), ["other_version"]),
        (findings(peer(), seen=Counter({Kind.OURS: 1, Kind.OTHER_NETWORK: 9})), []),
        (findings(peer(near=True, heard=False), asked_for_peers=True), ["no_multicast"]),
        (findings(peer(near=True, heard=False), asked_for_peers=True, lan=False), []),
        (findings(peer(near=False, heard=False), asked_for_peers=True), []),
        (findings(peer(served=None)), ["no_server"]),
        (findings(peer(served=served(0, 4))), ["blocks_missing"]),
        (findings(peer(served=served(0, 4)), peer(served=served(4, 8, "joining"), peer=TWO)), ["blocks_loading"]),
        (findings(peer(served=served(0, 8, "draining"))), ["blocks_missing"]),
        (findings(peer(served=served(0, 8, model=bytes(32))), wanted=WANTED), ["other_checkpoint"]),
        (findings(peer(own=True, dialled_back=False)), ["own_server_firewalled"]),
        (findings(peer(own=True, dialled_back=True), own_running=(ONE,)), []),
    ],
)
def test_faults_of_the_swarm(found: Findings, codes: list[str]) -> None:
    assert wrong(found) == codes
    assert all(verdict.advice for verdict in diagnose(found) if verdict.severity is Severity.WRONG)


def test_missing_blocks_are_named() -> None:
    found = findings(peer(served=served(1, 3)), peer(served=served(5, 6), peer=TWO))
    assert diagnose(found)[0].what == "tale: no server holds blocks 0:1, 3:5, 6:8 of 8"
    assert diagnose(found)[0].advice == "start a server for them: petalite serve tale --blocks 0:1"


def test_the_clock_that_most_disagree_with_is_the_wrong_one() -> None:
    late, right = peer(skew=7200.0), peer(skew=1.0, peer=TWO)
    assert diagnose(findings(late, right))[0].what == "the clock of 10.0.0.2:4000 is 2.0 h ahead of ours"
    third = peer(skew=7190.0, peer=THREE)
    assert diagnose(findings(late, right, third))[0].what == "this machine's clock is 2.0 h behind that of most peers"
    assert wrong(findings(peer(skew=59.0))) == []
    assert wrong(findings(peer(skew=-61.0))) == ["clock_skew"]


def test_a_server_of_this_machine_that_was_not_found_is_a_note() -> None:
    verdicts = diagnose(findings(peer(), own_running=(TWO,)))
    assert [v.code for v in verdicts if v.severity is Severity.NOTE] == ["own_server_not_found"]


def test_nothing_found_and_nothing_asked_is_still_an_answer() -> None:
    assert diagnose(findings(lan=False, asked_for_peers=True)) != []
