"""petalite passes: a reduced run. The whole: `python tests/conformance/try_out.py server` and `... client`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from zygote import Zygote

from tools.conformance.command import main

# Cases of clients start a process each: these are the ones that no other test of the client resembles.
CLIENT = ["client/001", "client/009", "client/012", "client/033", "client/052", "client/060", "client/061",
          "client/066", "client/074", "client/088", "client/092", "client/095", "client/105", "client/107"]  # fmt: skip


def run(tmp_path: Path, *arguments: str) -> list[str]:
    """What is not pass; "skipped" apart."""
    report = tmp_path / "report.json"
    code = main([*arguments[:1], "--report", str(report), "--seed", "5", *arguments[1:]])
    found = json.loads(report.read_text())
    wrong = [f"{case['id']} {case['verdict']}: {case['text']}" for case in found["cases"]
             if case["verdict"] not in ("pass", "skipped")]  # fmt: skip
    assert (code == 0) == (not [line for line in wrong if "non-strict" not in line.split(":")[0]])
    assert found["totals"].get("pass", 0) >= len(found["cases"]) - 8
    return wrong


def test_the_server_conforms(zygote: Zygote, tmp_path: Path) -> None:
    page, suite = tmp_path / "page.html", tmp_path / "junit.xml"
    with zygote.serve() as address:
        assert run(tmp_path, "server", "--quick", "--html", str(page), "--junit", str(suite), address) == []
    assert "handshake/001" in page.read_text()
    assert 'classname="handshake" name="001"' in suite.read_text()


@pytest.mark.parametrize("cases", [["handshake/*", "records/00*", "steps/00*"]])
def test_the_server_conforms_in_a_private_swarm(zygote: Zygote, tmp_path: Path, cases: list[str]) -> None:
    key = tmp_path / "key"
    key.write_text(f"petalite swarm key v1\n{'5a' * 32}\n")
    chosen = [word for case in cases for word in ("--case", case)]
    with zygote.serve(key=str(key)) as address:
        assert run(tmp_path, "server", "--quick", "--swarm-key", str(key), *chosen, address) == []


def test_the_client_conforms(zygote: Zygote, tmp_path: Path) -> None:
    chosen = [word for case in CLIENT for word in ("--case", case)]
    assert run(tmp_path, "client", *chosen, "--", *zygote.command()) == []
