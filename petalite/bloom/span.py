"""Consecutive blocks of one model, as a server runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from petalite.bloom.blocks import Block, Window, alibi_slopes
from petalite.bloom.cache import Rows
from petalite.bloom.config import BloomConfig
from petalite.errors import LocalProtocolError


@dataclass(slots=True)
class Part:
    """One session's share of a batched step: T new tokens for each of its rows, all of which stand at `position`.

    `pad[i]` tokens at the start of row i are left padding: nobody looks at them (None: no padding). `prompts` (blocks,
    P, C) are added to the inputs of each block at the first P positions of each row that are not padding.
    """

    rows: Rows
    tokens: int
    position: int
    pad: Sequence[int] | None = None
    prompts: Tensor | None = None

    @property
    def prompted(self) -> bool:
        """Whether some of the new tokens stand where prompts are added."""
        return self.prompts is not None and self.position < max(self.pad or (0,)) + self.prompts.shape[1]


R_co = TypeVar("R_co", covariant=True)


class Underway(Protocol[R_co]):
    """What a device may still be working on."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> R_co:
        """Wait for it."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An `Underway` that is not."""

    value: Tensor

    def done(self) -> bool:
        return True

    def result(self) -> Tensor:
        return self.value


@dataclass(frozen=True, slots=True)
class RawRows:
    """Hidden states of some rows, one position each, as bytes of the span's dtype. Where they are not known to be
    `finite`, they may still be.
    """

    data: bytes
    finite: bool


class Span(nn.Module):
    """Blocks [start, end). Call it under `torch.inference_mode()`, except to differentiate through `forward`.

    Hidden states at padded positions are finite and otherwise meaningless.
    """

    asynchronous = False
    """Whether `begin_batch` leaves short steps to a device and returns."""

    def __init__(self, config: BloomConfig, start: int, end: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        if not 0 <= start < end <= config.n_layer or len(blocks) != end - start:
            raise LocalProtocolError(f"a span cannot be {len(blocks)} blocks [{start}, {end}) of {config.n_layer}")
        self.config = config
        self.start = start
        self.end = end
        self.blocks = nn.ModuleList(blocks)
        self._layers = tuple(blocks)  # looked up in every step: a tuple, not a ModuleList
        self._slopes = torch.tensor(alibi_slopes(config.n_head), dtype=torch.float64)
        self._alibi = torch.empty(config.n_head, 1, 0)

    def forward(self, hidden: Tensor, pad: Sequence[int] | None = None) -> Tensor:
        """hidden (B, T, C) -> (B, T, C): whole sequences, no cache, causal. Differentiable in `hidden`."""
        B, T, C = hidden.shape
        window = self._window(B, T, 0, pad, None, hidden.device)
        x = hidden.reshape(B * T, C)
        for layer in self._layers:
            x = layer(x, (window,), 0)
        return x.view(B, T, C)

    def step(self, hidden: Tensor, rows: Rows, pad: Sequence[int] | None = None, position: int | None = None) -> Tensor:
        """hidden (B, T, C) -> (B, T, C): T tokens behind what `rows` hold, prefill or decode.

        `position`: where the first of them goes, if not where the rows stand (a piece of a step not committed yet).
        Keys and values are written, positions are not moved: `rows.commit(position + T)` does, once the result counts.
        Rows may stand at different positions. Raises `LocalProtocolError` where the rows are too short.
        """
        B, T, C = hidden.shape
        if rows.batch != B:
            raise LocalProtocolError(f"{B} rows of hidden states for {rows.batch} rows of cache")
        if position is not None or rows.positions.count(rows.positions[0]) == B:
            part = Part(rows, T, rows.positions[0] if position is None else position, pad)
            return self.step_batch(hidden.reshape(B * T, C), (part,)).view(B, T, C)
        parts = [Part(rows.row(i), T, p, None if pad is None else pad[i : i + 1]) for i, p in enumerate(rows.positions)]
        return self.step_batch(hidden.reshape(B * T, C), parts).view(B, T, C)

    def step_batch(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """hidden (N, C) -> (N, C), N = sum of rows * tokens over `parts`: steps of several sessions as one.

        Matrix products see all N tokens at once, whatever the parts' lengths and positions; attention goes by parts.
        """
        windows = self._windows(hidden, parts)
        prompts = find_prompts(parts, hidden.device)
        for index, layer in enumerate(self._layers):
            hidden = layer(add_prompts(hidden, prompts, index), windows, index)
        return hidden

    def begin_batch(self, inputs: Sequence[Tensor], parts: Sequence[Part]) -> Underway[Tensor]:
        """`step_batch` of `inputs` (N_i, C), one after the other, perhaps without waiting for it."""
        return Finished(self.step_batch(inputs[0] if len(inputs) == 1 else torch.cat(list(inputs)), parts))

    def begin_raw(self, inputs: Sequence[bytearray], parts: Sequence[Part]) -> Underway[list[RawRows]] | None:
        """`begin_batch` of decode steps for an `asynchronous` span, from and to bytes, which spares the host all that
        tensors are about: `inputs` holds those of each part. None where that cannot be; nothing was done then.
        """
        return None

    def entry_device(self, tokens: int) -> torch.device:
        """Where hidden states of so many tokens are best handed in."""
        return self.device

    def step_blocks(self, hidden: Tensor, parts: Sequence[Part]) -> Iterator[Tensor]:
        """`step_batch` block by block: yields (N, C) after each, so that a long prefill can let others in between."""
        windows = self._windows(hidden, parts)
        prompts = find_prompts(parts, hidden.device)
        for index, layer in enumerate(self._layers):
            hidden = layer(add_prompts(hidden, prompts, index), windows, index)
            yield hidden

    @property
    def layers(self) -> tuple[Block, ...]:
        """The blocks, first to last."""
        return self._layers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and of the cache (norms keep it when weights are quantized)."""
        return self._layers[0].input_layernorm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._layers[0].input_layernorm.weight.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(t.numel() * t.itemsize for t in [*self.parameters(), *self.buffers()])

    def _windows(self, hidden: Tensor, parts: Sequence[Part]) -> list[Window]:
        windows = [self._part_window(part, hidden.device) for part in parts]
        if hidden.shape[0] != sum(w.batch * w.tokens for w in windows):
            raise LocalProtocolError(f"{hidden.shape[0]} tokens do not fill the {len(parts)} parts of the batch")
        return windows

    def check_part(self, part: Part) -> None:
        """Raises `LocalProtocolError` where the rows are of another span's cache, or too short."""
        rows, T, position = part.rows, part.tokens, part.position
        if len(rows.views) != len(self._layers):
            raise LocalProtocolError(f"rows of a cache for {len(rows.views)} blocks, span of {len(self._layers)}")
        if T < 1 or position < 0 or position + T > rows.length:
            raise LocalProtocolError(f"{T} tokens at position {position} do not fit rows of {rows.length} slots")

    def _part_window(self, part: Part, device: torch.device) -> Window:
        self.check_part(part)
        rows, T, position = part.rows, part.tokens, part.position
        return self._window(rows.batch, T, position, part.pad, rows.views, device)

    def _window(
        self,
        B: int,
        T: int,
        position: int,
        pad: Sequence[int] | None,
        cache: Sequence[Tensor] | None,
        device: torch.device,
    ) -> Window:
        S = position + T
        bias = self._bias(S, device)  # (H, 1, S)
        if B > 1:
            bias = bias.repeat(B, 1, 1)
        padded = pad is not None and any(pad)
        return Window(B, T, S, bias, _mask(T, S, pad if padded else None, device) if T > 1 or padded else None, cache)

    def sequence_window(self, batch: int, tokens: int, mask: Tensor | None, device: torch.device) -> Window:
        """What `batch` whole sequences look at: no cache, and no token outside of `mask` (batch, tokens; bool).

        Only real tokens count in ALiBi's distances, as in transformers, whose positions are the mask's running sum.
        """
        if mask is None:
            return self._window(batch, tokens, 0, None, None, device)
        mask = mask.to(device)
        count = mask.cumsum(1)
        distance = (count - count[:, -1:]).to(torch.float64)
        bias = (self._slopes.to(device)[:, None, None] * distance[:, None, None, :]).to(torch.float32)
        key = torch.arange(tokens, device=device)
        # As in _mask: a token always sees itself, even one that nobody looks at.
        hidden = (key > key[:, None]) | (~mask[:, None, :] & (key != key[:, None]))
        return Window(
            batch,
            tokens,
            tokens,
            bias.view(-1, 1, tokens),
            torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))[:, None],
        )

    def _bias(self, S: int, device: torch.device) -> Tensor:
        """(H, 1, S): slope * (j - (S - 1)) for key j. A view: the last S columns of a table, which doubles as it must.

        Measured from the last query: softmax does not see a constant, and near keys keep exact small numbers however
        long the sequence is.
        """
        known = self._alibi.shape[2]
        if known < S or self._alibi.device != device:
            with torch.inference_mode(False):  # a later differentiable call may use the same table
                distance = torch.arange(1 - max(S, 2 * known, 256), 1, dtype=torch.float64)
                self._alibi = (self._slopes[:, None, None] * distance).to(torch.float32).to(device)
            known = self._alibi.shape[2]
        return self._alibi[:, :, known - S :]


