"""The fast way on CUDA against the plain one, on the same weights; needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.cache import CachePool
from petalite.bloom.config import BloomConfig
from petalite.bloom.fast import FastSpan, accelerate
from petalite.bloom.fast_ends import accelerate_ends
from petalite.bloom.graphs import BATCHES
from petalite.bloom.onepass import why_not
from petalite.bloom.span import Part, Span
from petalite.bloom.synthetic import random_span

CONFIG = BloomConfig(hidden_size=512, n_head=4, n_layer=2, vocab_size=1003)
WIDE = BloomConfig(hidden_size=2048, n_head=16, n_layer=3, vocab_size=1003)  # one kernel takes all its blocks
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


KINDS = {
    "bf16": (CONFIG, torch.bfloat16, False),
    "int8": (CONFIG, torch.bfloat16, True),
    "one kernel, bf16": (WIDE, torch.bfloat16, False),
    "one kernel, f16": (WIDE, torch.float16, False),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def fast(request: pytest.FixtureRequest) -> Iterator[tuple[FastSpan, CachePool]]:
    config, dtype, quantize = request.param
    with torch.inference_mode():
        span = random_span(config, 0, config.n_layer, dtype=dtype, device="cuda", quantize=quantize)
        for parameter in span.parameters():
            if parameter.dim() == 1:  # made as ones and zeros: biases, gains and shifts that are missing would not show
                parameter.add_(torch.randn_like(parameter) / 4)
        pool = CachePool(config, config.n_layer, 8192, dtype=dtype, device="cuda")
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
    hidden = torch.randn(batch, span.config.hidden_size, device="cuda", dtype=span.dtype)
    agree(span.step_batch(hidden, parts), Span.step_batch(span, hidden, parts))


@needs_cuda
@pytest.mark.parametrize(("position", "pad"), [(0, None), (100, None), (100, [0, 33]), (250, [7, 0])])
def test_prefills(fast: tuple[FastSpan, CachePool], position: int, pad: list[int] | None) -> None:
    span, pool = fast
    part = Part(pool.reserve(2, 600), 150, position, pad)
    hidden = torch.randn(300, span.config.hidden_size, device="cuda", dtype=span.dtype)
    agree(span.step_batch(hidden, [part]), Span.step_batch(span, hidden, [part]))


@needs_cuda
def test_a_step_is_the_same_whether_waited_for_or_not(fast: tuple[FastSpan, CachePool]) -> None:
    span, pool = fast
    part = Part(pool.reserve(1, 64), 1, 17)
    hidden = torch.randn(1, span.config.hidden_size, dtype=span.dtype)
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


@needs_cuda
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_long_rows_are_shared_by_several_multiprocessors(batch: int) -> None:
    """And every step leaves its keys and values where the next one looks for them."""
    with torch.inference_mode():
        span = random_span(WIDE, 0, WIDE.n_layer, dtype=torch.bfloat16, device="cuda")
        assert why_not(span) == ""
        pool = CachePool(WIDE, WIDE.n_layer, 20_000, dtype=torch.bfloat16, device="cuda")
        for arena in pool.arenas:
            arena.normal_()
        fast, reason = accelerate(span, pool)
        assert isinstance(fast, FastSpan), reason
        rows = [pool.reserve(1, 1200 + i) for i in range(batch)]
        for position in (0, 63, 64, 65, 129, 700, 1199):
            parts = [Part(row, 1, position) for row in rows]
            hidden = torch.randn(batch, WIDE.hidden_size, device="cuda", dtype=torch.bfloat16)
            quick = fast.step_batch(hidden, parts)
            written = [torch.stack([view[..., position, :] for view in row.views]) for row in rows]
            agree(quick, span.step_batch(hidden, parts))
            for row, new in zip(rows, written, strict=True):
                plain = torch.stack([view[..., position, :] for view in row.views])
                agree(new.flatten(1), plain.flatten(1))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n_head": 16}, "no kernel for 16 heads of 64"),
        ({"hidden_size": 1280, "n_head": 10}, "no kernel for 10 heads of 128"),
        ({"apply_residual_connection_post_layernorm": True}, "residuals are taken behind norms"),
    ],
)
def test_what_one_kernel_is_not_for(changes: dict[str, Any], why: str) -> None:
    config = replace(BloomConfig(hidden_size=1024, n_head=8, n_layer=1, vocab_size=100), **changes)
    assert why_not(random_span(config, 0, 1, dtype=torch.bfloat16, device="cpu")) == why


def test_one_kernel_is_not_for_int8() -> None:
    config = BloomConfig(hidden_size=1024, n_head=8, n_layer=1, vocab_size=100)
    assert why_not(random_span(config, 0, 1, dtype=torch.bfloat16, device="cpu", quantize=True)) == "weights are int8"
