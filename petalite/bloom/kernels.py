"""Kernels for CUDA where torch's own means stop: the products of decode steps, and their attention.

A decode step reads every weight once and does little else, so its floor is the memory's bandwidth; what stands around
the products (norms, activation, residual) rides along in them. Importing this module needs Triton. The plain twins are
the modules of `blocks` and `quantize`, which `tools/bench gpu --check` and the tests hold these to.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from petalite.bloom.quantize import Int8Linear

# A product of up to 16 rows is one tile of the matrix units; what it costs is reading the weights once.
MAX_ROWS = 16
# Attention of one row and head is shared by so many programs: one alone would wait for one piece of the past after
# the other.
SPLITS = 8
_PAST = 64  # positions that such a program looks at in one go


def _tilings() -> list[Any]:
    """Candidate tilings of (output channels, inputs); which is fastest depends on shape and chip, so it is measured."""
    return [
        triton.Config({"BN": bn, "BK": bk}, num_warps=warps, num_stages=stages)
        for bn, bk, warps, stages in (
            (16, 256, 4, 5),
            (16, 512, 4, 4),
            (16, 1024, 8, 3),
            (32, 128, 4, 5),
            (32, 256, 4, 4),
            (64, 128, 4, 4),
            (64, 256, 8, 3),
            (128, 128, 8, 4),
        )
    ]


@triton.jit
def _gelu(x):
    """The tanh form, as x * sigmoid(2 z)."""
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * z))


@triton.autotune(configs=_tilings(), key=["N", "K", "NORM", "SCALED"])
@triton.jit
def _product(
    x, weight, scale, bias, residual, norm_weight, norm_bias, y, M, N, K, eps,
    BM: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (M, N) = act(norm(x (M, K)) @ weight (N, K)^T * scale (N) + bias (N)) + residual (M, N), with M <= BM.

    Each of the four extras is there or not; whatever the plain way rounds to the activations' type is rounded here.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    there = m[:, None] < M
    kind = x.dtype.element_ty
    mean = tl.zeros((BM,), tl.float32)
    spread = tl.zeros((BM,), tl.float32)
    if NORM:
        for start in range(0, K, BK):
            at = start + k
            part = tl.load(x + m[:, None] * K + at[None, :], mask=there & (at[None, :] < K), other=0.0)
            mean += tl.sum(part.to(tl.float32), axis=1)
        mean = mean / K
        for start in range(0, K, BK):
            at = start + k
            part = tl.load(x + m[:, None] * K + at[None, :], mask=there & (at[None, :] < K), other=0.0)
            off = tl.where(at[None, :] < K, part.to(tl.float32) - mean[:, None], 0.0)
            spread += tl.sum(off * off, axis=1)
        spread = tl.rsqrt(spread / K + eps)
    rows = n.to(tl.int64)[:, None] * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        at = start + k
        right = tl.load(
            weight + rows + at[None, :],
            mask=(n[:, None] < N) & (at[None, :] < K),
            other=0,
            eviction_policy="evict_first",
        )
        left = tl.load(x + m[:, None] * K + at[None, :], mask=there & (at[None, :] < K), other=0.0)
        if NORM:
            gain = tl.load(norm_weight + at, mask=at < K, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + at, mask=at < K, other=0.0).to(tl.float32)
            normed = (left.to(tl.float32) - mean[:, None]) * spread[:, None]
            left = (normed * gain[None, :] + shift[None, :]).to(kind)
        total += tl.dot(left, tl.trans(right.to(kind)))
    inside = n < N
    if SCALED:
        total = total * tl.load(scale + n, mask=inside, other=0.0)[None, :]
    total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = m[:, None] * N + n[None, :]
    mask = there & inside[None, :]
    if GELU:
        total = _gelu(total.to(kind).to(tl.float32))
    if ADD:
        total = total.to(kind).to(tl.float32) + tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + target, total.to(kind), mask=mask)


def product(
    layer: nn.Module,
    x: Tensor,
    *,
    norm: nn.LayerNorm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`layer` (nn.Linear or Int8Linear) of x (M <= 16, K) -> (M, N), x through `norm` before it, then GELU, then
    `residual` (M, N) added, where asked for. Int8 weights are read as int8.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    M, K = x.shape
    N = weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    scale = layer.scale if isinstance(layer, Int8Linear) else bias
    _product[lambda meta: (triton.cdiv(N, meta["BN"]),)](
        x, weight, scale, bias, x if residual is None else residual,
        bias if norm is None else norm.weight, bias if norm is None else norm.bias, y,
        M, N, K, 0.0 if norm is None else norm.eps,
        BM=MAX_ROWS, NORM=norm is not None, SCALED=isinstance(layer, Int8Linear), GELU=gelu, ADD=residual is not None,
    )  # fmt: skip
    return y


@triton.jit
def _attend(
    qkv, keys, values, base, length, position, first, slopes, sums, peaks, weights, scale, H,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """One program a row, head and share of the past. The first share also writes the new key and value and sees them;
    all see what lies from `first` on before the new position.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    share = tl.program_id(2)
    d = tl.arange(0, BD)
    inside = d < D
    source = qkv + (row * H + head) * 3 * D + d
    q = tl.load(source, mask=inside, other=0.0).to(tl.float32) * scale
    p = tl.load(position + row)
    begin = tl.load(base + row) + head * tl.load(length + row) * D
    slope = tl.load(slopes + head)
    start = tl.load(first + row)
    most = float("-inf")
    weight = 0.0
    gathered = tl.zeros((BD,), tl.float32)
    if share == 0:
        k = tl.load(source + D, mask=inside, other=0.0)
        v = tl.load(source + 2 * D, mask=inside, other=0.0)
        tl.store(keys + begin + p * D + d, k, mask=inside)
        tl.store(values + begin + p * D + d, v, mask=inside)
        most = tl.sum(q * k.to(tl.float32), axis=0)  # its own key has distance 0, so no bias
        weight = 1.0
        gathered = v.to(tl.float32)
    chunk = tl.cdiv(tl.cdiv(p - start, SHARES), BS) * BS
    low = start + share * chunk
    high = tl.minimum(low + chunk, p)
    for begin_s in range(low, high, BS):
        s = begin_s + tl.arange(0, BS)
        known = s < high
        at = begin + s[:, None] * D + d[None, :]
        mask = known[:, None] & inside[None, :]
        seen = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        past = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(seen * q[None, :], axis=1) + slope * (s - p).to(tl.float32)
        score = tl.where(known, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=0))
        fade = tl.exp(most - higher)
        portion = tl.exp(score - higher)
        gathered = gathered * fade + tl.sum(portion[:, None] * past, axis=0)
        weight = weight * fade + tl.sum(portion, axis=0)
        most = higher
    slot = (row * H + head) * SHARES + share
    tl.store(sums + slot * BD + d, gathered)
    tl.store(peaks + slot, most)
    tl.store(weights + slot, weight)


