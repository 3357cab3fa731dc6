"""Frames (chapter 02): plaintexts of records, valid ones with their meaning, invalid ones with their GOAWAY code."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack

from petalite.errors import GoAwayCode, RemoteProtocolError
from petalite.wire import frames
from petalite.wire.frames import Cancel, Data, Err, Frame, GoAway, Hello, Ignorable, Ping, Pong, Progress, Req, Res

HELLO = {
    "v": 0,
    "caps": {},
    "limits": {"body": 67_108_864, "streams": 256},
    "agent": "x/1",
    "time": 1_767_225_600,
    "observed": "192.0.2.7:4242",
}
VALID: dict[str, Frame] = {
    "HELLO": Hello(HELLO),
    "HELLO, least": Hello({"v": 0}),
    "HELLO with an unknown capability and key": Hello({"v": 1, "caps": {"warp": {"factor": 9}}, "later": None}),
    "REQ": Req(1, False, "echo", {"size": 3, "max": 3}),
    "REQ without a body": Req(2, True, "info", {}),
    "REQ, largest stream id": Req(2**53 - 1, True, "echo", {"dl": 1_500}),
    "REQ with its body": Req(1, True, "echo", {"size": 3, "max": 3}, b"abc"),
    "RES": Res(1, False, {"size": 3}),
    "RES without a body": Res(1, True, {}),
    "RES with its body": Res(1, True, {"size": 3}, b"abc"),
    "DATA": Data(1, True, b"abc"),
    "DATA, more to come": Data(70_000, False, bytes(range(16))),
    "ERR": Err(3, 10, "busy", {"retry": True, "after": 500}),
    "ERR, unknown code": Err(3, 4_711, "", {}),
    "CANCEL": Cancel(5),
    "PING": Ping(bytes(range(1, 9))),
    "PONG": Pong(bytes(range(1, 9))),
    "GOAWAY": GoAway(9, 7, "restart"),
    "GOAWAY, unknown code": GoAway(99, 0, ""),
    "PROGRESS": Progress(1, {"s": "queued"}),
    "unknown ignorable type": Ignorable(17),
}
OTHER_FORMS: dict[str, bytes] = {
    "DATA, in wider forms": frames.data_prefix(1, True, 3) + b"abc",
    "CANCEL, array32 and uint64": bytes.fromhex("dd 00000002 cc05 cf 0000000000000005"),
    "REQ with str32": bytes.fromhex("95 01 01 01 db 00000001 6d 80"),
}
INVALID: dict[str, bytes] = {
    "empty": b"",
    "no msgpack": b"\xc1",
    "a map": msgpack.packb({}),
    "an empty array": msgpack.packb([]),
    "type is a bool": msgpack.packb([True, 1, 1, "m", {}]),
    "trailing byte": msgpack.packb([5, 1]) + b"\0",
    "cut short": msgpack.packb([5, 1])[:-1],
    "HELLO without a map": msgpack.packb([0, []]),
    "REQ of four elements": msgpack.packb([1, 1, 1, "m"]),
    "REQ of six elements, the last no bin": msgpack.packb([1, 1, 1, "m", {}, 0]),
    "REQ of seven elements": msgpack.packb([1, 1, 1, "m", {"size": 1}, b"x", b"y"]),
    "REQ with an empty body": msgpack.packb([1, 1, 1, "m", {}, b""]),
    "RES with a body of 32,769 bytes": msgpack.packb([2, 1, 1, {"size": 32_769}, bytes(32_769)]),
    "method is bin": msgpack.packb([1, 1, 1, b"m", {}]),
    "method of 65 characters": msgpack.packb([1, 1, 1, "m" * 65, {}]),
    "reserved flag": msgpack.packb([1, 1, 2, "m", {}]),
    "flags are a bool": msgpack.packb([2, 1, True, {}]),
    "duplicate key": bytes.fromhex("94 02 01 01 82 a1 61 01 a1 61 02"),
    "bin key": bytes.fromhex("94 02 01 01 81 c4 01 61 01"),
    "float": bytes.fromhex("94 02 01 01 81 a1 61 cb 3ff0000000000000"),
    "DATA with text": msgpack.packb([3, 1, 0, "body"]),
    "PING of seven bytes": msgpack.packb([6, bytes(7)]),
    "GOAWAY without text": msgpack.packb([8, 0, 0]),
    "array of 2^32-1 elements": bytes.fromhex("dd ffffffff 05"),
    "stream 0": msgpack.packb([5, 0]),
    "stream 2^53": msgpack.packb([5, 2**53]),
    "negative stream": msgpack.packb([5, -1]),
    "unknown critical type": msgpack.packb([9, 1]),
    "type 32": msgpack.packb([32, 1]),
    "negative type": msgpack.packb([-1, 1]),
}


def make() -> dict[str, Any]:
    valid = [_valid(name, frames.encode(frame)) for name, frame in VALID.items()]
    valid += [_valid(name, data) for name, data in OTHER_FORMS.items()]
    invalid = [{"name": name, "hex": data.hex(), "goaway": _code(data)} for name, data in INVALID.items()]
    return {
        "note": "Plaintexts of whole records, hexadecimal. Bytes in a frame's meaning are hexadecimal too.",
        "valid": valid,
        "invalid": invalid,
    }


def _valid(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "hex": data.hex(), "frame": meaning(frames.decode(memoryview(data)))}


def meaning(frame: Frame) -> dict[str, Any]:
    """A frame as JSON: its type and its fields."""
    made: dict[str, Any] = {"type": type(frame).__name__}
    for each in fields(frame):
        value = getattr(frame, each.name)
        if value is None:
            continue
        made[each.name] = bytes(value).hex() if isinstance(value, bytes | memoryview) else value
    if isinstance(frame, Ignorable):
        made = {"type": "Ignorable", "number": frame.type}
    return made


def _code(data: bytes) -> str:
    try:
        frames.decode(memoryview(data))
    except RemoteProtocolError as error:
        return GoAwayCode(error.code).name.lower()
    raise AssertionError(f"{data.hex()} is a valid frame")
