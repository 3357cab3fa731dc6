"""What config.json says about a BLOOM checkpoint, checked (spec: model)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petalite.errors import CheckpointError

CONFIG_FILE = "config.json"

# Far above any BLOOM, low enough that products of them stay harmless.
MAX_LAYERS = 4_096
MAX_HIDDEN_SIZE = 2**20
MAX_VOCAB_SIZE = 2**24

# transformers' names for one and the same number; the first that is present wins, as there.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embed", "hidden_size"),
    "n_head": ("num_attention_heads", "n_head"),
    "n_layer": ("num_hidden_layers", "n_layer"),
    "vocab_size": ("vocab_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BloomConfig:
    """The numbers of one BLOOM model. Raises `ValueError` when made of nonsense."""

    hidden_size: int
    n_head: int
    n_layer: int
    vocab_size: int
    layer_norm_epsilon: float = 1e-5
    # True: the residual branches off after the layer norm, not before it.
    apply_residual_connection_post_layernorm: bool = False
    # True: the output head is the word embedding matrix itself.
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    # What config.json says the weights were saved in ("float16"); the tensors in the file have the last word.
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, limit in (
            ("hidden_size", MAX_HIDDEN_SIZE),
            ("n_head", MAX_HIDDEN_SIZE),
            ("n_layer", MAX_LAYERS),
            ("vocab_size", MAX_VOCAB_SIZE),
        ):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be an integer from 1 to {limit}, not {value!r}")
        if self.hidden_size % self.n_head:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of n_head {self.n_head}")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) is not float or not math.isfinite(epsilon) or not 0 < epsilon < 1:
            raise ValueError(f"layer_norm_epsilon must be a number between 0 and 1, not {epsilon!r}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_head

    @classmethod
    def load(cls, directory: Path | str) -> BloomConfig:
        """Read `directory`/config.json.

        Raises `CheckpointError` when it is missing, is not JSON, describes another model than BLOOM, or holds nonsense.
        """
        path = Path(directory) / CONFIG_FILE
        raw = read_json(path)
        model_type = raw.get("model_type", "bloom")
        if model_type != "bloom":
            raise CheckpointError(f"{path}: model_type is {model_type!r}, expected 'bloom'")
        try:
            return cls._from_json(raw)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def _from_json(cls, raw: Mapping[str, Any]) -> BloomConfig:
        sizes: dict[str, Any] = {}
        for name, spellings in _SPELLINGS.items():
            sizes[name] = next((raw[s] for s in spellings if raw.get(s) is not None), None)
            if sizes[name] is None:
                raise ValueError(f"{name} is missing")
        epsilon = raw.get("layer_norm_epsilon", 1e-5)
        dtype = raw.get("dtype", raw.get("torch_dtype"))
        return cls(
            **sizes,
            layer_norm_epsilon=float(epsilon) if type(epsilon) is int else epsilon,
            apply_residual_connection_post_layernorm=_flag(raw, "apply_residual_connection_post_layernorm", False),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", True),
            bos_token_id=_token(raw, "bos_token_id"),
            eos_token_ids=_tokens(raw, "eos_token_id"),
            pad_token_id=_token(raw, "pad_token_id"),
            dtype=dtype if isinstance(dtype, str) else None,
        )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file of a checkpoint. Raises `CheckpointError`."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, expected a checkpoint in Hugging Face layout") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw


def _flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value


def _token(raw: Mapping[str, Any], name: str) -> int | None:
    tokens = _tokens(raw, name)
    if len(tokens) > 1:
        raise ValueError(f"{name} must be one token id, not {raw[name]!r}")
    return tokens[0] if tokens else None


def _tokens(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = raw.get(name)
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else [value]
    if any(type(token) is not int or token < 0 for token in tokens):
        raise ValueError(f"{name} must be a token id, not {value!r}")
    return tuple(tokens)
