"""The KV cache: one pool of token slots, rows cut from it, a position each, written in place (spec: model, sessions).

A pool holds, for every block of a span, one flat tensor of keys and values. A row is a run of token slots; within it
lie (H, slots, d) numbers, so that neighbouring rows of one length are one (B * H, slots, d) tensor and attention needs
no copy. Memory of the pool is taken once, and on a CPU not touched before it is used.

A step writes keys and values behind a row's position and moves nothing; `commit` moves the position once the result is
complete. A step that fails or is dropped leaves the cache as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from petalite.bloom.config import BloomConfig
from petalite.errors import LocalProtocolError, PetaliteError


class CacheFull(PetaliteError):
    """No run of free slots is long enough; `free` is what is left in all, which may lie in several runs."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"KV cache has no room for {wanted} tokens ({free} free)")
        self.wanted = wanted
        self.free = free


@dataclass(slots=True)
class Rows:
    """`batch` neighbouring rows of `length` token slots each, reserved together: one session's cache.

    Row i holds `positions[i]` committed tokens. `beside`: further slots that stand for memory which the session takes
    elsewhere.
    """

    pool: CachePool
    offset: int
    batch: int
    length: int
    positions: list[int]
    views: tuple[Tensor, ...]  # per block of `blocks` (2, B, H, length, d)
    blocks: slice  # which of the pool's blocks these rows are for
    beside: int = 0

    @property
    def slots(self) -> int:
        """What is taken from the pool."""
        return self.batch * self.length + self.beside

    @property
    def position(self) -> int:
        """The position all rows share. Raises `LocalProtocolError` if they differ."""
        if len(set(self.positions)) != 1:
            raise LocalProtocolError(f"rows stand at different positions: {self.positions}")
        return self.positions[0]

    def row(self, i: int) -> Rows:
        """Row i alone, for one step: it shares the slots, and is committed and released through the whole."""
        views = tuple(view[:, i : i + 1] for view in self.views)
        return Rows(self.pool, self.offset + i * self.length, 1, self.length, [self.positions[i]], views, self.blocks)

    def commit(self, position: int | Sequence[int]) -> None:
        """Say that every slot below `position` (one for all, or one a row) is written."""
        positions = [position] * self.batch if isinstance(position, int) else list(position)
        if len(positions) != self.batch or any(not 0 <= p <= self.length for p in positions):
            raise LocalProtocolError(f"cannot commit {positions} in {self.batch} rows of {self.length} slots")
        self.positions = positions

    def truncate(self, position: int) -> None:
        """Forget every token at or behind `position`; rows that are shorter stay as they are."""
        if position < 0:
            raise LocalProtocolError(f"cannot truncate to {position}")
        self.positions = [min(p, position) for p in self.positions]

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was, position included (beam search).

        Copies only rows that change, and one block's worth at a time on top of the cache.
        """
        if len(sources) != self.batch or any(not 0 <= s < self.batch for s in sources):
            raise LocalProtocolError(f"cannot reorder {self.batch} rows as {list(sources)}")
        changed = [(i, s) for i, s in enumerate(sources) if i != s]
        if not changed:
            return
        longest = max(self.positions[s] for _, s in changed)
        device = self.views[0].device
        to, source = (torch.tensor(column, device=device) for column in zip(*changed, strict=True))
        for view in self.views:
            used = view[:, :, :, :longest]
            used.index_copy_(1, to, used.index_select(1, source))
        self.positions = [self.positions[s] for s in sources]


@dataclass(slots=True, eq=False)
class Growth:
    """A longer place for `rows`, reserved: `copy` brings along what is cached, then `CachePool.grown` moves in.

    Between the two no step may run on the rows; to give up, release `new`.
    """

    rows: Rows
    new: Rows
    old_views: tuple[Tensor, ...]
    used: int

    def copy(self) -> None:
        """What takes long, in any thread. Heads lie `length` slots apart, so all of it moves."""
        for old_view, new_view in zip(self.old_views, self.new.views, strict=True):
            new_view[:, :, :, : self.used].copy_(old_view[:, :, :, : self.used])


class CachePool:
    """Token slots for `blocks` blocks; hands out rows first fit.

    `capacity` counts token slots: a session of B rows of length L takes B * L of them, in every block.
    Not safe to call from several threads at once; `Rows` of different sessions are independent.
    """

    def __init__(
        self,
        config: BloomConfig,
        blocks: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if blocks < 1 or capacity < 0:
            raise LocalProtocolError(f"cannot make a cache of {capacity} tokens for {blocks} blocks")
        self.config = config
        self.capacity = capacity
        self.bytes_per_token = bytes_per_token(config, blocks, dtype)
        # empty, not zeros: pages nobody has written to are not resident.
        shape = (2, capacity * config.hidden_size)
        self._arenas = [torch.empty(shape, dtype=dtype, device=device) for _ in range(blocks)]
        # (offset, slots) of the free runs: sorted, never adjacent, none empty.
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    @property
    def arenas(self) -> Sequence[Tensor]:
        """Keys and values of each block, (2, capacity * C): what `Rows.views` are views of."""
        return self._arenas

    @property
    def free(self) -> int:
        """Token slots not reserved."""
        return sum(slots for _, slots in self._free)

    def would_fit(self, batch: int, length: int, released: Iterable[Rows] = (), beside: int = 0) -> bool:
        """Whether `reserve` would find room once the rows in `released` were given back."""
        runs = [*self._free, *((rows.offset, rows.slots) for rows in released)]
        return any(slots >= batch * length + beside for _, slots in _merged(runs))

    def reserve(self, batch: int, length: int, blocks: slice = slice(None), beside: int = 0) -> Rows:
        """Take `batch` neighbouring rows of `length` slots, for all blocks of the pool or those of a slice.

        `beside`: so many slots more, which stay unused.

        A slot is one of all blocks: a slice takes no less room. Raises `CacheFull` where no free run is long enough.
        """
        if batch < 1 or length < 1 or beside < 0:
            raise LocalProtocolError(f"cannot reserve {batch} rows of {length} slots and {beside} beside them")
        wanted = batch * length + beside
        for i, (offset, slots) in enumerate(self._free):
            if slots >= wanted:
                self._free[i : i + 1] = [(offset + wanted, slots - wanted)] if slots > wanted else []
                views = self._views(offset, batch, length, blocks)
                return Rows(self, offset, batch, length, [0] * batch, views, blocks, beside)
        raise CacheFull(wanted, self.free)

    def release(self, rows: Rows) -> None:
        """Give rows back; they must not be used again. Releasing twice is a mistake and raises `LocalProtocolError`."""
        if rows.pool is not self or not rows.views:
            raise LocalProtocolError("these rows are not reserved in this pool")
        rows.views = ()
        self._free = _merged([*self._free, (rows.offset, rows.slots)])

    def extend(self, rows: Rows, length: int) -> None:
        """Make `rows` `length` slots long, contents kept. Raises `CacheFull` and changes nothing then."""
        if length > rows.length:
            growth = self.grow(rows, length)
            growth.copy()
            self.grown(growth)

    def grow(self, rows: Rows, length: int) -> Growth:
        """The same in three parts, of which this is the first. Raises `CacheFull`."""
        new = self.reserve(rows.batch, length, rows.blocks, rows.beside)
        return Growth(rows, new, rows.views, max(rows.positions))

    def grown(self, growth: Growth) -> None:
        """All is copied: the rows lie in their new place, and the old one is free."""
        rows, new = growth.rows, growth.new
        old = Rows(self, rows.offset, rows.batch, rows.length, [], rows.views, rows.blocks, rows.beside)
        rows.offset, rows.length, rows.views = new.offset, new.length, new.views
        self.release(old)

    def _views(self, offset: int, batch: int, length: int, blocks: slice) -> tuple[Tensor, ...]:
        C, H, d = self.config.hidden_size, self.config.n_head, self.config.head_dim
        run = slice(offset * C, (offset + batch * length) * C)
        return tuple(arena[:, run].view(2, batch, H, length, d) for arena in self._arenas[blocks])


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(offset, slots) of runs that do not overlap: sorted, neighbours as one."""
    merged: list[tuple[int, int]] = []
    for offset, slots in sorted(runs):
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + slots)
        else:
            merged.append((offset, slots))
    return merged


def bytes_per_token(config: BloomConfig, blocks: int, dtype: torch.dtype) -> int:
    """Cache bytes of one token slot: a key and a value of C numbers in every block."""
    return blocks * 2 * config.hidden_size * dtype.itemsize