Prompts = list[tuple[Tensor, Tensor, Tensor]]
"""Of each part that has them: which tokens of the batch (K,), what position of the prompts each has (K,), and those."""


def find_prompts(parts: Sequence[Part], device: torch.device) -> Prompts:
    """The prompts that reach into the new tokens of `parts`."""
    found, first = [], 0
    for part in parts:
        B, T = part.rows.batch, part.tokens
        if part.prompts is not None and part.prompted:
            pad = torch.tensor(part.pad or [0] * B, device=device)[:, None]
            place = (torch.arange(part.position, part.position + T, device=device) - pad).view(-1)  # (B * T)
            tokens = ((place >= 0) & (place < part.prompts.shape[1])).nonzero().view(-1)
            found.append((tokens + first, place[tokens], part.prompts))
        first += B * T
    return found


def add_prompts(hidden: Tensor, prompts: Prompts, index: int) -> Tensor:
    """What enters block `index` of the span: hidden (N, C), which is not changed, and the prompts."""
    for tokens, places, values in prompts:
        hidden = hidden.index_add(0, tokens, values[index, places].to(hidden.dtype))
    return hidden


def _mask(T: int, S: int, pad: Sequence[int] | None, device: torch.device) -> Tensor:
    """(1 or B, 1, T, S): -inf where key j may not be seen by query i (positions S - T + i), 0 elsewhere.

    Query i sees keys j <= i, and of those not the padded ones, but always itself: a row without any key would be NaN.
    """
    key = torch.arange(S, device=device)
    query = key[S - T :, None]
    hidden = key > query  # (T, S)
    hidden = hidden[None, None]
    if pad is not None:
        first = torch.tensor(pad, device=device)[:, None, None, None]
        hidden = hidden | ((key < first) & (key != query))
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
