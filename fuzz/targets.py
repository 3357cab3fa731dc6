"""All targets by name. Each is imported when it is asked for, so that a process loads what its target needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the engine instruments what is imported later
    from fuzz.decoders import Target

_DECODERS = "packing frames repeats hello certificate tensors messages dht_records dht_messages txt addresses"
MODULES = {
    "fuzz.decoders": tuple(_DECODERS.split()),
    "fuzz.models": ("manifest",),
    "fuzz.connections": ("handshake", "records", "connection", "whole_connection"),
}
NAMES = tuple(name for names in MODULES.values() for name in names)


def find(name: str) -> Target:
    """Raises KeyError for a name that is none."""
    for module, names in MODULES.items():
        if name in names:
            found: Target = importlib.import_module(module).TARGETS[name]
            return found
    raise KeyError(name)
