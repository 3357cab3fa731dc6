"""Kernels for CUDA where torch's own means stop: products of a few rows, norms between them, attention over the cache.

Importing this module needs Triton. Their plain twins are the modules of `blocks` and `quantize`, which the tests hold
them to.
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
# Programs that attention is cut into, where there are that many keys: enough to fill the chip.
_PROGRAMS = 512
_MOST_SPLITS = 16


def _tilings() -> list[Any]:
    """Candidate tilings of (output channels, inputs); which is fastest depends on shape and chip, so it is measured."""
    return [
        triton.Config({"BN": bn, "BK": bk}, num_warps=warps, num_stages=stages)
        for bn, bk, warps, stages in (
            (16, 256, 2, 5),
            (16, 512, 2, 4),
            (32, 128, 4, 6),
            (32, 256, 4, 4),
            (32, 256, 4, 6),
            (32, 512, 4, 3),
            (64, 128, 4, 4),
            (64, 256, 4, 4),
        )
    ]


@triton.autotune(configs=_tilings(), key=["N", "K", "INT8"])
@triton.jit
def _linear(
    x, weight, scale, bias, residual, y, M, N, K,
    INT8: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y (M, N) = act(x (M, K) @ weight (N, K)^T * scale (N) + bias (N)) + residual (M, N); M <= BM."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    rows = n.to(tl.int64)[:, None] * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        at_k = start + k
        left = tl.load(x + m[:, None] * K + at_k[None, :], mask=(m[:, None] < M) & (at_k[None, :] < K), other=0.0)
        right = tl.load(
            weight + rows + at_k[None, :],
            mask=(n[:, None] < N) & (at_k[None, :] < K),
            other=0,
            eviction_policy="evict_first",
        )
        total += tl.dot(left, tl.trans(right.to(left.dtype)))
    inside = n < N
    if INT8:
        total = total * tl.load(scale + n, mask=inside, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GELU:  # the tanh form; tanh(u) = 2 sigmoid(2 u) - 1
        inner = 0.7978845608028654 * (total + 0.044715 * total * total * total)
        total = total * tl.sigmoid(2.0 * inner)
    to = m[:, None] * N + n[None, :]
    mask = (m[:, None] < M) & inside[None, :]
    if RESIDUAL:
        total += tl.load(residual + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + to, total.to(y.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x (M <= 16, K), weight (N, K) of x's dtype, or int8 with scale float32 (N,); bias (N,) -> (M, N), in `dtype` if
    not in x's.

    Then GELU in its tanh form, then `residual` (M, N) on top. Sums are in float32 and rounded once, at the end.
    """
    M, K = x.shape
    N = weight.shape[0]
    y = torch.empty((M, N), dtype=dtype or x.dtype, device=x.device)
    _linear[lambda meta: (triton.cdiv(N, meta["BN"]),)](
        x, weight, y if scale is None else scale, y if bias is None else bias, y if residual is None else residual, y,
        M, N, K, INT8=scale is not None, BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None,
        BM=MAX_ROWS,
    )  # fmt: skip
    return y


