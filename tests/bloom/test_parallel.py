"""Work in threads: results in order, little begun ahead, little left to do when it is given up."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from petalite.bloom.checkpoint import Checkpoint
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_span
from petalite.bloom.parallel import THREADS, in_order
from petalite.bloom.synthetic import write_checkpoint


def test_results_come_in_order_whoever_is_done_first():
    later = threading.Event()

    def job(number: int) -> int:
        if number == 0:
            assert later.wait(10)
        if number == 1:
            later.set()
        return number

    assert list(in_order(partial(job, number) for number in range(50))) == list(range(50))


def test_the_first_error_ends_it():
    done: list[int] = []

    def job(number: int) -> None:
        if number in (3, 4):
            raise ValueError(number)
        done.append(number)

    with pytest.raises(ValueError, match="3"):
        list(in_order(partial(job, number) for number in range(1000)))
    assert len(done) < 3 + 2 * THREADS


def test_little_is_begun_ahead_and_nothing_after_closing():
    begun: list[int] = []
    results = in_order(partial(begun.append, number) for number in range(1000))
    next(results)
    results.close()
    assert 1 <= len(begun) <= 2 * THREADS


def test_loading_stops_soon_when_its_progress_is_interrupted(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, BloomConfig(hidden_size=24, n_head=3, n_layer=30, vocab_size=31))
    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "read", lambda self, info, into, sha=None: read.append(info.name))

    def interrupted(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_span(tmp_path, 0, 30, progress=interrupted)
    assert len(read) <= 2 * 12 + 2 * THREADS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_pieces_are_converted_as_the_whole_would_be(tmp_path, monkeypatch, stored, dtype):
    from safetensors.torch import load_file

    write_checkpoint(tmp_path, BloomConfig(hidden_size=24, n_head=3, n_layer=1, vocab_size=31), dtype=stored)
    monkeypatch.setattr("petalite.bloom.checkpoint.READ_BYTES", 1000)
    for name, tensor in load_span(tmp_path, 0, 1, dtype=dtype).state_dict().items():
        whole = load_file(tmp_path / "model.safetensors")[name.replace("blocks.", "transformer.h.")]
        assert torch.equal(tensor, whole.to(dtype)), name
