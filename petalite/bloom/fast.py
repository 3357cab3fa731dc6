"""The fast way on CUDA, the same formulas as `blocks`: decode steps of up to 16 rows as captured graphs.

`accelerate` wraps a span where it can, and says why where it cannot. Graphs need fixed shapes, so there is one for each
of a few batch sizes; rows of different sessions and lengths share one, since where each row stands is data. Where
`onepass` has a kernel for the span, a graph is that kernel; else it is eight for each block. Longer steps go block by
block, with attention that keeps no scores. `fast_ends` is the client's half.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float, c_int64
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petalite.bloom.blocks import Block
from petalite.bloom.cache import CacheFull, CachePool
from petalite.bloom.graphs import BATCHES, Graph, Replay, bytes_of, capture, kernels_for
from petalite.bloom.onepass import MAX_ROWS, OnePass, why_not
from petalite.bloom.quantize import Int8Linear
from petalite.bloom.span import Finished, Part, RawRows, Span, Underway, add_prompts, find_prompts

log = logging.getLogger("petalite.bloom")

_MOST_INT8_TOKENS = 512
# Tokens that a new kernel is tried behind, and how far its result may be off: half precision rounds by about 0.02.
_PROOF_TOKENS = 100
_MOST_OFF = 0.1
# Of prefills at the start, so that no client waits while their kernels are compiled.
_WARM_UP_TOKENS = (64, 256)


def accelerate(span: Span, pool: CachePool, progress: Callable[[int, int], None] | None = None) -> tuple[Span, str]:
    """`span` or a faster one with the same results, and "" or why it is not faster. Blocking; `progress` by graphs."""
    kernels, reason = kernels_for(span.device, span.dtype)
    if reason:
        return span, reason
    fast = FastSpan(span, pool, kernels)
    try:
        fast.warm_up(progress or (lambda done, total: None))
    except (RuntimeError, CacheFull) as error:
        return span, f"graphs cannot be captured: {str(error).splitlines()[0]}"
    return fast, ""


def _with_sums(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (B, C) and the sum of each row: what is not finite is in no finite sum."""
    return hidden, hidden.sum(dim=1, dtype=torch.float32)


def _raw_rows(graph: Graph, sizes: Sequence[int]) -> list[RawRows]:
    hidden, sums = graph.taken
    data = bytes_of(hidden)
    row_bytes = len(data) // hidden.shape[0]
    finite = [isfinite(total) for total in (c_float * hidden.shape[0]).from_address(sums.data_ptr())]
    rows, at = [], 0
    for size in sizes:
        rows.append(RawRows(bytes(data[at * row_bytes : (at + size) * row_bytes]), all(finite[at : at + size])))
        at += size
    return rows


