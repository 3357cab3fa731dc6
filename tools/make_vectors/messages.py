"""Messages (chapter 07): heads of requests and replies as msgpack, and heads that must be refused with their code."""

from __future__ import annotations

from typing import Any

from petalite.errors import ErrorCode, RequestError
from petalite.wire import messages as m
from petalite.wire import packing
from petalite.wire.tensors import Descriptor

SID, PEER, MODEL = bytes(range(16)), bytes([0x70]) * 32, bytes([0x6D]) * 32
H = (Descriptor("h", "f16", (1, 2, 64)),)
HOP = m.Hop(peer=bytes([0x31]) * 32, sid=bytes([0x61]) * 16)

GOOD: dict[str, tuple[str, m.Message]] = {
    "manifest": ("request", m.Manifest(model=MODEL)),
    "open": ("request", m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=128, batch=1, dtype="f16", codec="raw")),
    "open from a peer": (
        "request",
        m.Open(sid=SID, model=MODEL, blocks=(2, 4), max_len=128, batch=2, dtype="bf16", codec="i8b64", from_=PEER),
    ),
    "open, answered": ("reply", m.OpenReply(pos=0, ttl=600)),
    "step": ("request", m.Step(sid=SID, n=0, pos=0, tensors=H)),
    "step, pushed on": ("request", m.Step(sid=SID, n=3, pos=5, next=(HOP,), tensors=H)),
    "step of a beam": (
        "request",
        m.Step(sid=SID, n=3, pos=5, hypo=(1, 0), pad=(0, 2), tensors=(Descriptor("h", "f32", (2, 1, 64), "i8b64"),)),
    ),
    "step, answered": ("reply", m.StepReply(n=0, pos=2, tensors=H)),
    "extend": ("request", m.Extend(sid=SID, max_len=256)),
    "extend, answered": ("reply", m.ExtendReply(max_len=256)),
    "status": ("request", m.Status(sid=SID)),
    "status, answered": ("reply", m.StatusReply(n=1, pos=2, max_len=256)),
    "close": ("request", m.Close(sid=SID)),
    "await": ("request", m.Await(sid=SID, n=1)),
    "push": ("request", m.Push(owner=PEER, sid=SID, n=1, pos=3, tensors=H)),
}
OPEN = GOOD["open"][1].to_wire()
STEP = GOOD["step"][1].to_wire()
BAD: dict[str, tuple[str, dict[str, Any], ErrorCode]] = {
    "session id of 15 bytes": ("step", STEP | {"sid": bytes(15)}, ErrorCode.BAD_REQUEST),
    "session id as text": ("step", STEP | {"sid": "0123456789abcdef"}, ErrorCode.BAD_REQUEST),
    "no position": ("step", {key: value for key, value in STEP.items() if key != "pos"}, ErrorCode.BAD_REQUEST),
    "position is a bool": ("step", STEP | {"pos": True}, ErrorCode.BAD_REQUEST),
    "position -1": ("step", STEP | {"pos": -1}, ErrorCode.POSITION),
    "a critical key": ("step", STEP | {"!warp": 9}, ErrorCode.UNSUPPORTED),
    "two rows, three hypotheses": ("step", STEP | {"hypo": [0, 0, 0]}, ErrorCode.BAD_REQUEST),
    "blocks reversed": ("open", OPEN | {"blocks": [2, 1]}, ErrorCode.NOT_SERVED),
    "blocks empty": ("open", OPEN | {"blocks": [1, 1]}, ErrorCode.NOT_SERVED),
    "max_len 2^31": ("open", OPEN | {"max_len": 2**31}, ErrorCode.RESOURCES),
    "batch 10^6": ("open", OPEN | {"batch": 10**6}, ErrorCode.RESOURCES),
    "unknown codec": ("open", OPEN | {"codec": "zip"}, ErrorCode.UNSUPPORTED),
    "unknown dtype": ("open", OPEN | {"dtype": "f8"}, ErrorCode.UNSUPPORTED),
}


def make() -> dict[str, Any]:
    return {
        "note": "Heads as msgpack, hexadecimal, without the keys size, max and dl of chapter 03; 'kind' is the class "
        "in petalite/wire/messages.py. 'bad' are requests; 'error' is the code of the answer.",
        "good": [
            {
                "name": name,
                "direction": direction,
                "kind": type(one).__name__,
                "hex": packing.encode(one.to_wire()).hex(),
            }
            for name, (direction, one) in GOOD.items()
        ],
        "bad": [_bad(name, *vector) for name, vector in BAD.items()],
    }


def _bad(name: str, method: str, head: dict[str, Any], code: ErrorCode) -> dict[str, Any]:
    data = packing.encode(head)
    try:
        m.METHODS[method][0].from_wire(packing.decode(data))
    except RequestError as error:
        assert error.code is code, (name, error)
        return {"name": name, "method": method, "hex": data.hex(), "error": code.name.lower()}
    raise AssertionError(f"{name} was taken")
