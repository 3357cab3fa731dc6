"""A target a decoder. Each says one thing: whatever the bytes, it returns or raises its one documented error.

What was decoded must also survive being encoded and decoded again: a value that exists is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from petalite.dht import messages as dht
from petalite.dht.contacts import parse_place
from petalite.dht.records import RecordError, check_times, newer, read_record
from petalite.errors import GoAwayCode, HandshakeError, RemoteProtocolError, RequestError
from petalite.identity import Address, PeerId
from petalite.lan.announcement import Announcement
from petalite.wire import certificate, frames, packing, tensors
from petalite.wire.heads import RepeatedHead, encode_head
from petalite.wire.hello import Hello
from petalite.wire.messages import METHODS, Step
from petalite.wire.repeats import Repeats
from petalite.wire.training import TRAINING_METHODS

Target = Callable[[bytes], None]

STATIC = bytes(range(32))
NOW = 1_700_000_000
NETWORK = "petalite"


class Finding(Exception):
    """An invariant of a target does not hold."""


def check(holds: bool, text: str) -> None:
    if not holds:
        raise Finding(text)


def fuzz_packing(data: bytes) -> None:
    try:
        value = packing.decode(data)
    except RemoteProtocolError as error:
        check(error.code is GoAwayCode.FRAME, f"code {error.code}")
        return
    check(packing.decode(packing.encode(value)) == value, "another value after a round trip")


def fuzz_frames(data: bytes) -> None:
    try:
        frame = frames.decode(memoryview(data))
    except RemoteProtocolError:
        return
    if isinstance(frame, frames.Data):
        frame = frames.Data(frame.stream, frame.end, bytes(frame.body))
    check(frames.decode(memoryview(frames.encode(frame))) == frame, "another frame after a round trip")


def fuzz_repeats(data: bytes) -> None:
    """Frames on a connection that has seen some already, against the decoder that has seen none."""
    repeats = Repeats()
    for stream in (1, 3):
        repeats.decode(memoryview(step_frame({"sid": STATIC, "n": stream, "size": 8}, stream)))
    for _ in range(2):  # seen once, it is known itself
        try:
            frame: object = frames.decode(memoryview(data))
        except RemoteProtocolError as error:
            frame = error.code, str(error)
        try:
            found: object = repeats.decode(memoryview(data))
        except RemoteProtocolError as error:
            found = error.code, str(error)
        check(found == frame, "another frame than the decoder's")


def step_frame(head: Mapping[str, Any], stream: int = 5) -> bytes:
    """A step with `head` and a body of eight bytes, as a connection writes it."""
    start = frames.encode_req(True, "step", packing.encode(dict(head), within=1))
    return frames.with_stream(frames.with_body(start, 8), stream) + bytes(8)


def fuzz_hello(data: bytes) -> None:
    try:
        head = packing.decode(data)
        if type(head) is not dict:
            return
        hello = Hello.from_wire(head)
    except (RemoteProtocolError, RequestError):
        return
    check(Hello.from_wire(hello.to_wire()) == hello, "another HELLO after a round trip")


def fuzz_certificate(data: bytes) -> None:
    try:
        made = certificate.verify(data, STATIC, NETWORK.encode(), NOW)
    except HandshakeError:
        return
    check(NOW <= made.not_after <= NOW + 87_000, "a certificate outside of its time")


def fuzz_tensors(data: bytes) -> None:
    """First byte: how many bytes of descriptors follow; the rest is the body of the first."""
    if not data:
        return
    size = 1 + data[0]
    try:
        found = tensors.parse_descriptors(packing.decode(data[1:size]))
        if not found:
            return
        array = tensors.decode(found[0], data[size:])
    except (RemoteProtocolError, RequestError):
        return
    check(array.shape == found[0].shape and len(data) - size == found[0].nbytes, "another shape")
    if found[0].codec == tensors.INT8:
        check(tensors.is_finite(found[0].dtype, array), "int8 decoded to a value that is not finite")
    elif tensors.is_finite(found[0].dtype, array):
        check(b"".join(tensors.encode(array)) == data[size:], "other bytes after a round trip")
    elif found[0].dtype in tensors.FLOATS:
        sure = tensors.surely_finite(found[0].dtype, data[size:], found[0].dtype)
        check(not sure, "sure of values that are not finite")
    check(array.dtype == tensors.DTYPES[found[0].dtype] or array.dtype == np.float32, "another type")


_MESSAGES = tuple(kind for pair in (METHODS | TRAINING_METHODS).values() for kind in pair)


def fuzz_messages(data: bytes) -> None:
    """First byte: which message."""
    if not data:
        return
    kind = _MESSAGES[data[0] % len(_MESSAGES)]
    try:
        head = packing.decode(data[1:])
        made = kind.from_wire(head)
    except (RemoteProtocolError, RequestError):
        return
    if isinstance(made, Step):
        check(1 <= made.answered <= made.tensors[0].shape[1], "an answer of no tokens, or of more than were sent")
    again = packing.decode(packing.encode(made.to_wire()))
    check(kind.from_wire(again) == made, "another message after a round trip")
    repeated = RepeatedHead(made.template("n", "pos"), **{name: again[name] for name in ("n", "pos") if name in again})
    check(packing.decode(encode_head(repeated, {})) == again, "another message by way of a template")
    repeats = Repeats()
    for _ in range(3):  # of a frame that is known, its head is known too the second time
        frame = repeats.decode(memoryview(step_frame(again)))
        check(isinstance(frame, frames.Req) and kind.from_wire(frame.head) == made, "another message from a known head")


def _verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    return signature[0] != 0  # what comes behind the signature shall be reached


def fuzz_dht_records(data: bytes) -> None:
    try:
        record = read_record(data, NETWORK, verify=_verify)
        check_times(record, NOW * 1000)
    except RecordError:
        return
    check(newer(record, record) is record and record.raw == data, "another record")


_REQUESTS = (
    dht.Ping(),
    dht.FindNode(target=STATIC),
    dht.FindValue(key=STATIC),
    dht.Store(records=(bytes(65), bytes(65))),
)


def fuzz_dht_messages(data: bytes) -> None:
    """First byte: which request, and whether it is read or its reply."""
    if not data:
        return
    request = _REQUESTS[data[0] % 4]
    try:
        head = packing.decode(data[1:])
        if type(head) is not dict:
            return
        if data[0] & 4:
            dht.reply_from_map(request, head)
            return
        made = dht.request_from_map(dht.METHOD_OF[type(request)], head)
    except (RemoteProtocolError, RequestError):
        return
    check(dht.request_from_map(dht.METHOD_OF[type(made)], dht.to_map(made)) == made, "another request")


def fuzz_txt(data: bytes) -> None:
    try:
        made = Announcement.from_txt(data)
    except ValueError:
        return
    check(Announcement.from_txt(made.to_txt()) == made, "another announcement after a round trip")


def fuzz_addresses(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for parse in (Address.parse, PeerId.parse, parse_place):
        try:
            made = parse(text)
        except ValueError as error:
            check("\n" not in str(error).strip("\n") or "\n" in text, "an error of more than one line")
            continue
        if not isinstance(made, PeerId):
            continue
        check(made.text == text, "two spellings of one peer id")
    try:
        address = Address.parse(text)
    except ValueError:
        return
    check(Address.parse(str(address)) == address, "another address after a round trip")


TARGETS: dict[str, Target] = {
    "packing": fuzz_packing,
    "frames": fuzz_frames,
    "repeats": fuzz_repeats,
    "hello": fuzz_hello,
    "certificate": fuzz_certificate,
    "tensors": fuzz_tensors,
    "messages": fuzz_messages,
    "dht_records": fuzz_dht_records,
    "dht_messages": fuzz_dht_messages,
    "txt": fuzz_txt,
    "addresses": fuzz_addresses,
}
