"""`python tools/simulate_sessions [--runs N] [--seed S] | --matrix [--tokens T] [--kinds K,K] [--every E]`

Without arguments 500 seeded runs. Exit code 1 if a text came out wrong, a step hung, or something was left behind; each
wrong run names its seed or case, which repeats it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: python tools/simulate_sessions
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from tools.simulate_sessions.faults import FAULTS
from tools.simulate_sessions.matrix import REQUIRED, all_cases, judge, run_case
from tools.simulate_sessions.runs import Report, make_parts, run_seeds
from tools.simulate_sessions.world import load_parts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/simulate_sessions", description=__doc__)
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="seeded runs (default 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="first seed (default 0)")
    parser.add_argument("--trace", action="store_true", help="print what happened in each run")
    parser.add_argument("--matrix", action="store_true", help="every token, hop and fault on the embedded model")
    parser.add_argument("--tokens", type=int, default=20, metavar="T", help="tokens of the matrix (default 20)")
    parser.add_argument("--kinds", default=",".join(REQUIRED), help=f"faults of the matrix, of {','.join(FAULTS)}")
    parser.add_argument("--every", type=int, default=1, metavar="E", help="each E-th case only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.matrix:
        return _matrix(arguments.tokens, arguments.kinds.split(","), arguments.every)
    return _runs(arguments.seed, arguments.runs, arguments.trace)


def _runs(first: int, count: int, trace: bool) -> int:
    started = time.monotonic()
    total: Counter[str] = Counter()

    def told(report: Report) -> None:
        total.update(
            steps=report.steps, faults=report.faults, failovers=report.failovers, replayed=report.replayed,
            cut=report.cut_short, without=report.without_server,
        )  # fmt: skip
        if report.problem:
            print(f"seed {report.seed}: {report.problem}", flush=True)
        if trace:
            print("\n".join(f"  {line}" for line in report.trace))
        done = report.seed - first + 1
        if done % 500 == 0:
            print(f"{done} runs, {time.monotonic() - started:.0f} s", flush=True)

    wrong = run_seeds(make_parts(), first, count, told)
    print(
        f"{count} runs from seed {first}: {total['steps']} steps, {total['cut']} cut short by their caller, "
        f"{total['without']} without a server before its deadline, {total['faults']} faults, "
        f"{total['failovers']} failovers, {total['replayed']} tokens replayed, {len(wrong)} wrong; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if wrong else 0


def _matrix(tokens: int, kinds: list[str], every: int) -> int:
    started = time.monotonic()
    parts = load_parts()
    undisturbed = run_case(parts, None, tokens)
    wrong = count = absent = 0
    for case in list(all_cases(tokens, kinds))[::every]:
        verdict = run_case(parts, case, tokens)
        problem = judge(verdict, undisturbed.told)
        count += 1
        absent += not verdict.happened
        if problem:
            wrong += 1
            print(f"{case}: {problem}", flush=True)
        if count % 200 == 0:
            print(f"{count} cases, {time.monotonic() - started:.0f} s", flush=True)
    print(
        f"{count} cases of {tokens} tokens, {absent} without an occasion for the fault, {wrong} wrong; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