class FastSpan(Span):
    """A span whose decode steps over `pool` are graphs."""

    asynchronous = True

    def __init__(self, span: Span, pool: CachePool, kernels: Any) -> None:
        super().__init__(span.config, span.start, span.end, span.layers)
        self._pool = pool
        self._dtype = span.dtype  # asked for in every step, and far to look for in modules
        self._kernels = kernels
        self._cuda_slopes = self._slopes.to(device=span.device, dtype=torch.float32)
        self._graphs: dict[int, Graph] = {}
        self._several = why_not(self)  # why there is no kernel for all blocks
        self._spare = 0  # a slot that nobody reads, for the unused rows of a graph

    @property
    def dtype(self) -> torch.dtype:
        """As `Span.dtype`."""
        return self._dtype

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Capture every graph. Raises RuntimeError where CUDA refuses, CacheFull where the pool has no spare slot."""
        C, device = self.config.hidden_size, self.device
        self._spare = self._pool.reserve(1, 1).offset
        with torch.inference_mode(), torch.cuda.device(device):
            for done, batch in enumerate(BATCHES):
                progress(done, len(BATCHES))
                hidden = torch.zeros((batch, C), dtype=self.dtype, pin_memory=True)
                meta = torch.zeros((4, batch), dtype=torch.int64, pin_memory=True)
                meta[0], meta[1] = self._spare * C, 1
                self._graphs[batch] = self._captured((hidden, meta), batch)
            self._warm_up_long()
        progress(len(BATCHES), len(BATCHES))

    def _captured(self, given: Sequence[Tensor], batch: int) -> Graph:
        """A decode step of `batch` rows: one kernel where there is one for this model and chip, else some a block."""
        if batch <= MAX_ROWS and not self._several:
            try:
                run = OnePass(self, self._pool, batch)
                self._prove(run, batch)
                return capture(self.device, given, lambda given: _with_sums(run(*given)))
            except (RuntimeError, CacheFull) as error:
                self._several = str(error)
                log.warning("decode steps take several kernels a block: %s", error)
        return capture(self.device, given, lambda given: _with_sums(self._decode(*given)))

    def _prove(self, run: Callable[[Tensor, Tensor], Tensor], batch: int) -> None:
        """Raises RuntimeError where `run` does not do what the plain blocks do: nobody has tried it on every chip."""
        tokens = min(_PROOF_TOKENS, self._pool.free // batch)
        rows = self._pool.reserve(batch, tokens)
        try:
            for view in rows.views:
                view.normal_()
            part = Part(rows, 1, tokens - 1)
            meta = torch.empty((4, batch), dtype=torch.int64)
            self._place(meta, (part,))
            # Small: what comes out is what the blocks have added, and not what went in.
            hidden = torch.randn((batch, self.config.hidden_size), dtype=self.dtype, device=self.device).mul_(0.01)
            got = run(hidden, meta.to(self.device)).float()
            wanted = Span.step_batch(self, hidden, (part,)).float()
        finally:
            self._pool.release(rows)
        off = float((got - wanted).norm() / wanted.norm())
        if not off < _MOST_OFF:
            raise RuntimeError(f"the kernel for all blocks is off by {off:.2g}")

    def _warm_up_long(self) -> None:
        for tokens in _WARM_UP_TOKENS:
            rows = self._pool.reserve(1, max(1, min(tokens, self._pool.free)))
            hidden = torch.zeros((rows.length, self.config.hidden_size), dtype=self.dtype, device=self.device)
            for pad in (None, [1]):
                self._step_long(hidden, [Part(rows, rows.length, 0, pad)])
            self._pool.release(rows)

    def entry_device(self, tokens: int) -> torch.device:
        """Where hidden states of so many tokens are best handed in: those of a graph on the host."""
        return torch.device("cpu") if tokens <= BATCHES[-1] else self.device

    def begin_batch(self, inputs: Sequence[Tensor], parts: Sequence[Part]) -> Underway[Tensor]:
        """As `Span.begin_batch`. Decode steps of up to 16 rows replay a graph; their result is on the host. One batch
        at a time: its result is taken before the next one begins.
        """
        batch = sum(part.rows.batch for part in parts)
        if batch > BATCHES[-1] or not all(map(self._is_decoding, parts)):
            return Finished(self._step_long(torch.cat([x.to(self.device) for x in inputs]), parts))
        graph = self._graphs[next(size for size in BATCHES if size >= batch)]
        graph.fill(inputs)
        self._place(graph.given[1], parts)
        graph.replay()
        return Replay(graph, lambda graph: graph.taken[0].narrow(0, 0, batch).clone())

    def begin_raw(self, inputs: Sequence[bytearray], parts: Sequence[Part]) -> Underway[list[RawRows]] | None:
        """As `Span.begin_raw`; None where no graph is for so many rows, or a part is no decode step."""
        sizes = [part.rows.batch for part in parts]
        graph = next((self._graphs[size] for size in BATCHES if size >= sum(sizes)), None)
        if graph is None or not all(map(self._is_decoding, parts)):
            return None
        graph.fill_raw(inputs)
        self._place(graph.given[1], parts)
        graph.replay()
        return Replay(graph, lambda graph: _raw_rows(graph, sizes))

    def _is_decoding(self, part: Part) -> bool:
        return part.tokens == 1 and not part.prompted and part.rows.pool is self._pool

    def step_batch(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """As `Span.step_batch`."""
        output: Tensor = self.begin_batch((hidden,), parts).result()
        return output.to(hidden.device)

    def step_blocks(self, hidden: Tensor, parts: Sequence[Part]) -> Iterator[Tensor]:
        """As `Span.step_blocks`."""
        attend = self._attention(hidden, parts)
        prompts = find_prompts(parts, self.device)
        for index, layer in enumerate(self.layers):
            with torch.cuda.device(self.device):
                hidden = self._long_block(layer, index, add_prompts(hidden, prompts, index), attend)
            yield hidden

    def _step_long(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        for output in self.step_blocks(hidden, parts):
            hidden = output
        return hidden

    # Decode steps

    def _place(self, meta: Tensor, parts: Sequence[Part]) -> None:
        """Fill the pinned `meta` (4, batch) with where each row stands, as `kernels.decode_attention` wants it; unused
        rows stand at the spare slot.
        """
        C, batch = self.config.hidden_size, meta.shape[1]
        places = (c_int64 * (4 * batch)).from_address(meta.data_ptr())
        at = 0
        for part in parts:
            self.check_part(part)
            rows = part.rows
            for i in range(rows.batch):
                places[at] = (rows.offset + i * rows.length) * C
                places[batch + at] = rows.length
                places[2 * batch + at] = part.position
                places[3 * batch + at] = part.pad[i] if part.pad else 0
                at += 1
        for unused in range(at, batch):
            places[unused::batch] = [self._spare * C, 1, 0, 0]

    def _decode(self, hidden: Tensor, meta: Tensor) -> Tensor:
        x = hidden
        for layer, arena in zip(self.layers, self._pool.arenas, strict=True):
            x = self._block(layer, x, arena, meta)
        return x

    def _block(self, block: Block, x: Tensor, arena: Tensor, meta: Tensor) -> Tensor:
        """`Block.forward` for one token a row."""
        attention, mlp, after = block.self_attention, block.mlp, block.post_layernorm_residual
        normed = self._kernels.layer_norm(x, block.input_layernorm)
        qkv = self._linear(attention.query_key_value, normed)
        seen = self._kernels.decode_attention(qkv, arena, meta, self._cuda_slopes, attention.head_dim)
        x = self._linear(attention.dense, seen, residual=normed if after else x)
        normed = self._kernels.layer_norm(x, block.post_attention_layernorm)
        wide = self._linear(mlp.dense_h_to_4h, normed, gelu=True)
        return self._linear(mlp.dense_4h_to_h, wide, residual=normed if after else x)

    def _linear(self, layer: nn.Module, x: Tensor, **then: Any) -> Tensor:
        scale = layer.scale if isinstance(layer, Int8Linear) else None
        y: Tensor = self._kernels.linear(x, layer.weight, layer.bias, scale=scale, **then)
        return y

    # Longer ones

    def _attention(self, hidden: Tensor, parts: Sequence[Part]) -> Callable[[Tensor, int], Tensor]:
        """Checks the parts; the function goes from qkv (N, 3C) of one block to what its heads gathered (N, C)."""
        for part in parts:
            self.check_part(part)
        sizes = [part.rows.batch * part.tokens for part in parts]
        if hidden.shape[0] != sum(sizes):
            raise RuntimeError(f"{hidden.shape[0]} tokens do not fill the {len(parts)} parts of the batch")
        pads = [
            torch.tensor(part.pad, dtype=torch.int32, device=self.device) if part.pad and any(part.pad) else None
            for part in parts
        ]

        def attend(qkv: Tensor, index: int) -> Tensor:
            pieces = zip(torch.split(qkv, sizes), parts, pads, strict=True)
            seen = [self._attend_part(piece, part, pad, index) for piece, part, pad in pieces]
            return seen[0] if len(seen) == 1 else torch.cat(seen)

        return attend

    def _attend_part(self, qkv: Tensor, part: Part, pad: Tensor | None, index: int) -> Tensor:
        rows, T = part.rows, part.tokens
        H, d = self.config.n_head, self.config.head_dim
        new = qkv.view(rows.batch, T, H, 3, d).narrow(3, 1, 2).permute(3, 0, 2, 1, 4)
        rows.views[index].narrow(3, part.position, T).copy_(new)
        arena = rows.pool.arenas[rows.blocks][index]
        seen: Tensor = self._kernels.prefill_attention(
            qkv, arena, rows.offset, rows.length, part.position, rows.batch, self._cuda_slopes, pad
        )
        return seen

    def _long_block(self, block: Block, index: int, x: Tensor, attend: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`Block.forward` with other attention."""
        attention, mlp, after = block.self_attention, block.mlp, block.post_layernorm_residual
        normed = block.input_layernorm(x)
        seen = attend(self._long_linear(attention.query_key_value, normed), index)
        x = self._long_linear(attention.dense, seen).add_(normed if after else x)
        normed = block.post_attention_layernorm(x)
        wide = F.gelu(self._long_linear(mlp.dense_h_to_4h, normed), approximate="tanh")
        return self._long_linear(mlp.dense_4h_to_h, wide).add_(normed if after else x)

    def _long_linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer` of x (N, K). Int8 weights are read as they are, but for so many tokens that torch's own product
        makes good for a copy of them as floats.
        """
        if isinstance(layer, Int8Linear) and x.shape[0] <= _MOST_INT8_TOKENS:
            y: Tensor = self._kernels.int8_linear(x, layer.weight, layer.scale, layer.bias)
        else:
            y = layer(x)
        return y
