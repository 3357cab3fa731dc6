"""The fast way on CUDA: decode steps of up to 16 rows as captured graphs, the same formulas as `blocks`.

`accelerate` wraps a span where it can, and says why where it cannot; everything but short decode steps goes the plain
way. Graphs need fixed shapes, so there is one for each of a few batch sizes; rows of different sessions and lengths
share one, since where each row stands is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petalite.bloom.blocks import Block
from petalite.bloom.cache import CacheFull, CachePool
from petalite.bloom.span import Part, Span

BATCHES = (1, 2, 4, 8, 16)
_WARM_UP_RUNS = 3


@dataclass(slots=True)
class _Graph:
    """One captured pass: fill `hidden` (B, C) and `meta` (4, B), replay, read `output` (B, C)."""

    hidden: Tensor
    meta: Tensor
    staging: Tensor  # pinned twin of `meta`
    output: Tensor
    graph: Any


def accelerate(span: Span, pool: CachePool, progress: Callable[[int, int], None] | None = None) -> tuple[Span, str]:
    """`span` or a faster one with the same results, and "" or why it is not faster. Blocking; `progress` by graphs."""
    if span.device.type != "cuda":
        return span, "not on a CUDA device"
    if span.dtype == torch.float32:
        return span, "float32 goes the plain way"
    try:
        from petalite.bloom import kernels
    except ImportError as error:
        return span, f"Triton is missing: {error}"
    fast = FastSpan(span, pool, kernels)
    try:
        fast.warm_up(progress or (lambda done, total: None))
    except (RuntimeError, CacheFull) as error:
        return span, f"graphs cannot be captured: {str(error).splitlines()[0]}"
    return fast, ""


class FastSpan(Span):
    """A span whose decode steps over `pool` are graphs."""

    def __init__(self, span: Span, pool: CachePool, kernels: Any) -> None:
        super().__init__(span.config, span.start, span.end, span.layers)
        self._pool = pool
        self._kernels = kernels
        self._cuda_slopes = self._slopes.to(device=span.device, dtype=torch.float32)
        self._graphs: dict[int, _Graph] = {}
        self._spare = 0  # a slot that nobody reads, for the unused rows of a graph

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Capture every graph. Raises RuntimeError where CUDA refuses, CacheFull where the pool has no spare slot."""
        self._spare = self._pool.reserve(1, 1).offset
        with torch.inference_mode():
            for done, batch in enumerate(BATCHES):
                progress(done, len(BATCHES))
                self._graphs[batch] = self._capture(batch)
        progress(len(BATCHES), len(BATCHES))

    def _capture(self, batch: int) -> _Graph:
        C, device = self.config.hidden_size, self.device
        hidden = torch.zeros((batch, C), dtype=self.dtype, device=device)
        staging = torch.zeros((4, batch), dtype=torch.int64, pin_memory=True)
        staging[0], staging[1] = self._spare * C, 1
        meta = staging.to(device)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP_RUNS):
                self._decode(hidden, meta)
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self._decode(hidden, meta)
        return _Graph(hidden, meta, staging, output, graph)

    def step_batch(self, hidden: Tensor, parts: Sequence[Part]) -> Tensor:
        """As `Span.step_batch`; decode steps of up to 16 rows replay a graph."""
        batch = sum(part.rows.batch for part in parts)
        if batch > BATCHES[-1] or any(
            part.tokens != 1 or part.prompted or part.rows.pool is not self._pool for part in parts
        ):
            return super().step_batch(hidden, parts)
        graph = self._graphs[next(size for size in BATCHES if size >= batch)]
        self._point(graph.staging, parts)
        graph.meta.copy_(graph.staging, non_blocking=True)
        graph.hidden[:batch].copy_(hidden)
        graph.graph.replay()
        return graph.output[:batch].clone()

    def _point(self, staging: Tensor, parts: Sequence[Part]) -> None:
        """Where each row of the batch stands; rows beyond it write to the spare slot."""
        C = self.config.hidden_size
        columns = []
        for part in parts:
            self.check_part(part)
            for i in range(part.rows.batch):
                start = (part.rows.offset + i * part.rows.length) * C
                columns.append((start, part.rows.length, part.position, part.pad[i] if part.pad else 0))
        columns += [(self._spare * C, 1, 0, 0)] * (staging.shape[1] - len(columns))
        torch.cuda.current_stream(self.device).synchronize()  # the last copy out of `staging` is over
        staging.copy_(torch.tensor(columns, dtype=torch.int64).T)

    def _decode(self, hidden: Tensor, meta: Tensor) -> Tensor:
        x = hidden
        for layer, arena in zip(self.layers, self._pool.arenas, strict=True):
            x = self._block(layer, x, arena, meta)
        return x

    def _block(self, block: Block, x: Tensor, arena: Tensor, meta: Tensor) -> Tensor:
        """`Block.forward` for one token a row."""
        attention, mlp, after = block.self_attention, block.mlp, block.post_layernorm_residual
        product = self._kernels.product
        normed, norm = self._before(block.input_layernorm, x, after)
        qkv = product(attention.query_key_value, normed, norm=norm)
        seen = self._kernels.decode_attention(qkv, arena, meta, self._cuda_slopes, attention.head_dim)
        x = product(attention.dense, seen, residual=normed)
        normed, norm = self._before(block.post_attention_layernorm, x, after)
        wide = product(mlp.dense_h_to_4h, normed, norm=norm, gelu=True)
        result: Tensor = product(mlp.dense_4h_to_h, wide, residual=normed)
        return result

    @staticmethod
    def _before(norm: nn.LayerNorm, x: Tensor, after: bool) -> tuple[Tensor, nn.LayerNorm | None]:
        """What a product takes and what it is yet to do to it: where the normed values are the residual, nothing."""
        return (norm(x), None) if after else (x, norm)
