"""Records (chapter 01): ciphertexts under a fixed key, over a rekey, and what must be refused."""

from __future__ import annotations

from typing import Any

from petalite import limits
from petalite.wire.noise import TransportCipher
from petalite.wire.records import RecordWriter

KEY = bytes(range(32))
FRAME = bytes.fromhex("92 05 01")
SHOWN = (0, 1, limits.REKEY_RECORDS - 1, limits.REKEY_RECORDS, limits.REKEY_RECORDS + 1, 2 * limits.REKEY_RECORDS)


def make() -> dict[str, Any]:
    cipher = TransportCipher(KEY)
    writer = RecordWriter(cipher)
    rows: list[dict[str, Any]] = []
    for number in range(SHOWN[-1] + 1):
        if number in SHOWN:
            rows.append({"n": number, "key": (cipher.k or b"").hex()})
        record = bytes(writer.pack([(FRAME, None)]))
        if number in SHOWN:
            rows[-1] |= {"record": record.hex()}
    first = bytes.fromhex(rows[0]["record"])
    refused = {
        "length 0": ("0000", "frame"),
        "length 16, which is a tag alone": ("0010" + bytes(16).hex(), "frame"),
        "the last bit flipped": (first[:-1].hex() + f"{first[-1] ^ 1:02x}", "decrypt"),
        "the first bit of the ciphertext flipped": (f"0013{first[2] ^ 0x80:02x}" + first[3:].hex(), "decrypt"),
        "record 1 in the place of record 0": (rows[1]["record"], "decrypt"),
        "record 0 twice": (first.hex() * 2, "decrypt"),
    }
    return {
        "note": "One direction whose first key is given; every record holds the frame, so record n can be checked "
        "after n others. 'key' is the key that record n is under. 'refused': streams from record 0 on.",
        "key": KEY.hex(),
        "frame": FRAME.hex(),
        "records": rows,
        "refused": [{"name": name, "stream": stream, "goaway": code} for name, (stream, code) in refused.items()],
    }
