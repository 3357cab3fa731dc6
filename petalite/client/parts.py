"""What a client loads of a model: tokenizer, embeddings, head."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.config import BloomConfig
from petalite.bloom.fast_ends import Ends, accelerate_ends
from petalite.bloom.loading import load_embeddings, load_head
from petalite.bloom.manifest import Manifest, load_or_make
from petalite.bloom.packed import quicken
from petalite.errors import CheckpointError
from petalite.models import CLIENT_PART, find_model, model_name

log = logging.getLogger("petalite.client")


@dataclass(frozen=True, slots=True)
class LocalParts:
    """What a client loads from a checkpoint."""

    name: str
    config: BloomConfig
    manifest: Manifest
    tokenizer: Tokenizer
    embeddings: Embeddings
    head: Head
    device: torch.device
    ends: Ends | None = None  # embeddings and head, where the device can work while others do


def load_local_parts(model: str, device: str = "cpu", dtype: torch.dtype | None = None) -> LocalParts:
    """Read the embeddings, norms, head and tokenizer of `model`. Raises CheckpointError.

    `dtype` None: float32 on a CPU, else bfloat16, as servers there compute.
    """
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    directory = find_model(model, CLIENT_PART)
    manifest = load_or_make(directory)
    embeddings = load_embeddings(directory, dtype=dtype, device=device, manifest=manifest)
    head = load_head(directory, embeddings=embeddings, dtype=dtype, device=device, manifest=manifest)
    quicken(head)
    return LocalParts(
        model_name(model),
        BloomConfig.load(directory),
        manifest,
        load_tokenizer(directory),
        embeddings,
        head,
        torch.device(device),
    )


def accelerated(parts: LocalParts) -> LocalParts:
    """`parts` with `ends` where the device allows it. Blocking."""
    ends, reason = accelerate_ends(parts.embeddings, parts.head)
    log.debug("embeddings and head: %s", reason or "as graphs")
    return replace(parts, ends=ends)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Raises CheckpointError when tokenizer.json is missing or is not one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected the model's tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception, with a position in the file as its text
        raise CheckpointError(f"{path}: not a tokenizer: {str(error)[:200]}") from error
