"""Measure a server or a client of the petalite protocol against its specification (spec/README.md tells more)."""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.conformance import registry, report
from tools.conformance.bench import Keeper, describe
from tools.conformance.crypto import SwarmKey, parse_peer
from tools.conformance.link import Target
from tools.conformance.runner import Result, run_all, run_server_case
from tools.conformance.soak import Soak
from tools.conformance.suite import load_cases
from tools.conformance.verdicts import Failed


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python tools/conformance", description=__doc__)
    sides = made.add_subparsers(dest="side", required=True)
    server = sides.add_parser("server", help="test a server")
    server.add_argument("address", nargs="?", metavar="ADDRESS", help="petalite://PEER_ID@HOST:PORT")
    environment = (
        "What the client has to do comes in its environment, and what it says is JSON: see spec/first-client.md."
    )
    client = sides.add_parser("client", help="test a client: it is started once for each case", epilog=environment)
    client.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="where the test servers listen")
    client.add_argument("command", nargs="*", metavar="COMMAND", help="the client, after --")
    soak = sides.add_parser("soak", help="send a server thousands of hostile connections")
    soak.add_argument("address", metavar="ADDRESS", help="petalite://PEER_ID@HOST:PORT")
    soak.add_argument("--pid", type=int, help="the server's process here, whose memory and descriptors count")
    soak.add_argument("--connections", type=int, default=10_000, metavar="N", help="how many (%(default)s)")
    soak.add_argument("--rate", type=float, default=25.0, metavar="R", help="how many a second (%(default)s)")
    for side in (server, client, soak):
        side.add_argument("--swarm-key", type=Path, metavar="FILE", help="key file of a private swarm")
        side.add_argument("--network", default="petalite", help="network id of a public network")
        side.add_argument("--seed", type=int, help="of whatever is random")
        side.add_argument("--verbose", action="store_true", help="show transcripts, or kinds of connections")
    for side in (server, client):
        side.add_argument("--case", action="append", default=[], metavar="GLOB", help="only these cases; repeatable")
        side.add_argument("--level", choices=["must", "should"], default="should", help="must leaves out the SHOULDs")
        side.add_argument("--quick", action="store_true", help="leave out the cases that wait for clocks or cost much")
        side.add_argument("--report", type=Path, metavar="FILE", help="write a report as JSON")
        side.add_argument("--junit", type=Path, metavar="FILE", help="write a report as JUnit XML")
        side.add_argument("--html", type=Path, metavar="FILE", help="write a page")
        side.add_argument("--merge", type=Path, action="append", default=[], metavar="FILE",
                          help="further JSON reports that get a column on the page; repeatable")  # fmt: skip
        side.add_argument("--list", action="store_true", help="list the cases and end")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no case failed; 1: one did; 2: usage, or no case could be run."""
    options = parser().parse_args(arguments)
    load_cases()
    options.seed = random.randrange(2**32) if options.seed is None else options.seed
    try:
        return _soak(options) if options.side == "soak" else _cases(options)
    except (ValueError, OSError, Failed) as error:
        print(f"cannot begin: {error}", file=sys.stderr)
        return 2


def _cases(options: argparse.Namespace) -> int:
    cases = registry.select(options.side, options.case, options.level)
    if options.quick:
        cases = [case for case in cases if not case.slow and not case.long]
    if options.list:
        for case in cases:
            print(f"{case.id:<16} {case.level:<6} {case.title} [{' '.join(case.requirements)}]")
        return 0
    if not cases:
        print("no case matches", file=sys.stderr)
        return 2
    return _server(options, cases) if options.side == "server" else _client(options, cases)


def parse_address(text: str, network: bytes, key: SwarmKey | None) -> Target:
    """Raises ValueError."""
    found = re.fullmatch(r"petalite://([a-z2-7]{52})@(?:\[([^\]]+)\]|([^:]+)):(\d{1,5})", text)
    if not found:
        raise ValueError(f"{text!r} is not petalite://PEER_ID@HOST:PORT")
    peer, six, host, port = found.groups()
    return Target(six or host, int(port), parse_peer(peer), network, key)


def _network(options: argparse.Namespace) -> tuple[bytes, SwarmKey | None]:
    key = SwarmKey.load(options.swarm_key) if options.swarm_key else None
    return (key.network if key else options.network.encode()), key


def _server(options: argparse.Namespace, cases: Sequence[registry.Case]) -> int:
    if not options.address:
        raise ValueError("ADDRESS is missing")
    target = parse_address(options.address, *_network(options))
    target.connect().close()  # where nothing listens there is nothing to test
    try:
        hello, info = describe(target)
    except Failed as failure:  # every case will say so, each in its way
        hello, info = {}, None
        print(f"the target does not describe itself: {failure}")
    keeper = Keeper(target, info, options.seed)
    agent = str(hello.get("agent") or "unknown")
    print(f"target {agent!a}, seed {options.seed}, {len(cases)} cases")
    try:

        def one(case: registry.Case) -> Result:
            return run_server_case(case, target, info, options.seed, keeper)

        results = run_all(cases, one, lambda result: _show(result, options.verbose))
    finally:
        keeper.close()
    return _finish(options, results, agent, {"hello": hello, "info": info})


def _client(options: argparse.Namespace, cases: Sequence[registry.Case]) -> int:
    from tools.conformance.client.harness import Harness

    if not options.command:
        raise ValueError("COMMAND is missing: tools/conformance client [options] -- COMMAND...")
    if shutil.which(options.command[0]) is None:
        raise ValueError(f"there is no program {options.command[0]!r}")
    network, key = _network(options)
    host, _, port = options.listen.rpartition(":")
    with Harness(
        options.command, host.strip("[]"), int(port), network, key, options.swarm_key, options.seed
    ) as harness:
        print(f"client {' '.join(options.command)!a}, seed {options.seed}, {len(cases)} cases")
        results = run_all(cases, harness.run_case, lambda result: _show(result, options.verbose), workers=4)
        return _finish(options, results, harness.agent or "unknown", {"command": list(options.command)})


def _soak(options: argparse.Namespace) -> int:
    target = parse_address(options.address, *_network(options))
    hello, info = describe(target)
    print(f"target {str(hello.get('agent') or 'unknown')!a}, seed {options.seed}, {options.connections} connections")
    soak = Soak(target, info, options.connections, options.rate, options.seed, options.pid, partial(print, flush=True))
    faults = soak.run()
    if options.verbose:
        print(*(f"{count:>6} {kind}" for kind, count in sorted(soak.kinds.items())), sep="\n")
    print(*faults or ["passed"], sep="\n")
    return 1 if faults else 0


def _show(result: Result, verbose: bool) -> None:
    print(report.line(result), flush=True)
    if verbose and result.verdict in ("fail", "error"):
        for entry in result.transcript:
            print(f"{'':>12}{entry['ms']:>9} ms {entry['way']} {report.readable(entry)}")


def _finish(options: argparse.Namespace, results: Sequence[Result], agent: str, about: dict[str, Any]) -> int:
    made = report.as_json(results, options.side, options.seed, agent, _printable(about))
    if options.report:
        report.write_json(options.report, made)
    if options.junit:
        report.write_junit(options.junit, results)
    if options.html:
        others = [json.loads(path.read_text()) for path in options.merge]
        report.write_html(options.html, [made, *others])
    print(report.summary(results))
    return 0 if report.conforms(results) else 1


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
