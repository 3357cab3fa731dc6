"""Tensors as bytes: descriptors in a message's head, little-endian values in its body (spec/05).

numpy knows no bfloat16, so a bf16 tensor is an array of uint16 here: its bits. The bridge does the same for torch
tensors, byte for byte; this module is what a peer without torch needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.limits import INT8_BLOCK, MAX_BODY, MAX_DIMENSIONS, MAX_TENSOR_NAME, MAX_TENSORS
from petalite.wire.packing import FieldError, ListOf, Map, Str, field, refuse_critical

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview

RAW: Final = "raw"
INT8: Final = "i8b64"
CODECS: Final = (RAW, INT8)

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "i64": np.dtype("<i8"),
    "u8": np.dtype("u1"),
}
FLOATS: Final = frozenset({"f32", "f16", "bf16"})

# Below this a block counts as zero, so that a scale is never subnormal and a subnormal value never rounds to a code
# other than 0: the bytes are then the same on hardware that flushes subnormals. At or above INT8_HUGE an encoder
# refuses, since 127 * scale could exceed float32.
INT8_TINY: Final = 2.0**-118
INT8_HUGE: Final = 2.0**127

_MAX_SCALE: Final = {"f32": 2.0**121, "bf16": 2.0**121, "f16": 515.875}
# The least bits of a float32 that is no scale. As unsigned integers the bits of negative numbers (-0 too), infinities
# and NaN all lie above those of the positive numbers, so one comparison refuses them all.
BAD_SCALE_BITS: Final = {name: int(np.float32(top).view(np.uint32)) for name, top in _MAX_SCALE.items()}

_NAME: Final = Str(1, MAX_TENSOR_NAME)
_WORD: Final = Str(1, MAX_TENSOR_NAME)
_LIST: Final = ListOf(Map(), 0, MAX_TENSORS)
_INTEGERS: Final = frozenset({int})
_STRINGS: Final = frozenset({str})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Name, value type, shape and codec of one tensor. One that exists is well formed and fits into a body.

    Raises FieldError (a LocalProtocolError) on construction.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str = RAW
    nbytes: int = dataclasses.field(init=False, compare=False, repr=False)
    """Bytes that the tensor takes in a body."""

    def __post_init__(self) -> None:
        _NAME.check("n", self.name)
        if self.dtype not in DTYPES:
            raise FieldError(f"tensor {self.name!r}: unknown dtype {self.dtype[:32]!r}", ErrorCode.UNSUPPORTED)
        if self.codec not in CODECS:
            raise FieldError(f"tensor {self.name!r}: unknown codec {self.codec[:32]!r}", ErrorCode.UNSUPPORTED)
        if self.codec == INT8 and self.dtype not in FLOATS:
            raise FieldError(f"tensor {self.name!r}: codec {INT8} takes no {self.dtype}", ErrorCode.UNSUPPORTED)
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS:
            text = f"tensor {self.name!r}: {len(self.shape)} dimensions, must be 1..{MAX_DIMENSIONS}"
            raise FieldError(text, ErrorCode.TENSOR)
        for length in self.shape:
            if type(length) is not int:
                raise FieldError(f"tensor {self.name!r}: a dimension must be an integer")
            if length < 1:
                raise FieldError(f"tensor {self.name!r}: dimension {length}, must be at least 1", ErrorCode.TENSOR)
        object.__setattr__(self, "nbytes", _size_in_body(self))

    def to_wire(self) -> dict[str, Any]:
        return {"n": self.name, "d": self.dtype, "s": self.shape, "c": self.codec}


def _size_in_body(descriptor: Descriptor) -> int:
    """FieldError(TENSOR) once it is sure to exceed the largest body (PT-TEN-007)."""
    item = 1 if descriptor.codec == INT8 else DTYPES[descriptor.dtype].itemsize
    size = item
    for length in descriptor.shape:
        size *= length
        if size > MAX_BODY:
            raise FieldError(f"tensor {descriptor.name!r}: larger than a body of {MAX_BODY} bytes", ErrorCode.TENSOR)
    if descriptor.codec == INT8:
        rows, blocks = _rows_and_blocks(descriptor.shape)
        size += 4 * rows * blocks
        if size > MAX_BODY:
            raise FieldError(f"tensor {descriptor.name!r}: larger than a body of {MAX_BODY} bytes", ErrorCode.TENSOR)
    return size


def total_size(descriptors: Sequence[Descriptor]) -> int:
    """Bytes of a body that holds these tensors; FieldError(TENSOR) if a body cannot."""
    if len(descriptors) == 1:
        return descriptors[0].nbytes
    total = sum(descriptor.nbytes for descriptor in descriptors)
    if total > MAX_BODY:
        raise FieldError(f"tensors of {total} bytes, larger than a body of {MAX_BODY}", ErrorCode.TENSOR)
    return total


def parse_descriptors(raw: Any, *, names: Sequence[str] | None = None) -> tuple[Descriptor, ...]:
    """Descriptors from a received array, in the order of their bytes in the body; `names`: those that may occur.

    Raises RequestError: BAD_REQUEST for a wrong type, a name given twice or unknown; UNSUPPORTED for an unknown dtype,
    codec or critical key; TENSOR for shapes and sizes that cannot be.
    """
    try:
        if type(raw) is list and len(raw) == 1 and type(raw[0]) is dict:  # as in every step
            only = _parse(raw[0])
            if names is None or only.name in names:
                return (only,)
        made = [_parse(fields) for fields in field({"t": raw}, "t", _LIST)]
        check_names(made, names)
        total_size(made)
    except FieldError as error:
        raise RequestError(error.code, str(error)) from None
    return tuple(made)


def _parse(fields: Mapping[str, Any]) -> Descriptor:
    refuse_critical(fields)
    shape = fields.get("s")
    words = (fields.get("n"), fields.get("d"), fields.get("c"))
    if not (_STRINGS.issuperset(map(type, words)) and words[1] in DTYPES and words[2] in CODECS):
        words = (field(fields, "n", _NAME), field(fields, "d", _WORD), field(fields, "c", _WORD))
    name, dtype, codec = words
    if type(shape) is not list:
        raise RequestError(ErrorCode.BAD_REQUEST, f"tensor {name!r}: field 's' must be an array of integers")
    if not _INTEGERS.issuperset(map(type, shape)):
        raise RequestError(ErrorCode.BAD_REQUEST, f"tensor {name!r}: a dimension must be an integer")
    return known_descriptor(name, dtype, tuple(shape), codec)


@functools.lru_cache(maxsize=64)
def known_descriptor(name: str, dtype: str, shape: tuple[int, ...], codec: str) -> Descriptor:
    """A descriptor, made and checked once for many: the steps of a session all bring the same few."""
    return Descriptor(name, dtype, shape, codec)


def check_names(descriptors: Sequence[Descriptor], names: Sequence[str] | None = None) -> None:
    """FieldError(BAD_REQUEST) if a name occurs twice, or is not one of `names`."""
    seen = set()
    for descriptor in descriptors:
        if descriptor.name in seen:
            raise FieldError(f"tensor {descriptor.name!r} is given twice")
        if names is not None and descriptor.name not in names:
            raise FieldError(f"tensor {descriptor.name!r} is not known here")
        seen.add(descriptor.name)


# ---------------------------------------------------------------------------------------------------------- values


def describe(name: str, array: Array, codec: str = RAW) -> Descriptor:
    """The descriptor of an array; uint16 is bf16. LocalProtocolError for a type that does not travel."""
    wanted = array.dtype.newbyteorder("<")
    for dtype, have in DTYPES.items():
        if have == wanted:
            return Descriptor(name, dtype, array.shape, codec)
    raise LocalProtocolError(f"tensor {name!r}: arrays of {array.dtype} have no wire type")


def encode(array: Array, codec: str = RAW) -> list[memoryview]:
    """The body's bytes in pieces; raw shares memory with a contiguous little-endian array.

    Raises LocalProtocolError if a value is NaN or infinite (or, for i8b64, at least 2**127).
    """
    descriptor = describe("array", array, codec)
    if codec == INT8:
        return _encode_int8(_widen(array, descriptor.dtype))
    values = np.ascontiguousarray(array, dtype=DTYPES[descriptor.dtype])
    if not is_finite(descriptor.dtype, values):
        raise LocalProtocolError("a tensor with NaN or infinity is not sent")
    return [values.reshape(-1).view(np.uint8).data]


def decode(descriptor: Descriptor, buffer: Buffer) -> Array:
    """The array of `descriptor`'s type (uint16 for bf16) and shape; raw is a view of `buffer`, at any alignment.

    Raises RequestError(TENSOR) for a wrong number of bytes, and for i8b64 for scales or codes that no encoder makes.
    """
    size = descriptor.nbytes
    if len(buffer) != size:
        raise tensor_error(descriptor, f"{len(buffer)} bytes, must be {size}")
    if descriptor.codec == INT8:
        return _narrow(_decode_int8(descriptor, buffer), descriptor.dtype)
    return np.frombuffer(buffer, DTYPES[descriptor.dtype]).reshape(descriptor.shape)


def tensor_error(descriptor: Descriptor, text: str) -> RequestError:
    return RequestError(ErrorCode.TENSOR, f"tensor {descriptor.name!r}: {text}")


def is_finite(dtype: str, array: Array) -> bool:
    """Whether no value is NaN or infinite; always so for integers."""
    if dtype == "f32":
        return bool(np.isfinite(array).all())
    if dtype not in FLOATS:
        return True
    # numpy tests halves one at a time; as integers without their sign they are ordered, infinity and NaN on top.
    bits = array.view(np.int16) & np.int16(0x7FFF)
    return int(bits.max()) < (0x7C00 if dtype == "f16" else 0x7F80)


# High bytes of little-endian values that are, or may be, too large for a type: those that may be infinite or NaN, and
# from 2**15 on for f16.
_LARGEST: Final = {"f32": 0x7F, "bf16": 0x7F, "f16": 0x7C}
_SUSPECT: Final = {
    **{(name, name): bytes(high for high in range(256) if high & 0x7F >= top) for name, top in _LARGEST.items()},
    ("f16", "f32"): bytes(high for high in range(256) if high & 0x7F >= _LARGEST["f16"]),
    ("f32", "f16"): bytes(high for high in range(256) if high & 0x7F >= 0x47),
}


def surely_finite(dtype: str, data: Buffer, target: str) -> bool:
    """Whether the high bytes alone of the values in `data` show that each is finite, and stays so as a `target`.

    A quick look at few of them: where it says no, they may be finite nevertheless.
    """
    size = DTYPES[dtype].itemsize
    high = bytes(data[size - 1 :: size])
    return len(high.translate(None, _SUSPECT[dtype, target])) == len(high)


def _widen(array: Array, dtype: str) -> Array:
    """Exact float32 values of any float type."""
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _narrow(values: Array, dtype: str) -> Array:
    """Finite float32 values rounded to nearest even."""
    if dtype == "bf16":
        bits = values.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(DTYPES[dtype], copy=False)


# ----------------------------------------------------------------------------------------------------------- i8b64


def _rows_and_blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = 1
    for length in shape[:-1]:
        rows *= length
    return rows, -(-shape[-1] // INT8_BLOCK)


def _encode_int8(values: Array) -> list[memoryview]:
    """Scales, then codes, by the steps of PT-TEN-041."""
    rows, blocks = _rows_and_blocks(values.shape)
    width = values.shape[-1]
    padded = np.zeros((rows, blocks * INT8_BLOCK), np.float32)
    padded[:, :width] = values.reshape(rows, width)
    grouped = padded.reshape(rows, blocks, INT8_BLOCK)
    peaks = np.abs(grouped).max(axis=-1)
    if not bool((peaks < INT8_HUGE).all()):  # also for NaN
        raise LocalProtocolError("a tensor with NaN, infinity or a value of 2**127 or more is not sent as i8b64")
    peaks[peaks < INT8_TINY] = 0
    scales = peaks / np.float32(127)
    # A zero block divides by one: its values are below INT8_TINY and round to 0.
    divisors = np.where(scales == 0, np.float32(1), scales)
    codes = np.rint(grouped / divisors[..., None]).astype(np.int8).reshape(rows, -1)[:, :width]
    return [
        scales.astype("<f4", copy=False).reshape(-1).view(np.uint8).data,
        np.ascontiguousarray(codes).reshape(-1).view(np.uint8).data,
    ]


def _decode_int8(descriptor: Descriptor, buffer: Buffer) -> Array:
    """Values as float32, after the checks of PT-TEN-044 and PT-TEN-045."""
    rows, blocks = _rows_and_blocks(descriptor.shape)
    width = descriptor.shape[-1]
    scales = np.frombuffer(buffer, "<f4", rows * blocks).reshape(rows, blocks).astype(np.float32)
    codes = np.frombuffer(buffer, np.int8, offset=4 * rows * blocks).reshape(rows, width)
    if int(scales.view(np.uint32).max()) >= BAD_SCALE_BITS[descriptor.dtype]:
        raise tensor_error(descriptor, "a scale is negative, not finite or too large")
    if int(codes.min()) == -128:
        raise tensor_error(descriptor, "code -128")
    spread = np.repeat(scales, INT8_BLOCK, axis=1)[:, :width]
    if not scales.all() and codes[spread == 0].any():
        raise tensor_error(descriptor, "a block of scale 0 has codes other than 0")
    return (spread * codes).reshape(descriptor.shape)
