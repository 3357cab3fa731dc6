"""Fuzz petalite's decoders and connections.

    python fuzz/run.py [TARGET...] [--seconds 60]    the targets share the time: what CI does
    python fuzz/run.py [TARGET...] --long            10^6 inputs a decoder, 10^5 a whole connection, and what they reach
    python fuzz/run.py TARGET --input FILE           one input again

A finding is written to fuzz/findings/ and makes the exit code 1. The inputs are guided by coverage, for which atheris
is needed (a development dependency); each target runs in a process of its own, whose memory is limited.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fuzz import coverage, seeds, targets  # noqa: E402 - only after the path

FINDINGS = ROOT / "fuzz" / "findings"
CORPUS = ROOT / "fuzz" / "corpus"
DECODER_RUNS, CONNECTION_RUNS = 1_000_000, 100_000
CONNECTIONS = ("handshake", "connection", "whole_connection")  # thousands of times the work of a decoder
HUNG_SECONDS = 120  # for one input, by the clock: other programs take their time too; the engine counts CPU time
MAX_INPUT = {
    "records": 600,
    "manifest": 20_000,
    "packing": 70_000,
    "frames": 70_000,
}  # else 4,096: longer inputs say little new


@dataclass(frozen=True)
class Outcome:
    target: str
    inputs: int
    seconds: int
    code: int
    log: str

    def __str__(self) -> str:
        if self.code:
            tail = "\n".join(self.log.splitlines()[-40:])
            return f"{self.target}: FINDING, exit code {self.code}; the input is in {FINDINGS}\n{tail}"
        return f"{self.target}: {self.inputs:,} inputs in {self.seconds} s, {self.inputs / max(1, self.seconds):,.0f}/s"


def fuzz(name: str, corpus: Path, *, seconds: int = 0, runs: int = -1) -> Outcome:
    """Fuzz one target for so long or so many inputs, whichever is over first; `corpus` gets what was worth keeping."""
    FINDINGS.mkdir(exist_ok=True)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds.of(name)):
        (corpus / f"seed-{number:04}").write_bytes(data)
    flags = [f"-max_total_time={seconds}", f"-runs={runs}", f"-max_len={MAX_INPUT.get(name, 4_096)}"]
    flags += [f"-timeout={HUNG_SECONDS}", "-rss_limit_mb=4096", "-seed=1", f"-artifact_prefix={FINDINGS / name}-"]
    command = [sys.executable, str(ROOT / "fuzz" / "engine.py"), name, *flags, str(corpus)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = done.stderr.decode("utf-8", "replace")
    end = re.search(r"^Done (\d+) (?:runs )?in (\d+) second", log, re.M)
    inputs, took = (int(text) for text in end.groups()) if end else (0, 0)
    return Outcome(name, inputs, took, done.returncode or int(end is None), log)


def corpus_coverage(names: list[str], corpus: Path) -> list[str]:
    found: coverage.Lines = set()
    for name in names:
        found |= coverage.reached(name, (path.read_bytes() for path in sorted((corpus / name).iterdir())))
    return coverage.report(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets.NAMES)}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for all of them together")
    parser.add_argument("--long", action="store_true", help="count inputs, not seconds, and keep the corpus")
    parser.add_argument("--runs", type=int, help="with --long: so many inputs a target")
    parser.add_argument("--input", type=Path, metavar="FILE")
    given = parser.parse_args()
    names = given.targets or list(targets.NAMES)
    if unknown := set(names) - set(targets.NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if given.input:
        targets.find(names[0])(given.input.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed here; the test suite runs every target over its seeds all the same")
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = CORPUS if given.long else Path(scratch)
        for name in names:
            runs = given.runs or (CONNECTION_RUNS if name in CONNECTIONS else DECODER_RUNS)
            limit = {"runs": runs} if given.long else {"seconds": max(1, given.seconds // len(names))}
            outcomes.append(fuzz(name, corpus / name, **limit))
            print(outcomes[-1], flush=True)
        if given.long:
            print(*corpus_coverage(names, corpus), sep="\n")
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
