"""Where logs go: to stderr, one line an event. Imported only when a command runs, so that help stays quick."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import TYPE_CHECKING, TextIO

from petalite.cli.output import escape

if TYPE_CHECKING:
    from petalite.cli import Settings


class OneLine(logging.Formatter):
    """One line an event, whatever a peer managed to put in it; under --debug a traceback follows, indented."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.settings = settings

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        record.asctime = self.formatTime(record)
        line = escape(self.formatMessage(record))
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return line
        line += escape(f": {type(error).__name__}: {error}")
        if self.settings.debug:
            trace = "".join(traceback.format_exception(error)).splitlines()
            line += "".join(f"\n  {escape(part)}" for part in trace)
        return line


class ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is now: a progress bar replaces it while it runs, to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def start(settings: Settings) -> None:
    """Send the logs of every library to stderr, at the level of `settings`."""
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, ToStderr)]:
        root.removeHandler(old)
    handler = ToStderr()
    handler.setFormatter(OneLine(settings))
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
