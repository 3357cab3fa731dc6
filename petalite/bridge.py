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
    FLOATS,
    INT8,
    INT8_HUGE,
    INT8_TINY,
    RAW,
    Buffer,
    Descriptor,
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


def wire_dtype(dtype: torch.dtype) -> str:
    """The wire's name of a torch type; LocalProtocolError if it does not travel."""
    try:
        return _WIRE[dtype]
    except KeyError:
        raise LocalProtocolError(f"tensors of {dtype} have no wire type") from None


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a wire type."""
    return _TORCH[name]


def to_wire(tensor: torch.Tensor, dtype: str, codec: str = RAW, name: str = "h") -> tuple[Descriptor, list[memoryview]]:
    """Descriptor and body bytes of `tensor`, cast to `dtype` (a wire type) first.

    Without a cast the bytes share memory with `tensor`: leave it alone until they are sent. Raises LocalProtocolError
    if a value is NaN or infinite after the cast: what does not fit into f16 may fit into bf16, the caller's choice.
    """
    descriptor = Descriptor(name, dtype, tuple(tensor.shape), codec)
    values = tensor.detach().to(_TORCH[dtype])
    if dtype in FLOATS and not all_finite(values):
        _refuse(tensor, dtype, name)
    if codec == INT8:
        scales, codes = _encode_int8(values, name)
        return descriptor, [_bytes(scales), _bytes(codes)]
    return descriptor, [_bytes(values)]


def from_wire(
    descriptor: Descriptor, buffer: Buffer, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor, on `device` (default: CPU) and cast to `dtype` (default: as sent).

    Raw without a cast shares memory with a writable, aligned `buffer`, and keeps it alive. Raises RequestError(TENSOR)
    for a wrong number of bytes, NaN or infinity (before or after the cast), or scales or codes that no encoder makes.
    """
    size = descriptor.nbytes
    if len(buffer) != size:
        raise tensor_error(descriptor, f"{len(buffer)} bytes, must be {size}")
    if descriptor.codec == INT8:
        values = _decode_int8(descriptor, _tensor(buffer, torch.uint8).to(device))
    else:
        values = _tensor(buffer, _TORCH[descriptor.dtype]).view(descriptor.shape)
        if device is not None:
            values = values.to(device)  # first: looking at many values is quicker there
        if descriptor.dtype in FLOATS and not all_finite(values):
            raise tensor_error(descriptor, "NaN or infinity")
    if dtype is None or dtype == values.dtype:
        return values
    cast = values.to(dtype)
    if cast.dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(values.dtype).max and not all_finite(cast):
        raise tensor_error(descriptor, f"a value does not fit into {dtype}")
    return cast


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
