"""The spec's constants, read from the spec's own machine-readable file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPEC = Path(__file__).resolve().parents[2] / "spec"
_RAW: dict[str, Any] = json.loads((SPEC / "constants.json").read_text())

LIMIT: dict[str, int] = {name: value for chapter in _RAW["chapters"].values() for name, value in chapter.items()}
ERRORS: dict[str, int] = _RAW["errors"]
GOAWAYS: dict[str, int] = _RAW["goaways"]
ERROR_NAMES = {code: name for name, code in ERRORS.items()}
GOAWAY_NAMES = {code: name for name, code in GOAWAYS.items()}
FRAME_NAMES: dict[int, str] = {number: name for name, number in _RAW["frames"].items()}
HELLO, REQ, RES, DATA, ERR, CANCEL, PING, PONG, GOAWAY, PROGRESS = FRAME_NAMES
END = 1
