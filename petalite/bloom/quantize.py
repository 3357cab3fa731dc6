"""Int8 weights with one scale for each output channel; activations stay in the compute dtype (spec: model)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights turned into codes, or back into floats, at a time: temporary copies stay in the processor's cache.
_CHUNK_ELEMENTS = 2**18


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (out, in) floats to int8 (out, in) and float32 scales (out,).

    scale = max |row| / 127, code = round(weight / scale), ties to even: every weight is off by at most half a scale,
    that is 1/254 of the largest weight of its row (a row of zeros gets scale 0). Raises `ValueError` where a weight is
    not finite.
    """
    codes = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], device=weight.device)
    chunk = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    chunks = zip(*(torch.split(each, chunk) for each in (weight, codes, scale)), strict=True)
    for rows, their_codes, their_scale in chunks:
        rows = rows.to(torch.float32)
        their_scale.copy_(rows.abs().amax(dim=1) / 127)
        divisor = torch.where(their_scale > 0, their_scale, 1)
        their_codes.copy_((rows / divisor[:, None]).round_().clamp_(-127, 127))
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weights that are not finite cannot be quantized")
    return codes, scale


class Int8Linear(nn.Module):
    """y = (x @ codes^T) * scale + bias, the same signature as nn.Linear. Differentiable in x."""

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = self.weight.shape[0] if x.is_cuda else max(1, _CHUNK_ELEMENTS // self.weight.shape[1])
        products = [F.linear(x, codes.to(x.dtype)) for codes in torch.split(self.weight, rows)]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        # Codes are at most 127, exact in every compute dtype; scaling the sums instead costs one rounding, not many.
        return y * self.scale.to(x.dtype) + self.bias
