"""Checkpoints of every layout, and wrong ones: one clear line each."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalite.bloom.checkpoint import Checkpoint, tensor_shapes
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_embeddings, load_head, load_span
from petalite.bloom.synthetic import write_checkpoint
from petalite.errors import CheckpointError

CONFIG = BloomConfig(hidden_size=24, n_head=3, n_layer=4, vocab_size=31)
QKV = "transformer.h.1.self_attention.query_key_value.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "single", CONFIG)
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "sharded", CONFIG, shards=6)
    return tmp_path / "sharded"


def all_weights(directory: Path) -> dict[str, torch.Tensor]:
    span = load_span(directory, 0, Checkpoint(directory).config.n_layer)
    embeddings = load_embeddings(directory)
    head = load_head(directory, embeddings=embeddings)
    return {**span.state_dict(), **embeddings.state_dict(), **head.state_dict()}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shards", [1, 3, 53])
def test_every_layout_holds_the_same_model(tmp_path, prefix, shards):
    from transformers import BloomForCausalLM

    write_checkpoint(tmp_path, CONFIG, shards=shards, prefix=prefix)
    oracle = BloomForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in oracle.state_dict().items()}
    span = load_span(tmp_path, 1, 3)
    assert (span.start, span.end) == (1, 3)
    for name, tensor in span.state_dict().items():
        index, rest = name.removeprefix("blocks.").split(".", 1)
        assert torch.equal(tensor, theirs[f"h.{int(index) + 1}.{rest}"]), name
    for name, tensor in [*load_embeddings(tmp_path).state_dict().items(), *load_head(tmp_path).state_dict().items()]:
        assert torch.equal(tensor, theirs[name]), name


def test_a_span_never_opens_files_it_does_not_need(sharded):
    checkpoint = Checkpoint(sharded)
    needed = {checkpoint.find(name).path for name in tensor_shapes(CONFIG) if name.startswith("h.2.")}
    others = [path for path in checkpoint.files() if path not in needed]
    assert len(others) >= 3
    expected = load_span(sharded, 2, 3).state_dict()
    others[0].unlink()
    for path in others[1:]:
        path.write_bytes(b"rubbish")
    found = load_span(sharded, 2, 3).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError):
        load_span(sharded, 0, 4)


def test_progress_counts_blocks(single):
    seen: list[tuple[int, int]] = []
    load_span(single, 1, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def edit_header(path: Path, change) -> None:
    """Rewrite a safetensors file's header through `change(header)`, data left alone."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def index_entry(name: str, file: object):
    return lambda d: edit_json(d / "model.safetensors.index.json", lambda raw: raw["weight_map"].update({name: file}))


def cut(file: str, size: int):
    return lambda d: (d / file).write_bytes((d / file).read_bytes()[:size])


def write(file: str, data: bytes):
    return lambda d: (d / file).write_bytes(data)


def config(**changes: object):
    return lambda d: edit_json(d / "config.json", lambda raw: raw.update(changes))


def header(change):
    return lambda d: edit_header(d / "model.safetensors", change)


def tensors(change):
    return lambda d: edit_tensors(d / "model.safetensors", change)


