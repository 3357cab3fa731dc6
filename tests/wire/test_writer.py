"""The priority writer (spec 03): order, fairness, and that nothing urgent waits behind more than a piece."""

from __future__ import annotations

import pytest

from petalite import limits
from petalite.wire.writer import Outgoing, Plain, Priority, PriorityWriter


class Message(Outgoing):
    """One queued message that notes when it began and ended."""

    def __init__(self, writer: PriorityWriter, stream: int, size: int, priority: Priority = Priority.STEP) -> None:
        self.has_ended = False
        self.stream = stream
        self.load((bytes([stream]) * size,) if size else (), priority)
        writer.put(self)

    def make_head(self) -> bytes:
        assert not self.begun
        return b"head%d" % self.stream

    def ended(self) -> None:
        assert self.begun and not self.has_ended
        self.has_ended = True


def owners(frames: list[Plain]) -> list[int]:
    """Which message each body piece belongs to."""
    return [body[0] for _, body in frames if body is not None]


def sizes(frames: list[Plain]) -> list[int]:
    return [len(body) for _, body in frames if body is not None]


def test_a_message_is_its_head_and_its_pieces_in_order() -> None:
    writer = PriorityWriter()
    message = Message(writer, 1, 150_000)
    frames = writer.take(10**6)
    assert frames[0] == (b"head1", None)
    assert sizes(frames) == [65_000, 65_000, 20_000]
    assert [prefix[5] for prefix, body in frames if body is not None] == [0, 0, 1]  # END on the last only
    assert message.has_ended and not writer


def test_control_goes_first() -> None:
    writer = PriorityWriter()
    Message(writer, 1, 10)
    writer.control(b"ping")
    assert writer.control_bytes == 4
    assert [prefix for prefix, body in writer.take(10**6)][:2] == [b"ping", b"head1"]
    assert writer.control_bytes == 0


def test_a_step_overtakes_a_prefill_between_two_pieces() -> None:
    writer = PriorityWriter()
    Message(writer, 1, 10**6, Priority.BULK)
    writer.take(1)
    Message(writer, 2, 2000, Priority.STEP)
    frames = writer.take(1)
    assert frames[0] == (b"head2", None) and owners(frames) == [2]


def test_steps_take_turns_of_one_quantum() -> None:
    writer = PriorityWriter()
    for stream in (1, 2, 3):
        Message(writer, stream, 40_000)
    frames = writer.take(10**6)
    assert owners(frames) == [1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert max(sizes(frames)) == limits.SHARED_QUANTUM


def test_bulk_shares_in_long_pieces() -> None:
    writer = PriorityWriter()
    for stream in (1, 2):
        Message(writer, stream, 130_000, Priority.BULK)
    assert owners(writer.take(10**6)) == [1, 2, 1, 2]


def test_a_small_budget_makes_small_pieces() -> None:
    writer = PriorityWriter()
    Message(writer, 1, 10**5, Priority.BULK)
    assert sizes(writer.take(limits.WRITE_AHEAD_SLOW)) == [limits.MIN_QUANTUM] * 2


def test_lower_classes_get_one_turn_in_sixteen() -> None:
    writer = PriorityWriter()
    Message(writer, 1, 2_000_000, Priority.STEP)
    Message(writer, 2, 2_000_000, Priority.DHT)
    Message(writer, 3, 2_000_000, Priority.BULK)
    turns = owners(writer.take(64 * limits.SHARED_QUANTUM))
    lower = [turn for turn in turns if turn != 1]
    assert len(turns) > 50 and len(lower) == len(turns) // limits.LOW_CLASS_EVERY
    assert set(lower) == {2, 3}


def test_the_head_is_made_only_when_its_turn_comes() -> None:
    writer = PriorityWriter()
    first, second = Message(writer, 1, 10**6), Message(writer, 2, 10, Priority.BULK)
    writer.take(1)
    assert first.begun and not second.begun


def test_a_removed_message_leaves_nothing() -> None:
    writer = PriorityWriter()
    first, second = Message(writer, 1, 10**6), Message(writer, 2, 10)
    writer.take(1)
    writer.remove(first)
    assert next(prefix for prefix, _ in writer.take(10**6)) == b"head2"
    assert not writer and second.has_ended and not first.has_ended
    writer.remove(first)  # once more does no harm
    assert not writer


@pytest.mark.parametrize("pieces", [(), (b"",), (b"", b"ab", b"", b"c")])
def test_empty_pieces_make_no_frames(pieces: tuple[bytes, ...]) -> None:
    writer = PriorityWriter()
    message = Message(writer, 1, 0)
    message.load(pieces, Priority.STEP)
    frames = writer.take(10**6)
    assert b"".join(bytes(body) for _, body in frames if body is not None) == b"".join(pieces)
    assert message.has_ended


def test_pieces_of_any_shape_are_bytes() -> None:
    array = memoryview(bytes(range(24))).cast("B", (2, 3, 4))
    writer = PriorityWriter()
    Message(writer, 1, 0).load((array, bytearray(b"z")), Priority.STEP)
    body = b"".join(bytes(part) for _, part in writer.take(10**6) if part is not None)
    assert body == bytes(range(24)) + b"z"
