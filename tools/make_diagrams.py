"""`python tools/make_diagrams.py [--check]`: draw the state tables of the code into the chapters that show them.

A chapter says where: between `<!-- diagram: NAME -->` and `<!-- end diagram -->`, where NAME is one of TABLES. Each
is a Mermaid picture, and for tables with refusals a grid of what every event does in every state.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from petalite.client.hop import HOP_TRANSITIONS
from petalite.server.state import SESSION_REFUSALS, SESSION_TRANSITIONS
from petalite.wire.state import DIRECTION_TRANSITIONS, STREAM_TRANSITIONS

SPEC = Path(__file__).resolve().parents[1] / "spec"
Table = Mapping[Any, Mapping[Any, Any]]
TABLES: dict[str, tuple[Table, Table | None]] = {
    "stream": (STREAM_TRANSITIONS, None),
    "direction": (DIRECTION_TRANSITIONS, None),
    "hop": (HOP_TRANSITIONS, None),
    "session": (SESSION_TRANSITIONS, SESSION_REFUSALS),
}
_MARKED = re.compile(r"(<!-- diagram: (\w+) -->\n).*?(<!-- end diagram -->)", re.DOTALL)


def picture(transitions: Table) -> str:
    """A Mermaid state diagram; events between the same two states share an arrow, those that stay are left out."""
    arrows: dict[tuple[IntEnum, IntEnum], list[str]] = {}
    for state, events in transitions.items():
        for event, following in events.items():
            if following is not state:
                arrows.setdefault((state, following), []).append(_word(event))
    lines = [f"    {a.name} --> {b.name}: {', '.join(words)}" for (a, b), words in arrows.items()]
    first = next(iter(transitions))
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}", *lines, "```"])


def grid(transitions: Table, refusals: Table) -> str:
    """A row an event, a column a state: the state after it, or the error; "-" where it cannot happen."""
    states = list(transitions)
    events = [event for event in type(next(iter(next(iter(transitions.values()))))) if _used(event, transitions)]
    lines = [_row(["event", *(state.name for state in states)]), _row(["---"] * (len(states) + 1))]
    for event in events:
        cells = [_word(event)]
        for state in states:
            following, code = transitions[state].get(event), refusals[state].get(event)
            cells.append(following.name if following else code.name.lower() if code else "-")
        lines.append(_row(cells))
    return "\n".join(lines)


def _used(event: IntEnum, transitions: Table) -> bool:
    return any(event in events for events in transitions.values())


def _word(event: IntEnum) -> str:
    return event.name.lower().replace("_", " ")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def drawn(text: str) -> str:
    """A chapter's text with its diagrams as the code has them. KeyError for a name that is none of TABLES."""

    def replace(match: re.Match[str]) -> str:
        transitions, refusals = TABLES[match[2]]
        parts = [picture(transitions), *([grid(transitions, refusals)] if refusals else [])]
        return match[1] + "\n" + "\n\n".join(parts) + "\n\n" + match[3]

    return _MARKED.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/make_diagrams.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a chapter differs")
    check = parser.parse_args().check
    stale = 0
    for path in sorted(SPEC.glob("*.md")):
        text = path.read_text()
        new = drawn(text)
        if new != text:
            stale += 1
            print(f"{'differs' if check else 'drawn'}: {path.name}")
            if not check:
                path.write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
