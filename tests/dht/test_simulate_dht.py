"""The simulation in small: the same bars as the full one, and that its hash means something (spec/09, "Simulation")."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from petalite.dht.ids import number
from petalite.dht.knowledge import Knowledge
from petalite.dht.region import RegionSearch
from tools.simulate_dht import __main__ as command
from tools.simulate_dht import scenarios
from tools.simulate_dht.network import Network
from tools.simulate_dht.scenarios import Report

ROOT = Path(__file__).resolve().parent.parent.parent


def small(seed: int, *, wire: bool = False) -> str:
    network = Network(seed, wire=wire)
    members = scenarios.grow(network, 40, quiet=100.0)
    key = bytes(range(32))
    scenarios.publish(network, members[5:6], [key])
    reads = scenarios.Reads(network)
    reads.read(members[9], key, members[5])
    network.run(network.now + 10.0)
    assert reads.found == [True]
    return network.trace


def test_same_seed_same_trace_and_another_seed_another() -> None:
    assert small(1) == small(1) != small(2)


def test_trace_is_the_same_when_every_message_is_encoded_and_decoded() -> None:
    assert small(3) == small(3, wire=True)


def test_trace_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from tools.simulate_dht.scenarios import *\n"
        "network = Network(5); members = grow(network, 40, quiet=100.0); liars_of(network, members, 0.3, 5)\n"
        "look_up(network, 5, 4, members); print(network.trace)"
    )
    traces = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        traces.add(done.stdout)
    assert len(traces) == 1


def test_command_prints_figures_and_says_by_its_exit_code_whether_bars_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.QUICK, "dead", partial(scenarios.dead, nodes=40, values=5))
    assert command.main(["--json", "--seed", "3", "dead"]) == 0
    (report,) = json.loads(capsys.readouterr().out.splitlines()[-1])["scenarios"]
    assert report["passed"] and report["figures"]["found"] == 1.0 and len(report["trace"]) == 16
    bad = Report("missed", {"found": 0.5}, {"found": (">=", 0.99)})
    monkeypatch.setitem(command.QUICK, "dead", lambda seed: bad)
    assert command.main(["dead"]) == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(lambda: scenarios.healthy(1, nodes=150, lookups=60, quiet=100.0), id="healthy"),
        pytest.param(lambda: scenarios.dead(1, nodes=100, values=40), id="dead"),
        pytest.param(lambda: scenarios.churn(1, nodes=80, values=6, hours=0.5), id="churn"),
        pytest.param(lambda: scenarios.liars(1, nodes=100, values=40), id="liars"),
        pytest.param(lambda: scenarios.liars(1, nodes=100, values=15, fakes=10), id="made-up"),
    ],
)
def test_bars_hold_in_small(report: object) -> None:
    assert callable(report)
    result = report()
    assert isinstance(result, Report) and result.passed, result.figures


def eclipse(sybils: int) -> float:
    """Share of values found behind so many sybils each, ground nearer than any honest node."""
    report = scenarios.sybils(2, nodes=120, values=3, count=sybils, batch=3)
    return report.figures["found"]


def test_more_sybils_than_k_do_not_hide_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """PT-DHT-050, PT-DHT-052, PT-REC-021, with the control: without regions the same attack hides every value."""
    assert eclipse(24) == 1.0
    monkeypatch.setattr(Knowledge, "radius", lambda self, now: 0)
    monkeypatch.setattr(RegionSearch, "crowded", False)
    assert eclipse(24) == 0.0


def test_size_is_estimated_within_a_factor_of_two() -> None:
    """PT-DHT-051"""
    network = Network(4)
    members = scenarios.grow(network, 150, quiet=1500.0)
    sizes = sorted(node.core.known.size(network.now) for node in members)
    assert 100 < sizes[75] < 225 and sizes[7] > 60 and sizes[-8] < 375


def test_crowding_one_key_does_not_move_the_estimate_of_its_neighbours() -> None:
    """PT-DHT-051"""
    network = Network(6)
    members = scenarios.grow(network, 120, quiet=1500.0)
    key = bytes(32)
    neighbours = sorted(members, key=lambda node: node.core.n ^ number(key))[:10]
    scenarios._surround(network, members, key, 20)
    network.run(network.now + 30.0)
    for node in neighbours:
        assert node.core.known.size(network.now) < 300
