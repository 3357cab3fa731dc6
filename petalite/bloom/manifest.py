"""The manifest of a checkpoint and the model id, its SHA-256 (spec: model).

A manifest says which numbers make up the model: the configuration as far as it matters to them, and every tensor's
name, dtype, shape and hash. It is made once and kept beside the checkpoint, so that a server can check what it serves
without the files of other blocks, and it checks itself: whoever knows the id can take a manifest from anybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from petalite.bloom.checkpoint import DTYPES, Checkpoint, TensorInfo, tensor_shapes
from petalite.bloom.config import BloomConfig
from petalite.bloom.parallel import in_order
from petalite.errors import CheckpointError

MANIFEST_FILE = "petalite-manifest.json"
FORMAT = "petalite-manifest-1"
MAX_MANIFEST = 2**20  # bytes; room for 500 blocks. Checked before anything is parsed.

_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_BITS = re.compile(r"[0-9a-f]{16}", re.ASCII)


class ManifestError(ValueError):
    """These bytes are no manifest."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: dtype in safetensors' spelling, SHA-256 of its raw little-endian bytes in hex."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`config` holds the numbers only (no token ids, no dtype); `tensors` goes by canonical name."""

    config: BloomConfig
    tensors: Mapping[str, TensorEntry]

    @cached_property
    def encoded(self) -> bytes:
        """The canonical form: the very bytes that are hashed, stored and sent."""
        tensors = {name: [e.dtype, list(e.shape), e.sha256] for name, e in self.tensors.items()}
        whole = {"config": _config_to_json(self.config), "format": FORMAT, "tensors": tensors}
        return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")

    @cached_property
    def model_id(self) -> bytes:
        """32 bytes: SHA-256 of the canonical form."""
        return hashlib.sha256(self.encoded).digest()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest that may come from anybody. Raises `ManifestError` unless it is canonical to the byte."""
        if len(data) > MAX_MANIFEST:
            raise ManifestError(f"a manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST}")
        try:
            raw = json.loads(bytes(data).decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise ManifestError("a manifest is not JSON in ASCII") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ManifestError(f"not a manifest of format {FORMAT}")
        config = _config_from_json(raw.get("config"))
        entries = raw.get("tensors")
        # 12 tensors a block: the count is compared before a table of names is made from the config's word.
        if not isinstance(entries, dict) or not 12 * config.n_layer <= len(entries) <= 12 * config.n_layer + 6:
            raise ManifestError("a manifest's tensors do not fit its config")
        shapes = tensor_shapes(config)
        if entries.keys() != shapes.keys():
            raise ManifestError("a manifest's tensor names do not fit its config")
        manifest = cls(config, {name: _entry_from_json(name, entries[name], shapes[name]) for name in shapes})
        # Duplicate keys, spaces, 1.0 for 1, unknown keys: all of it shows here.
        if manifest.encoded != data:
            raise ManifestError("a manifest is not in canonical form")
        return manifest

    def check_config(self, config: BloomConfig, directory: Path) -> None:
        """Raises `CheckpointError` if a checkpoint's config.json says other numbers."""
        theirs, ours = _config_to_json(config), _config_to_json(self.config)
        for key, value in ours.items():
            if theirs[key] != value:
                raise CheckpointError(
                    f"{directory}: config.json has {key} {theirs[key]}, expected {value} by the model's manifest"
                )

    def check_tensor(self, name: str, info: TensorInfo, sha256: str) -> None:
        """Raises `CheckpointError` if the tensor read is not the manifest's."""
        entry = self.tensors[name]
        if info.dtype != entry.dtype:
            raise CheckpointError(
                f"{info.path}: tensor {name} has dtype {info.dtype}, expected {entry.dtype} by the model's manifest"
            )
        if sha256 != entry.sha256:
            raise CheckpointError(
                f"{info.path}: tensor {name} has SHA-256 {sha256[:16]}.., expected {entry.sha256[:16]}.. by the model's"
                f" manifest (damaged, or another checkpoint; if it was replaced on purpose, delete {MANIFEST_FILE})"
            )


def make_manifest(directory: Path | str, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Hash every tensor of a complete checkpoint, in bounded memory. `progress(bytes hashed, bytes in all)`.

    Raises `CheckpointError`.
    """
    checkpoint = Checkpoint(directory)
    report = progress or (lambda done, total: None)
    infos = {name: checkpoint.find(name) for name in tensor_shapes(checkpoint.config)}
    total, done = sum(info.nbytes for info in infos.values()), 0
    entries: dict[str, TensorEntry] = {}
    report(0, total)
    with contextlib.closing(in_order(partial(checkpoint.digest, info) for info in infos.values())) as digests:
        for (name, info), digest in zip(infos.items(), digests, strict=True):
            entries[name] = TensorEntry(info.dtype, info.shape, digest)
            done += info.nbytes
            report(done, total)
    return Manifest(_numbers_only(checkpoint.config), entries)


def load_or_make(directory: Path | str, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest beside the checkpoint; made and written there if absent (kept in memory where that cannot be).

    Raises `CheckpointError` when the one that is there is wrong, or when there is none and a file is missing too.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except FileNotFoundError:
        return _make_and_keep(Path(directory), progress)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        manifest = Manifest.parse(data)
    except ManifestError as error:
        raise CheckpointError(f"{path}: {error}; delete it to have it made again") from error
    manifest.check_config(BloomConfig.load(directory), Path(directory))
    return manifest


def _make_and_keep(directory: Path, progress: Callable[[int, int], None] | None) -> Manifest:
    checkpoint = Checkpoint(directory)
    missing = [path for path in checkpoint.files() if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{missing[0]}: no such file ({len(missing)} missing), and without {MANIFEST_FILE} the model id needs all"
            " files: fetch the manifest from a peer or from the checkpoint's origin, or fetch the missing files"
        )
    manifest = make_manifest(directory, progress)
    _keep(manifest, directory)
    return manifest


def _keep(manifest: Manifest, directory: Path) -> None:
    """Write the manifest whole or not at all: servers may start side by side. A read-only directory is no error."""
    temporary = directory / f".{MANIFEST_FILE}.{os.getpid()}"
    try:
        temporary.write_bytes(manifest.encoded)
        os.replace(temporary, directory / MANIFEST_FILE)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _numbers_only(config: BloomConfig) -> BloomConfig:
    return _config_from_json(_config_to_json(config))


def _config_to_json(config: BloomConfig) -> dict[str, Any]:
    """What changes a number, and no float: languages print those differently, so epsilon goes by its bits."""
    return {
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "hidden_size": config.hidden_size,
        "layer_norm_epsilon_bits": struct.pack(">d", config.layer_norm_epsilon).hex(),
        "model_type": "bloom",
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }


def _config_from_json(raw: Any) -> BloomConfig:
    """Raises `ManifestError`."""
    if not isinstance(raw, dict) or raw.get("model_type") != "bloom":
        raise ManifestError("a manifest without the config of a bloom model")
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "layer_norm_epsilon_bits")}
    bits = raw.get("layer_norm_epsilon_bits")
    flags = [fields.get(name) for name in ("apply_residual_connection_post_layernorm", "tie_word_embeddings")]
    if not isinstance(bits, str) or not _BITS.fullmatch(bits) or any(type(flag) is not bool for flag in flags):
        raise ManifestError("a manifest's config is incomplete")
    try:
        return BloomConfig(**fields, layer_norm_epsilon=struct.unpack(">d", bytes.fromhex(bits))[0])
    except (TypeError, ValueError) as error:  # TypeError: an unknown key
        raise ManifestError(f"a manifest's config is wrong: {error}") from error


def _entry_from_json(name: str, raw: Any, shape: tuple[int, ...]) -> TensorEntry:
    """Raises `ManifestError`."""
    match raw:
        case [str(dtype), [*sizes], str(sha256)] if dtype in DTYPES and _HASH.fullmatch(sha256):
            if all(type(n) is int for n in sizes) and tuple(sizes) == shape:
                return TensorEntry(dtype, shape, sha256)
    raise ManifestError(f"a manifest's entry for {name!r} is wrong")
