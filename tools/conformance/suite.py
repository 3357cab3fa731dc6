"""All cases."""

from __future__ import annotations

import importlib
import pkgutil

from tools.conformance import server


def load_cases() -> None:
    """Import every module of cases, which registers them. May be called again."""
    from tools.conformance import client

    for package in (server, client):
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{found.name}")
