"""The model id: recomputed here from the rules with other tools, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import petalite
from petalite import limits
from petalite.bloom import checkpoint
from petalite.bloom.checkpoint import Checkpoint
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_embeddings, load_head, load_span
from petalite.bloom.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest, ManifestError, load_or_make, make_manifest
from petalite.bloom.synthetic import FORMULA_CONFIG, write_checkpoint, write_formula_checkpoint
from petalite.errors import CheckpointError

CONFIG = BloomConfig(hidden_size=24, n_head=3, n_layer=3, vocab_size=31)
FAIRYTALE = Path(petalite.__path__[0]) / "fairytale"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def by_hand(directory: Path, config: dict[str, object]) -> bytes:
    """The canonical form written down from the spec, with safetensors' own reader."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            digest = hashlib.sha256(raw).hexdigest()
            tensors[name.removeprefix("transformer.")] = [DTYPES[tensor.dtype], list(tensor.shape), digest]
    whole = {"tensors": tensors, "format": "petalite-manifest-1", "config": config}
    return json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()


def config_by_hand(config: BloomConfig) -> dict[str, object]:
    return {
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "hidden_size": config.hidden_size,
        "layer_norm_epsilon_bits": "3ee4f8b588e368f1",  # 1e-5 as IEEE-754 binary64
        "model_type": "bloom",
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }


@pytest.mark.parametrize(("shards", "prefix"), [(1, True), (4, False), (40, True)])
def test_model_id_is_the_hash_of_the_canonical_form(tmp_path, shards, prefix):
    write_checkpoint(tmp_path, CONFIG, shards=shards, prefix=prefix)
    expected = by_hand(tmp_path, config_by_hand(CONFIG))
    manifest = make_manifest(tmp_path)
    assert manifest.encoded == expected
    assert manifest.model_id == hashlib.sha256(expected).digest()
    assert Manifest.parse(expected) == manifest


def test_layout_does_not_change_the_id_but_a_dtype_does(tmp_path):
    write_checkpoint(tmp_path / "a", CONFIG)
    write_checkpoint(tmp_path / "b", CONFIG, shards=5, prefix=False)
    write_checkpoint(tmp_path / "c", CONFIG, dtype=torch.float16)
    ids = [make_manifest(tmp_path / name).model_id for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


def test_the_embedded_model_carries_its_manifest():
    expected = by_hand(FAIRYTALE, config_by_hand(BloomConfig.load(FAIRYTALE)))
    assert (FAIRYTALE / MANIFEST_FILE).read_bytes() == expected
    assert load_or_make(FAIRYTALE).model_id.hex() == "4121b6f657048f5a534fd76873b5cbd482ebd610fdf1543f64edf9cd0204ecb6"


def test_made_once_and_read_after(tmp_path):
    write_checkpoint(tmp_path, CONFIG, shards=3)
    progress: list[tuple[int, int]] = []
    first = load_or_make(tmp_path, progress=lambda done, total: progress.append((done, total)))
    assert progress[0][0] == 0
    assert progress[-1][0] == progress[-1][1] > 0
    assert (tmp_path / MANIFEST_FILE).read_bytes() == first.encoded
    assert [p.name for p in tmp_path.iterdir() if "manifest" in p.name] == [MANIFEST_FILE]
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    assert load_or_make(tmp_path) == first


def test_a_directory_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, CONFIG)

    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert load_or_make(tmp_path) == make_manifest(tmp_path)
    assert not (tmp_path / MANIFEST_FILE).exists()
    assert not list(tmp_path.glob("*manifest*"))


def test_missing_shards_without_a_manifest_say_what_to_do(tmp_path):
    write_checkpoint(tmp_path, CONFIG, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.*fetch the manifest from a peer"):
        load_or_make(tmp_path)


def test_a_span_is_checked_without_the_other_shards(tmp_path):
    write_checkpoint(tmp_path, CONFIG, shards=len(make_names()))
    manifest = load_or_make(tmp_path)
    needed = {Checkpoint(tmp_path).find(f"h.1.{name}").path for name in block_names()}
    for shard in tmp_path.glob("*.safetensors"):
        if shard not in needed:
            shard.write_bytes(b"rubbish")
    load_span(tmp_path, 1, 2, manifest=manifest)
    load_span(tmp_path, 1, 2, manifest=manifest, dtype=torch.float16, quantize="int8")


def make_names() -> list[str]:
    from petalite.bloom.checkpoint import tensor_shapes

    return list(tensor_shapes(CONFIG))


def block_names() -> list[str]:
    from petalite.bloom.checkpoint import block_shapes

    return list(block_shapes(CONFIG))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("h.1.mlp.dense_4h_to_h.bias", lambda d, m: load_span(d, 1, 2, manifest=m)),
        ("h.1.mlp.dense_h_to_4h.weight", lambda d, m: load_span(d, 1, 2, manifest=m, dtype=torch.float16)),
        ("h.1.mlp.dense_h_to_4h.weight", lambda d, m: load_span(d, 1, 2, manifest=m, quantize="int8")),
        ("h.1.mlp.dense_h_to_4h.weight", lambda d, m: load_span(d, 1, 2, manifest=m, pack=True)),
        ("word_embeddings.weight", lambda d, m: load_embeddings(d, manifest=m)),
        ("word_embeddings.weight", lambda d, m: load_head(d, manifest=m)),
        ("ln_f.bias", lambda d, m: load_head(d, manifest=m)),
    ],
)
def test_one_changed_bit_is_found_and_named(tmp_path, name, load):
    write_checkpoint(tmp_path, CONFIG)
    manifest = load_or_make(tmp_path)
    load(tmp_path, manifest)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer." + name].flatten().view(torch.int32)[-1] ^= 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"tensor {name} has SHA-256 .* delete petalite-manifest.json"):
        load(tmp_path, manifest)
    load_span(tmp_path, 0, 1, manifest=manifest)  # untouched blocks are as good as ever


