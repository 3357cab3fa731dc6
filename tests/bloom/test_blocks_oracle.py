"""Every formula against transformers on the same weights, float32.

Tolerance 2e-5 on logits of size about 5: both sum the same float32 products, in another order.
"""

from __future__ import annotations

import pytest
import torch

from petalite.bloom import blocks
from petalite.bloom.blocks import alibi_slopes
from petalite.bloom.config import BloomConfig
from petalite.bloom.loading import load_embeddings, load_head, load_span

CLOSE = {"rtol": 0, "atol": 2e-5}


def ids_of(pair, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, pair.span.config.vocab_size, (batch, length), generator=generator)


def test_slopes_are_transformers_for_every_head_count():
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    for n_head in [*range(1, 21), 32, 40, 112]:
        expected = _get_alibi_slopes(n_head, torch.device("cpu"))
        assert torch.allclose(torch.tensor(alibi_slopes(n_head)), expected, rtol=1e-6, atol=0), n_head


@pytest.mark.parametrize(("n_head", "hidden_size"), [(1, 24), (3, 48), (6, 60), (8, 64), (10, 80), (12, 72)])
def test_full_forward(pair, n_head, hidden_size):
    p = pair(n_head=n_head, hidden_size=hidden_size)
    ids = ids_of(p, 2, 37)
    torch.testing.assert_close(p.logits(ids), p.oracle(ids).logits, **CLOSE)


@pytest.mark.parametrize("flag", [False, True])
def test_residual_branches_where_the_config_says(pair, flag):
    p = pair(apply_residual_connection_post_layernorm=flag)
    ids = ids_of(p, 1, 20)
    torch.testing.assert_close(p.logits(ids), p.oracle(ids).logits, **CLOSE)


def test_norm_epsilon_is_the_configs(pair):
    p = pair(layer_norm_epsilon=0.1)
    ids = ids_of(p, 1, 9)
    torch.testing.assert_close(p.logits(ids), p.oracle(ids).logits, **CLOSE)


def test_untied_head(pair):
    p = pair(tie_word_embeddings=False)
    assert p.head.lm_head.weight is not p.embeddings.word_embeddings.weight
    assert not torch.equal(p.head.lm_head.weight, p.embeddings.word_embeddings.weight)
    ids = ids_of(p, 1, 12)
    torch.testing.assert_close(p.logits(ids), p.oracle(ids).logits, **CLOSE)


def test_tied_head_is_one_tensor(pair):
    p = pair()
    assert p.head.lm_head.weight is p.embeddings.word_embeddings.weight
    alone = load_head(p.directory)
    assert torch.equal(alone.lm_head.weight, p.embeddings.word_embeddings.weight)


def test_hidden_states_after_every_block(pair):
    p = pair()
    ids = ids_of(p, 2, 15)
    expected = p.oracle(ids, output_hidden_states=True).hidden_states
    hidden = p.embeddings(ids)
    torch.testing.assert_close(hidden, expected[0], **CLOSE)
    for block in range(p.span.config.n_layer - 1):  # transformers' last one has the final norm in it
        hidden = load_span(p.directory, block, block + 1)(hidden)
        torch.testing.assert_close(hidden, expected[block + 1], **CLOSE)


def test_left_padding_in_one_pass(pair):
    p = pair(n_head=3, hidden_size=48)
    ids = ids_of(p, 3, 20)
    pads = [0, 7, 19]
    mask = torch.ones_like(ids)
    for i, pad in enumerate(pads):
        mask[i, :pad] = 0
    expected = p.oracle(ids, attention_mask=mask).logits
    hidden = p.span(p.embeddings(ids), pad=pads)
    assert torch.isfinite(hidden).all()
    logits = p.head(hidden)
    for i, pad in enumerate(pads):
        torch.testing.assert_close(logits[i, pad:], expected[i, pad:], **CLOSE)
        alone = p.logits(ids[i : i + 1, pad:])
        torch.testing.assert_close(logits[i, pad:], alone[0], **CLOSE)


def test_gradient_of_the_input(pair):
    p = pair()
    config = p.span.config
    ids = ids_of(p, 2, 11)
    weights = torch.randn(2, 11, config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.enable_grad():
        ours = p.embeddings.word_embeddings(ids).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        hidden = p.head.ln_f(p.span(p.embeddings.word_embeddings_layernorm(ours), pad=[0, 4]))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        expected = p.oracle.transformer(inputs_embeds=theirs, attention_mask=mask, use_cache=False).last_hidden_state
        weights[1, :4] = 0
        (hidden * weights).sum().backward()
        (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in p.span.parameters())


def test_queries_in_pieces_change_nothing(pair, monkeypatch):
    p = pair()
    ids = ids_of(p, 2, 33)
    whole = p.span(p.embeddings(ids), pad=[0, 5])
    monkeypatch.setattr(blocks, "MAX_SCORES", 2 * 6 * 33 * 4)  # four queries at a time
    torch.testing.assert_close(p.span(p.embeddings(ids), pad=[0, 5]), whole, **CLOSE)


def test_the_embedded_model_whole():
    from pathlib import Path

    from transformers import BloomForCausalLM

    import petalite

    directory = Path(petalite.__path__[0]) / "fairytale"
    oracle = BloomForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = BloomConfig.load(directory)
    embeddings = load_embeddings(directory)
    logits = load_head(directory, embeddings=embeddings)(
        load_span(directory, 0, config.n_layer)(embeddings(torch.arange(4, 68)[None]))
    )
    expected = oracle(torch.arange(4, 68)[None]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)  # logits of size 20
