"""Records (spec 01): whole and byte by byte, every bit guarded, buffers that grow and shrink."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite import limits
from petalite.errors import GoAwayCode, RemoteProtocolError
from petalite.wire.noise import TransportCipher
from petalite.wire.records import RecordReader, RecordWriter, Scratch

KEY = bytes(range(32))


def pair(rekey: int = limits.REKEY_RECORDS) -> tuple[RecordWriter, RecordReader]:
    return RecordWriter(TransportCipher(KEY, rekey)), RecordReader(TransportCipher(KEY, rekey))


def read_all(reader: RecordReader, data: bytes, piece: int) -> list[bytes]:
    found = []
    for at in range(0, len(data), piece):
        found += [bytes(plain) for plain in reader.feed(data[at : at + piece])]
    return found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8), st.sampled_from([1, 2, 7, 10_000]))
def test_records_survive_any_cutting(plaintexts: list[bytes], piece: int) -> None:
    writer, reader = pair()
    data = bytes(writer.pack([(plain, None) for plain in plaintexts]))
    assert read_all(reader, data, piece) == plaintexts


def test_prefix_and_body_become_one_plaintext() -> None:
    writer, reader = pair()
    body = memoryview(bytes(range(200)))
    data = bytes(writer.pack([(b"head", body), (b"alone", None)]))
    assert read_all(reader, data, len(data)) == [b"head" + bytes(body), b"alone"]
    assert data[:2] == (4 + 200 + 16).to_bytes(2, "big")


def test_the_largest_record() -> None:
    writer, reader = pair()
    data = bytes(writer.pack([(bytes(limits.MAX_FRAME), None)]))
    assert len(data) == 2 + limits.MAX_RECORD
    assert read_all(reader, data, 10_000) == [bytes(limits.MAX_FRAME)]


@pytest.mark.parametrize("size", [0, 1, 15, 16])
def test_a_record_without_plaintext_costs_the_connection(size: int) -> None:
    _, reader = pair()
    with pytest.raises(RemoteProtocolError) as caught:
        read_all(reader, size.to_bytes(2, "big") + bytes(size), 100)
    assert caught.value.code is GoAwayCode.FRAME


def test_an_encrypted_empty_frame_costs_the_connection() -> None:
    cipher = TransportCipher(KEY)
    record = bytearray(16)
    cipher.encrypt_into(b"", record)
    with pytest.raises(RemoteProtocolError) as caught:
        read_all(pair()[1], b"\0\x10" + record, 100)
    assert caught.value.code is GoAwayCode.FRAME


@pytest.mark.parametrize("at", [2, 5, 12, 27])
def test_a_flipped_bit_is_noticed_and_leaves_no_plaintext(at: int) -> None:
    writer, _ = pair()
    scratch = Scratch()
    reader = RecordReader(TransportCipher(KEY), scratch=scratch)
    data = bytearray(writer.pack([(b"secret words", None)]))
    data[at] ^= 1
    with pytest.raises(RemoteProtocolError) as caught:
        read_all(reader, bytes(data), 100)
    assert caught.value.code is GoAwayCode.DECRYPT
    assert b"secret" not in bytes(scratch.view)


def test_a_replayed_record_is_noticed() -> None:
    writer, reader = pair()
    data = bytes(writer.pack([(b"once", None)]))
    with pytest.raises(RemoteProtocolError) as caught:
        read_all(reader, data + data, 1000)
    assert caught.value.code is GoAwayCode.DECRYPT


def test_swapped_records_are_noticed() -> None:
    writer, reader = pair()
    first, second = bytes(writer.pack([(b"one", None)])), bytes(writer.pack([(b"two", None)]))
    with pytest.raises(RemoteProtocolError):
        read_all(reader, second + first, 1000)


def test_records_go_on_over_a_rekey() -> None:
    writer, reader = pair(rekey=3)
    plaintexts = [bytes([number]) * 5 for number in range(10)]
    data = bytes(writer.pack([(plain, None) for plain in plaintexts]))
    assert read_all(reader, data, 11) == plaintexts
    # Without the rekey the fourth record is another one.
    assert data != bytes(pair()[0].pack([(plain, None) for plain in plaintexts]))


def test_bytes_that_came_with_the_handshake_are_read_first() -> None:
    writer, _ = pair()
    data = bytes(writer.pack([(b"early", None), (b"later", None)]))
    reader = RecordReader(TransportCipher(KEY), data[:30])
    first = reader.next_frame()
    assert first is not None and bytes(first) == b"early"
    assert reader.next_frame() is None
    assert read_all(reader, data[30:], 100) == [b"later"]


def test_the_buffer_grows_under_load_and_shrinks_again() -> None:
    writer, reader = pair()
    plaintexts = [bytes([number % 251]) * 60_000 for number in range(100)]
    data = b"".join(bytes(writer.pack([(plain, None)])) for plain in plaintexts)
    assert read_all(reader, data, 2**22) == plaintexts
    assert len(reader.space()) > 500_000
    small = bytes(writer.pack([(b"x", None)]))
    for _ in range(8):
        assert len(reader.space()) > 500_000  # one small read is no end of the load
        reader.space()[: len(small)] = small
        reader.received(len(small))
        assert reader.next_frame() is not None
        small = bytes(writer.pack([(b"x", None)]))
    assert len(reader.space()) < 70_000


def test_large_batches_share_one_buffer_and_small_ones_do_not() -> None:
    writer, _ = pair()
    body = memoryview(bytes(60_000))
    first = writer.pack([(b"a", body)])
    assert writer.pack([(b"b", body)]).obj is first.obj
    assert writer.pack([(b"c", None)]).obj is not first.obj
