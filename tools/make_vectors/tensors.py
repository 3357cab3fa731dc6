"""Tensors (chapter 05): descriptors, values and body bytes per codec, and what must be refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from petalite.errors import ErrorCode, RequestError
from petalite.wire import tensors
from petalite.wire.tensors import INT8, RAW, Array, Descriptor


def _f32(*values: float) -> Array:
    return np.array(values, np.float32)


def _bf16(*values: float) -> Array:
    return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _ramp(rows: int, width: int) -> Array:
    """Integers below 1,000 by a formula, over eight: exact in f32, with blocks of many sizes."""
    index = np.arange(rows * width)
    return (((index * 7919 + 13) % 2003 - 1001) / 8).astype(np.float32).reshape(rows, width)


GOOD: dict[str, tuple[Array, str]] = {
    "f32 raw": (_f32(1, -2, 0.5, 3e38, -1e-40), RAW),
    "f16 raw": (np.array([1, -2, 0.5, 65504], np.float16), RAW),
    "bf16 raw": (_bf16(1, -2, 0.5), RAW),
    "i64 raw": (np.array([[0, -1], [2**62, 7]], np.int64), RAW),
    "u8 raw": (np.array([0, 127, 255], np.uint8), RAW),
    "f32 i8b64, one block": (_f32(127, -63.5, 0.5, 1.5).reshape(1, 4), INT8),
    "f32 i8b64, zero block": (np.zeros((2, 3), np.float32), INT8),
    "f32 i8b64, short last block": (_ramp(3, 70), INT8),
    "f32 i8b64, three dimensions": (_ramp(4, 130).reshape(2, 2, 130), INT8),
    "f16 i8b64": (_ramp(2, 65).astype(np.float16), INT8),
    "bf16 i8b64": (_bf16(1, -0.5, 0.25, 96), INT8),
    "f32 i8b64, below the floor": (_f32(1e-37, -1e-38), INT8),
    "f32 i8b64, ties go to even": (_f32(127, 0.5, 1.5, 2.5, -0.5, -1.5), INT8),
}
BAD_BODIES: dict[str, tuple[Descriptor, str]] = {
    "a byte short": (Descriptor("h", "f16", (2,)), "000000"),
    "a byte long": (Descriptor("h", "f16", (1,)), "000000"),
    "i8b64, scale NaN": (Descriptor("h", "f32", (1, 1), INT8), "0000c07f01"),
    "i8b64, scale infinite": (Descriptor("h", "f32", (1, 1), INT8), "0000807f01"),
    "i8b64, scale negative": (Descriptor("h", "f32", (1, 1), INT8), "000080bf01"),
    "i8b64, scale -0": (Descriptor("h", "f32", (1, 1), INT8), "0000008000"),
    "i8b64, scale 2^121": (Descriptor("h", "f32", (1, 1), INT8), "0000007c01"),
    "i8b64, f16, scale 515.875": (Descriptor("h", "f16", (1, 1), INT8), "00f8004401"),
    "i8b64, code -128": (Descriptor("h", "f32", (1, 1), INT8), "0000803f80"),
    "i8b64, scale 0 with a code": (Descriptor("h", "f32", (1, 2), INT8), "000000000001"),
}
BAD_DESCRIPTORS: dict[str, tuple[Any, ErrorCode]] = {
    "no dimension": ({"n": "h", "d": "f32", "s": [], "c": "raw"}, ErrorCode.TENSOR),
    "dimension 0": ({"n": "h", "d": "f32", "s": [1, 0], "c": "raw"}, ErrorCode.TENSOR),
    "negative dimension": ({"n": "h", "d": "f32", "s": [-1], "c": "raw"}, ErrorCode.TENSOR),
    "nine dimensions": ({"n": "h", "d": "f32", "s": [1] * 9, "c": "raw"}, ErrorCode.TENSOR),
    "2^64 elements": ({"n": "h", "d": "u8", "s": [2**32, 2**32], "c": "raw"}, ErrorCode.TENSOR),
    "larger than a body": ({"n": "h", "d": "f32", "s": [2**24 + 1], "c": "raw"}, ErrorCode.TENSOR),
    "unknown dtype": ({"n": "h", "d": "f64", "s": [1], "c": "raw"}, ErrorCode.UNSUPPORTED),
    "unknown codec": ({"n": "h", "d": "f32", "s": [1], "c": "zip"}, ErrorCode.UNSUPPORTED),
    "i8b64 of integers": ({"n": "h", "d": "i64", "s": [1], "c": "i8b64"}, ErrorCode.UNSUPPORTED),
    "critical key": ({"n": "h", "d": "f32", "s": [1], "c": "raw", "!x": 1}, ErrorCode.UNSUPPORTED),
    "no name": ({"d": "f32", "s": [1], "c": "raw"}, ErrorCode.BAD_REQUEST),
    "shape is an integer": ({"n": "h", "d": "f32", "s": 1, "c": "raw"}, ErrorCode.BAD_REQUEST),
}


def make() -> dict[str, Any]:
    return {
        "note": "'values' are the sender's, as bits: little-endian bytes in C order, hexadecimal. 'decoded' likewise, "
        "after the codec; equal to 'values' for raw. 'error': code of the ERR that the receiver answers with.",
        "good": [_good(name, array, codec) for name, (array, codec) in GOOD.items()],
        "bad_bodies": [_bad_body(name, *vector) for name, vector in BAD_BODIES.items()],
        "bad_descriptors": [_bad_descriptor(name, *vector) for name, vector in BAD_DESCRIPTORS.items()],
    }


def _good(name: str, array: Array, codec: str) -> dict[str, Any]:
    descriptor = tensors.describe("h", array, codec)
    body = b"".join(tensors.encode(array, codec))
    return {
        "name": name,
        "descriptor": descriptor.to_wire(),
        "values": array.tobytes().hex(),
        "body": body.hex(),
        "decoded": tensors.decode(descriptor, body).tobytes().hex(),
    }


def _bad_body(name: str, descriptor: Descriptor, body: str) -> dict[str, Any]:
    try:
        tensors.decode(descriptor, bytes.fromhex(body))
    except RequestError as error:
        return {"name": name, "descriptor": descriptor.to_wire(), "body": body, "error": error.code.name.lower()}
    raise AssertionError(f"{name} was taken")


def _bad_descriptor(name: str, descriptor: Any, code: ErrorCode) -> dict[str, Any]:
    try:
        tensors.parse_descriptors([descriptor])
    except RequestError as error:
        assert error.code is code, (name, error)
        return {"name": name, "descriptor": descriptor, "error": code.name.lower()}
    raise AssertionError(f"{name} was taken")
