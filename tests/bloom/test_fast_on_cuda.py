"""The fast way on CUDA against the plain one, on the same weights; needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.cache import CachePool
from petalite.bloom.config import BloomConfig
from petalite.bloom.fast import BATCHES, FastSpan, accelerate, accelerate_ends
from petalite.bloom.span import Part, Span
from petalite.bloom.synthetic import random_span

CONFIG = BloomConfig(hidden_size=512, n_head=4, n_layer=2, vocab_size=1003)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=[False, True], ids=["bf16", "int8"])
def fast(request: pytest.FixtureRequest) -> Iterator[tuple[FastSpan, CachePool]]:
    with torch.inference_mode():
        span = random_span(CONFIG, 0, 2, dtype=torch.bfloat16, device="cuda", quantize=request.param)
        pool = CachePool(CONFIG, 2, 8192, dtype=torch.bfloat16, device="cuda")
        for arena in pool.arenas:
            arena.normal_()
        quick, reason = accelerate(span, pool)
        assert isinstance(quick, FastSpan), reason
        yield quick, pool


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    """As two orders of summation in bfloat16 do, row by row."""
    apart = (one.float() - other.float()).norm(dim=1) / other.float().norm(dim=1)
    assert float(apart.max()) < 0.02


@needs_cuda
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 13, BATCHES[-1]])
def test_decode_steps_of_several_sessions(fast: tuple[FastSpan, CachePool], batch: int) -> None:
    span, pool = fast
    parts = [Part(pool.reserve(1, 400), 1, 37 * i % 390, [min(5 * (i % 2), 37 * i % 390)]) for i in range(batch)]
    hidden = torch.randn(batch, 512, device="cuda", dtype=torch.bfloat16)
    agree(span.step_batch(hidden, parts), Span.step_batch(span, hidden, parts))


@needs_cuda
@pytest.mark.parametrize(("position", "pad"), [(0, None), (100, None), (100, [0, 33]), (250, [7, 0])])
def test_prefills(fast: tuple[FastSpan, CachePool], position: int, pad: list[int] | None) -> None:
    span, pool = fast
    part = Part(pool.reserve(2, 600), 150, position, pad)
    hidden = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    agree(span.step_batch(hidden, [part]), Span.step_batch(span, hidden, [part]))


@needs_cuda
def test_a_step_is_the_same_whether_waited_for_or_not(fast: tuple[FastSpan, CachePool]) -> None:
    span, pool = fast
    part = Part(pool.reserve(1, 64), 1, 17)
    hidden = torch.randn(1, 512, dtype=torch.bfloat16)
    underway = span.begin_batch((hidden,), (part,))
    while not underway.done():
        pass
    assert torch.equal(underway.result(), span.step_batch(hidden, (part,)))


@needs_cuda
def test_greedy_choices() -> None:
    with torch.inference_mode():
        embeddings = Embeddings(CONFIG).to(device="cuda", dtype=torch.bfloat16)
        embeddings.word_embeddings.weight.normal_()
        head = Head(CONFIG).to(device="cuda", dtype=torch.bfloat16)
        head.lm_head.weight = embeddings.word_embeddings.weight
        ends, reason = accelerate_ends(embeddings, head)
        assert ends is not None, reason
        # Each row is a token's own embedding: no other has nearly its logit.
        wanted = [5, 1002, 77]
        underway = ends.begin(embeddings.word_embeddings.weight[wanted].cpu())
        assert underway is not None
        tokens, embedded = underway.result()
        assert tokens == head(embeddings.word_embeddings.weight[wanted]).argmax(dim=-1).tolist() == wanted
        agree(embedded[:, 0], embeddings(torch.tensor(wanted, device="cuda")).cpu())


def test_elsewhere_it_says_why_not() -> None:
    span = random_span(CONFIG, 0, 1, dtype=torch.bfloat16, device="cpu")
    assert accelerate(span, CachePool(CONFIG, 1, 8)) == (span, "not on a CUDA device")
    assert accelerate_ends(Embeddings(CONFIG), Head(CONFIG)) == (None, "not on a CUDA device")
