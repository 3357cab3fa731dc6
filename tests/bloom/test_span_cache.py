"""Cached steps against whole passes: prefill in pieces, decode, padding, truncate, reorder, unequal positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalite.bloom.cache import CacheFull, CachePool, Rows, bytes_per_token
from petalite.bloom.config import BloomConfig
from petalite.bloom.span import Part, Span
from petalite.errors import LocalProtocolError

CLOSE = {"rtol": 0, "atol": 2e-5}


def pool_for(p, capacity: int = 512) -> CachePool:
    """Filled with NaN: whoever looks at a slot that was not written shows it."""
    pool = CachePool(p.span.config, p.span.end - p.span.start, capacity)
    for arena in pool._arenas:
        arena.fill_(float("nan"))
    return pool


def ids_of(p, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, p.span.config.vocab_size, (batch, length), generator=generator)


def feed(p, rows: Rows, ids: torch.Tensor, cuts: list[int], pad=None) -> torch.Tensor:
    """ids (B, T) in pieces that end at `cuts`, committed; logits (B, T, V)."""
    outs, done = [], 0
    start = rows.position
    for cut in [*cuts, ids.shape[1]]:
        outs.append(p.span.step(p.embeddings(ids[:, done:cut]), rows, pad=pad))
        rows.commit(start + cut)
        done = cut
    return p.head(torch.cat(outs, dim=1))


@pytest.mark.parametrize(("n_head", "hidden_size"), [(3, 48), (6, 60), (10, 80), (12, 72)])
def test_prefill_in_pieces_then_decode(pair, n_head, hidden_size):
    p = pair(n_head=n_head, hidden_size=hidden_size)
    ids = ids_of(p, 2, 30)
    rows = pool_for(p).reserve(2, 30)
    logits = feed(p, rows, ids, [1, 9, 20, *range(21, 30)])
    torch.testing.assert_close(logits, p.oracle(ids).logits, **CLOSE)


def test_left_padded_batch_prefill_then_decode(pair):
    p = pair()
    ids = ids_of(p, 3, 24)
    pads = [6, 0, 11]
    mask = torch.ones_like(ids)
    for i, n in enumerate(pads):
        mask[i, :n] = 0
    expected = p.oracle(ids, attention_mask=mask).logits
    rows = pool_for(p).reserve(3, 40)
    logits = feed(p, rows, ids, [5, 12, 20, 21, 22, 23], pad=pads)
    for i, n in enumerate(pads):
        torch.testing.assert_close(logits[i, n:], expected[i, n:], **CLOSE)


def test_a_step_that_is_not_committed_leaves_the_cache_as_it_was(pair):
    p = pair()
    ids = ids_of(p, 1, 20)
    rows = pool_for(p).reserve(1, 20)
    feed(p, rows, ids[:, :10], [])
    p.span.step(p.embeddings(ids_of(p, 1, 7, seed=9)), rows)  # result dropped
    assert rows.position == 10
    logits = feed(p, rows, ids[:, 10:], [1])
    torch.testing.assert_close(logits, p.oracle(ids).logits[:, 10:], **CLOSE)


def test_pieces_of_one_step_before_any_commit(pair):
    p = pair()
    ids = ids_of(p, 2, 18)
    rows = pool_for(p).reserve(2, 18)
    outs = [p.span.step(p.embeddings(ids[:, a : a + 6]), rows, position=a) for a in (0, 6, 12)]
    assert rows.positions == [0, 0]
    torch.testing.assert_close(p.head(torch.cat(outs, 1)), p.oracle(ids).logits, **CLOSE)


def test_truncate(pair):
    p = pair()
    ids = ids_of(p, 2, 25)
    other = torch.cat([ids[:, :8], ids_of(p, 2, 17, seed=5)], dim=1)
    rows = pool_for(p).reserve(2, 32)
    feed(p, rows, other, [10])
    rows.truncate(8)
    assert rows.positions == [8, 8]
    logits = feed(p, rows, ids[:, 8:], [3, 4])
    torch.testing.assert_close(logits, p.oracle(ids).logits[:, 8:], **CLOSE)


@pytest.mark.parametrize("sources", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1], [1, 0, 0, 2], [0, 0, 3, 3]])
def test_reorder(pair, sources):
    p = pair()
    ids = ids_of(p, 4, 16)
    rows = pool_for(p).reserve(4, 16)
    feed(p, rows, ids[:, :10], [])
    rows.reorder(sources)
    followed = torch.cat([ids[sources, :10], ids[:, 10:]], dim=1)
    logits = feed(p, rows, ids[:, 10:], [2, 3])
    torch.testing.assert_close(logits, p.oracle(followed).logits[:, 10:], **CLOSE)


def test_rows_of_one_session_at_different_positions(pair):
    p = pair()
    ids = ids_of(p, 3, 20)
    rows = pool_for(p).reserve(3, 20)
    feed(p, rows, ids, [])
    rows.commit([4, 13, 0])
    rows.reorder([0, 1, 1])
    assert rows.positions == [4, 13, 13]
    new = ids_of(p, 3, 5, seed=3)
    logits = p.head(p.span.step(p.embeddings(new), rows))
    for i, (row, position) in enumerate([(0, 4), (1, 13), (1, 13)]):
        whole = torch.cat([ids[row : row + 1, :position], new[i : i + 1]], dim=1)
        torch.testing.assert_close(logits[i], p.oracle(whole).logits[0, position:], **CLOSE)
    with pytest.raises(LocalProtocolError, match="different positions"):
        _ = rows.position


def test_sessions_of_all_lengths_in_one_batch(pair):
    """Decode steps, a prefill and a padded pair of beams at once, as if each were alone."""
    p = pair(n_head=10, hidden_size=80)
    pool = pool_for(p)
    plan = [(1, 12, 1, None), (1, 0, 9, None), (2, 7, 1, [3, 0]), (1, 30, 2, None)]  # B, position, T, pad
    parts, hidden, expected = [], [], []
    for seed, (batch, position, tokens, pad) in enumerate(plan):
        ids = ids_of(p, batch, position + tokens, seed)
        rows = pool.reserve(batch, 40 + seed)
        if position:
            feed(p, rows, ids[:, :position], [], pad=pad)
        parts.append(Part(rows, tokens, position, pad))
        hidden.append(p.embeddings(ids[:, position:]).flatten(0, 1))
        mask = torch.ones_like(ids)
        for i, n in enumerate(pad or []):
            mask[i, :n] = 0
        expected.append(p.oracle(ids, attention_mask=mask).logits[:, position:].flatten(0, 1))
    logits = p.head(p.span.step_batch(torch.cat(hidden), parts))
    torch.testing.assert_close(logits, torch.cat(expected), **CLOSE)
    by_block = list(p.span.step_blocks(torch.cat(hidden), parts))
    assert len(by_block) == p.span.config.n_layer
    torch.testing.assert_close(p.head(by_block[-1]), torch.cat(expected), **CLOSE)


def test_extend_keeps_what_is_cached(pair):
    p = pair()
    ids = ids_of(p, 2, 20)
    pool = pool_for(p, 100)
    rows = pool.reserve(2, 12)
    feed(p, rows, ids[:, :12], [])
    with pytest.raises(CacheFull):
        pool.extend(rows, 60)
    assert (rows.length, pool.free) == (12, 76)
    pool.extend(rows, 20)
    assert (rows.length, pool.free) == (20, 60)
    logits = feed(p, rows, ids[:, 12:], [1])
    torch.testing.assert_close(logits, p.oracle(ids).logits[:, 12:], **CLOSE)
    pool.release(rows)
    assert pool.free == 100


def test_the_bias_table_grows_behind_a_long_session(pair):
    p = pair()
    ids = ids_of(p, 1, 700)
    rows = pool_for(p, 700).reserve(1, 700)
    logits = feed(p, rows, ids, [250, 257, 600, 699])
    torch.testing.assert_close(logits, p.oracle(ids).logits, rtol=0, atol=5e-5)


def test_backward_after_inference_mode_used_the_same_span(pair):
    p = pair(n_layer=1)
    with torch.inference_mode():
        p.span(p.embeddings(ids_of(p, 1, 4)))
    with torch.enable_grad():
        hidden = torch.zeros(1, 4, p.span.config.hidden_size, requires_grad=True)
        p.span(hidden).sum().backward()
    assert hidden.grad is not None


def test_steps_that_do_not_fit_are_refused(pair):
    p = pair()
    pool = pool_for(p)
    rows = pool.reserve(1, 8)
    hidden = p.embeddings(ids_of(p, 1, 5))
    for mistake in (
        lambda: p.span.step(hidden, rows, position=4),
        lambda: p.span.step(hidden, rows, position=-1),
        lambda: p.span.step(hidden.repeat(2, 1, 1), rows),
        lambda: p.span.step_batch(hidden[0], [Part(rows, 4, 0)]),
        lambda: rows.commit(9),
        lambda: rows.commit([1, 1]),
        lambda: rows.truncate(-1),
        lambda: rows.reorder([1]),
        lambda: pool.reserve(0, 4),
        lambda: CachePool(p.span.config, 2, 64).release(rows),
    ):
        with pytest.raises(LocalProtocolError):
            mistake()
    pool.release(rows)
    with pytest.raises(LocalProtocolError):
        pool.release(rows)
    with pytest.raises(LocalProtocolError):
        p.span.step(hidden, rows)


def test_bytes_per_token_is_what_the_arenas_take():
    config = BloomConfig(hidden_size=24, n_head=3, n_layer=5, vocab_size=10)
    pool = CachePool(config, 2, 100, dtype=torch.bfloat16)
    assert pool.bytes_per_token == bytes_per_token(config, 2, torch.bfloat16) == 2 * 2 * 24 * 2
    assert sum(arena.numel() * arena.itemsize for arena in pool._arenas) == 100 * pool.bytes_per_token


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 12)), max_size=40))
def test_rows_never_overlap_and_nothing_is_lost(actions):
    """Against a plain map of slots."""
    pool = CachePool(BloomConfig(hidden_size=2, n_head=1, n_layer=1, vocab_size=2), 1, 64)
    taken = [False] * 64
    held: list[Rows] = []
    for give_back, batch, length in actions:
        if give_back and held:
            rows = held.pop(batch % len(held))
            taken[rows.offset : rows.offset + rows.batch * rows.length] = [False] * (rows.batch * rows.length)
            pool.release(rows)
        else:
            wanted = batch * length
            fits = next((i for i in range(65 - wanted) if not any(taken[i : i + wanted])), None)
            try:
                rows = pool.reserve(batch, length)
            except CacheFull as full:
                assert fits is None
                assert (full.wanted, full.free) == (wanted, taken.count(False))
                continue
            assert rows.offset == fits
            assert rows.views[0].shape == (2, batch, 1, length, 2)
            taken[fits : fits + wanted] = [True] * wanted
            held.append(rows)
        assert pool.free == taken.count(False)


def test_rows_for_some_blocks_of_a_pool(pair):
    """A span that serves part of the pool's blocks: its rows, reordered, extended and given back, are like any."""
    p = pair()
    ids = ids_of(p, 2, 20)
    pool = CachePool(p.span.config, 3, 200)
    part = Span(p.span.config, 1, 3, p.span.layers[1:])
    rows = pool.reserve(2, 12, slice(1, 3))
    assert (len(rows.views), len(rows.row(1).views), pool.free) == (2, 2, 176)
    with torch.inference_mode():
        first = Span(p.span.config, 0, 1, p.span.layers[:1])(p.embeddings(ids))
        part.step(first[:, :10], rows)
        rows.commit(10)
        pool.extend(rows, 20)
        assert (len(rows.views), rows.blocks, pool.free) == (2, slice(1, 3), 160)
        logits = p.head(part.step(first[:, 10:], rows))
    torch.testing.assert_close(logits, p.oracle(ids).logits[:, 10:], **CLOSE)
    pool.release(rows)
    assert pool.free == 200


def test_would_fit_counts_runs_that_become_one():
    pool = CachePool(BloomConfig(hidden_size=2, n_head=1, n_layer=1, vocab_size=2), 1, 30)
    first, second, third = (pool.reserve(1, 10) for _ in range(3))
    assert not pool.would_fit(1, 1)
    assert pool.would_fit(2, 10, [first, second])
    assert not pool.would_fit(2, 10, [first, third])
    pool.release(second)
    assert pool.would_fit(2, 10, [third])
    assert pool.free == 10
