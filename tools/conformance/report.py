"""Reports: lines for people, JSON, JUnit, and a page of agents by cases."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from tools.conformance.codec import Malformed, unpack
from tools.conformance.runner import VERDICTS, Result

VERSION = 1


def line(result: Result) -> str:
    """One line a case, two where there is something to say."""
    case = result.case
    first = f"{result.verdict:>10}  {case.id:<18} {case.title}  [{result.seconds:.1f} s]"
    return first if not result.text else f"{first}\n{'':>12}{result.text}"


def readable(entry: dict[str, Any]) -> str:
    """A transcript's entry for people: frames decoded, the rest in hexadecimal."""
    data = base64.b64decode(entry["data"])
    if entry["kind"] == "frame" and len(data) == entry["size"]:
        try:
            return ascii(unpack(data))[:160]
        except Malformed:
            pass
    return f"{entry['kind']} of {entry['size']} bytes {data.hex()[:120]}"


def summary(results: Sequence[Result]) -> str:
    """The counts, and again which cases have to be looked at."""
    counts = Counter(result.verdict for result in results)
    lines = [f"{len(results)} cases: " + _counts(counts)]
    for verdict in ("fail", "error", "non-strict"):
        if named := [result.case.id for result in results if result.verdict == verdict]:
            lines.append(f"{verdict}: {' '.join(named)}")
    return "\n".join(lines)


def conforms(results: Sequence[Result]) -> bool:
    return not any(result.verdict in ("fail", "error") for result in results)


def as_json(results: Sequence[Result], side: str, seed: int, agent: str, about: dict[str, Any]) -> dict[str, Any]:
    """The report as one object; its fields are described in spec/13-registry.md."""
    return {
        "tool": VERSION,
        "spec": 1,
        "side": side,
        "seed": seed,
        "agent": agent,
        "about": about,
        "totals": dict(Counter(result.verdict for result in results)),
        "cases": [
            {
                "id": result.case.id,
                "title": result.case.title,
                "requirements": list(result.case.requirements),
                "level": result.case.level,
                "verdict": result.verdict,
                "text": result.text,
                "ms": round(1000 * result.seconds),
                "transcript": result.transcript,
            }
            for result in results
        ],
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_junit(path: Path, results: Sequence[Result]) -> None:
    counts = Counter(result.verdict for result in results)
    rows = [
        f'<testsuite name="conformance" tests="{len(results)}" failures="{counts["fail"]}" '
        f'errors="{counts["error"]}" skipped="{counts["skipped"]}">'
    ]
    for result in results:
        group, _, number = result.case.id.rpartition("/")
        rows.append(f'<testcase classname="{group}" name="{number}" time="{result.seconds:.3f}">')
        element = {"fail": "failure", "error": "error", "skipped": "skipped"}.get(result.verdict)
        if element:
            rows.append(f"<{element} message={quoteattr(result.text)}>{escape(result.case.title)}</{element}>")
        rows.append("</testcase>")
    path.write_text("\n".join([*rows, "</testsuite>", ""]))


_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Conformance</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 2px 8px; border: 1px solid #ddd; text-align: left; vertical-align: top; }}
thead th {{ position: sticky; top: 0; background: #fff; }}
.pass {{ background: #d9f2d9; }} .fail, .error {{ background: #f7c9c9; }} .non-strict {{ background: #fff2c6; }}
.skipped {{ color: #777; }} pre {{ max-width: 60em; white-space: pre-wrap; }}
</style>
<h1>Conformance</h1>
<p>{summary}</p>
<table><thead><tr><th>case</th><th>what it tests</th>{agents}</tr></thead>
<tbody>
{rows}
</tbody></table>
"""


def write_html(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    """One page, a column an agent and a row a case; each failure unfolds to its transcript."""
    columns = [{case["id"]: case for case in report["cases"]} for report in reports]
    known = {case["id"]: case for column in columns for case in column.values()}
    rows = []
    for name in sorted(known):
        title = f"{html.escape(known[name]['title'])}<br><small>{' '.join(known[name]['requirements'])}</small>"
        cells = "".join(_cell(column.get(name)) for column in columns)
        rows.append(f'<tr><th id="{name}">{name}</th><td>{title}</td>{cells}</tr>')
    agents = "".join(f"<th>{html.escape(report['agent'])}<br>{report['side']}</th>" for report in reports)
    text = "; ".join(f"{report['agent']}: {_counts(report['totals'])}" for report in reports)
    path.write_text(_PAGE.format(summary=html.escape(text), agents=agents, rows="\n".join(rows)))


def _counts(totals: Mapping[str, int]) -> str:
    return ", ".join(f"{totals.get(word, 0)} {word}" for word in VERDICTS)


def _cell(case: dict[str, Any] | None) -> str:
    if case is None:
        return "<td></td>"
    inside = html.escape(case["verdict"])
    if case["text"]:
        rows = [f"{entry['ms']:>9} ms {entry['way']} {readable(entry)}" for entry in case["transcript"]]
        log = f"<pre>{html.escape(chr(10).join(rows))}</pre>" if rows else ""
        inside = f"<details><summary>{inside}</summary>{html.escape(case['text'])}{log}</details>"
    return f'<td class="{case["verdict"]}">{inside}</td>'
