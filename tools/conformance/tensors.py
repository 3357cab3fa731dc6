"""Tensors on the wire, and the formula model, in plain numpy (spec/05, spec/06)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
WIDTH = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "u8": 1}
BLOCK = 64
FORMULA_ID = bytes.fromhex("ae66c4bfe0bcb1f4a65d60f486e9d5dbda1ec7b19d99ad92080d05bce9b9dd90")
HIDDEN, HEADS, LAYERS, VOCAB, EPSILON = 64, 8, 2, 256, 1e-5


def descriptor(array: Array, dtype: str = "f32", codec: str = "raw", name: str = "h") -> dict[str, Any]:
    return {"n": name, "d": dtype, "s": list(array.shape), "c": codec}


def encode(values: Array, dtype: str = "f32", codec: str = "raw") -> bytes:
    """A float tensor's body bytes."""
    values = values.astype(np.float32)
    if codec == "i8b64":
        scales, codes = quantize(values)
        return scales.astype("<f4").tobytes() + codes.tobytes()
    return bytes(narrow(values, dtype).tobytes())


def pack(given: Mapping[str, Array]) -> tuple[list[dict[str, Any]], bytes]:
    """Descriptors and body of float32 tensors."""
    return [descriptor(array, name=name) for name, array in given.items()], b"".join(map(encode, given.values()))


def narrow(values: Array, dtype: str) -> Array:
    """float32 to the type's bits, ties to even."""
    if dtype == "bf16":
        bits = values.astype("<f4").view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype({"f32": "<f4", "f16": "<f2"}[dtype])


def quantize(values: Array) -> tuple[Array, Array]:
    """Scales (rows, blocks) and codes (rows, columns), block by block as the chapter's six steps say."""
    columns = values.shape[-1]
    rows = values.reshape(-1, columns)
    blocks = -(-columns // BLOCK)
    scales = np.zeros((len(rows), blocks), np.float32)
    codes = np.zeros(rows.shape, np.int8)
    for row in range(len(rows)):
        for block in range(blocks):
            part = rows[row, block * BLOCK : (block + 1) * BLOCK]
            peak = np.abs(part).max()
            if peak >= np.float32(2.0**-118):
                scale = np.float32(peak) / np.float32(127)
                scales[row, block] = scale
                codes[row, block * BLOCK : block * BLOCK + len(part)] = np.rint(part / scale).astype(np.int8)
    return scales, codes


def decode(body: bytes, dtype: str, shape: tuple[int, ...], codec: str = "raw") -> Array:
    """Body bytes to float32 values."""
    if codec == "i8b64":
        columns, rows = shape[-1], int(np.prod(shape[:-1]))
        blocks = -(-columns // BLOCK)
        scales = np.frombuffer(body, "<f4", rows * blocks).reshape(rows, blocks)
        codes = np.frombuffer(body, np.int8, offset=4 * rows * blocks).reshape(rows, columns)
        wide = np.repeat(scales, BLOCK, axis=1)[:, :columns] * codes.astype(np.float32)
        return decode(bytes(narrow(wide, dtype).tobytes()), dtype, shape) if dtype != "f32" else wide.reshape(shape)
    if dtype == "bf16":
        return (np.frombuffer(body, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(body, {"f32": "<f4", "f16": "<f2"}[dtype]).astype(np.float32).reshape(shape)


def encoded_size(shape: tuple[int, ...], dtype: str, codec: str) -> int:
    count = int(np.prod(shape, dtype=object))
    return count * WIDTH[dtype] if codec == "raw" else count + 4 * (count // shape[-1]) * -(-shape[-1] // BLOCK)


# --- the formula model -----------------------------------------------------------------------------------------------


@functools.cache
def weight(name: str, *shape: int) -> Array:
    """One tensor of the formula model, float64."""
    seed = 2166136261
    for byte in name.encode("ascii"):
        seed = (seed ^ byte) * 16777619 % 2**32
    x = (seed + np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761)) % 2**32
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D) % 2**32
    x = (x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B) % 2**32
    u = (x >> np.uint64(24)).astype(np.int64) - 128
    norm = name.endswith("layernorm.weight") or name == "ln_f.weight"
    made: Array = (1 + np.floor(u / 4) / 128 if norm else u / 256).reshape(shape)
    return made


def norm(x: Array, name: str) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    scaled: Array = (x - mean) / np.sqrt(variance + EPSILON)
    return scaled * weight(f"{name}.weight", HIDDEN) + weight(f"{name}.bias", HIDDEN)


def linear(x: Array, name: str, width: int) -> Array:
    made: Array = x @ weight(f"{name}.weight", width, x.shape[-1]).T + weight(f"{name}.bias", width)
    return made


def embed(tokens: list[int]) -> Array:
    """(1, T, C): the input of block 0."""
    return norm(weight("word_embeddings.weight", VOCAB, HIDDEN)[tokens], "word_embeddings_layernorm")[None]


def head(hidden: Array) -> Array:
    return norm(hidden, "ln_f") @ weight("word_embeddings.weight", VOCAB, HIDDEN).T


def block(x: Array, index: int, pad: int = 0) -> Array:
    """One block over one whole row (T, C); the first `pad` positions are left padding."""
    name = f"h.{index}"
    tokens, width = len(x), HIDDEN // HEADS
    fused = linear(norm(x, f"{name}.input_layernorm"), f"{name}.self_attention.query_key_value", 3 * HIDDEN)
    q, k, v = np.moveaxis(fused.reshape(tokens, HEADS, 3, width), 2, 0)  # each (T, H, d)
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    hidden_keys = (j > i) | ((j < pad) & (i >= pad))
    mixed = np.empty((tokens, HEADS, width))
    for h in range(HEADS):
        scores = q[:, h] @ k[:, h].T / np.sqrt(width) + 2.0 ** (-8 * (h + 1) / HEADS) * (j - i)
        scores = np.where(hidden_keys, -np.inf, scores)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h]
    y = linear(mixed.reshape(tokens, HIDDEN), f"{name}.self_attention.dense", HIDDEN) + x
    u = linear(norm(y, f"{name}.post_attention_layernorm"), f"{name}.mlp.dense_h_to_4h", 4 * HIDDEN)
    gelu = 0.5 * u * (1 + np.tanh(0.7978845608 * u * (1 + 0.044715 * u * u)))
    z: Array = linear(gelu, f"{name}.mlp.dense_4h_to_h", HIDDEN) + y
    return z


def run_blocks(x: Array, start: int, end: int, pad: int = 0) -> Array:
    """(T, C) through blocks [start, end), as one whole pass."""
    for index in range(start, end):
        x = block(x.astype(np.float64), index, pad)
    return x


def greedy(tokens: list[int], count: int) -> list[int]:
    """What a client must generate with exact arithmetic."""
    made = list(tokens)
    for _ in range(count):
        made.append(int(head(run_blocks(embed(made)[0], 0, LAYERS)[-1]).argmax()))
    return made[len(tokens) :]
