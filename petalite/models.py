"""From the word MODEL on a command line to a directory in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

from petalite.errors import CheckpointError

FAIRYTALE = "fairytale"


def find_model(model: str) -> Path:
    """The directory of `model`: the embedded one's name, a directory, or a hub name (with the hub extra).

    Raises CheckpointError saying what was looked for.
    """
    if model == FAIRYTALE:
        return Path(__file__).parent / FAIRYTALE
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: a file; a model is a directory with config.json")
    raise CheckpointError(f"{model}: no such model: neither {FAIRYTALE!r} nor a directory with config.json")


def model_name(model: str) -> str:
    """What to call it where people read it: the word itself or the directory's name, never a whole path."""
    return model if model == FAIRYTALE else Path(model).expanduser().resolve().name
