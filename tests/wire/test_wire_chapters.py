"""Chapters 02, 03 and 08 say what the code does: state tables, constants, codes, and literal bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from petalite import limits
from petalite.errors import ErrorCode, GoAwayCode
from petalite.wire import frames
from petalite.wire.state import (
    DIRECTION_TRANSITIONS,
    IGNORES_LATE_FRAMES,
    STREAM_TRANSITIONS,
    DirectionEvent,
    DirectionState,
    StreamEvent,
    StreamState,
)

SPEC = Path(__file__).resolve().parents[2] / "spec"
CHAPTERS = {name: (SPEC / name).read_text() for name in ("02-frames.md", "03-requests.md", "08-errors.md")}
VECTORS = {
    vector["name"]: vector["hex"] for vector in json.loads((SPEC / "vectors" / "frames.json").read_text())["valid"]
}


def rows(chapter: str) -> list[list[str]]:
    """The cells of all table rows."""
    lines = [line for line in CHAPTERS[chapter].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def state_table(chapter: str, states: list[str]) -> dict[str, dict[str, str]]:
    """The first table whose head begins with "state"."""
    table = rows(chapter)
    head = next(row for row in table if row[0] == "state")
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in table if row[0] in states}


def test_the_table_of_streams() -> None:
    table = state_table("03-requests.md", [state.name for state in StreamState])
    for state in StreamState:
        for event in StreamEvent:
            following = STREAM_TRANSITIONS[state].get(event)
            expected = following.name if following is not None else "error"
            if state in IGNORES_LATE_FRAMES and event not in (StreamEvent.REQ, StreamEvent.REQ_END):
                expected = "ignore"  # a REQ on a used id is an id that did not rise
            assert table[state.name][event.name] == expected, (state, event)
    assert all(set(row) == {event.name for event in StreamEvent} for row in table.values())


def test_the_table_of_directions() -> None:
    table = state_table("02-frames.md", [state.name for state in DirectionState])
    for state in DirectionState:
        for event in DirectionEvent:
            following = DIRECTION_TRANSITIONS[state].get(event)
            assert table[state.name][event.name] == (following.name if following is not None else "error")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_constants_are_those_of_limits(chapter: str) -> None:
    checked = 0
    for names, values, *_ in (row for row in rows(chapter) if re.match(r"[A-Z]+_[A-Z_]+", row[0])):
        numbers = [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", values)]
        for name, number in zip(names.split(", "), numbers, strict=True):
            assert getattr(limits, name) == number, name
            checked += 1
    assert checked >= 2


def test_codes_are_those_of_the_enums() -> None:
    errors = {int(row[0]): row[1] for row in rows("08-errors.md") if row[0].isdigit()}
    assert errors == {code.value: code.name.lower() for code in ErrorCode}
    table = rows("02-frames.md")
    start = next(at for at, row in enumerate(table) if row[:2] == ["code", "name"])
    goaways = {int(row[0]): row[1].replace(" ", "_") for row in table[start + 1 :] if row[0].isdigit()}
    assert goaways == {code.value: code.name.lower() for code in GoAwayCode}
    types = {int(row[0]): row[1] for row in table[:start] if row[0].isdigit() and row[1]}
    assert types == {kind.value: kind.name for kind in frames.FrameType}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_requirements_are_numbered_once_and_say_must_or_may(chapter: str) -> None:
    lines = [line for line in CHAPTERS[chapter].splitlines() if line.startswith("**PT-")]
    ids = [re.match(r"\*\*(PT-[A-Z]{3}-\d{3})\*\* ", line) for line in lines]
    assert all(ids) and len({found[1] for found in ids if found}) == len(lines) > 10
    assert [found[1] for found in ids if found] == sorted(found[1] for found in ids if found)


def test_literal_frames_are_the_vectors() -> None:
    examples = re.findall(r"^(.+) = ((?:[0-9a-f]{2} ?)+)$", CHAPTERS["02-frames.md"], re.MULTILINE)
    assert len(examples) == 12
    for name, data in examples:
        assert VECTORS[name] == data.replace(" ", ""), name
    for _, data in re.findall(r"^(.+) = ((?:[0-9a-f]{2} ?)+)$", CHAPTERS["08-errors.md"], re.MULTILINE):
        assert isinstance(frames.decode(memoryview(bytes.fromhex(data))), frames.Err)
    for _, name, data in re.findall(
        r"^([<>]) ([A-Z]+) +((?:[0-9a-f]{2} ?)+)$", CHAPTERS["03-requests.md"], re.MULTILINE
    ):
        assert VECTORS[name] == data.replace(" ", "")
