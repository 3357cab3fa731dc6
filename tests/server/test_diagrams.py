"""The chapters show the state tables that the code runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalite.server.state import SESSION_REFUSALS, SESSION_TRANSITIONS
from tools.make_diagrams import TABLES, drawn, grid, picture

SPEC = Path(__file__).resolve().parents[2] / "spec"


@pytest.mark.parametrize("path", sorted(SPEC.glob("*.md")), ids=lambda path: path.name)
def test_chapters_are_drawn_from_the_tables(path) -> None:
    assert drawn(path.read_text()) == path.read_text(), "run python tools/make_diagrams.py"


def test_the_session_table_is_shown() -> None:
    assert "<!-- diagram: session -->" in (SPEC / "07-sessions.md").read_text()


def test_a_diagram_has_every_transition_and_every_refusal() -> None:
    shown = grid(SESSION_TRANSITIONS, SESSION_REFUSALS)
    assert "| open | OPENED | OPENED | FIRST | conflict | conflict | - |" in shown
    assert "| step | no_session | FIRST | out_of_order | RUNNING | out_of_order | - |" in shown
    for transitions, _ in TABLES.values():
        drawn_arrows = picture(transitions)
        for state, events in transitions.items():
            for event, following in events.items():
                line = next((a for a in drawn_arrows.splitlines() if f" {state.name} --> {following.name}:" in a), "")
                assert state is following or event.name.lower().replace("_", " ") in line
