"""Which lines of our own modules the inputs of a corpus reach: a line tracer, and the line tables of the code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from fuzz import targets

ROOT = Path(__file__).resolve().parent.parent
# What peers' bytes go through first. The rest of the package sees only what these let pass.
WIRE = (
    "certificate connection frames handshake hello liveness messages noise packing quota records replier requester"
    " streams tensors writer"
)
MODULES = (
    *(f"wire/{name}.py" for name in WIRE.split()),
    *("dht/contacts.py", "dht/messages.py", "dht/records.py", "lan/announcement.py"),
    *("identity.py", "bloom/manifest.py"),
)

Lines = set[tuple[str, int]]


def all_lines() -> Lines:
    """(module, line) of every line inside of a function of MODULES."""
    found: Lines = set()
    for module in MODULES:
        path = ROOT / "petalite" / module
        for code in _functions(compile(path.read_text(encoding="utf-8"), str(path), "exec")):
            found |= {(module, line) for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:  # so no class body, which runs at import
                yield constant
            yield from _functions(constant)


def reached(name: str, inputs: Iterable[bytes]) -> Lines:
    """The lines of MODULES that a target reaches with some inputs."""
    target = targets.find(name)
    files = {str(ROOT / "petalite" / module): module for module in MODULES}
    found: Lines = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None
        found.add((module, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for data in inputs:
            target(data)
    finally:
        sys.settrace(before)
    return found


def report(found: Lines) -> list[str]:
    """A line a module: its share, and the first lines that were not reached."""
    known = all_lines()
    lines = []
    for module in MODULES:
        own = {line for name, line in known if name == module}
        missed = sorted(own - {line for name, line in found if name == module})
        more = "" if len(missed) <= 12 else f" and {len(missed) - 12} more"
        lines.append(f"{1 - len(missed) / len(own):4.0%} of {len(own):3} lines of {module}: {missed[:12]}{more}")
    return [*lines, f"{len(known & found) / len(known):5.1%} of {len(known)} lines in all"]
