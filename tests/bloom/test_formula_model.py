"""The formula model: what spec/06-model.md prints is what we compute (PT-MDL-050, PT-MDL-060)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from petalite.bloom.checkpoint import tensor_shapes
from petalite.bloom.loading import load_embeddings, load_head, load_span
from petalite.bloom.manifest import make_manifest
from petalite.bloom.synthetic import FORMULA_CONFIG, formula_tensor, write_formula_checkpoint

CHAPTER = (Path(__file__).parents[2] / "spec" / "06-model.md").read_text()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_formula_checkpoint(tmp_path)
    return tmp_path


def numbers_after(title: str) -> torch.Tensor:
    line = re.search(rf"^\| {re.escape(title)} \| (.*) \|$", CHAPTER, re.MULTILINE)
    assert line is not None
    return torch.tensor([float(number) for number in line[1].split(",")])


def test_model_id_and_manifest_example(directory):
    manifest = make_manifest(directory)
    assert f"Its model id is `{manifest.model_id.hex()}`" in CHAPTER
    begin, end = re.search(r"^(\{\"config\".*), \.\.\. (,.*)$", CHAPTER, re.MULTILINE).groups()
    encoded = manifest.encoded.decode()
    assert encoded.startswith(begin + ",")
    assert encoded.endswith(end)
    assert f"{len(encoded):,} bytes" in CHAPTER


def test_elements(directory):
    rows = re.findall(r"^\| ([a-z0-9_.]+) \| (\d+) \| ([0-9.]+) \|$", CHAPTER, re.MULTILINE)
    assert len(rows) == 4
    for name, i, value in rows:
        assert formula_tensor(name, tensor_shapes(FORMULA_CONFIG)[name]).flatten()[int(i)] == float(value)


def test_activations_and_greedy_ids(directory):
    embeddings = load_embeddings(directory)
    head = load_head(directory, embeddings=embeddings)
    ids = torch.tensor([[80, 101, 116, 97, 108]])
    hidden = embeddings(ids)
    seen = {"embeddings and their norm": hidden}
    hidden = load_span(directory, 0, 1)(hidden)
    seen["block 0"] = hidden
    hidden = load_span(directory, 1, 2)(hidden)
    seen["block 1 and ln_f"] = head.ln_f(hidden)
    seen["head"] = head(hidden)
    for title, tensor in seen.items():
        torch.testing.assert_close(tensor[0, -1, :4], numbers_after(title), rtol=0, atol=1e-4)
    span = load_span(directory, 0, 2)
    for _ in range(8):
        ids = torch.cat([ids, head(span(embeddings(ids)))[:, -1:].argmax(-1)], dim=1)
    continuation = " ".join(str(token) for token in ids[0, 5:].tolist())
    assert f"Greedy continuation: {continuation} (" in CHAPTER
