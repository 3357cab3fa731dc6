"""`python tools/simulate_dht [--quick | --full] [--seed N] [--json] [NAME...]`: run the scenarios, print figures as
a table.

Exit code 1 if a figure misses its bar. The same seed gives the same trace hashes, on every machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: python tools/simulate_dht
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tools.simulate_dht import scenarios
from tools.simulate_dht.scenarios import Report

Scenario = Callable[[int], Report]

QUICK: dict[str, Scenario] = {
    "healthy": partial(scenarios.healthy, nodes=200, lookups=100),
    "dead": partial(scenarios.dead, nodes=200, values=50),
    "churn": partial(scenarios.churn, nodes=100, values=10, hours=1.0),
    "liars": partial(scenarios.liars, nodes=200, values=50),
    "made-up": partial(scenarios.liars, nodes=200, values=30, fakes=10),
    "sybils": partial(scenarios.sybils, nodes=200, values=10),
}
FULL: dict[str, Scenario] = {
    "healthy": scenarios.healthy,
    "dead": scenarios.dead,
    "liars": scenarios.liars,
    "made-up": partial(scenarios.liars, fakes=10),
    "sybils": scenarios.sybils,
    "large": partial(scenarios.healthy, nodes=10_000, spacing=0.02, quiet=0.0),
    "churn": scenarios.churn,
}
_NOTES = {
    "nearest": "share of lookups that found the nearest live peer (full sort)",
    "recall": "share of the 20 nearest live peers found",
    "found": "share of reads that found the value",
    "quorum": "share of reads answered from 3 or more subnets",
    "holders": "peers that hold a value after one write",
    "size p5": "estimated over true network size; p50, p95 alike",
    "p50": "seconds of virtual time of a lookup; p95 alike",
}


def run(chosen: dict[str, Scenario], seed: int) -> list[Report]:
    """Run the scenarios one after the other; the cycle collector waits, since millions of live objects only
    slow it.
    """
    reports = []
    for scenario in chosen.values():
        gc.disable()
        started = time.perf_counter()
        report = scenario(seed)
        report.seconds = time.perf_counter() - started
        reports.append(report)
        print(f"{report.name}: {report.seconds:.0f} s", file=sys.stderr)
        gc.enable()
        gc.collect()
    return reports


def table(reports: list[Report]) -> str:
    lines = []
    for report in reports:
        verdict = "ok" if report.passed else "MISSED"
        lines.append(f"{report.name}  [{verdict}, {report.seconds:.0f} s, trace {report.trace}]")
        for name, value in report.figures.items():
            shown = f"{value:.3f}".rstrip("0").rstrip(".")
            bar = f"  bar {report.bars[name][0]} {report.bars[name][1]}" if name in report.bars else ""
            lines.append(f"  {name:<14} {shown:>10}{bar}")
    lines += ["", *(f"{name}: {note}" for name, note in _NOTES.items())]
    lines.append("Signatures are a stand-in (SHA-256); ids are hashes of random keys; RTT 20 ms + exponential 60 ms;")
    lines.append("a dead peer is silence; nothing else is simplified.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="simulate_dht", description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="100 to 200 nodes, under a minute (the default)")
    size.add_argument("--full", action="store_true", help="1,000 nodes each and 10,000 once: about half an hour")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object as the last line instead of the table")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of: {', '.join(FULL)}")
    options = parser.parse_args(arguments)
    scenario_set = FULL if options.full else QUICK
    unknown = set(options.names) - set(scenario_set)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are: {', '.join(scenario_set)}")
    chosen = {name: scenario_set[name] for name in scenario_set if not options.names or name in options.names}
    reports = run(chosen, options.seed)
    if options.json:
        made = [
            {"name": r.name, "passed": r.passed, "figures": r.figures, "trace": r.trace, "seconds": round(r.seconds, 1)}
            for r in reports
        ]
        print(json.dumps({"seed": options.seed, "scenarios": made}))
    else:
        print(table(reports))
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
