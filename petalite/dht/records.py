"""A record: what one peer says of itself under one key, signed, numbered and expiring (spec/10).

    record    = signature (64 bytes) || payload (at most 1,000 bytes of msgpack)
    signature = Ed25519("petalite record v1" 00 || payload)
    payload   = {net: str, key: bin32, pub: bin32, seq: unix ms, exp: unix ms, val: map | nil}

The bytes are signed as they are: nobody re-encodes a payload. A `val` of nil withdraws what the publisher said before.
Wall-clock times are unix milliseconds and always arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from petalite.dht.ids import ID_BYTES
from petalite.errors import LocalProtocolError, RemoteProtocolError, RequestError
from petalite.identity import KEY_BYTES, SIGNATURE_BYTES, PeerId, peer_id_of, verify
from petalite.limits import (
    CLOCK_SKEW_SECONDS,
    MAX_NETWORK_ID,
    MAX_RECORD_PAYLOAD,
    RECORD_EXPIRY_SECONDS,
)
from petalite.wire.packing import Bin, Int, Map, Str, decode, encode, field, refuse_critical

CONTEXT = b"petalite record v1\0"

Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, signature, message) -> whether it is good: `identity.verify`, or a stand-in in simulations."""


class StoreCode(IntEnum):
    """What became of one record offered to a store (spec/10, "Codes")."""

    STORED = 0
    KNOWN = 1  # the very same bytes were there
    MALFORMED = 2
    NETWORK = 3
    SIGNATURE = 4
    EXPIRED = 5
    FUTURE = 6  # expiry more than an hour ahead, or a number more than ten minutes
    OUTDATED = 7  # a higher number is stored, or the same number with other bytes
    NOT_CLOSEST = 8
    QUOTA = 9
    FULL = 10


class RecordError(Exception):
    """A record that is refused; `code` says why."""

    def __init__(self, code: StoreCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose signature, network and form are good. `raw` is all of it; `publisher` is the subkey."""

    raw: bytes
    key: bytes
    publisher: PeerId
    seq: int
    exp: int
    val: dict[str, Any] | None


def make_record(
    network_id: str, key: bytes, val: dict[str, Any] | None, *, seq: int, exp: int, public_key: bytes,
    sign: Callable[[bytes], bytes],
) -> bytes:  # fmt: skip
    """The bytes of a new record; seq and exp in unix ms.

    Raises:
        LocalProtocolError: the payload exceeds MAX_RECORD_PAYLOAD, or `val` has no msgpack form.
    """
    fields = {"net": network_id, "key": key, "pub": public_key, "seq": seq, "exp": exp, "val": val}
    payload = encode(fields)
    if len(payload) > MAX_RECORD_PAYLOAD:
        raise LocalProtocolError(f"record payload of {len(payload)} bytes, limit {MAX_RECORD_PAYLOAD}")
    return sign(CONTEXT + payload) + payload


def read_record(raw: bytes, network_id: str, *, verify: Verify = verify) -> Record:
    """Check form, network and signature, in that order: the dear check comes last. Times are for `check_times`.

    Raises:
        RecordError: MALFORMED, NETWORK or SIGNATURE.
    """
    if not SIGNATURE_BYTES < len(raw) <= SIGNATURE_BYTES + MAX_RECORD_PAYLOAD:
        raise RecordError(StoreCode.MALFORMED, f"record of {len(raw)} bytes")
    signature, payload = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
    try:
        fields = decode(payload, max_size=MAX_RECORD_PAYLOAD)
        if type(fields) is not dict:
            raise RecordError(StoreCode.MALFORMED, "record payload is not a map")
        refuse_critical(fields)
        net = field(fields, "net", Str(1, MAX_NETWORK_ID))
        key = field(fields, "key", Bin(ID_BYTES))
        public_key = field(fields, "pub", Bin(KEY_BYTES))
        seq = field(fields, "seq", Int(0, 2**63 - 1))
        exp = field(fields, "exp", Int(0, 2**63 - 1))
        val = field(fields, "val", Map(), None)
        if "val" not in fields:
            raise RecordError(StoreCode.MALFORMED, "record without 'val'")
    except (RemoteProtocolError, RequestError) as error:
        raise RecordError(StoreCode.MALFORMED, str(error)) from None
    if net != network_id:
        raise RecordError(StoreCode.NETWORK, "record of another network")
    if not verify(public_key, signature, CONTEXT + payload):
        raise RecordError(StoreCode.SIGNATURE, "bad signature")
    return Record(bytes(raw), key, peer_id_of(public_key), seq, exp, val)


def check_times(record: Record, wall_ms: int) -> None:
    """Refuse what has lapsed and what claims to come from the future; nothing is clamped (PT-REC-012, -013).

    Raises:
        RecordError: EXPIRED or FUTURE.
    """
    if record.exp <= wall_ms:
        raise RecordError(StoreCode.EXPIRED, "record expired")
    if record.exp > wall_ms + RECORD_EXPIRY_SECONDS * 1000:
        raise RecordError(StoreCode.FUTURE, "record expires more than an hour ahead")
    if record.seq > wall_ms + CLOCK_SKEW_SECONDS * 1000:
        raise RecordError(StoreCode.FUTURE, "record numbered more than ten minutes ahead")


def newer(one: Record, other: Record) -> Record:
    """Of two records of one publisher under one key: the higher number; of equal numbers the lexically greater bytes.

    The latter never comes from an honest publisher; the rule only makes every reader choose alike.
    """
    return max(one, other, key=lambda record: (record.seq, record.raw))