@triton.autotune(
    configs=[
        triton.Config({"BN": bn, "BK": bk}, num_warps=warps, num_stages=stages)
        for bn, bk, warps, stages in ((64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 64, 8, 5))
    ],
    key=["N", "K", "BM"],
)
@triton.jit(do_not_specialize=["M"])
def _int8_linear(
    x, codes, scale, bias, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """y (M, N) = x (M, K) @ codes (N, K)^T * scale (N) + bias (N). Codes become floats in registers, and stay there."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = codes + n.to(tl.int64)[:, None] * K
    right = x + m.to(tl.int64)[None, :] * K
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        at_k = start + k
        weights = tl.load(left + at_k[None, :], mask=(n[:, None] < N) & (at_k[None, :] < K), other=0)
        tokens = tl.load(right + at_k[:, None], mask=(m[None, :] < M) & (at_k[:, None] < K), other=0.0)
        total = tl.dot(weights.to(tokens.dtype), tokens, total)
    inside = n < N
    total = total * tl.load(scale + n, mask=inside, other=0.0)[:, None]
    total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    to = y + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & (m[None, :] < M))


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x (M, K), codes int8 (N, K), scale float32 (N,), bias (N,) -> (M, N); for M that are many, but not thousands."""
    M, K = x.shape
    N = codes.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    BM = 64 if M <= 64 else 128
    # Programs that read the same weights are neighbours.
    _int8_linear[lambda meta: (triton.cdiv(M, BM), triton.cdiv(N, meta["BN"]))](
        x, codes, scale, bias, y, M, N, K, BM=BM
    )  # fmt: skip
    return y


@triton.jit
def _layer_norm(x, weight, bias, y, C, eps, BC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < C
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * C + c, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / C
    apart = tl.where(inside, value - mean, 0.0)
    spread = tl.sum(apart * apart, axis=0) / C
    tl.store(y + row * C + c, (apart * tl.rsqrt(spread + eps) * w + b).to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """`norm` of x (M, C)."""
    M, C = x.shape
    y = torch.empty_like(x)
    width = triton.next_power_of_2(C)
    _layer_norm[(M,)](
        x, norm.weight, norm.bias, y, C, norm.eps, BC=width,
        num_warps=min(16, max(4, width // 512)),
    )  # fmt: skip
    return y


@triton.jit
def _decode_attention(
    qkv, keys, values, base, length, position, first, slopes, parts, scale, H,
    D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program a row, head and split of the keys. The first writes the new key and value, and attends to them too.

    A part is D sums, then their largest score, then their weight: what `_merge` makes one of.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, BD)
    inside = d < D
    source = qkv + (row * H + head) * 3 * D + d
    q = tl.load(source, mask=inside, other=0.0).to(tl.float32) * scale
    p = tl.load(position + row)
    # A multiple of D, as the arena holds nothing but heads: without knowing, loads are of single numbers.
    begin = tl.multiple_of(tl.load(base + row) + head * tl.load(length + row) * D, ALIGN)
    most = float("-inf")
    weight = 0.0
    gathered = tl.zeros((BD,), tl.float32)
    if split == 0:
        k = tl.load(source + D, mask=inside, other=0.0)
        v = tl.load(source + 2 * D, mask=inside, other=0.0)
        tl.store(keys + begin + p * D + d, k, mask=inside)
        tl.store(values + begin + p * D + d, v, mask=inside)
        most = tl.sum(q * k.to(tl.float32), axis=0)  # its own key has distance 0, so no bias
        weight = 1.0
        gathered = v.to(tl.float32)
    slope = tl.load(slopes + head)
    start = tl.load(first + row)
    share_of = tl.cdiv(tl.cdiv(tl.maximum(p - start, 0), SPLITS), BS) * BS
    start += split * share_of
    end = tl.minimum(start + share_of, p)
    for begin_s in range(start, end, BS):
        s = begin_s + tl.arange(0, BS)
        known = s < end
        at = begin + s[:, None] * D + d[None, :]
        mask = known[:, None] & inside[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0)
        v = tl.load(values + at, mask=mask, other=0.0)  # asked for at once: one wait for memory instead of two
        score = tl.sum(k.to(tl.float32) * q[None, :], axis=1) + slope * (s - p).to(tl.float32)
        score = tl.where(known, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=0))
        fade = tl.exp(most - higher)
        share = tl.exp(score - higher)
        gathered = gathered * fade + tl.sum(share[:, None] * v.to(tl.float32), axis=0)
        weight = weight * fade + tl.sum(share, axis=0)
        most = higher
    part = parts + ((row * H + head) * SPLITS + split) * (D + 2)
    tl.store(part + d, gathered, mask=inside)
    tl.store(part + D, most)
    tl.store(part + D + 1, weight)


@triton.jit
def _merge(parts, out, H, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr):
    """One program a row and head: the parts of its splits -> what it gathered."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    inside = d < D
    part = parts + ((row * H + head) * SPLITS + tl.arange(0, SPLITS)) * (D + 2)
    most = tl.load(part + D)
    fade = tl.exp(most - tl.max(most, axis=0))  # 0 for a split without keys
    weight = tl.sum(tl.load(part + D + 1) * fade, axis=0)
    gathered = tl.load(part[:, None] + d[None, :], mask=inside[None, :], other=0.0)
    result = tl.sum(gathered * fade[:, None], axis=0) / weight
    tl.store(out + (row * H + head) * D + d, result.to(out.dtype.element_ty), mask=inside)


def decode_attention(qkv: Tensor, arena: Tensor, meta: Tensor, slopes: Tensor, head_dim: int) -> Tensor:
    """Attention of one new token a row over the in-place cache.

    qkv (B, 3C), fused as (H, 3, d). arena (2, slots * C): keys and values of one block's pool. meta (4, B) int64: for
    each row its first element in the arena, its length in slots, its position, its left padding. slopes (H,) float32.
    Returns (B, C); the new keys and values are in the arena then.
    """
    B = qkv.shape[0]
    H = slopes.shape[0]
    splits = min(_MOST_SPLITS, 1 << (max(1, _PROGRAMS // (B * H)).bit_length() - 1))
    parts = torch.empty(B * H * splits * (head_dim + 2), dtype=torch.float32, device=qkv.device)
    out = torch.empty((B, H * head_dim), dtype=qkv.dtype, device=qkv.device)
    width = triton.next_power_of_2(head_dim)
    _decode_attention[(B, H, splits)](
        qkv, arena[0], arena[1], meta[0], meta[1], meta[2], meta[3], slopes, parts, head_dim**-0.5, H,
        D=head_dim, BD=width, ALIGN=head_dim & -head_dim, BS=64, SPLITS=splits,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge[(B, H)](parts, out, H, D=head_dim, BD=width, SPLITS=splits, num_warps=4)
    return out


# Numbers that differ from call to call: a kernel for each kind of them would be compiled while a client waits.
@triton.jit(do_not_specialize=["slot", "length", "position", "T"])
def _prefill_attention(
    qkv, keys, values, pad, slopes, out, slot, length, position, T, H, scale,
    D: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program a row, head and BM queries; the new keys are in the cache already. Flash attention (Dao 2023)."""
    # The last queries look at most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    d = tl.arange(0, BD)
    inside = d < D
    m = block * BM + tl.arange(0, BM)
    source = qkv + ((row * T + m).to(tl.int64)[:, None] * H + head) * 3 * D + d[None, :]
    q = tl.load(source, mask=(m < T)[:, None] & inside[None, :], other=0.0)
    p = position + m
    begin = tl.multiple_of(((slot + row * length).to(tl.int64) * H + head * length) * D, ALIGN)
    slope = tl.load(slopes + head)
    first = 0
    if PADDED:
        first = tl.load(pad + row)
    most = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    gathered = tl.zeros((BM, BD), tl.float32)
    end = position + tl.minimum((block + 1) * BM, T)
    for begin_s in range(0, end, BN):
        s = begin_s + tl.arange(0, BN)
        at = begin + s[:, None] * D + d[None, :]
        mask = (s < end)[:, None] & inside[None, :]
        seen = tl.load(keys + at, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(seen)) * scale + slope * (s[None, :] - p[:, None]).to(tl.float32)
        visible = s[None, :] <= p[:, None]
        if PADDED:  # a token always sees itself, even one that nobody looks at
            visible = visible & ((s[None, :] >= first) | (s[None, :] == p[:, None]))
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(most - level)
        share = tl.exp(score - level[:, None])
        seen = tl.load(values + at, mask=mask, other=0.0)
        gathered = tl.dot(share.to(seen.dtype), seen, gathered * fade[:, None])
        weight = weight * fade + tl.sum(share, axis=1)
        most = higher
    weight = tl.where(weight > 0.0, weight, 1.0)  # queries behind the last
    to = out + ((row * T + m).to(tl.int64)[:, None] * H + head) * D + d[None, :]
    tl.store(to, (gathered / weight[:, None]).to(out.dtype.element_ty), mask=(m < T)[:, None] & inside[None, :])


def prefill_attention(
    qkv: Tensor, arena: Tensor, slot: int, length: int, position: int, batch: int, slopes: Tensor, pad: Tensor | None
) -> Tensor:
    """Attention of T new tokens in each of `batch` rows, which are in the cache at `position` already.

    qkv (batch * T, 3C), fused as (H, 3, d). arena (2, slots * C); `slot`: where the first row begins in it; rows
    are `length` slots long. pad (batch,) int32: left padding, or None. slopes (H,) float32. Returns (batch * T, C).
    """
    H = slopes.shape[0]
    T = qkv.shape[0] // batch
    C = qkv.shape[1] // 3
    D = C // H
    out = torch.empty((batch * T, C), dtype=qkv.dtype, device=qkv.device)
    _prefill_attention[(triton.cdiv(T, 64), H, batch)](
        qkv, arena[0], arena[1], slopes if pad is None else pad, slopes, out, slot, length, position, T, H,
        D**-0.5, D=D, BD=triton.next_power_of_2(D), ALIGN=D & -D, BM=64, BN=64, PADDED=pad is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
