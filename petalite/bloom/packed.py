"""The fast way on a CPU: the products of a block by oneDNN, with the weights in the order in which it reads them.

torch gives float32 products to MKL, which on processors that are not Intel's needs up to three times as long for a few
rows; and its own int8 product turns weights back into floats. `pack` puts the modules of this file in the place of
`nn.Linear` and `Int8Linear`, one by one, so that no more than one matrix exists twice. Their formulas are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petalite.bloom.blocks import Head
from petalite.bloom.quantize import Int8Linear
from petalite.bloom.span import Span

# An input of an int8 product is an integer of 16 bits, this times its row's largest number at most (see PackedInt8).
_LARGEST = 127 * 256
_ZERO = 128 * 256
# One or two rows need longer than three to six with packed float weights, by a third: so they get empty company.
_FEWEST_ROWS = 4


def why_not_packed(device: torch.device, dtype: torch.dtype) -> str:
    """ "" or why weights stay as they are there."""
    return _missing(dtype) if device.type == "cpu" else "not on a CPU"


def pack(span: Span) -> str:
    """Pack the weights of `span` in place; "" or why they stay as they are. Blocking."""
    reason = why_not_packed(span.device, span.dtype)
    if not reason:
        for layer in span.layers:
            for name, linear in products(layer):
                layer.set_submodule(name, packed(linear))
    return reason


def products(block: nn.Module) -> list[tuple[str, nn.Linear | Int8Linear]]:
    """The linear layers of a block, with their names in it."""
    return [(name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear | Int8Linear)]


def packed(linear: nn.Linear | Int8Linear) -> nn.Module:
    """The same product with packed weights, which are a copy; `linear` itself where this processor has none."""
    if isinstance(linear, nn.Linear):
        return PackedLinear(linear)
    return PackedInt8(linear) if torch.cpu._is_vnni_supported() else linear


def quicken(head: Head) -> None:
    """Have oneDNN compute the logits too. A head that shares its matrix with the embeddings cannot pack it, but that
    is enough for a fifth of the time of one row, and for half of it from two to eight.
    """
    linear = head.lm_head
    if linear.weight.device.type == "cpu" and not _missing(linear.weight.dtype):
        head.lm_head = UnpackedLinear(linear)


def _missing(dtype: torch.dtype) -> str:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "torch is built without oneDNN"
    name = str(dtype).removeprefix("torch.")
    probe = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}.get(name)
    able = probe is None or getattr(torch.ops.mkldnn, probe)()
    return "" if able else f"oneDNN has no products of {name} on this processor"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _rows_for(count: int) -> int:
    """Rows to compute for `count`: all up to 32, then a quarter of a power of two apart.

    oneDNN keeps what it made for each number of rows, 0.3 MiB of it, for up to 1,024 numbers; peers choose them.
    """
    step = 1 << max(0, count.bit_length() - 3) if count > 32 else 1
    return max(_FEWEST_ROWS, -(-count // step) * step)


class PackedLinear(nn.Module):
    """`nn.Linear` with weights that only oneDNN can read. Differentiable in x."""

    weight: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), None))
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Differentiable.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        given = x.shape[0]
        count = _rows_for(given)
        if given == count:
            return _product(x, self.weight, self.bias)
        # Of one row, as in most decode steps, the company are its likes: nothing is to be written.
        wide = x.expand(count, -1) if given == 1 else F.pad(x, (0, 0, 0, count - given))
        return _product(wide, self.weight, self.bias).narrow(0, 0, given)

    def plain_weight(self) -> Tensor:
        """(out, in), made anew: backward passes read it once."""
        return self.weight.to_dense()


class UnpackedLinear(nn.Linear):
    """The same `nn.Linear`, weight and all, by oneDNN where nothing is to be differentiated."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        return _product(x, self.weight, self.bias)


class PackedInt8(nn.Module):
    """`Int8Linear` where the processor multiplies bytes (VNNI). Differentiable in x.

    It multiplies unsigned by signed bytes only. So each row of x becomes integers of 16 bits, which keeps more of it
    than bfloat16 would, and their high and low bytes are two rows of the product: x = s (256 high + low - 32,768).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, plain: Int8Linear) -> None:
        super().__init__()
        codes = plain.weight
        self.register_buffer("weight", torch.ops.onednn.qlinear_prepack(codes, None))
        self.register_buffer("scale", plain.scale)
        self.register_buffer("_zeros", torch.zeros(codes.shape[0], dtype=torch.int32))
        self.register_buffer("_offset", codes.sum(dim=1, dtype=torch.int32) * plain.scale * _ZERO)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Differentiable.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        given, K = x.shape
        N = _rows_for(given)
        wide = F.pad(x.to(torch.float32), (0, 0, 0, N - given))
        step = wide.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30).div_(_LARGEST)
        integers = (wide / step).round_().add_(_ZERO).to(torch.int32).to(torch.uint16)
        rows = integers.view(torch.uint8).view(N, K, 2).permute(2, 0, 1).reshape(2 * N, K)  # all low bytes, all high
        low, high = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 0, self.weight, self.scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        ).split(N)
        y = torch.addcmul(self.bias, low.add_(high, alpha=256).sub_(self._offset), step)
        return y[:given].to(x.dtype)

    def plain_weight(self) -> Tensor:
        """(out, in) in float32, made anew: backward passes read it once."""
        return self.weight.to_dense().T * self.scale[:, None]


class _Differentiable(torch.autograd.Function):
    """A packed product, and the way back through its plain weight: the weight itself is never learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear | PackedInt8) -> Tensor:
        ctx.layer = layer
        return layer.product(x).clone()  # it may be a view of more rows, which autograd lets nobody add to in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.plain_weight().to(grad.dtype), None