WRONG = [
    (shutil.rmtree, "no such directory"),
    (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    (write("config.json", b"{"), "config.json: not valid JSON"),
    (write("config.json", b"[" * 100_000), "config.json: not valid JSON"),
    (write("config.json", b"[1]"), "config.json: expected a JSON object"),
    (config(model_type="llama"), "config.json: model_type is 'llama', expected 'bloom'"),
    (config(n_head=None), "config.json: n_head is missing"),
    (config(n_head=0), "n_head must be an integer from 1"),
    (config(n_head=2.0), "n_head must be an integer from 1"),
    (config(n_layer=True), "n_layer must be an integer from 1"),
    (config(n_layer=10**9), "n_layer must be an integer from 1"),
    (config(n_head=5), "hidden_size 24 is not a multiple of n_head 5"),
    (config(layer_norm_epsilon="small"), "layer_norm_epsilon must be a number"),
    (config(layer_norm_epsilon=float("nan")), "layer_norm_epsilon must be a number"),
    (config(apply_residual_connection_post_layernorm=1), "must be true or false"),
    (config(eos_token_id=-1), "eos_token_id must be a token id"),
    (config(pad_token_id=[1, 2]), "pad_token_id must be one token id"),
    (config(hidden_size=48), r"model.safetensors: tensor .* has shape .*, expected .* by config.json"),
    (config(n_layer=5), "model.safetensors: tensor h.4.input_layernorm.weight is missing"),
    (config(tie_word_embeddings=False), "model.safetensors: tensor lm_head.weight is missing"),
    (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index.json"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    (cut("model.safetensors", 0), "truncated within its header"),
    (cut("model.safetensors", 100), "truncated within its header"),
    (cut("model.safetensors", 60_000), r"model.safetensors: truncated: tensor .* ends at byte \d+, the file has 60000"),
    (write("model.safetensors", b"\xff" * 500), "not a safetensors file"),
    (write("model.safetensors", struct.pack("<Q", 9) + b"not json!"), "header is not JSON"),
    (write("model.safetensors", struct.pack("<Q", 2) + b"[]"), "header is not a JSON object"),
    (header(lambda h: h[QKV].pop("shape")), "query_key_value.weight: header entry without a proper"),
    (header(lambda h: h[QKV].update(data_offsets=[9, 3])), "query_key_value.weight: header entry without a proper"),
    (header(lambda h: h[QKV].update(data_offsets=[-4, 3])), "query_key_value.weight: header entry without a proper"),
    (header(lambda h: h[QKV].update(data_offsets=[0, 4])), "query_key_value.weight has 4 bytes, expected 6912"),
    (header(lambda h: h[QKV].update(data_offsets=[0, 2**60])), "truncated: tensor"),
    (header(lambda h: h[QKV].update(dtype="I32")), "query_key_value.weight has dtype I32, expected F32, F16 or BF16"),
    (tensors(lambda t: t.pop(QKV)), "tensor h.1.self_attention.query_key_value.weight is missing"),
    (tensors(lambda t: t.update({QKV: t[QKV].T.contiguous()})), r"has shape \[24, 72\], expected \[72, 24\]"),
    (tensors(lambda t: t.update({QKV: t[QKV].double()})), "has dtype F64, expected F32, F16 or BF16"),
]

WRONG_SHARDED = [
    (index_entry(QKV, "absent.safetensors"), "absent.safetensors: no such file"),
    (index_entry(QKV, "model-00001-of-00006.safetensors"), "model-00001-of-00006.safetensors: tensor h.1.*is missing"),
    (index_entry(QKV, "../model.safetensors"), "points to '../model.safetensors'"),
    (index_entry(QKV, "/etc/passwd"), "points to '/etc/passwd'"),
    (index_entry(QKV, "weights.bin"), "points to 'weights.bin'"),
    (index_entry(QKV, 3), "points to 3"),
    (
        lambda d: edit_json(d / "model.safetensors.index.json", lambda raw: raw["weight_map"].pop(QKV)),
        "index.json: tensor h.1.self_attention.query_key_value.weight is not listed",
    ),
    (write("model.safetensors.index.json", b"nonsense"), "index.json: not valid JSON"),
    (write("model.safetensors.index.json", b"{}"), "index.json: weight_map is missing"),
    (cut("model-00003-of-00006.safetensors", 2000), "model-00003-of-00006.safetensors: truncated"),
]


@pytest.mark.parametrize(("spoil", "line"), WRONG)
def test_wrong_checkpoint_gives_one_clear_line(single, spoil, line):
    spoil(single)
    with pytest.raises(CheckpointError, match=line) as caught:
        all_weights(single)
    assert "\n" not in str(caught.value)
    assert str(single) in str(caught.value)


@pytest.mark.parametrize(("spoil", "line"), WRONG_SHARDED)
def test_wrong_shards_give_one_clear_line(sharded, spoil, line):
    spoil(sharded)
    with pytest.raises(CheckpointError, match=line) as caught:
        all_weights(sharded)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (4, 5), (2, 2), (3, 1), (-1, 2)])
def test_blocks_that_are_not_there(single, start, end):
    with pytest.raises(CheckpointError, match=f"has blocks 0:4, cannot serve {start}:{end}"):
        load_span(single, start, end)


def test_quantizing_a_weight_that_is_not_finite_names_it(single):
    edit_tensors(single / "model.safetensors", lambda t: t[QKV].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"tensor h.1.self_attention.query_key_value.weight: .*not finite"):
        load_span(single, 0, 2, quantize="int8")


def test_the_spellings_of_older_configs(tmp_path):
    old = {"n_embed": 24, "num_attention_heads": 3, "num_hidden_layers": 4, "vocab_size": 31, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(old | {"eos_token_id": [2, 5], "bos_token_id": 1}))
    assert BloomConfig.load(tmp_path) == BloomConfig(
        hidden_size=24, n_head=3, n_layer=4, vocab_size=31, dtype="float16", eos_token_ids=(2, 5), bos_token_id=1
    )
