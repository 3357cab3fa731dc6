"""torch tensors <-> wire tensors: the only place that knows both (spec/05).

The i8b64 codec runs in torch, on the tensor's own device, and gives the very bytes of `wire.tensors`.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Final

import numpy as np
import torch

from petalite.errors import LocalProtocolError
from petalite.limits import INT8_BLOCK
from petalite.wire.tensors import (
    BAD_SCALE_BITS,
    DTYPES,
    FLOATS,
    INT8,
    INT8_HUGE,
    INT8_TINY,
    RAW,
    Buffer,
    Descriptor,
    known_descriptor,
    surely_finite,
    tensor_error,
)

_TORCH: Final[dict[str, torch.dtype]] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "u8": torch.uint8,
}
_WIRE: Final = {dtype: name for name, dtype in _TORCH.items()}
_HERE: Final = (None, "cpu", torch.device("cpu"))
# What numpy can make of floats. It has no bfloat16, but can carry its bits.
_CASTS: Final = {"f32": {"f32", "f16"}, "f16": {"f32", "f16"}, "bf16": {"bf16"}}
# Bytes of a few values. They are looked at, and cast, without torch: its kernels are quick, but a decode step finds
# their code, and that of all that leads to them, in none of the processor's caches.
FEW_BYTES: Final = 2**15


def wire_dtype(dtype: torch.dtype) -> str:
    """The wire's name of a torch type; LocalProtocolError if it does not travel."""
    try:
        return _WIRE[dtype]
    except KeyError:
        raise LocalProtocolError(f"tensors of {dtype} have no wire type") from None


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a wire type."""
    return _TORCH[name]


def to_wire(
    tensor: torch.Tensor, dtype: str, codec: str = RAW, name: str = "h", shape: tuple[int, ...] | None = None
) -> tuple[Descriptor, list[memoryview]]:
    """Descriptor and body bytes of `tensor`, cast to `dtype` (a wire type) first; `shape`: as which it goes, if not as
    its own.

    The bytes may share memory with `tensor`: leave it alone until they are sent. Raises LocalProtocolError if a value
    is NaN or infinite after the cast: what does not fit into f16 may fit into bf16, the caller's choice.
    """
    descriptor = known_descriptor(name, dtype, tuple(tensor.shape) if shape is None else shape, codec)
    if codec == RAW and descriptor.nbytes <= FEW_BYTES:
        few = _encode_few(tensor, dtype)
        if few is not None:
            return descriptor, [few.data.cast("B")]
    values = tensor.detach().to(_TORCH[dtype])
    if dtype in FLOATS and not all_finite(values):
        _refuse(tensor, dtype, name)
    if codec == INT8:
        scales, codes = _encode_int8(values, name)
        return descriptor, [_bytes(scales), _bytes(codes)]
    return descriptor, [_bytes(values)]


def from_wire(
    descriptor: Descriptor,
    buffer: Buffer,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The tensor, on `device` (default: CPU) and cast to `dtype` (default: as sent); `shape`: as which it is wanted, if
    not as it was sent.

    Raw without a cast shares memory with a writable, aligned `buffer`, and keeps it alive. Raises RequestError(TENSOR)
    for a wrong number of bytes, NaN or infinity (before or after the cast), or scales or codes that no encoder makes.
    """
    size = descriptor.nbytes
    if len(buffer) != size:
        raise tensor_error(descriptor, f"{len(buffer)} bytes, must be {size}")
    if size <= FEW_BYTES and descriptor.codec == RAW and device in _HERE:
        few = _decode_few(descriptor, buffer, dtype, shape or descriptor.shape)
        if few is not None:
            return few
    values = _decode(descriptor, buffer, device)
    cast = values if dtype is None else values.to(dtype)
    decoded = cast is values and descriptor.codec == INT8  # its scales were looked at
    # What is not finite stays so when it is cast: one look is enough.
    if descriptor.dtype in FLOATS and not decoded and not all_finite(cast):
        if all_finite(values):
            raise tensor_error(descriptor, f"a value does not fit into {dtype}")
        raise tensor_error(descriptor, "NaN or infinity")
    return cast if shape is None else cast.view(shape)


