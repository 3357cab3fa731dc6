"""Frames: one msgpack array a Noise transport message (spec 02). Bytes to frozen dataclasses and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from petalite import limits
from petalite.errors import GoAwayCode, LocalProtocolError, RemoteProtocolError
from petalite.wire import packing

END = 1
Buffer = bytes | bytearray | memoryview
Head = Mapping[str, Any]


class FrameType(IntEnum):
    HELLO = 0
    REQ = 1
    RES = 2
    DATA = 3
    ERR = 4
    CANCEL = 5
    PING = 6
    PONG = 7
    GOAWAY = 8
    PROGRESS = 16


FIRST_IGNORABLE = 16
FIRST_INVALID = 32


@dataclass(frozen=True, slots=True)
class Hello:
    head: Head


@dataclass(frozen=True, slots=True)
class Req:
    stream: int
    end: bool
    method: str
    head: Head


@dataclass(frozen=True, slots=True)
class Res:
    stream: int
    end: bool
    head: Head


@dataclass(frozen=True, slots=True)
class Data:
    """Body bytes; `body` points into the buffer that was decoded and is valid only until that is reused."""

    stream: int
    end: bool
    body: Buffer


@dataclass(frozen=True, slots=True)
class Err:
    stream: int
    code: int
    text: str
    detail: Head = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cancel:
    stream: int


@dataclass(frozen=True, slots=True)
class Ping:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    payload: bytes


@dataclass(frozen=True, slots=True)
class GoAway:
    code: int
    last_stream: int
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    stream: int
    head: Head


@dataclass(frozen=True, slots=True)
class Ignorable:
    """A frame of a type from the ignorable range that this version does not know."""

    type: int


Frame = Hello | Req | Res | Data | Err | Cancel | Ping | Pong | GoAway | Progress | Ignorable


def encode(frame: Frame) -> bytes:
    """One frame as plaintext bytes. Raises LocalProtocolError if it breaks a limit of spec 02."""
    data = packing.encode(_fields_of(frame))
    limit = limits.MAX_FRAME if isinstance(frame, Data) else limits.MAX_HEAD_FRAME
    if len(data) > limit:
        raise LocalProtocolError(f"{type(frame).__name__} frame of {len(data)} bytes, limit {limit}")
    return data


def _fields_of(frame: Frame) -> list[Any]:
    match frame:
        case Hello(head):
            return [FrameType.HELLO, dict(head)]
        case Req(stream, end, method, head):
            return [FrameType.REQ, stream, int(end), method, dict(head)]
        case Res(stream, end, head):
            return [FrameType.RES, stream, int(end), dict(head)]
        case Data(stream, end, body):
            return [FrameType.DATA, stream, int(end), bytes(body)]
        case Err(stream, code, text, detail):
            return [FrameType.ERR, stream, int(code), text, dict(detail)]
        case Cancel(stream):
            return [FrameType.CANCEL, stream]
        case Ping(payload):
            return [FrameType.PING, payload]
        case Pong(payload):
            return [FrameType.PONG, payload]
        case GoAway(code, last_stream, text):
            return [FrameType.GOAWAY, int(code), last_stream, text]
        case Progress(stream, head):
            return [FrameType.PROGRESS, stream, dict(head)]
        case Ignorable(type_):
            return [type_]


def data_prefix(stream: int, end: bool, size: int) -> bytes:
    """Everything of a DATA frame that stands before its `size` body bytes, so that a body is never packed."""
    if stream < 0x80:
        id_bytes = bytes((stream,))
    elif stream < 0x1_0000:
        id_bytes = b"\xcd" + stream.to_bytes(2, "big")
    elif stream < 0x1_0000_0000:
        id_bytes = b"\xce" + stream.to_bytes(4, "big")
    else:
        id_bytes = b"\xcf" + stream.to_bytes(8, "big")
    return b"\x94\x03" + id_bytes + (b"\x01\xc5" if end else b"\x00\xc5") + size.to_bytes(2, "big")


def decode(data: memoryview) -> Frame:
    """Plaintext of one record to a frame.

    Raises RemoteProtocolError(FRAME) for anything malformed and RemoteProtocolError(PROTOCOL) for an unknown
    critical type. A `Data` frame's body is a view into `data`.
    """
    if (fast := _decode_data(data)) is not None:
        return fast
    values = packing.decode(data, max_size=limits.MAX_FRAME, max_str=limits.MAX_FRAME)
    if type(values) is not list or not values or type(values[0]) is not int:
        raise _malformed("a frame is an array that begins with its type")
    kind = values[0]
    builder = _BUILDERS.get(kind)
    if builder is not None:
        if kind != FrameType.DATA and kind != FrameType.ERR and len(data) > limits.MAX_HEAD_FRAME:
            raise _malformed(f"frame of {len(data)} bytes, limit {limits.MAX_HEAD_FRAME}")
        return builder(values)
    if FIRST_IGNORABLE <= kind < FIRST_INVALID:
        return Ignorable(kind)
    raise RemoteProtocolError(f"unknown frame type {kind}")


def _malformed(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, GoAwayCode.FRAME)


_INT_SIZES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_BIN_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4}


def _decode_data(data: memoryview) -> Data | None:
    """DATA in the usual encoding, sliced by hand; None sends anything unusual down the general path."""
    size = len(data)
    if size < 6 or data[0] != 0x94 or data[1] != FrameType.DATA:
        return None
    at = 2
    stream = data[at]
    at += 1
    if stream > 0x7F:
        width = _INT_SIZES.get(stream)
        if width is None or size < at + width + 3:
            return None
        stream = int.from_bytes(data[at : at + width], "big")
        at += width
    flags, width = data[at], _BIN_SIZES.get(data[at + 1], 0)
    at += 2
    if flags > 1 or not width or int.from_bytes(data[at : at + width], "big") != size - at - width:
        return None
    at += width
    _check_stream(stream)
    if size - at > limits.MAX_DATA:
        raise _malformed(f"DATA of {size - at} bytes, limit {limits.MAX_DATA}")
    return Data(stream, flags == END, data[at:])


def _check_stream(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**53:
        raise RemoteProtocolError(f"stream id must be an integer in 1..2^53-1, not {_show(value)}")
    return value


def _check_flags(value: Any) -> bool:
    if type(value) is not int or value not in (0, END):
        raise _malformed(f"flags must be 0 or 1, not {_show(value)}")
    return value == END


def _check_map(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _malformed(f"a map is due, not {_show(value)}")
    return value


def _check_str(value: Any, name: str, limit: int) -> str:
    if type(value) is not str or len(value) > limit:
        raise _malformed(f"{name} must be a str of at most {limit} characters")
    return value


def _check_int(value: Any, name: str, high: int) -> int:
    if type(value) is not int or not 0 <= value <= high:
        raise _malformed(f"{name} must be an integer in 0..{high}, not {_show(value)}")
    return value


def _show(value: Any) -> str:
    return ascii(value)[:40]


def _arity(values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise _malformed(f"frame type {values[0]} has {count} elements, not {len(values)}")
    return values


def _hello(values: list[Any]) -> Hello:
    _, head = _arity(values, 2)
    return Hello(_check_map(head))


def _req(values: list[Any]) -> Req:
    _, stream, flags, method, head = _arity(values, 5)
    _check_str(method, "method", limits.MAX_METHOD)
    return Req(_check_stream(stream), _check_flags(flags), method, _check_map(head))


def _res(values: list[Any]) -> Res:
    _, stream, flags, head = _arity(values, 4)
    return Res(_check_stream(stream), _check_flags(flags), _check_map(head))


def _data(values: list[Any]) -> Data:
    _, stream, flags, body = _arity(values, 4)
    if type(body) is not bytes or len(body) > limits.MAX_DATA:
        raise _malformed(f"DATA carries a bin of at most {limits.MAX_DATA} bytes")
    return Data(_check_stream(stream), _check_flags(flags), body)


def _err(values: list[Any]) -> Err:
    _, stream, code, text, detail = _arity(values, 5)
    _check_str(text, "error text", limits.MAX_FRAME)
    return Err(
        _check_stream(stream),
        _check_int(code, "error code", 2**32 - 1),
        text[: limits.MAX_ERROR_TEXT],
        _check_map(detail),
    )


def _cancel(values: list[Any]) -> Cancel:
    _, stream = _arity(values, 2)
    return Cancel(_check_stream(stream))


def _ping_payload(values: list[Any]) -> bytes:
    _, payload = _arity(values, 2)
    if type(payload) is not bytes or len(payload) != limits.PING_BYTES:
        raise _malformed(f"PING and PONG carry {limits.PING_BYTES} bytes")
    return payload


def _goaway(values: list[Any]) -> GoAway:
    _, code, last, text = _arity(values, 4)
    _check_str(text, "GOAWAY text", limits.MAX_STR)
    return GoAway(
        _check_int(code, "GOAWAY code", 2**32 - 1),
        _check_int(last, "last stream", 2**53 - 1),
        text[: limits.MAX_GOAWAY_TEXT],
    )


def _progress(values: list[Any]) -> Progress:
    _, stream, head = _arity(values, 3)
    return Progress(_check_stream(stream), _check_map(head))


_BUILDERS: dict[int, Callable[[list[Any]], Frame]] = {
    FrameType.HELLO: _hello,
    FrameType.REQ: _req,
    FrameType.RES: _res,
    FrameType.DATA: _data,
    FrameType.ERR: _err,
    FrameType.CANCEL: _cancel,
    FrameType.PING: lambda values: Ping(_ping_payload(values)),
    FrameType.PONG: lambda values: Pong(_ping_payload(values)),
    FrameType.GOAWAY: _goaway,
    FrameType.PROGRESS: _progress,
}
