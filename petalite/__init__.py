"""petalite: strangers' machines run one large language model together.

async with petalite.join(peers=[...]) as swarm:
    model = await swarm.load("fairytale")
    async for piece in model.generate("Once upon a time"):
        print(piece, end="")

with petalite.connect(peers=[...]) as swarm:
    print(swarm.load("fairytale").generate_text("Once upon a time"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "connect", "join"]

if TYPE_CHECKING:
    from petalite.client.api import connect, join


def __getattr__(name: str) -> Any:
    """`join` and `connect` bring torch with them, so they are imported when first used (PEP 562)."""
    if name in ("connect", "join"):
        from petalite.client import api

        return getattr(api, name)
    raise AttributeError(f"module 'petalite' has no attribute {name!r}")
