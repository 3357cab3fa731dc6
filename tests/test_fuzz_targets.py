"""The fuzz targets over their seeds and near misses of them, within bounded memory; and a short run of the fuzzer."""

from __future__ import annotations

import importlib.util
import os
import tracemalloc
from pathlib import Path

import pytest

from fuzz import coverage, run, seeds, targets

# One input costs no more than 10 MiB (PT-MSG-022); whole connections reserve 1 MiB of bodies at most besides.
BOUND = 10 * 2**20
SECONDS = 2 if os.environ.get("CI") else 1


@pytest.mark.parametrize("name", targets.NAMES)
def test_target_holds_over_seeds_and_near_misses(name: str) -> None:
    target = targets.find(name)
    inputs = seeds.near_misses(name, 60 if name in ("connection", "whole_connection", "handshake", "manifest") else 500)
    target(inputs[0])  # what is made once is nobody's fault
    tracemalloc.start()
    try:
        for data in inputs:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            target(data)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < BOUND, f"{peak - before} bytes for {data[:64].hex()}"
    finally:
        tracemalloc.stop()


# What the seeds alone must reach: a target that stops at its first check finds nothing, and shows here.
REACHED = {
    "packing": ("wire/packing.py", 0.3),
    "frames": ("wire/frames.py", 0.75),
    "repeats": ("wire/repeats.py", 0.8),
    "certificate": ("wire/certificate.py", 0.5),
    "tensors": ("wire/tensors.py", 0.6),
    "messages": ("wire/messages.py", 0.6),
    "dht_records": ("dht/records.py", 0.7),
    "dht_messages": ("dht/messages.py", 0.7),
    "txt": ("lan/announcement.py", 0.5),
    "handshake": ("wire/handshake.py", 0.8),
    "records": ("wire/records.py", 0.4),
    "connection": ("wire/connection.py", 0.7),
    "whole_connection": ("wire/replier.py", 0.7),
}


@pytest.mark.parametrize("name", REACHED)
def test_seeds_reach_the_decoder(name: str) -> None:
    module, share = REACHED[name]
    known = {line for line in coverage.all_lines() if line[0] == module}
    found = coverage.reached(name, seeds.of(name)) & known
    assert len(found) >= share * len(known), sorted(line for _, line in known - found)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not published for this machine")
@pytest.mark.parametrize("name", targets.NAMES)
def test_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    outcome = run.fuzz(name, tmp_path / "corpus", seconds=SECONDS)
    assert outcome.code == 0, outcome
    assert outcome.inputs > 0


def test_a_finding_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import decoders
    from petalite.wire import packing

    monkeypatch.setattr(packing, "decode", lambda *args, **kwargs: {}["a bug"])
    with pytest.raises(KeyError):
        decoders.fuzz_packing(b"\xc0")
    answers = iter((1, 2))
    monkeypatch.setattr(packing, "decode", lambda *args, **kwargs: next(answers))
    with pytest.raises(decoders.Finding):
        decoders.fuzz_packing(b"\x01")
