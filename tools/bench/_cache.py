"""What benchmarks make once and keep: checkpoints of a BLOOM's size, a virtual environment. Delete it at will."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint
from petalite.models import find_model

# As wide as bloom-560m, random weights: 559 million parameters, 2.2 GB in float32.
WIDE = BloomConfig(hidden_size=1024, n_head=16, n_layer=24, vocab_size=250_880)


def cache_directory() -> Path:
    """Where they are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "petalite-bench"


def kept_checkpoint(config: BloomConfig, shards: int = 1) -> Path:
    """A checkpoint of `config` with random weights and a tokenizer, written where it is not there yet."""
    name = f"{config.hidden_size}-{config.n_head}-{config.n_layer}-{config.vocab_size}-{shards}"
    directory = cache_directory() / name
    if not directory.is_dir():
        unfinished = directory.with_name(f"{name}.{os.getpid()}")
        write_checkpoint(unfinished, config, shards=shards)
        shutil.copy(find_model("fairytale") / "tokenizer.json", unfinished)
        unfinished.rename(directory)
    return directory
