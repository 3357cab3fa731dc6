"""Low-rank adapters (LoRA, Hu et al. 2021) in the files of the PEFT library: what is in them, checked, read, written.

A directory holds `adapter_model.safetensors` and `adapter_config.json`. Here and everywhere in petalite a tensor's name
is PEFT's without its `base_model.model.`: `transformer.h.3.self_attention.query_key_value.lora_A.weight`, A of shape
(rank, inputs) and B of shape (outputs, rank); what a layer adds to its output is scaling * B (A x).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petalite.bloom.checkpoint import DTYPES, block_shapes
from petalite.bloom.config import BloomConfig, read_json
from petalite.errors import CheckpointError

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

# PEFT's name of a target (the last part of the layer's name) -> the layer within its block.
TARGETS: Mapping[str, str] = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
Check = Callable[[Mapping[str, tuple[int, ...]]], None]
"""Takes all tensors' shapes by name; raises ValueError with what is wrong with them."""

_NAME = re.compile(r"transformer\.h\.(0|[1-9][0-9]{0,5})\.([a-z0-9_.]+)\.lora_([AB])\.weight", re.ASCII)
_LAYERS = frozenset(TARGETS.values())

# Options of PEFT's LoRA that change the formula; an adapter that uses one would be computed wrongly, so it is refused.
_MUST_BE_OFF = (
    *("fan_in_fan_out", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "rank_pattern"),
    *("alpha_pattern", "trainable_token_indices", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
# Ways to begin that leave the model's own weights as they are; the others (PiSSA, LoftQ, ...) change them.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """An adapter's weights by name (see above), and the one number that scales them all."""

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    rank_stabilized: bool = False  # PEFT's use_rslora (Kalajdzievski 2023)

    @property
    def scaling(self) -> float:
        return scaling_of(self.rank, self.alpha, self.rank_stabilized)


def scaling_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank)."""
    return alpha / (rank**0.5 if rank_stabilized else rank)


def layer_sizes(config: BloomConfig, target: str) -> tuple[int, int]:
    """(inputs, outputs) of a target's layer. Raises ValueError for a name that is none of TARGETS."""
    if target not in TARGETS:
        raise ValueError(f"no such layer to adapt: {target!r}; there are {', '.join(TARGETS)}")
    outputs, inputs = block_shapes(config)[f"{TARGETS[target]}.weight"]
    return inputs, outputs


def parse_name(name: str) -> tuple[int, str, str] | None:
    """(block, layer within the block, "A" or "B") of a tensor's name; None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _LAYERS:
        return None
    return int(match[1]), match[2], match[3]


def lora_name(block: int, layer: str, side: str) -> str:
    return f"transformer.h.{block}.{layer}.lora_{side}.weight"


def load_lora(directory: Path | str, config: BloomConfig) -> Lora:
    """Read an adapter of this model, weights in float32.

    Raises CheckpointError: a file is missing or damaged, the adapter is none of LoRA's or uses an option that petalite
    does not compute, or a tensor does not fit the model.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    raw = read_json(path)
    rank, alpha, rank_stabilized = _read_config(path, raw)
    file = directory / TENSORS_FILE

    def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
        bare = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items()}
        if len(bare) != len(shapes):
            raise ValueError("a tensor is there twice")
        check_shapes(bare, config, rank)

    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in read_tensors(file, check).items()}
    return Lora(tensors=tensors, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: BloomConfig, rank: int) -> None:
    """Whether these are all tensors of an adapter of that rank. Raises ValueError naming the tensor."""
    if not shapes:
        raise ValueError("no tensors")
    for name, shape in shapes.items():
        parsed = parse_name(name)
        if parsed is None:
            raise ValueError(f"tensor {name[:100]!r} is none of a LoRA adapter of BLOOM's layers")
        block, layer, side = parsed
        if block >= config.n_layer:
            raise ValueError(f"tensor {name} is for block {block} of a model of {config.n_layer}")
        inputs, outputs = layer_sizes(config, layer.rpartition(".")[2])
        due = (rank, inputs) if side == "A" else (outputs, rank)
        if shape != due:
            raise ValueError(f"tensor {name} has shape {list(shape)}, expected {list(due)}")
        if lora_name(block, layer, "B" if side == "A" else "A") not in shapes:
            raise ValueError(f"tensor {name} is without its other half")


def _read_config(path: Path, raw: Mapping[str, Any]) -> tuple[int, float, bool]:
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'")
    for name in _MUST_BE_OFF:
        if raw.get(name):
            raise CheckpointError(f"{path}: {name} is {raw[name]!r}, which petalite does not compute")
    if raw.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {raw['init_lora_weights']!r}, which changes the model's own weights"
        )
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {raw['bias']!r}, expected 'none'")
    rank, alpha, rank_stabilized = raw.get("r"), raw.get("lora_alpha"), raw.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= 2**16:
        raise CheckpointError(f"{path}: r is {rank!r}, expected a rank")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}, expected a number")
    if not isinstance(rank_stabilized, bool):
        raise CheckpointError(f"{path}: use_rslora is {rank_stabilized!r}, expected true or false")
    return rank, float(alpha), rank_stabilized


def save_lora(directory: Path | str, lora: Lora, base_model: str | None = None) -> None:
    """Write both files as PEFT does; its `PeftModel.from_pretrained` puts them on a local BLOOM. Raises OSError."""
    places = {found[:2] for found in map(parse_name, lora.tensors) if found is not None}
    blocks, layers = sorted({block for block, _ in places}), {layer for _, layer in places}
    regular = len(places) == len(blocks) * len(layers)  # the same layers in each block
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [target for target, layer in TARGETS.items() if layer in layers]
        if regular
        else [f"transformer.h.{block}.{layer}" for block, layer in sorted(places)],
        "layers_to_transform": blocks if regular else None,
        "modules_to_save": None,
    }
    write_adapter(directory, {PEFT_PREFIX + name: tensor for name, tensor in lora.tensors.items()}, config)


def write_adapter(directory: Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Tensors and their description, under PEFT's file names. Raises OSError."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / TENSORS_FILE, tensors)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Raises OSError."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def read_tensors(path: Path, check: Check) -> dict[str, Tensor]:
    """All tensors of one small safetensors file, in float32; `check` sees the shapes before any tensor is read.

    Raises CheckpointError: also where `check` raises ValueError, or a number is not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
            for name, part in slices.items():
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"tensor {name[:100]!r} has dtype {part.get_dtype()}, expected F32, F16 or BF16")
            check({name: tuple(part.get_shape()) for name, part in slices.items()})
            tensors = {name: file.get_tensor(name).to(torch.float32) for name in slices}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"tensor {name} holds a number that is not finite")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return tensors


def expect_shapes(due: Mapping[str, Sequence[int | None]]) -> Check:
    """A check for `read_tensors`: exactly these tensors; None stands for any size from 1."""

    def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shapes.keys() != due.keys():
            raise ValueError(f"tensors {_names(shapes)}, expected {_names(due)}")
        for name, shape in shapes.items():
            sizes = due[name]
            if len(shape) != len(sizes) or any(
                n != want if want else n < 1 for n, want in zip(shape, sizes, strict=True)
            ):
                raise ValueError(
                    f"tensor {name} has shape {list(shape)}, expected {['any' if n is None else n for n in sizes]}"
                )

    return check


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(name[:100] for name in names)[:8]) or "none"
