"""petalite: strangers' machines run one large language model together.

async with petalite.join(peers=[...]) as swarm:
    model = await swarm.load("fairytale")
    async for piece in model.generate("Once upon a time"):
        print(piece, end="")

with petalite.connect(peers=[...]) as swarm:
    print(swarm.load("fairytale").generate_text("Once upon a time"))

What is trained through the swarm are torch modules: `PromptTuning`, `LoraAdapter`, `SequenceClassifier`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LoraAdapter", "PromptTuning", "SequenceClassifier", "__version__", "connect", "join"]

if TYPE_CHECKING:
    from petalite.client.api import connect, join
    from petalite.client.tuning import LoraAdapter, PromptTuning, SequenceClassifier


def __getattr__(name: str) -> Any:
    """All of it brings torch along, so it is imported when first used (PEP 562)."""
    if name in ("connect", "join"):
        from petalite.client import api

        return getattr(api, name)
    if name in ("LoraAdapter", "PromptTuning", "SequenceClassifier"):
        from petalite.client import tuning

        return getattr(tuning, name)
    raise AttributeError(f"module 'petalite' has no attribute {name!r}")
