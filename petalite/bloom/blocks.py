"""BLOOM's blocks: the formulas and nothing else (Workshop et al. 2022; ALiBi: Press et al. 2021; spec: model).

Letters in shapes: B rows of a batch, T new tokens of each, S tokens they may look at (the past and themselves),
N = sum of B * T tokens in one call, C hidden size, H heads, d = C / H. Tokens travel flat, (N, C): matrix products need
no more, and rows of different lengths share them. Modules are named as in Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petalite.bloom.config import BloomConfig

# Attention scores alive at a time, per call and block: longer prefills run their queries in pieces.
MAX_SCORES = 2**24


def alibi_slopes(n_head: int) -> list[float]:
    """The slope of each head: 2^(-8 i / n), i = 1..n, where n is the largest power of two <= n_head; the heads left
    over take every other slope of the series for 2 n.
    """
    n = 1 << (n_head.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    return slopes + [2.0 ** (-8 * i / (2 * n)) for i in range(1, 2 * (n_head - n), 2)]


@dataclass(slots=True)
class Window:
    """What one group of rows, all at the same position, looks at in one call; shared by every block of a span."""

    batch: int  # B
    tokens: int  # T
    seen: int  # S
    bias: Tensor  # (B * H or H, 1, S) float32: slope * (key position - last query position)
    mask: Tensor | None  # (1 or B, 1, T, S) float32: 0 where allowed, -inf elsewhere; None: all allowed
    cache: Sequence[Tensor] | None = None  # per block (2, B, H, row length, d); None: keys are those of this call only

    def pieces(self, n_head: int) -> Iterator[tuple[slice, Tensor | None]]:
        """The T queries cut so that no more than about MAX_SCORES scores live at once, with the mask of each piece."""
        step = max(1, MAX_SCORES // (self.batch * n_head * self.seen))
        for first in range(0, self.tokens, step):
            piece = slice(first, first + step)
            yield piece, None if self.mask is None else self.mask[:, :, piece]


class Attention(nn.Module):
    """Causal self-attention with ALiBi. Linear in, linear out; everything between is in `attend`."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.scale = 1 / math.sqrt(config.head_dim)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, windows: Sequence[Window], index: int) -> Tensor:
        """x (N, C) -> (N, C). `index` is the block's place in the span: which tensor of each window's cache is ours."""
        qkv = self.query_key_value(x)  # (N, 3C)
        if len(windows) == 1:
            return self.dense(self.attend(qkv, windows[0], index))  # type: ignore[no-any-return]
        parts = qkv.split([w.batch * w.tokens for w in windows])
        return self.dense(  # type: ignore[no-any-return]
            torch.cat([self.attend(part, w, index) for part, w in zip(parts, windows, strict=True)])
        )

    def attend(self, qkv: Tensor, window: Window, index: int) -> Tensor:
        """qkv (B * T, 3C) -> what the heads gathered (B * T, C). Writes the new keys and values to the cache first."""
        B, T, S, H, d = window.batch, window.tokens, window.seen, self.n_head, self.head_dim
        fused = qkv.view(B, T, H, 3, d)
        if window.cache is None:
            k, v = (fused[:, :, :, i].transpose(1, 2).reshape(B * H, T, d) for i in (1, 2))
        else:
            row = window.cache[index]  # (2, B, H, L, d)
            row.narrow(3, S - T, T).copy_(fused.narrow(3, 1, 2).permute(3, 0, 2, 1, 4))
            k, v = row.view(2, B * H, -1, d).narrow(2, 0, S).unbind()  # no copy of the past
        q = fused.select(3, 0).transpose(1, 2).reshape(B * H, T, d)
        if B * H * T * S <= MAX_SCORES:
            context = self.weigh(q, k, v, window.bias, window.mask)
        else:
            pieces = window.pieces(H)
            context = torch.cat([self.weigh(q[:, piece], k, v, window.bias, mask) for piece, mask in pieces], dim=1)
        if T == 1:
            return context.view(B, H * d)  # the heads of a token lie side by side already
        return context.view(B, H, T, d).transpose(1, 2).reshape(B * T, H * d)

    def weigh(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """q (B*H, T, d), k, v (B*H, S, d) -> (B*H, T, d): softmax(q k^T / sqrt(d) + bias + mask) v."""
        k = k.transpose(1, 2)
        if q.dtype == torch.float32:
            scores = torch.baddbmm(bias, q, k, alpha=self.scale)  # (B*H, T, S)
        else:
            # Half precision could not tell neighbouring positions apart in the sum: add the bias in float32.
            scores = torch.bmm(q, k).to(torch.float32).mul_(self.scale).add_(bias)
        if mask is not None:
            scores.view(mask.shape[0], -1, *mask.shape[2:]).add_(mask)
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights if weights.dtype == v.dtype else weights.to(v.dtype), v)


class FeedForward(nn.Module):
    """Four times wider, GELU in its tanh form, and back."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) -> (N, C)."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.post_layernorm_residual = config.apply_residual_connection_post_layernorm
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = Attention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, windows: Sequence[Window], index: int) -> Tensor:
        """x (N, C) -> (N, C)."""
        normed = self.input_layernorm(x)
        x = self.self_attention(normed, windows, index).add_(normed if self.post_layernorm_residual else x)
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed).add_(normed if self.post_layernorm_residual else x)  # type: ignore[no-any-return]


class Embeddings(nn.Module):
    """Token ids to the input of block 0."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        # Given a weight, nn.Embedding makes up none: on the meta device that would import torch's compiler (seconds).
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.word_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (..., T) int64 -> (..., T, C). Raises `IndexError` for an id outside of the vocabulary."""
        return self.word_embeddings_layernorm(self.word_embeddings(ids))  # type: ignore[no-any-return]


class Head(nn.Module):
    """The last block's output to logits. A tied head shares the embeddings' tensor."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., vocabulary)."""
        return self.lm_head(self.ln_f(hidden))  # type: ignore[no-any-return]
