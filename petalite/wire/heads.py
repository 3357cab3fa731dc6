"""Heads of messages that are sent again and again, and differ in a few integers: steps, their pushes, their replies."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

from petalite.wire import packing


class Template:
    """The fields that stay, encoded once. Raises LocalProtocolError where `packing.encode` does."""

    __slots__ = ("_encoded", "fields")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        pairs = [_packed_key(name) + packing.encode(value, within=2) for name, value in fields.items()]
        self._encoded = b"".join(pairs)

    def with_integers(self, integers: Mapping[str, int]) -> bytes:
        """The whole map, with `integers` of 0..2^64-1 under names that the template does not have."""
        parts = [map_header(len(self.fields) + len(integers)), self._encoded]
        for name, value in integers.items():
            parts += _packed_key(name), packing.encode_uint(value)
        return b"".join(parts)


class RepeatedHead(Mapping[str, Any]):
    """A head made of a template and what differs; like any other mapping, but sooner encoded."""

    __slots__ = ("integers", "template")

    def __init__(self, template: Template, **integers: int) -> None:
        self.template = template
        self.integers = integers

    def __getitem__(self, name: str) -> Any:
        return self.integers[name] if name in self.integers else self.template.fields[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.template.fields
        yield from self.integers

    def __len__(self) -> int:
        return len(self.template.fields) + len(self.integers)


def encode_head(head: Mapping[str, Any], added: dict[str, int]) -> bytes:
    """`head` and the connection's own fields, which it does not have, as one map."""
    if type(head) is RepeatedHead:
        return head.template.with_integers(head.integers | added)
    return packing.encode({**head, **added}, within=1)


@functools.lru_cache(maxsize=256)
def _packed_key(name: str) -> bytes:
    return packing.encode(name)


def map_header(count: int) -> bytes:
    """What stands before `count` pairs of keys and values."""
    return bytes((0x80 + count,)) if count < 16 else bytes(msgpack.Packer().pack_map_header(count))
