"""Heads that are encoded once and filled in: the same map as one encoded whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import LocalProtocolError
from petalite.limits import MAX_NESTING
from petalite.wire import frames, packing
from petalite.wire.heads import RepeatedHead, Template, encode_head

NAMES = st.text("abcdefgh", min_size=1, max_size=3)
VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=8) | st.lists(st.text())


@given(st.dictionaries(NAMES, VALUES, max_size=20), st.dictionaries(NAMES, st.integers(0, 2**64 - 1), max_size=20))
def test_a_repeated_head_is_the_map_that_it_stands_for(fields: dict[str, Any], integers: dict[str, int]) -> None:
    fields = {name: value for name, value in fields.items() if name not in integers}
    head = RepeatedHead(Template(fields), **integers)
    assert dict(head) == fields | integers and len(head) == len(fields) + len(integers)
    added = {"size": 3, "dl": 2**40}
    encoded = encode_head(head, added)
    assert packing.decode(encoded) == packing.decode(encode_head(dict(head), added)) == {**fields, **integers, **added}
    assert len(encoded) == len(packing.encode({**fields, **integers, **added}))  # as short as can be


@pytest.mark.parametrize("bad", [1.5, "\ud800", {1: 2}, object()])
def test_what_has_no_place_on_the_wire_is_not_encoded(bad: object) -> None:
    with pytest.raises(LocalProtocolError):
        Template({"x": bad})
    with pytest.raises(LocalProtocolError):
        encode_head({"x": bad}, {})


def test_a_head_nests_no_deeper_than_its_frame_allows() -> None:
    value: Any = 1
    for _ in range(MAX_NESTING - 2):  # the frame is one container, its head another
        value = [value]
    for head in ({"x": value}, RepeatedHead(Template({"x": value}))):
        frame = frames.with_stream(frames.encode_req(True, "m", encode_head(head, {})), 1)
        assert frames.decode(memoryview(frame)) == frames.Req(1, True, "m", {"x": value})
    with pytest.raises(LocalProtocolError):
        Template({"x": [value]})
    with pytest.raises(LocalProtocolError):
        encode_head({"x": [value]}, {})
