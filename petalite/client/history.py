"""What was sent into one block, kept so that any server can be replaced by sending it again (spec 07, replay)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from petalite.client.hidden import Hidden, as_tensor

# Tokens that may wait for their place in the store: they are put there together, out of a decode step's way.
LOOSE_TOKENS = 64


class History:
    """The inputs of one block boundary: (B, length, C) in the wire's dtype, the very values that were sent."""

    def __init__(self) -> None:
        self._store: Tensor | None = None
        self._loose: list[Hidden] = []  # what comes behind the `_stored` tokens of the store
        self._stored = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included."""
        held = self._loose if self._store is None else [self._store, *self._loose]
        return sum(values.nbytes for values in held)

    def write(self, start: int, values: Hidden) -> None:
        """Keep `values` (B, T, C), which must not change any more, as positions start..start+T. What is known already
        stays as it is.

        Raises ValueError for a gap: nothing may be missing before `start`.
        """
        if start > self.length:
            raise ValueError(f"inputs from {start} on, but only {self.length} are known")
        known = self.length - start
        new = values.shape[1] - known
        if new <= 0:
            return
        self._loose.append(as_tensor(values).narrow(1, known, new) if known else values)
        self.length += new
        if self.length - self._stored >= LOOSE_TOKENS:
            self._tidy()

    def _tidy(self) -> Tensor | None:
        """Put all that is loose into the store."""
        if self._loose:
            loose = [as_tensor(values) for values in self._loose]
            store = self._room_for(self.length, loose[0])
            for values in loose:
                store.narrow(1, self._stored, values.shape[1]).copy_(values)
                self._stored += values.shape[1]
            self._loose.clear()
        return self._store

    def _room_for(self, end: int, like: Tensor) -> Tensor:
        if self._store is None or self._store.shape[1] < end:
            grown = like.new_empty((like.shape[0], max(end, 2 * self._stored, LOOSE_TOKENS), like.shape[2]))
            if self._store is not None:
                grown[:, : self._stored] = self._store[:, : self._stored]
            self._store = grown
        return self._store

    def read(self, start: int, end: int) -> Hidden:
        """(B, end - start, C); the very values that were written last, if that is it. Raises ValueError outside of what
        is known.
        """
        if not 0 <= start < end <= self.length:
            raise ValueError(f"inputs {start}:{end} are not all known ({self.length} are)")
        if self._loose and end == self.length and self._loose[-1].shape[1] == end - start:
            return self._loose[-1]
        store = self._tidy()
        if store is None:
            raise ValueError("no inputs are known")
        return store.narrow(1, start, end - start)

    def truncate(self, length: int) -> None:
        if length < self.length:
            self._tidy()
            self._stored = self.length = length

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was."""
        store = self._tidy()
        if store is not None:
            self._store = store.index_select(0, torch.tensor(list(sources), device=store.device))
