"""Strict msgpack (chapter 04): values that must be read, and bytes that must be refused."""

from __future__ import annotations

from typing import Any

import msgpack

from petalite.errors import RemoteProtocolError
from petalite.wire import packing

VALID = {
    "nil": "c0",
    "true": "c3",
    "5": "05",
    "5 as uint64": "cf0000000000000005",
    "-1 as int64": "d3ffffffffffffffff",
    "2^64-1": "cfffffffffffffffff",
    "-2^63": "d38000000000000000",
    "text": "a3c3a978",
    "text as str32": "db0000000161",
    "bin": "c403010203",
    "array": "9301a161c0",
    "array32": "dd0000000101",
    "map": "82a16101a16290",
    "nested 16 deep": "91" * 15 + "90",
}
INVALID = {
    "nothing": "",
    "cut short": "9201",
    "trailing byte": "c000",
    "reserved byte c1": "c1",
    "duplicate key": "82a16101a16102",
    "duplicate key in another width": "82a16101d9016102",
    "integer key": "810101",
    "bin key": "81c4016101",
    "nil key": "81c001",
    "bad UTF-8": "a1ff",
    "a surrogate in UTF-8": "a3eda080",
    "float32": "ca3f800000",
    "float64": "cb3ff0000000000000",
    "NaN": "cb7ff8000000000000",
    "fixext": "d40000",
    "ext of no bytes": "c70005",
    "timestamp": "d6ff00000000",
    "array32 of 2^32-1 elements": "ddffffffff",
    "map32 of 2^32-1 pairs": "dfffffffff",
    "str32 of 2^32-1 bytes": "dbffffffff",
    "nested 17 deep": "91" * 16 + "90",
    "4,097 elements": "dc1001" + "c0" * 4097,
    "key of 65 bytes": "81d941" + "61" * 65 + "c0",
    "text of 4,097 bytes": "da1001" + "61" * 4097,
}


def make() -> dict[str, Any]:
    for name, text in INVALID.items():
        try:
            packing.decode(bytes.fromhex(text))
        except RemoteProtocolError:
            continue
        raise AssertionError(f"{name} was taken")
    valid = []
    for name, text in VALID.items():
        value = packing.decode(bytes.fromhex(text))
        valid.append({"name": name, "hex": text, "shortest": msgpack.packb(value).hex(), "value": _shown(value)})
    return {
        "note": "'shortest' is the same value in msgpack's shortest form. Bytes are shown as {\"bin\": hexadecimal}.",
        "valid": valid,
        "invalid": [{"name": name, "hex": text} for name, text in INVALID.items()],
    }


def _shown(value: Any) -> Any:
    return {"bin": value.hex()} if isinstance(value, bytes) else value
