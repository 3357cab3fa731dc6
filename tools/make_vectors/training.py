"""Training requests (chapter 15) to a server of the formula model, with the numbers that must come of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from petalite.wire import packing
from tools.conformance import tensors, training

BLOCKS = [0, 2]
ROWS, TOKENS, RANK = 1, 3, 1


def make() -> dict[str, Any]:
    plain = {"h": values("h", ROWS, TOKENS, tensors.HIDDEN)}
    full = {
        **plain,
        "mask": np.array([[1, 0, 1]], np.uint8),
        "prompts": values("prompts", 2, 1, tensors.HIDDEN),
        **adapter(),
    }
    # Nothing may depend on what comes out where there is no token.
    real = full["mask"][..., None]
    loss = {
        "grad": values("grad", ROWS, TOKENS, tensors.HIDDEN),
        "tap_grads": values("tap_grads", 1, ROWS, TOKENS, tensors.HIDDEN) * real,
    }
    return {
        "note": "Requests to a server of all blocks of the formula model (chapter 06, 6.8) and what must come of them, "
        "up to the rounding of its compute type. 'head' is msgpack, without size, max and dl; bodies and values are "
        "hexadecimal, little-endian float32 (mask: bytes). Position 1 of the masked row carries no meaning.",
        "numbers": [
            _forward("one row", plain, []),
            _forward("mask, prompts, adapter, taps", full, [0, 1]),
            _backward("one row, by h", {**plain, "grad": loss["grad"]}, [], ["h"]),
            _backward(
                "everything",
                {**full, **loss, "grad": loss["grad"] * real},
                [1],
                [name for name in full if name != "mask"],
            ),
        ],
    }


def values(name: str, *shape: int) -> tensors.Array:
    """Numbers that look like nothing in particular, exact in float32."""
    return tensors.weight(f"vector.{name}", *shape) * 2


def adapter() -> dict[str, tensors.Array]:
    made = {}
    for target, (wide_in, wide_out) in training.WIDTHS.items():
        made[f"{target}.lora_A"] = values(f"{target}.lora_A", 2, RANK, wide_in * tensors.HIDDEN) / 4
        made[f"{target}.lora_B"] = values(f"{target}.lora_B", 2, wide_out * tensors.HIDDEN, RANK) / 4
    return made


def _forward(name: str, given: dict[str, tensors.Array], taps: list[int]) -> dict[str, Any]:
    found = training.run({each: _wide(array) for each, array in given.items()}, *BLOCKS)
    reply = {"h": found[-1]}
    if taps:
        reply["taps"] = np.stack([found[block] for block in taps])
    return _vector(name, "forward", {"taps": taps} if taps else {}, given, reply)


def _backward(name: str, given: dict[str, tensors.Array], taps: list[int], wanted: list[str]) -> dict[str, Any]:
    wide = {each: _wide(array) for each, array in given.items()}
    start, end = BLOCKS
    reply = {each: training.gradient(wide, start, end, taps, each) for each in wanted}
    return _vector(name, "backward", {"wanted": wanted} | ({"taps": taps} if taps else {}), given, reply)


def _wide(array: tensors.Array) -> tensors.Array:
    return array if array.dtype == np.uint8 else array.astype(np.float64)


def _vector(
    name: str, method: str, fields: dict[str, Any], given: dict[str, tensors.Array], reply: dict[str, tensors.Array]
) -> dict[str, Any]:
    described = [
        tensors.descriptor(array, "u8" if array.dtype == np.uint8 else "f32", name=each)
        for each, array in given.items()
    ]
    head = {"model": tensors.FORMULA_ID, "blocks": BLOCKS, **fields, "t": described}
    return {
        "name": name,
        "method": method,
        "head": packing.encode(head).hex(),
        "body": b"".join(_bytes(array) for array in given.values()).hex(),
        "reply": [{"n": each, "s": list(array.shape), "hex": _bytes(array).hex()} for each, array in reply.items()],
    }


def _bytes(array: tensors.Array) -> bytes:
    return array.tobytes() if array.dtype == np.uint8 else array.astype("<f4").tobytes()
