"""Cases: numbered for ever, each tied to the requirements that it tests."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["must", "should"]
Side = Literal["server", "client"]


@dataclass(frozen=True)
class Case:
    """`run` raises Failed or Skipped. `slow`: it waits for clocks and may run beside others. `long`: it costs much."""

    id: str
    side: Side
    title: str
    requirements: tuple[str, ...]
    run: Callable[[Any], None]
    level: Level = "must"
    slow: bool = False
    long: bool = False
    network: Literal["any", "public", "private"] = "any"


CASES: dict[str, Case] = {}


def case(
    id: str, requirements: str, *, side: Side = "server", title: str = "", **options: Any
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as a case; its docstring's first line is the title. `requirements`: ids between spaces."""

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        add(
            Case(
                id,
                side,
                title or (run.__doc__ or "").strip().partition("\n")[0],
                tuple(requirements.split()),
                run,
                **options,
            )
        )
        return run

    return register


def add(made: Case) -> None:
    if made.id in CASES:
        raise ValueError(f"case {made.id} exists twice")
    CASES[made.id] = made


def select(side: Side, globs: Iterable[str], level: Level) -> list[Case]:
    """The cases of one side that match a glob, in the order of their ids; level must leaves those of should out."""
    wanted = list(globs) or ["*"]
    chosen = [
        made
        for made in CASES.values()
        if made.side == side
        and (level == "should" or made.level == "must")
        and any(fnmatch.fnmatchcase(made.id, glob) for glob in wanted)
    ]
    return sorted(chosen, key=lambda made: made.id)
