"""Whole sequences through blocks, forward and backward, a block at a time (spec/15).

Nothing is kept between the two: backward computes the forward pass again, keeps each block's input, and differentiates
one block after another, so that memory holds the inputs of one group of rows and the insides of one block. Both are
generators that pause after each block: whoever drives them can let others have the model meanwhile.

B rows, T tokens, C hidden size, n blocks of the span, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petalite.bloom.blocks import MAX_SCORES, Block, Window
from petalite.bloom.config import BloomConfig
from petalite.bloom.lora import adapted
from petalite.bloom.span import Span

# Tokens of the rows that go through a block together: enough for a matrix product to be worth it, few enough that
# nobody waits long for a block to end.
GROUP_TOKENS = 256
CUDA_GROUP_TOKENS = 2_048
# Times C numbers that autograd keeps for one token in one block, about: norms, the fused product and its parts, the
# wide layer before and after its activation, and the gradients of these.
_KEPT_PER_TOKEN = 48
# Copies of the attention scores that are alive at a time.
_KEPT_PER_SCORE = 3


@dataclass(frozen=True, slots=True)
class Extras:
    """What goes into a pass besides hidden states.

    `mask` (B, T) bool, True where there is a token (None: everywhere). `prompts` (n, P, C) or (n, B, P, C): added to
    the first P positions of each block's input. `adapter`: as for `lora.adapted`.
    """

    mask: Tensor | None = None
    prompts: Tensor | None = None
    adapter: Mapping[str, Tensor] = field(default_factory=dict)

    def of_rows(self, rows: slice) -> Extras:
        """The same for some of the rows."""
        prompts = self.prompts
        if prompts is not None and prompts.dim() == 4:
            prompts = prompts[:, rows]
        return Extras(None if self.mask is None else self.mask[rows], prompts, self.adapter)

    def of_block(self, index: int) -> dict[str, Tensor]:
        """What block `index` of the span gets of it, by name: "prompts" and the adapter's keys."""
        given = {"prompts": self.prompts, **self.adapter}
        return {name: tensor[index] for name, tensor in given.items() if tensor is not None}


def forward_pass(
    span: Span, hidden: Tensor, extras: Extras, taps: Sequence[int] = ()
) -> Generator[None, None, tuple[Tensor, Tensor | None]]:
    """hidden (B, T, C) -> the last block's output (B, T, C), and what went into the blocks `taps` (len(taps), B, T, C).

    Blocks are counted from the span's first; what enters a block is taken before its prompts are added. Run it under
    `torch.no_grad()`.
    """
    output = torch.empty_like(hidden)
    tapped = hidden.new_empty((len(taps), *hidden.shape)) if taps else None
    for rows in _groups(span, *hidden.shape[:2]):
        x, part = hidden[rows], extras.of_rows(rows)
        window = _window(span, x, part.mask)
        for index, block in enumerate(span.layers):
            if tapped is not None and index in taps:
                tapped[taps.index(index), rows] = x
            x = _run_block(block, x, window, part.of_block(index))
            yield
        output[rows] = x
    return output, tapped


def backward_pass(
    span: Span,
    hidden: Tensor,
    extras: Extras,
    grad: Tensor,
    wanted: Collection[str],
    taps: Sequence[int] = (),
    tap_grads: Tensor | None = None,
) -> Generator[None, None, dict[str, Tensor]]:
    """Gradients of a loss by name: "h", "prompts", or a key of the adapter, whichever are `wanted`.

    `grad` (B, T, C) and `tap_grads` (len(taps), B, T, C) are the loss's with respect to what `forward_pass` gives. "h"
    comes in the dtype of `hidden`, the others, summed over rows and tokens, in float32. Run it under `torch.no_grad()`.
    """
    given = {"prompts": extras.prompts, **extras.adapter}
    made = {
        name: torch.zeros_like(tensor, dtype=torch.float32)
        for name, tensor in given.items()
        if name in wanted and tensor is not None
    }
    if "h" in wanted:
        made["h"] = torch.empty_like(hidden)
    for rows in _groups(span, *hidden.shape[:2]):
        part = extras.of_rows(rows)
        window = _window(span, hidden[rows], part.mask)
        inputs = [hidden[rows]]
        for index, block in enumerate(span.layers[:-1]):
            inputs.append(_run_block(block, inputs[-1], window, part.of_block(index)))
            yield
        flowing = grad[rows]
        for index in reversed(range(len(inputs))):
            through = index > 0 or "h" in wanted
            found = _block_backward(
                span.layers[index], inputs.pop(), window, part.of_block(index), flowing, through, wanted
            )
            if through:
                flowing = found.pop("h")
                if tap_grads is not None and index in taps:
                    flowing = flowing + tap_grads[taps.index(index), rows]
            for name, gradient in found.items():
                total = made[name][index]
                (total[rows] if name == "prompts" and total.dim() == 3 else total).add_(gradient)
            yield
        if "h" in wanted:
            made["h"][rows] = flowing
    return made


def pass_bytes(config: BloomConfig, blocks: int, batch: int, tokens: int, *, backward: bool, itemsize: int) -> int:
    """About the working memory of a pass over `batch` rows of `tokens`, without what goes in and comes out."""
    rows = min(batch, max(1, GROUP_TOKENS // tokens))
    kept = blocks if backward else 2
    scores = rows * config.n_head * tokens * tokens
    return (
        rows * tokens * config.hidden_size * (kept * itemsize + 4 * _KEPT_PER_TOKEN)
        + 4 * _KEPT_PER_SCORE * (scores if backward else min(scores, MAX_SCORES))
        + 8 * rows * tokens * tokens
    )


def _groups(span: Span, batch: int, tokens: int) -> Iterator[slice]:
    """Rows that go together."""
    together = CUDA_GROUP_TOKENS if span.device.type == "cuda" else GROUP_TOKENS
    scores = span.config.n_head * tokens * tokens
    rows = max(1, min(together // tokens, MAX_SCORES // scores))
    for first in range(0, batch, rows):
        yield slice(first, min(first + rows, batch))


def _window(span: Span, hidden: Tensor, mask: Tensor | None) -> Window:
    return span.sequence_window(hidden.shape[0], hidden.shape[1], mask, hidden.device)


def _run_block(block: Block, x: Tensor, window: Window, given: Mapping[str, Tensor]) -> Tensor:
    """x (B, T, C) -> (B, T, C). `given`: this block's "prompts" (P, C) or (B, P, C), and its part of the adapter."""
    prompts = given.get("prompts")
    if prompts is not None:
        P = prompts.shape[-2]
        x = torch.cat([x[:, :P] + prompts.to(x.dtype), x[:, P:]], dim=1)
    return adapted(block, given)(x.reshape(-1, x.shape[-1]), (window,), 0).view(x.shape)  # type: ignore[no-any-return]


def _block_backward(
    block: Block,
    x: Tensor,
    window: Window,
    given: Mapping[str, Tensor],
    grad: Tensor,
    through: bool,
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """Gradients of one block by name: those `wanted`, and "h" if the gradient is to flow `through` to its input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items() if name in wanted}
    if through:
        leaves["h"] = x.detach().requires_grad_()
    if not leaves:
        return {}
    with torch.enable_grad():
        output = _run_block(block, leaves.get("h", x), window, {**given, **leaves})
        # a scalar: torch would import sympy, 50 MB and a second of everybody's time, to look at the shape of `grad`
        product = (output * grad).sum()
    return dict(zip(leaves, torch.autograd.grad(product, list(leaves.values())), strict=True))
