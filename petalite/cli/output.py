"""What commands write: results on stdout, everything else on stderr, nothing raw that a peer could have chosen."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

# Control characters (C0, DEL, C1), line and paragraph separators, marks that reorder text, lone surrogates
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Advance = Callable[[float], None]
"""Says that so much more is done, in the unit of the bar."""
Unit = Literal["bytes", "tokens", "blocks", "servers"]


def escape(text: str, keep: str = "") -> str:
    """`text` with every character that could move a cursor or reorder a line spelled out (`\\x1b`), but for `keep`."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def line_of(text: str) -> str:
    """`text` as one safe line: its own line breaks become spaces, anything else that is unsafe is escaped."""
    return escape(" ".join(text.split()))


def emit_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object as one line of stdout, at once: a script may be waiting for it."""
    import json

    print(json.dumps(value, allow_nan=False), flush=True)


def notice(text: str) -> None:
    """Write one line to stderr, dim on a terminal: worth knowing, not asked for."""
    line = escape(text)
    if TextStream.interrupted_by_notices is not None and sys.stderr.isatty() and sys.stdout.isatty():
        TextStream.interrupted_by_notices.end()  # both show on one screen: a notice starts a line of its own
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        line = f"\x1b[2m{line}\x1b[0m"
    print(line, file=sys.stderr, flush=True)


class TextStream:
    """Text to stdout piece by piece as it comes; ends its last line, so that what follows starts a new one."""

    interrupted_by_notices: ClassVar[TextStream | None] = None
    """The stream whose line is open now."""

    def __init__(self) -> None:
        self._open_line = False

    def write(self, piece: str) -> None:
        """Write a piece at once; line breaks and tabs are text, other control characters are not."""
        if piece:
            sys.stdout.write(escape(piece, keep="\n\t"))
            sys.stdout.flush()
            self._open_line = not piece.endswith("\n")
            TextStream.interrupted_by_notices = self if self._open_line else None

    def end(self) -> None:
        """End the line that is open, if one is."""
        if self._open_line:
            self.write("\n")


@contextmanager
def progress(label: str, total: float | None, unit: Unit | None = None) -> Iterator[Advance]:
    """A bar on stderr while the block runs, gone after it; nothing where stderr is not a terminal.

    Call what it yields with each amount done. `total` None: unknown, a moving bar.
    """
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    # rich is imported only where it draws: a quarter of the start of a command otherwise
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    if unit == "bytes":
        columns.append(DownloadColumn(binary_units=True))
    elif unit is not None:
        columns += [MofNCompleteColumn(), TextColumn(unit)]
    if total is not None:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(escape(label), total=total)
        yield lambda done: bars.advance(task, done)
