"""Every MUST of the chapters has a case or a stated reason; every case names requirements that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from petalite import limits
from petalite.errors import ErrorCode, GoAwayCode
from petalite.wire.frames import FrameType
from tools.conformance.registry import CASES
from tools.conformance.suite import load_cases
from tools.make_first_session import made
from tools.make_requirements import SPEC, read_spec, render

load_cases()
ROOT = SPEC.parent
REQUIREMENTS = {entry["id"]: entry for entry in read_spec()}
UNTESTED = {name: entry["why"] for entry in json.loads((SPEC / "untested.json").read_text()) for name in entry["ids"]}
CONSTANTS = json.loads((SPEC / "constants.json").read_text())
COVERED = {name for case in CASES.values() for name in case.requirements}


def test_requirements_json_is_what_the_chapters_say() -> None:
    assert (SPEC / "requirements.json").read_text() == render(list(REQUIREMENTS.values())), (
        "a chapter has changed: run python tools/make_requirements.py"
    )


def test_every_must_has_a_case_or_a_reason() -> None:
    open_ = [
        f"{name} ({entry['chapter']}): {entry['text'][:100]}"
        for name, entry in REQUIREMENTS.items()
        if entry["level"] == "MUST" and name not in COVERED and name not in UNTESTED
    ]
    assert not open_, (
        "name these in a case of tools/conformance, or in spec/untested.json with the reason:\n" + "\n".join(open_)
    )


def test_no_case_names_an_unknown_requirement() -> None:
    unknown = {case.id: sorted(set(case.requirements) - set(REQUIREMENTS)) for case in CASES.values()}
    assert not {name: ids for name, ids in unknown.items() if ids}
    assert not [case.id for case in CASES.values() if not case.requirements]


def test_reasons_are_needed_and_point_to_files_that_exist() -> None:
    assert not set(UNTESTED) - set(REQUIREMENTS), "spec/untested.json names requirements that are gone"
    assert not set(UNTESTED) & COVERED, "spec/untested.json names requirements that have a case by now"
    for why in set(UNTESTED.values()):
        for place in re.findall(r"\b(?:tests|tools|spec)/[\w./]+", why):
            assert (ROOT / place.rstrip(".")).exists(), f"{place} does not exist: {why}"


def test_there_are_cases_in_both_directions() -> None:
    sides = [case.side for case in CASES.values()]
    assert len(sides) >= 150
    assert sides.count("server") >= 100
    assert sides.count("client") >= 50
    assert all(re.fullmatch(r"[a-z]+/\d{3}", name) for name in CASES)


# --- constants


def test_the_code_has_the_constants_of_the_spec() -> None:
    wrong = {
        name: (value, getattr(limits, name, None))
        for chapter in CONSTANTS["chapters"].values()
        for name, value in chapter.items()
        if getattr(limits, name, None) != value
    }
    assert not wrong, "name: (spec/constants.json, petalite/limits.py)"
    assert CONSTANTS["errors"] == {code.name.lower(): int(code) for code in ErrorCode}
    assert CONSTANTS["goaways"] == {code.name.lower(): int(code) for code in GoAwayCode}
    assert CONSTANTS["frames"] == {kind.name: int(kind) for kind in FrameType}


_ROW = re.compile(r"^\| ([A-Z][A-Z0-9_]+(?:, [A-Z][A-Z0-9_]+)*) \| ([^|]+) \|", re.MULTILINE)


def table_values(path: Path) -> list[tuple[str, int]]:
    """(name, value) of each row of a chapter's tables of constants."""
    found = []
    for names, values in _ROW.findall(path.read_text()):
        numbers = [
            int(number.replace(",", "")) for number in re.findall(r"(?<![\d.])\d[\d,]*(?![\d.,]*\d)(?!\.\d)", values)
        ]
        if len(numbers) == len(names.split(", ")) and "." not in values and "^" not in values:
            found += list(zip(names.split(", "), numbers, strict=True))
    return found


@pytest.mark.parametrize("path", sorted(SPEC.glob("[0-9][0-9]-*.md")), ids=lambda path: path.stem)
def test_the_chapters_tables_agree_with_the_constants(path: Path) -> None:
    known = {name: value for chapter in CONSTANTS["chapters"].values() for name, value in chapter.items()}
    for name, value in table_values(path):
        if name in known:
            assert known[name] == value, f"{path.name}: {name} is {value}, spec/constants.json has {known[name]}"
        elif hasattr(limits, name):
            assert getattr(limits, name) == value, f"{path.name}: {name} is {value}, petalite/limits.py has another"


def test_the_tables_are_read() -> None:
    assert dict(table_values(SPEC / "02-frames.md"))["MAX_FRAME"] == 65_519
    assert dict(table_values(SPEC / "03-requests.md"))["MAX_BODY"] == 67_108_864


# --- pages


def test_hostile_inputs_name_cases_and_tests_that_exist() -> None:
    named = re.findall(r"`([a-z]+/[^`]+)`", (SPEC / "hostile-inputs.md").read_text())
    missing = [name for name in named if name not in CASES and not (ROOT / name).exists()]
    assert not missing
    assert len(named) > 200


def test_the_first_session_is_what_the_engine_makes() -> None:
    assert json.loads((SPEC / "vectors" / "first_session.json").read_text()) == made()


def test_the_first_clients_page_shows_these_bytes() -> None:
    page = (SPEC / "first-client.md").read_text()
    session = made()
    for data in (session["preamble"], *session["handshake"], session["model"]):
        assert data in page
    for frame in session["frames"]:
        assert frame["plain"] in page
        assert frame["record"] in page


def test_links_between_pages_lead_somewhere() -> None:
    for path in SPEC.glob("*.md"):
        for place in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (SPEC / place).exists(), f"{path.name}: {place}"