def _decode(descriptor: Descriptor, buffer: Buffer, device: torch.device | str | None) -> torch.Tensor:
    """What is sent raw may be NaN or infinite."""
    if descriptor.codec == INT8:
        return _decode_int8(descriptor, _tensor(buffer, torch.uint8).to(device))
    # To its device first: looking at many values is quicker there.
    return _tensor(buffer, _TORCH[descriptor.dtype]).view(descriptor.shape).to(device)


class Inlet:
    """Where the few values of messages of one kind become a tensor of `dtype` and `shape`, the same one each time: that
    asks torch for nothing. What `take` gave last is overwritten by the next.
    """

    def __init__(self, descriptor: Descriptor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._descriptor = descriptor
        self._have, self._want = descriptor.dtype, _WIRE[dtype]
        self._values = torch.empty(shape, dtype=dtype)
        bits = self._values.view(torch.int16) if self._want == "bf16" else self._values
        self._array: np.ndarray[Any, Any] = bits.numpy().reshape(-1).view(DTYPES[self._want])

    @staticmethod
    def serves(descriptor: Descriptor, dtype: torch.dtype) -> bool:
        """Whether such values are few, and numpy can cast them."""
        few = descriptor.codec == RAW and descriptor.nbytes <= FEW_BYTES
        return few and _WIRE.get(dtype, "") in _CASTS.get(descriptor.dtype, ())

    def take(self, buffer: Buffer) -> torch.Tensor | None:
        """None where the bytes are too few or too many, or a value may not be finite: `from_wire` judges those."""
        if len(buffer) != self._descriptor.nbytes or not surely_finite(self._have, buffer, self._want):
            return None
        self._array[:] = np.frombuffer(buffer, DTYPES[self._have])
        return self._values


def few_to_wire(tensor: torch.Tensor, dtype: str) -> memoryview | None:
    """The bytes of a copy of `tensor` as a `dtype`, all finite; None where `to_wire` has to do it."""
    few = _encode_few(tensor, dtype)
    return None if few is None else few.data.cast("B")


def few_from_wire(descriptor: Descriptor, buffer: memoryview) -> torch.Tensor:
    """The tensor of a raw `buffer`, which is writable, aligned, as large as it should be, and known to hold no NaN or
    infinity; they share memory.
    """
    array = np.frombuffer(buffer, DTYPES[descriptor.dtype]).reshape(descriptor.shape)
    if descriptor.dtype == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _encode_few(tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, np.dtype[Any]] | None:
    """A copy. None for types that numpy lacks, another device, values that may be too large: `to_wire` judges those."""
    have = _WIRE.get(tensor.dtype, "")
    if dtype not in _CASTS.get(have, ()):
        return None
    try:
        array: np.ndarray[Any, Any] = (tensor.view(torch.int16) if have == "bf16" else tensor).numpy()
    except (TypeError, RuntimeError):  # on a device, or with a gradient: to ask for each beforehand takes as long
        return None
    if array.nbytes > FEW_BYTES:
        return None
    kind = array.dtype if have == "bf16" else DTYPES[dtype]
    return array.astype(kind, "C") if surely_finite(have, array.tobytes(), dtype) else None


def _decode_few(
    descriptor: Descriptor, buffer: Buffer, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """As `_encode_few`."""
    have = descriptor.dtype
    want = have if dtype is None else _WIRE.get(dtype, "")
    if want not in _CASTS.get(have, ()) or not surely_finite(have, buffer, want):
        return None
    if have == want:
        return _tensor(buffer, _TORCH[have]).view(shape)
    return torch.from_numpy(np.frombuffer(buffer, DTYPES[have]).astype(DTYPES[want]).reshape(shape))


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    A sum is never finite where a term is not, and takes one pass; only a sum that overflows needs the slow look.
    """
    return isfinite(values.sum(dtype=torch.float32).item()) or bool(torch.isfinite(values).all())


def _refuse(tensor: torch.Tensor, dtype: str, name: str) -> None:
    if all_finite(tensor):
        peak = float(tensor.abs().max())
        raise LocalProtocolError(f"tensor {name!r}: value of size {peak:.6g} does not fit into {dtype}")
    raise LocalProtocolError(f"tensor {name!r}: NaN or infinity is not sent")


def _bytes(values: torch.Tensor) -> memoryview:
    if values.dtype is torch.bfloat16:
        values = values.contiguous().view(torch.int16)  # numpy has no bfloat16
    if values.is_cuda:  # a copy into pinned memory, which torch keeps at hand, takes a tenth of the time
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        values = pinned.copy_(values)
    array: np.ndarray[Any, Any] = values.cpu().contiguous().numpy()
    return array.data.cast("B")


def _tensor(buffer: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """One dimension over the buffer's memory; a copy where torch could not use it as it is."""
    if memoryview(buffer).readonly:
        buffer = bytearray(buffer)
    values = torch.frombuffer(buffer, dtype=dtype)
    if values.data_ptr() % values.itemsize:
        return torch.frombuffer(bytearray(buffer), dtype=dtype)
    return values


def _encode_int8(values: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and codes; the same steps, in the same order, as in `wire.tensors`."""
    width = values.shape[-1]
    rows = values.reshape(-1, width).float()
    blocks = -(-width // INT8_BLOCK)
    if width % INT8_BLOCK:
        rows = torch.nn.functional.pad(rows, (0, blocks * INT8_BLOCK - width))
    grouped = rows.view(-1, blocks, INT8_BLOCK)
    peaks = grouped.abs().amax(dim=-1)
    if not peaks.max().item() < INT8_HUGE:
        raise LocalProtocolError(f"tensor {name!r}: a value of 2**127 or more is not sent as {INT8}")
    # Divided by a tensor: by a plain 127 a GPU would multiply with the reciprocal, and other bytes come out.
    scales = peaks.masked_fill_(peaks < INT8_TINY, 0).div_(peaks.new_full((1,), 127))
    divisors = scales.masked_fill(scales == 0, 1)
    codes = (grouped / divisors.unsqueeze(-1)).round_().to(torch.int8).view(-1, blocks * INT8_BLOCK)
    return scales, codes[:, :width]


def _decode_int8(descriptor: Descriptor, body: torch.Tensor) -> torch.Tensor:
    width = descriptor.shape[-1]
    blocks = -(-width // INT8_BLOCK)
    rows = body.numel() // (4 * blocks + width)
    head = body[: 4 * rows * blocks]
    if head.data_ptr() % 4:
        head = head.clone()
    scales, codes = head.view(torch.float32), body[4 * rows * blocks :].view(torch.int8).view(rows, width)
    bits = scales.view(torch.int32)  # signed: what is negative here is a negative scale or a negative NaN
    low, high = (int(end) for end in bits.aminmax())
    if low < 0 or high >= BAD_SCALE_BITS[descriptor.dtype]:
        raise tensor_error(descriptor, "a scale is negative, not finite or too large")
    if int(codes.min()) == -128:
        raise tensor_error(descriptor, "code -128")
    if width % INT8_BLOCK:
        spread = scales.view(rows, blocks).repeat_interleave(INT8_BLOCK, dim=1)[:, :width]
    else:
        spread = scales.view(rows, blocks, 1)
        codes = codes.view(rows, blocks, INT8_BLOCK)
    if low == 0 and bool(codes.bool().logical_and_(spread == 0).any()):
        raise tensor_error(descriptor, "a block of scale 0 has codes other than 0")
    return (codes * spread).view(descriptor.shape).to(_TORCH[descriptor.dtype])
