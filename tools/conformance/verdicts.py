"""What can become of a case, and how the engine says so."""

from __future__ import annotations


class Failed(Exception):
    """The target did something else than the spec says. Its text: what was expected, what was observed."""


class Hung(Failed):
    """Nothing came where something was due: neither an answer nor the end of the connection."""


class Closed(Failed):
    """The connection ended where something else was due."""


class Skipped(Exception):
    """The case does not apply to this target; its text says why."""


def require(condition: object, text: str) -> None:
    """Raise Failed(text) unless `condition` holds."""
    if not condition:
        raise Failed(text)
