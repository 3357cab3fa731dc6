"""What a benchmark measured, as a table for people and as one JSON object for programs."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """`rows` share their keys, which are the table's columns; a bar is what must hold, with its verdict.

    `rounds`: what rows are summaries of, where that is worth telling programs.
    """

    name: str
    conditions: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: dict[str, bool | str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> str:
        made = {"bench": self.name, "conditions": self.conditions, "rows": self.rows, "bars": self.bars}
        return json.dumps(made | ({"rounds": self.rounds} if self.rounds else {}), sort_keys=True)

    def as_table(self) -> str:
        lines = [f"{self.name}: " + ", ".join(f"{name} {value}" for name, value in self.conditions.items())]
        for columns in dict.fromkeys(tuple(row) for row in self.rows):
            rows = [row for row in self.rows if tuple(row) == columns]
            lines += ["", *_table(columns, [[_text(row[name]) for name in columns] for row in rows])]
        lines += [""] if self.bars else []
        lines += [f"{_verdict(holds):8} {bar}" for bar, holds in self.bars.items()]
        return "\n".join(lines)


def _table(columns: Sequence[str], cells: list[list[str]]) -> list[str]:
    widths = [max(len(columns[at]), *(len(row[at]) for row in cells)) for at in range(len(columns))]
    lines = [columns, *cells]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _verdict(holds: bool | str) -> str:
    return holds if isinstance(holds, str) else ("ok" if holds else "MISSED")


def machine() -> dict[str, Any]:
    """The conditions every benchmark states."""
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": f"{os.getloadavg()[0]:.1f}" if sys.platform != "win32" else "unknown",
    }
