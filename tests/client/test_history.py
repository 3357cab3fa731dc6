"""Kept inputs: what is written is what is read, whatever was cut, reordered or written twice."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petalite.bridge import from_wire, to_wire, torch_dtype
from petalite.client.hidden import Encoded, as_tensor
from petalite.client.history import LOOSE_TOKENS, History


def values(start: int, end: int, batch: int = 2) -> torch.Tensor:
    return torch.arange(start, end, dtype=torch.float32).view(1, -1, 1) + 100 * torch.arange(batch).view(-1, 1, 1)


def test_written_values_are_read_back() -> None:
    history = History()
    history.write(0, values(0, 5))
    history.write(5, values(5, 200))
    assert torch.equal(history.read(3, 150), values(3, 150))
    assert history.length == 200


def test_what_is_known_stays_when_it_is_written_again() -> None:
    history = History()
    history.write(0, values(0, 5))
    history.write(2, values(1002, 1008))
    assert torch.equal(history.read(0, 8), torch.cat([values(0, 5), values(1005, 1008)], dim=1))


def test_a_gap_is_refused() -> None:
    history = History()
    history.write(0, values(0, 5))
    with pytest.raises(ValueError, match="only 5 are known"):
        history.write(6, values(6, 7))


@pytest.mark.parametrize(("start", "end"), [(0, 6), (3, 3), (-1, 2), (5, 6)])
def test_reading_outside_of_what_is_known_is_refused(start: int, end: int) -> None:
    history = History()
    history.write(0, values(0, 5))
    with pytest.raises(ValueError, match="not all known"):
        history.read(start, end)


def test_nothing_is_known_at_first() -> None:
    history = History()
    assert (history.length, history.nbytes) == (0, 0)
    with pytest.raises(ValueError):
        history.read(0, 1)


def test_memory_is_at_most_twice_what_is_kept() -> None:
    history = History()
    for i in range(1000):
        history.write(i, values(i, i + 1))
    assert history.nbytes <= 2 * 1000 * 2 * 4


def test_what_was_read_is_not_changed_by_what_is_written_later() -> None:
    history = History()
    history.write(0, values(0, 5))
    sent = history.read(0, 5).clone()
    view = history.read(0, 5)
    history.truncate(3)
    history.reorder([1, 0])
    history.write(3, values(50, 60))
    assert torch.equal(view[:, :3], sent[:, :3])


def test_what_was_written_last_is_read_as_it_came() -> None:
    """So that its bytes, which came over the wire, can go on as they are."""
    history = History()
    history.write(0, values(0, 5))
    for i in range(5, 500):
        piece = values(i, i + 1)
        history.write(i, piece)
        assert history.read(i, i + 1) is piece or (i + 1) % LOOSE_TOKENS < 5
    assert torch.equal(history.read(0, 500), values(0, 500))


def test_memory_of_what_is_kept_as_it_travels_counts() -> None:
    history = History()
    tensor, body = to_wire(values(0, 3), "f16", "i8b64")
    history.write(0, Encoded(tensor, body, from_wire(tensor, b"".join(body))))
    history.write(3, Encoded(*to_wire(values(3, 7), "f16")))
    assert history.nbytes == tensor.nbytes + 2 * 3 * 2 + 2 * 4 * 2


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_what_is_kept_as_it_travels_is_read_as_what_it_means(dtype: str) -> None:
    history = History()
    for i in range(3):
        history.write(2 * i, Encoded(*to_wire(values(2 * i, 2 * i + 2), dtype)))
    read = as_tensor(history.read(1, 6))
    assert read.dtype == torch_dtype(dtype)
    assert torch.equal(read.float(), values(1, 6))


@pytest.mark.parametrize("loose", [1, 6, LOOSE_TOKENS])
@given(operations=st.lists(st.tuples(st.sampled_from("wtr"), st.integers(0, 9), st.integers(0, 1)), max_size=30))
def test_agrees_with_a_plain_list(loose: int, operations: list[tuple[str, int, int]]) -> None:
    with mock.patch("petalite.client.history.LOOSE_TOKENS", loose):
        check_against_a_plain_list(operations)


def check_against_a_plain_list(operations: list[tuple[str, int, int]]) -> None:
    history, rows = History(), [[], []]  # type: tuple[History, list[list[float]]]
    stamp = 0.0
    for kind, number, which in operations:
        if kind == "w":
            start = min(number, history.length)
            stamp += 1
            new = [[stamp * 10 + row] * 4 for row in range(2)]
            values = torch.tensor(new).unsqueeze(-1)
            history.write(start, Encoded(*to_wire(values, "f32")) if which else values)
            for row, added in zip(rows, new, strict=True):
                row += added[len(row) - start :] if start + 4 > len(row) else []
        elif kind == "t":
            history.truncate(number)
            rows = [row[:number] for row in rows]
        else:
            sources = [which, 1 - which] if number % 2 else [which, which]
            history.reorder(sources)
            rows = [list(rows[source]) for source in sources]
        assert history.length == len(rows[0])
        if rows[0]:
            last = history.read(history.length - 1, history.length).squeeze(-1).tolist()
            assert last == [row[-1:] for row in rows]
            assert history.read(0, history.length).squeeze(-1).tolist() == rows