@triton.jit
def _gather(sums, peaks, weights, out, H, D: tl.constexpr, BD: tl.constexpr, SHARES: tl.constexpr):
    """One program a row and head: the shares' sums, each weighted by how much its peak counts."""
    slot = (tl.program_id(0) * H + tl.program_id(1)) * SHARES + tl.arange(0, SHARES)
    d = tl.arange(0, BD)
    peak = tl.load(peaks + slot)
    counts = tl.exp(peak - tl.max(peak, axis=0))  # 0 for a share that saw nothing
    total = tl.sum(tl.load(weights + slot) * counts, axis=0)
    gathered = tl.sum(tl.load(sums + slot[:, None] * BD + d[None, :]) * counts[:, None], axis=0)
    target = out + (tl.program_id(0) * H + tl.program_id(1)) * D + d
    tl.store(target, (gathered / total).to(out.dtype.element_ty), mask=d < D)


def decode_attention(qkv: Tensor, arena: Tensor, meta: Tensor, slopes: Tensor, head_dim: int) -> Tensor:
    """Attention of one new token a row over the in-place cache.

    qkv (B, 3C), fused as (H, 3, d). arena (2, slots * C): keys and values of one block's pool. meta (4, B) int64: for
    each row its first element in the arena, its length in slots, its position, its left padding. slopes (H,) float32.
    Returns (B, C); the new keys and values are in the arena then.
    """
    B, H = qkv.shape[0], slopes.shape[0]
    width = triton.next_power_of_2(head_dim)
    out = torch.empty((B, H * head_dim), dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty((B, H, SPLITS, width), dtype=torch.float32, device=qkv.device)
    peaks, weights = torch.empty((2, B, H, SPLITS), dtype=torch.float32, device=qkv.device)
    _attend[(B, H, SPLITS)](
        qkv, arena[0], arena[1], meta[0], meta[1], meta[2], meta[3], slopes, sums, peaks, weights, head_dim**-0.5, H,
        D=head_dim, BD=width, BS=_PAST, SHARES=SPLITS, num_warps=4, num_stages=2,
    )  # fmt: skip
    _gather[(B, H)](sums, peaks, weights, out, H, D=head_dim, BD=width, SHARES=SPLITS, num_warps=1)
    return out
