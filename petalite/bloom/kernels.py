"""Two kernels for CUDA where torch's own means stop: the int8 matrix product and attention of decode steps.

Importing this module needs Triton. Their plain twins are `quantize.Int8Linear` and `blocks.Attention.weigh`, which the
tests hold them to.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A product of up to 16 rows is one tile of the matrix units; what it costs is reading the weights once.
MAX_ROWS = 16


def _tilings() -> list[Any]:
    """Candidate tilings of (output channels, inputs); which is fastest depends on shape and chip, so it is measured."""
    return [
        triton.Config({"BN": bn, "BK": bk}, num_warps=warps, num_stages=stages)
        for bn, bk, warps, stages in (
            (16, 256, 4, 5),
            (16, 512, 4, 4),
            (32, 128, 4, 5),
            (32, 256, 4, 4),
            (64, 128, 4, 4),
            (64, 256, 8, 3),
            (128, 128, 8, 4),
        )
    ]


@triton.autotune(configs=_tilings(), key=["N", "K"])
@triton.jit
def _int8_linear(x, codes, scale, bias, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y (M, N) = (x (M, K) @ codes (N, K)^T) * scale (N) + bias (N); M <= BM."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    rows = n.to(tl.int64)[:, None] * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        at = start + k
        left = tl.load(x + m[:, None] * K + at[None, :], mask=(m[:, None] < M) & (at[None, :] < K), other=0.0)
        right = tl.load(
            codes + rows + at[None, :],
            mask=(n[:, None] < N) & (at[None, :] < K),
            other=0,
            eviction_policy="evict_first",
        )
        total += tl.dot(left, tl.trans(right.to(left.dtype)))
    inside = n < N
    total = total * tl.load(scale + n, mask=inside, other=0.0)[None, :]
    total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=(m[:, None] < M) & inside[None, :])


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x (M <= 16, K), codes int8 (N, K), scale float32 (N,), bias (N,) -> (M, N): weights are read as int8."""
    M, K = x.shape
    N = codes.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    _int8_linear[lambda meta: (triton.cdiv(N, meta["BN"]),)](x, codes, scale, bias, y, M, N, K, BM=MAX_ROWS)
    return y


@triton.jit
def _decode_attention(
    qkv, keys, values, base, length, position, first, slopes, out, scale, H,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One program a row and head: write the new key and value, then attend to all from `first` on, itself included."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    inside = d < D
    source = qkv + (row * H + head) * 3 * D + d
    q = tl.load(source, mask=inside, other=0.0).to(tl.float32) * scale
    k = tl.load(source + D, mask=inside, other=0.0)
    v = tl.load(source + 2 * D, mask=inside, other=0.0)
    p = tl.load(position + row)
    begin = tl.load(base + row) + head * tl.load(length + row) * D
    tl.store(keys + begin + p * D + d, k, mask=inside)
    tl.store(values + begin + p * D + d, v, mask=inside)
    # Its own key has distance 0, so no bias; starting from it, nothing is ever divided by zero.
    most = tl.sum(q * k.to(tl.float32), axis=0)
    weight = most * 0.0 + 1.0
    gathered = v.to(tl.float32)
    slope = tl.load(slopes + head)
    start = tl.load(first + row)
    for begin_s in range(start, p, BS):
        s = begin_s + tl.arange(0, BS)
        known = s < p
        at = begin + s[:, None] * D + d[None, :]
        mask = known[:, None] & inside[None, :]
        seen = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(seen * q[None, :], axis=1) + slope * (s - p).to(tl.float32)
        score = tl.where(known, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=0))
        fade = tl.exp(most - higher)
        share = tl.exp(score - higher)
        seen = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        gathered = gathered * fade + tl.sum(share[:, None] * seen, axis=0)
        weight = weight * fade + tl.sum(share, axis=0)
        most = higher
    tl.store(out + (row * H + head) * D + d, (gathered / weight).to(out.dtype.element_ty), mask=inside)


def decode_attention(qkv: Tensor, arena: Tensor, meta: Tensor, slopes: Tensor, head_dim: int) -> Tensor:
    """Attention of one new token a row over the in-place cache.

    qkv (B, 3C), fused as (H, 3, d). arena (2, slots * C): keys and values of one block's pool. meta (4, B) int64: for
    each row its first element in the arena, its length in slots, its position, its left padding. slopes (H,) float32.
    Returns (B, C); the new keys and values are in the arena then.
    """
    B = qkv.shape[0]
    H = slopes.shape[0]
    out = torch.empty((B, H * head_dim), dtype=qkv.dtype, device=qkv.device)
    width = triton.next_power_of_2(head_dim)
    _decode_attention[(B, H)](
        qkv, arena[0], arena[1], meta[0], meta[1], meta[2], meta[3], slopes, out, head_dim**-0.5, H,
        D=head_dim, BD=width, BS=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
