"""Makes spec/vectors/*.json: `python tools/make_vectors`. Each module here is one file, under the module's name.

A module has `make() -> dict`, which gives the same value each time; `--check` compares instead of writing.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "spec" / "vectors"


def make_all() -> dict[str, str]:
    """File name to content, of every file that is made here."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            made = importlib.import_module(f"{__name__}.{module.name}").make()
            found[f"{module.name}.json"] = _as_text(made)
    return found


def _as_text(document: dict[str, Any]) -> str:
    """One vector a line, so that a change shows as the lines that it changes."""
    parts = []
    for name, value in document.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(item)}" for item in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
