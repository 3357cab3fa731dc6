"""Budgets for bodies: reserved whole before a byte of them is taken (spec 03)."""

from __future__ import annotations


class Quota:
    """`limit` bytes, of which each `reserve` takes a part, also from `parent` where there is one."""

    __slots__ = ("limit", "parent", "used")

    def __init__(self, limit: int, parent: Quota | None = None) -> None:
        self.limit = limit
        self.used = 0
        self.parent = parent

    @property
    def left(self) -> int:
        own = self.limit - self.used
        return own if self.parent is None else min(own, self.parent.left)

    def reserve(self, size: int) -> bool:
        """Take `size` bytes, or return False and take nothing."""
        if not size:
            return True
        if self.used + size > self.limit or (self.parent is not None and not self.parent.reserve(size)):
            return False
        self.used += size
        return True

    def has_room(self, size: int) -> bool:
        """Whether `reserve` would take it: for a body that is handed on at once."""
        return self.used + size <= self.limit and (self.parent is None or self.parent.has_room(size))

    def release(self, size: int) -> None:
        if size:
            self.used -= size
            if self.parent is not None:
                self.parent.release(size)
