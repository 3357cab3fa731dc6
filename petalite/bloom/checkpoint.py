"""Where a checkpoint's tensors lie, and their bytes (safetensors, one file or sharded with an index; spec: model).

Plain reads into memory of our own: a mapped file would count as resident, and could change under a hash that was right.
Only the files that hold a wanted tensor are ever opened. Pickled weights are refused.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from petalite.bloom.config import BloomConfig, read_json
from petalite.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "transformer."
MAX_HEADER = 100_000_000  # as the safetensors library
# Read at a time: small enough to be in the processor's cache still when it is hashed and converted.
READ_BYTES = 2**19

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_shapes(config: BloomConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its canonical name (no `transformer.`), with its shape."""
    C, V = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (V, C),
        "word_embeddings_layernorm.weight": (C,),
        "word_embeddings_layernorm.bias": (C,),
    }
    for block in range(config.n_layer):
        shapes |= {block_prefix(block) + name: shape for name, shape in block_shapes(config).items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, C)
    return shapes


def block_shapes(config: BloomConfig) -> dict[str, tuple[int, ...]]:
    """One block's tensors, names relative to the block."""
    C = config.hidden_size
    return {
        "input_layernorm.weight": (C,),
        "input_layernorm.bias": (C,),
        "self_attention.query_key_value.weight": (3 * C, C),
        "self_attention.query_key_value.bias": (3 * C,),
        "self_attention.dense.weight": (C, C),
        "self_attention.dense.bias": (C,),
        "post_attention_layernorm.weight": (C,),
        "post_attention_layernorm.bias": (C,),
        "mlp.dense_h_to_4h.weight": (4 * C, C),
        "mlp.dense_h_to_4h.bias": (4 * C,),
        "mlp.dense_4h_to_h.weight": (C, 4 * C),
        "mlp.dense_4h_to_h.bias": (C,),
    }


def block_prefix(block: int) -> str:
    """Canonical names of a block's tensors begin with this."""
    return f"h.{block}."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in one file; `begin` and `nbytes` in bytes from the start of the file."""

    path: Path
    name: str  # as spelled in the file
    dtype: str  # "F32", "F16" or "BF16"
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class Checkpoint:
    """A directory in Hugging Face layout. Opening it reads config and index, no weights.

    Raises `CheckpointError` with one line that names file, tensor and what was expected.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory, expected a checkpoint in Hugging Face layout")
        self.config = BloomConfig.load(self.directory)
        self._shapes = tensor_shapes(self.config)
        self._index = self._read_index()  # None: one file
        self._headers: dict[Path, Mapping[str, TensorInfo]] = {}

    def find(self, name: str) -> TensorInfo:
        """Where the tensor of this canonical name lies. Opens only the header of its file."""
        spelled = (name, PREFIX + name)
        if self._index is None:
            path = self.directory / SINGLE_FILE
        else:
            files = [self._index[s] for s in spelled if s in self._index]
            if not files:
                raise CheckpointError(f"{self.directory / INDEX_FILE}: tensor {name} is not listed")
            path = self.directory / files[0]
        if path not in self._headers:
            self._headers[path] = _read_header(path)
        info = next((self._headers[path][s] for s in spelled if s in self._headers[path]), None)
        if info is None:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {info.dtype}, expected F32, F16 or BF16")
        shape = self._shapes[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)} by config.json"
            )
        nbytes = math.prod(shape) * DTYPES[info.dtype].itemsize
        if info.nbytes != nbytes:
            raise CheckpointError(
                f"{path}: tensor {name} has {info.nbytes} bytes, expected {nbytes} by dtype and shape"
            )
        return info

    def read(self, info: TensorInfo, into: Tensor, sha: hashlib._Hash | None = None) -> None:
        """Fill `into` (CPU, contiguous, of the tensor's shape) in its own dtype; `sha` gets the bytes of the file."""
        flat, dtype = into.view(-1), DTYPES[info.dtype]
        step = READ_BYTES // dtype.itemsize
        other = torch.empty(min(step, flat.numel()), dtype=dtype) if into.dtype != dtype else None
        with _open(info.path) as file:
            file.seek(info.begin)
            for part in torch.split(flat, step):
                raw = part if other is None else other[: part.numel()]
                piece = _bytes_of(raw)
                _read_exactly(file, piece, info)
                if sha is not None:
                    sha.update(piece)
                if other is not None:
                    part.copy_(raw)

    def digest(self, info: TensorInfo) -> str:
        """SHA-256 of a tensor's bytes in hex, in bounded memory."""
        sha = hashlib.sha256()
        buffer = memoryview(bytearray(min(READ_BYTES, info.nbytes)))
        with _open(info.path) as file:
            file.seek(info.begin)
            for first in range(0, info.nbytes, READ_BYTES):
                piece = buffer[: info.nbytes - first]
                _read_exactly(file, piece, info)
                sha.update(piece)
        return sha.hexdigest()

    def files(self) -> list[Path]:
        """Every file that holds tensors, whether it is there or not."""
        names = {SINGLE_FILE} if self._index is None else set(self._index.values())
        return [self.directory / name for name in sorted(names)]

    def _read_index(self) -> Mapping[str, str] | None:
        path = self.directory / INDEX_FILE
        if (self.directory / SINGLE_FILE).exists():
            return None
        if not path.exists():
            pickled = sorted(p.name for p in self.directory.glob("pytorch_model*.bin"))
            hint = f"; {pickled[0]} is a pickle, convert it to safetensors" if pickled else ""
            raise CheckpointError(f"{self.directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: weight_map is missing")
        for name, file in weight_map.items():
            # A bare file name: an index from the network must not lead out of its directory.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{path}: tensor {name} points to {file!r}, expected a .safetensors file name")
        return weight_map


def _read_header(path: Path) -> Mapping[str, TensorInfo]:
    """All tensors of one safetensors file, offsets checked against the file's size."""
    with _open(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{path}: not a safetensors file, or truncated within its header ({size} bytes)")
        try:
            raw = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    tensors = {}
    for name, entry in raw.items():
        if name == "__metadata__":
            continue
        info = _parse_entry(path, name, entry, 8 + length)
        if info.begin + info.nbytes > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {name} ends at byte {info.begin + info.nbytes}, the file has {size}"
            )
        tensors[name] = info
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One tensor's header entry; `data` is where the bytes of all tensors begin."""
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
        if isinstance(dtype, str) and shape is not None and offsets is not None and len(offsets) == 2:
            begin, end = offsets
            if begin <= end:
                return TensorInfo(path, name, dtype, shape, data + begin, end - begin)
    raise CheckpointError(f"{path}: tensor {name}: header entry without a proper dtype, shape and data_offsets")


def _sizes(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value):
        return tuple(value)
    return None


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, though the checkpoint needs it") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read_exactly(file: BinaryIO, piece: memoryview, info: TensorInfo) -> None:
    done = 0
    while done < len(piece):
        try:
            n = file.readinto(piece[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{info.path}: cannot be read: {error.strerror}") from error
        if not n:
            raise CheckpointError(f"{info.path}: truncated within tensor {info.name}")
        done += n


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory, writable. Only while the tensor lives."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("only contiguous CPU tensors have bytes to read into")
    array = (ctypes.c_char * (tensor.numel() * tensor.itemsize)).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
