"""`python tools/make_requirements.py [--check]`: spec/requirements.json, made from the chapters' numbered sentences.

A normative sentence begins a line with its id, bold or not (`**PT-FRM-012** ...` or `PT-MSG-001 ...`), and ends with
its paragraph. Its level is the first word of RFC 2119 in it; sentences without one state a fact that others rest on.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

SPEC = Path(__file__).resolve().parents[1] / "spec"
TARGET = SPEC / "requirements.json"
_SENTENCE = re.compile(r"^(?:\*\*)?(PT-[A-Z0-9]+-\d+)(?:\*\*)? +(.*)$")
_LEVEL = re.compile(r"\b(MUST NOT|MUST|SHOULD NOT|SHOULD|MAY)\b")


def read_chapter(path: Path) -> list[dict[str, str]]:
    """The requirements of one chapter, in its order."""
    found: list[dict[str, str]] = []
    open_paragraph = False
    for line in path.read_text().splitlines():
        match = _SENTENCE.match(line)
        if match:
            found.append({"id": match[1], "chapter": path.name, "level": "", "text": match[2]})
            open_paragraph = True
        elif open_paragraph and line.strip() and not line.startswith(("|", "#", "-", "*", "```")):
            found[-1]["text"] += " " + line.strip()
        else:
            open_paragraph = False
    for entry in found:
        levels = _LEVEL.findall(entry["text"])
        entry["level"] = _strongest(levels)
    return found


def _strongest(levels: list[str]) -> str:
    for word in ("MUST", "SHOULD", "MAY"):
        if any(level.startswith(word) for level in levels):
            return word
    return "FACT"


def read_spec(spec: Path = SPEC) -> list[dict[str, str]]:
    """All requirements. Raises ValueError for an id that stands twice."""
    found = [entry for path in sorted(spec.glob("[0-9][0-9]-*.md")) for entry in read_chapter(path)]
    places: dict[str, str] = {}
    for entry in found:
        if entry["id"] in places:
            raise ValueError(f"{entry['id']} stands in {places[entry['id']]} and again in {entry['chapter']}")
        places[entry["id"]] = entry["chapter"]
    return found


def render(requirements: list[dict[str, str]]) -> str:
    return "[\n" + ",\n".join(" " + json.dumps(entry, ensure_ascii=False) for entry in requirements) + "\n]\n"


def main() -> int:
    text = render(read_spec())
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != text:
            print("spec/requirements.json is not what the chapters say: run python tools/make_requirements.py")
            return 1
        return 0
    TARGET.write_text(text)
    print(f"{len(read_spec())} requirements in {TARGET.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