@pytest.mark.parametrize(
    "how", [{}, {"dtype": torch.float16}, {"pack": True}, {"pack": True, "dtype": torch.bfloat16}, {"quantize": "int8"}]
)
def test_a_changed_bit_in_any_piece_is_found(tmp_path, monkeypatch, how):
    """The bytes are hashed piece by piece: the first, the last, and both sides of each border count."""
    write_checkpoint(tmp_path, CONFIG)
    manifest = load_or_make(tmp_path)
    monkeypatch.setattr(checkpoint, "READ_BYTES", 1000)
    load_span(tmp_path, 1, 2, manifest=manifest, **how)
    name = "h.1.mlp.dense_h_to_4h.weight"  # 9,216 bytes
    info = Checkpoint(tmp_path).find(name)
    good = (tmp_path / "model.safetensors").read_bytes()
    for at in [0, info.nbytes - 1, *(1000 * piece + side for piece in range(1, 10) for side in (-1, 0))]:
        bad = bytearray(good)
        bad[info.begin + at] ^= 1
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(CheckpointError, match=f"tensor {name} has SHA-256"):
            load_span(tmp_path, 1, 2, manifest=manifest, **how)


def test_another_dtype_or_config_is_found(tmp_path):
    write_checkpoint(tmp_path / "a", CONFIG)
    write_checkpoint(tmp_path / "b", CONFIG, dtype=torch.float16)
    manifest = make_manifest(tmp_path / "a")
    with pytest.raises(CheckpointError, match="has dtype F16, expected F32 by the model's manifest"):
        load_span(tmp_path / "b", 0, 1, manifest=manifest)
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw | {"layer_norm_epsilon": 1e-6}))
    with pytest.raises(CheckpointError, match=r"config\.json has layer_norm_epsilon_bits"):
        load_span(tmp_path / "a", 0, 1, manifest=manifest)


GOOD = (FAIRYTALE / MANIFEST_FILE).read_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b"1" * 10_000,
        b" " * (MAX_MANIFEST + 1),
        GOOD + b"\n",
        GOOD.replace(b",", b", ", 1),
        GOOD.replace(b"manifest-1", b"manifest-2"),
        GOOD.replace(b'"n_head":8', b'"n_head":8.0'),
        GOOD.replace(b'"n_head":8', b'"n_head":8,"n_head":8'),
        GOOD.replace(b'"n_head":8', b'"n_head":true'),
        GOOD.replace(b'"n_head":8', b'"n_head":0'),
        GOOD.replace(b'"n_head":8', b'"n_head":7'),
        GOOD.replace(b'"n_head":8', b'"extra":8,"n_head":8'),
        GOOD.replace(b'"n_layer":8', b'"n_layer":4096'),
        GOOD.replace(b'"n_layer":8', b'"n_layer":7'),
        GOOD.replace(b'"vocab_size":6144', b'"vocab_size":6145'),
        GOOD.replace(b'"tie_word_embeddings":true', b'"tie_word_embeddings":1'),
        GOOD.replace(b"3ee4f8b588e368f1", b"7ff8000000000000"),
        GOOD.replace(b"3ee4f8b588e368f1", b"3EE4F8B588E368F1"),
        GOOD.replace(b'"F16"', b'"F64"', 1),
        GOOD.replace(b"[256]", b"[257]", 1),
        GOOD.replace(b"[256]", b"[256.0]", 1),
        GOOD.replace(b"[256]", b"256", 1),
        GOOD.replace(b"h.0.input", b"h.9.input", 1),
        GOOD.replace(b"ln_f.bias", b"ln_\\u0066.bias"),
        GOOD.replace(b"96b0", b"96B0", 1),
        GOOD[:-70],
    ],
    ids=range(30),
)
def test_manifests_that_are_not_canonical_are_refused(data):
    with pytest.raises(ManifestError):
        Manifest.parse(data)


@given(st.data())
def test_any_change_is_another_manifest_or_none(data):
    at = data.draw(st.integers(0, len(GOOD) - 1))
    byte = data.draw(st.integers(0, 255))
    changed = GOOD[:at] + bytes([byte]) + GOOD[at + 1 :]
    try:
        manifest = Manifest.parse(changed)
    except ManifestError:
        return
    assert manifest.encoded == changed
    assert (manifest.model_id == Manifest.parse(GOOD).model_id) == (changed == GOOD)


def test_the_limit_is_the_one_of_limits():
    assert limits.MAX_MANIFEST == MAX_MANIFEST


def test_a_damaged_manifest_file_gives_one_clear_line(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    (tmp_path / MANIFEST_FILE).write_bytes(GOOD[:100])
    with pytest.raises(CheckpointError, match=r"petalite-manifest\.json: .*delete it to have it made again"):
        load_or_make(tmp_path)


def formula_element(name: str, i: int) -> float:
    """The formula in plain integers, as a stranger would write it."""
    seed = 2166136261
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 & 0xFFFFFFFF
    x = (seed + i * 2654435761) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    u = (x >> 24) - 128
    if name.endswith(("layernorm.weight", "ln_f.weight")):
        return 1 + u // 4 / 128
    return u / 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formula_model_holds_the_formula_in_every_dtype(tmp_path, dtype):
    write_formula_checkpoint(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    assert len(tensors) == 5 + 12 * FORMULA_CONFIG.n_layer
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        for i in {0, 1, 77 % len(flat), len(flat) // 2, len(flat) - 1}:
            assert float(flat[i]) == formula_element(name.removeprefix("transformer."), i), (name, i)
