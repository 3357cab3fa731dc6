"""What was sent into one block, kept so that any server can be replaced by sending it again (spec 07, replay)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class History:
    """The inputs of one block boundary: (B, length, C) in the wire's dtype, the very values that were sent."""

    def __init__(self) -> None:
        self._store: Tensor | None = None
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included."""
        return 0 if self._store is None else self._store.numel() * self._store.itemsize

    def write(self, start: int, values: Tensor) -> None:
        """Keep `values` (B, T, C) as positions start..start+T. What is known already stays as it is.

        Raises ValueError for a gap: nothing may be missing before `start`.
        """
        if start > self.length:
            raise ValueError(f"inputs from {start} on, but only {self.length} are known")
        known = self.length - start
        new = values.shape[1] - known
        if new <= 0:
            return
        store = self._room_for(self.length + new, values)
        store.narrow(1, self.length, new).copy_(values.narrow(1, known, new) if known else values)
        self.length += new

    def _room_for(self, end: int, like: Tensor) -> Tensor:
        if self._store is None or self._store.shape[1] < end:
            grown = like.new_empty((like.shape[0], max(end, 2 * self.length, 64), like.shape[2]))
            if self._store is not None:
                grown[:, : self.length] = self._store[:, : self.length]
            self._store = grown
        return self._store

    def read(self, start: int, end: int) -> Tensor:
        """(B, end - start, C). Raises ValueError outside of what is known."""
        if self._store is None or not 0 <= start < end <= self.length:
            raise ValueError(f"inputs {start}:{end} are not all known ({self.length} are)")
        return self._store.narrow(1, start, end - start)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was."""
        if self._store is not None:
            self._store = self._store.index_select(0, torch.tensor(list(sources), device=self._store.device))
