"""Records and what is refused (spec/10, "Records"), with real signatures and literal bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.dht.records import (
    CONTEXT,
    Record,
    RecordError,
    StoreCode,
    check_times,
    make_record,
    newer,
    read_record,
)
from petalite.errors import LocalProtocolError
from petalite.identity import Identity
from petalite.wire.packing import encode

NET = "net"
KEY = b"\x11" * 32
NOW = 1_700_000_000_000
OWNER = Identity.from_seed(bytes(32))
OTHER = Identity.from_seed(b"\x01" * 32)


def signed(identity: Identity = OWNER, **changes: Any) -> bytes:
    """A good record with some payload fields replaced, or left out where the change is `...`."""
    fields: dict[str, Any] = {
        "net": NET, "key": KEY, "pub": identity.public_key, "seq": NOW, "exp": NOW + 600_000, "val": {"a": 1},
    } | changes  # fmt: skip
    payload = encode({name: value for name, value in fields.items() if value is not ...})
    return identity.sign(CONTEXT + payload) + payload


def code_of(raw: bytes) -> StoreCode:
    with pytest.raises(RecordError) as caught:
        read_record(raw, NET)
    return caught.value.code


def test_record_survives_the_way_there_and_names_its_publisher() -> None:
    raw = make_record(
        NET, KEY, {"span": [0, 4]}, seq=NOW, exp=NOW + 1, public_key=OWNER.public_key, sign=OWNER.sign
    )  # fmt: skip
    record = read_record(raw, NET)
    assert record == Record(raw, KEY, OWNER.peer_id, NOW, NOW + 1, {"span": [0, 4]})


def test_payload_bytes_are_as_the_specification_shows() -> None:
    """PT-REC-003: the example of spec/10."""
    raw = make_record(NET, KEY, None, seq=1, exp=2, public_key=OWNER.public_key, sign=OWNER.sign)
    assert raw[64:].hex() == (
        "86a36e6574a36e6574a36b6579c420" + "11" * 32 + "a3707562c420"
        "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29"
        "a373657101a365787002a376616cc0"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", StoreCode.MALFORMED),
        (b"\0" * 64, StoreCode.MALFORMED),
        (b"\0" * 1065, StoreCode.MALFORMED),
        (b"\0" * 64 + b"\xc1", StoreCode.MALFORMED),
        (b"\0" * 64 + encode([1]), StoreCode.MALFORMED),
        (signed(key=b"\x11" * 31), StoreCode.MALFORMED),
        (signed(pub=b"\x11" * 33), StoreCode.MALFORMED),
        (signed(seq=-1), StoreCode.MALFORMED),
        (signed(seq=2**63), StoreCode.MALFORMED),
        (signed(exp=True), StoreCode.MALFORMED),
        (signed(exp=...), StoreCode.MALFORMED),
        (signed(val=...), StoreCode.MALFORMED),
        (signed(val=[1]), StoreCode.MALFORMED),
        (signed(net=""), StoreCode.MALFORMED),
        (signed(**{"!new": 1}), StoreCode.MALFORMED),
        (signed(net="other"), StoreCode.NETWORK),
        (signed(pub=OTHER.public_key), StoreCode.SIGNATURE),
        (signed(pub=b"\x01" + bytes(31)), StoreCode.SIGNATURE),
        (signed()[:-1] + b"\x02", StoreCode.SIGNATURE),
    ],
)
def test_bad_record_is_refused_with_its_code(raw: bytes, code: StoreCode) -> None:
    assert code_of(raw) is code


def test_identity_point_as_public_key_signs_nothing() -> None:
    """The signature R = identity, S = 0 passes OpenSSL for every message under the key of order one."""
    payload = encode(
        {"net": NET, "key": KEY, "pub": b"\x01" + bytes(31), "seq": NOW, "exp": NOW + 1, "val": {}}
    )  # fmt: skip
    assert code_of(b"\x01" + bytes(63) + payload) is StoreCode.SIGNATURE


def test_unknown_payload_keys_are_carried_and_ignored() -> None:
    raw = signed(more={"x": 1})
    assert read_record(raw, NET).raw == raw


@given(st.binary(max_size=1100))
@settings(max_examples=200)
def test_any_bytes_are_a_record_or_a_record_error(data: bytes) -> None:
    for raw in (data, signed()[:64] + data):
        try:
            read_record(raw, NET, verify=lambda *_: True)
        except RecordError:
            pass


@pytest.mark.parametrize(
    ("seq", "exp", "code"),
    [
        (NOW, NOW, StoreCode.EXPIRED),
        (NOW, NOW + 1, None),
        (NOW, NOW + 3_600_000, None),
        (NOW, NOW + 3_600_001, StoreCode.FUTURE),
        (NOW + 600_000, NOW + 3_600_000, None),
        (NOW + 600_001, NOW + 3_600_000, StoreCode.FUTURE),
        (0, 2**63 - 1, StoreCode.FUTURE),
    ],
)
def test_times_are_judged_to_the_millisecond_and_never_clamped(seq: int, exp: int, code: StoreCode | None) -> None:
    record = read_record(signed(seq=seq, exp=exp), NET)
    if code is None:
        check_times(record, NOW)
        return
    with pytest.raises(RecordError) as caught:
        check_times(record, NOW)
    assert caught.value.code is code


def test_newer_is_the_higher_number_in_either_order() -> None:
    """PT-REC-015"""
    old, new = read_record(signed(seq=1), NET), read_record(signed(seq=2, val=None), NET)
    assert newer(old, new) is new is newer(new, old)
    twin = read_record(signed(seq=2), NET)
    assert newer(new, twin) == newer(twin, new)


def test_too_long_a_value_is_our_own_mistake() -> None:
    def make(size: int) -> bytes:
        return make_record(
            NET, KEY, {"v": b"x" * size}, seq=NOW, exp=NOW, public_key=OWNER.public_key, sign=OWNER.sign
        )  # fmt: skip

    fits = next(size for size in range(1000, 0, -1) if _fits(make, size))
    assert len(make(fits)) == 64 + 1000 and read_record(make(fits), NET).val == {"v": b"x" * fits}


def _fits(make: Any, size: int) -> bool:
    try:
        make(size)
    except LocalProtocolError:
        return False
    return True
