"""The formula model over whole rows with mask, prompts and adapter, and its gradients, in plain numpy (spec/15).

Gradients are taken by complex steps: f is analytic, so Im f(x + ih) / h is the derivative along h to the last bit of
float64, without any rule of differentiation that could share a mistake with the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tools.conformance.tensors import HEADS, HIDDEN, Array, linear, norm

STEP = 1e-30
LAYERS = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
WIDTHS = {"query_key_value": (1, 3), "dense": (1, 1), "dense_h_to_4h": (1, 4), "dense_4h_to_h": (4, 1)}


def run(given: Mapping[str, Array], start: int, end: int) -> list[Array]:
    """What enters each of the blocks [start, end), and the output: each (B, T, C). `given`: tensors by their names in
    spec/15, "h" (B, T, C) among them.
    """
    h = given["h"]
    mask = given.get("mask", np.ones(h.shape[:2], np.uint8))
    found: list[Array] = [h]
    for index in range(start, end):
        place = index - start
        rows = []
        for row, x in enumerate(found[-1]):
            prompts = given.get("prompts")
            if prompts is not None:
                own = prompts[place] if prompts.ndim == 3 else prompts[place, row]
                x = np.concatenate([x[: len(own)] + own, x[len(own) :]])
            adapter = {name: tensor[place] for name, tensor in given.items() if ".lora_" in name}
            rows.append(block(x, index, mask[row], adapter))
        found.append(np.stack(rows))
    return found


def block(x: Array, index: int, mask: Array, adapter: Mapping[str, Array]) -> Array:
    """One block over one row (T, C), by the steps of spec/06."""
    name = f"h.{index}"
    tokens, width = len(x), HIDDEN // HEADS

    def product(values: Array, target: str, size: int) -> Array:
        made: Array = linear(values, f"{name}.{LAYERS[target]}", size)
        a, b = adapter.get(f"{target}.lora_A"), adapter.get(f"{target}.lora_B")
        if a is not None and b is not None:
            made = made + values @ a.T @ b.T
        return made

    fused = product(norm(x, f"{name}.input_layernorm"), "query_key_value", 3 * HIDDEN)
    q, k, v = np.moveaxis(fused.reshape(tokens, HEADS, 3, width), 2, 0)  # each (T, H, d)
    count = np.cumsum(mask.astype(np.int64))
    slopes = 2.0 ** (-8 * np.arange(1, HEADS + 1) / HEADS)
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(width) + slopes[:, None, None] * (count - count[:, None])
    i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    p = np.exp(scores - scores.real.max(-1, keepdims=True))
    p = p * ((j <= i) & ((mask[None, :] != 0) | (i == j)))
    mixed = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
    y = product(mixed.reshape(tokens, HIDDEN), "dense", HIDDEN) + x
    u = product(norm(y, f"{name}.post_attention_layernorm"), "dense_h_to_4h", 4 * HIDDEN)
    gelu = 0.5 * u * (1 + np.tanh(0.7978845608 * u * (1 + 0.044715 * u * u)))
    z: Array = product(gelu, "dense_4h_to_h", HIDDEN) + y
    return z


def loss(given: Mapping[str, Array], start: int, end: int, taps: Sequence[int]) -> complex:
    """sum(grad * output) + sum(tap_grads * taps)."""
    found = run(given, start, end)
    total = (given["grad"] * found[-1]).sum()
    if taps:
        total = total + (given["tap_grads"] * np.stack([found[block - start] for block in taps])).sum()
    return complex(total)


def slope(given: Mapping[str, Array], start: int, end: int, taps: Sequence[int], name: str, way: Array) -> float:
    """The loss's derivative by the tensor `name`, along `way`."""
    moved = {**given, name: given[name] + 1j * STEP * way}
    return loss(moved, start, end, taps).imag / STEP


def gradient(given: Mapping[str, Array], start: int, end: int, taps: Sequence[int], name: str) -> Array:
    """The loss's gradient by the tensor `name`, element by element."""
    made = np.zeros(given[name].shape)
    for place in np.ndindex(*made.shape):
        way = np.zeros(made.shape)
        way[place] = 1
        made[place] = slope(given, start, end, taps, name, way)
    return made
