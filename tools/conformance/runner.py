"""Runs cases one after the other, those that only wait for clocks beside them, and gives each its verdict."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tools.conformance.bench import Bench, Keeper
from tools.conformance.link import Target
from tools.conformance.registry import Case
from tools.conformance.verdicts import Failed, Skipped

VERDICTS = ("pass", "fail", "non-strict", "skipped", "error")


@dataclass
class Result:
    case: Case
    verdict: str
    text: str = ""
    seconds: float = 0.0
    transcript: list[dict[str, Any]] = field(default_factory=list)


def judge(case: Case, run: Callable[[], list[str]]) -> Result:
    """Run a case; `run` returns the SHOULDs that were missed."""
    started = time.monotonic()
    try:
        misses = run()
        verdict, text = ("non-strict", "; ".join(misses)) if misses else ("pass", "")
    except Skipped as reason:
        verdict, text = "skipped", str(reason)
    except Failed as failure:
        verdict, text = ("fail" if case.level == "must" else "non-strict"), str(failure)
    except Exception as error:  # noqa: BLE001 - a fault of the tool or of its surroundings: shown as such, and the run goes on
        last = traceback.extract_tb(error.__traceback__)[-1]
        verdict, text = "error", f"{type(error).__name__}: {error} ({last.name}, line {last.lineno})"
    return Result(case, verdict, text, time.monotonic() - started)


def run_server_case(case: Case, target: Target, info: dict[str, Any] | None, seed: int, keeper: Keeper) -> Result:
    """One case, then the probe: a target that reacts rightly and is dead after it has failed."""
    bench = Bench(target, info, random.Random(f"{seed} {case.id}"))

    def run() -> list[str]:
        wanted = "private" if target.swarm_key else "public"
        if case.network not in ("any", wanted):
            raise Skipped(f"for {case.network} networks only")
        try:
            case.run(bench)
        finally:
            bench.close()
        try:
            keeper.probe()
        except Failed as failure:
            raise Failed(f"the server does not go on after this case: {failure}") from None
        return bench.misses

    result = judge(case, run)
    if result.verdict != "pass":
        result.transcript = bench.transcript.entries
    return result


def run_all(
    cases: Sequence[Case], one: Callable[[Case], Result], report: Callable[[Result], None], workers: int = 8
) -> list[Result]:
    """All results in the order of `cases`. Slow cases share a pool of threads; the others run in order meanwhile."""
    results: dict[str, Result] = {}
    lock = threading.Lock()

    def run(case: Case) -> None:
        result = one(case)
        with lock:
            results[case.id] = result
            report(result)

    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(run, case) for case in cases if case.slow]
        for case in cases:
            if not case.slow:
                run(case)
        for future in waiting:
            future.result()
    return [results[case.id] for case in cases]
