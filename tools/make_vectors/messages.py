"""Messages (chapter 07): heads of requests and replies as msgpack, and heads that must be refused with their code."""

from __future__ import annotations

from typing import Any

from petalite.errors import ErrorCode, RequestError
from petalite.wire import messages as m
from petalite.wire import packing
from petalite.wire import training as tr
from petalite.wire.tensors import Descriptor

SID, PEER, MODEL = bytes(range(16)), bytes([0x70]) * 32, bytes([0x6D]) * 32
H = (Descriptor("h", "f16", (1, 2, 64)),)
MASK, GRAD = Descriptor("mask", "u8", (1, 2)), Descriptor("grad", "f16", (1, 2, 64))
PROMPTS = Descriptor("prompts", "f32", (2, 1, 64))
LORA = (Descriptor("dense.lora_A", "f32", (2, 4, 64)), Descriptor("dense.lora_B", "f32", (2, 64, 4)))
ADDITIONS = (
    Descriptor("prompts", "f16", (2, 3, 64)),
    Descriptor("dense.lora_A", "f32", (2, 4, 64)),
    Descriptor("dense.lora_B", "f32", (2, 64, 4)),
)
HOP = m.Hop(peer=bytes([0x31]) * 32, sid=bytes([0x61]) * 16)

GOOD: dict[str, tuple[str, m.Message]] = {
    "manifest": ("request", m.Manifest(model=MODEL)),
    "open": ("request", m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=128, batch=1, dtype="f16", codec="raw")),
    "open from a peer": (
        "request",
        m.Open(sid=SID, model=MODEL, blocks=(2, 4), max_len=128, batch=2, dtype="bf16", codec="i8b64", from_=PEER),
    ),
    "open with additions": (
        "request",
        m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=128, batch=1, dtype="f16", codec="raw", tensors=ADDITIONS),
    ),
    "open with a held adapter": (
        "request",
        m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=128, batch=1, dtype="f16", codec="raw", adapter="tone"),
    ),
    "open, answered": ("reply", m.OpenReply(pos=0, ttl=600)),
    "step": ("request", m.Step(sid=SID, n=0, pos=0, tensors=H)),
    "step, pushed on": ("request", m.Step(sid=SID, n=3, pos=5, next=(HOP,), tensors=H)),
    "step of a beam": (
        "request",
        m.Step(sid=SID, n=3, pos=5, hypo=(1, 0), pad=(0, 2), tensors=(Descriptor("h", "f32", (2, 1, 64), "i8b64"),)),
    ),
    "step of a prompt": ("request", m.Step(sid=SID, n=0, pos=0, last=1, tensors=H)),
    "step of a prompt, answered": ("reply", m.StepReply(n=0, pos=2, tensors=(Descriptor("h", "f16", (1, 1, 64)),))),
    "step of a prompt, pushed on": ("request", m.Step(sid=SID, n=3, pos=5, last=2, next=(HOP,), tensors=H)),
    "step, answered": ("reply", m.StepReply(n=0, pos=2, tensors=H)),
    "extend": ("request", m.Extend(sid=SID, max_len=256)),
    "extend, answered": ("reply", m.ExtendReply(max_len=256)),
    "status": ("request", m.Status(sid=SID)),
    "status, answered": ("reply", m.StatusReply(n=1, pos=2, max_len=256)),
    "close": ("request", m.Close(sid=SID)),
    "await": ("request", m.Await(sid=SID, n=1)),
    "push": ("request", m.Push(owner=PEER, sid=SID, n=1, pos=3, tensors=H)),
    "push of a prompt": ("request", m.Push(owner=PEER, sid=SID, n=1, pos=3, last=1, tensors=H)),
    "unpushed": ("request", m.Unpushed(sid=SID, n=1)),
    "forward": ("request", tr.Forward(model=MODEL, blocks=(0, 2), tensors=H)),
    "forward with mask, prompts, a named adapter, and taps": (
        "request",
        tr.Forward(model=MODEL, blocks=(2, 4), taps=(2, 3), adapter="tone", tensors=(*H, MASK, PROMPTS)),
    ),
    "forward, answered": ("reply", tr.ForwardReply(tensors=(*H, Descriptor("taps", "f16", (2, 1, 2, 64))))),
    "backward": ("request", tr.Backward(model=MODEL, blocks=(0, 2), wanted=("h",), tensors=(*H, GRAD))),
    "backward through an adapter": (
        "request",
        tr.Backward(
            model=MODEL,
            blocks=(0, 2),
            taps=(1,),
            wanted=("dense.lora_A", "dense.lora_B", "prompts"),
            tensors=(*H, PROMPTS, *LORA, GRAD, Descriptor("tap_grads", "f16", (1, 1, 2, 64), "i8b64")),
        ),
    ),
    "backward, answered": ("reply", tr.BackwardReply(tensors=(*LORA, PROMPTS))),
}
OPEN = GOOD["open"][1].to_wire()
STEP = GOOD["step"][1].to_wire()
PUSH = GOOD["push"][1].to_wire()
FORWARD = GOOD["forward"][1].to_wire()
BACKWARD = GOOD["backward"][1].to_wire()


def _with(head: dict[str, Any], *tensors: tuple[str, str, tuple[int, ...]], **fields: Any) -> dict[str, Any]:
    """The head with more tensors."""
    return head | {"t": [*head["t"], *(Descriptor(*each).to_wire() for each in tensors)]} | fields


BAD: dict[str, tuple[str, dict[str, Any], ErrorCode]] = {
    "session id of 15 bytes": ("step", STEP | {"sid": bytes(15)}, ErrorCode.BAD_REQUEST),
    "session id as text": ("step", STEP | {"sid": "0123456789abcdef"}, ErrorCode.BAD_REQUEST),
    "no position": ("step", {key: value for key, value in STEP.items() if key != "pos"}, ErrorCode.BAD_REQUEST),
    "position is a bool": ("step", STEP | {"pos": True}, ErrorCode.BAD_REQUEST),
    "position -1": ("step", STEP | {"pos": -1}, ErrorCode.POSITION),
    "a critical key": ("step", STEP | {"!warp": 9}, ErrorCode.UNSUPPORTED),
    "two rows, three hypotheses": ("step", STEP | {"hypo": [0, 0, 0]}, ErrorCode.BAD_REQUEST),
    "last 0": ("step", STEP | {"last": 0}, ErrorCode.BAD_REQUEST),
    "the last 3 of 2 tokens": ("step", STEP | {"last": 3}, ErrorCode.BAD_REQUEST),
    "the last 3 of 2 tokens, pushed": ("push", PUSH | {"last": 3}, ErrorCode.BAD_REQUEST),
    "last is a bool": ("step", STEP | {"last": True}, ErrorCode.BAD_REQUEST),
    "blocks reversed": ("open", OPEN | {"blocks": [2, 1]}, ErrorCode.NOT_SERVED),
    "blocks empty": ("open", OPEN | {"blocks": [1, 1]}, ErrorCode.NOT_SERVED),
    "max_len 2^31": ("open", OPEN | {"max_len": 2**31}, ErrorCode.RESOURCES),
    "batch 10^6": ("open", OPEN | {"batch": 10**6}, ErrorCode.RESOURCES),
    "unknown codec": ("open", OPEN | {"codec": "zip"}, ErrorCode.UNSUPPORTED),
    "half of an adapter": ("open", OPEN | {"t": [ADDITIONS[1].to_wire()]}, ErrorCode.BAD_REQUEST),
    "prompts of other blocks": ("open", OPEN | {"blocks": [0, 1], "t": [ADDITIONS[0].to_wire()]}, ErrorCode.TENSOR),
    "an adapter twice": (
        "open",
        OPEN | {"adapter": "tone", "t": [tensor.to_wire() for tensor in ADDITIONS[1:]]},
        ErrorCode.BAD_REQUEST,
    ),
    "unknown dtype": ("open", OPEN | {"dtype": "f8"}, ErrorCode.UNSUPPORTED),
    "no hidden states": ("forward", FORWARD | {"t": [MASK.to_wire()]}, ErrorCode.BAD_REQUEST),
    "a tensor of another name": ("forward", _with(FORWARD, ("lora", "f32", (1,))), ErrorCode.BAD_REQUEST),
    "a mask of floats": ("forward", _with(FORWARD, ("mask", "f32", (1, 2))), ErrorCode.TENSOR),
    "a mask of another length": ("forward", _with(FORWARD, ("mask", "u8", (1, 3))), ErrorCode.TENSOR),
    "prompts for three blocks": ("forward", _with(FORWARD, ("prompts", "f32", (3, 1, 64))), ErrorCode.TENSOR),
    "more prompts than tokens": ("forward", _with(FORWARD, ("prompts", "f32", (2, 3, 64))), ErrorCode.TENSOR),
    "taps outside of the blocks": ("forward", FORWARD | {"taps": [2]}, ErrorCode.BAD_REQUEST),
    "taps that do not rise": ("forward", FORWARD | {"taps": [1, 1]}, ErrorCode.BAD_REQUEST),
    "A without B": ("forward", _with(FORWARD, ("dense.lora_A", "f32", (2, 4, 64))), ErrorCode.BAD_REQUEST),
    "an adapter of two ranks": (
        "forward",
        _with(FORWARD, ("dense.lora_A", "f32", (2, 4, 64)), ("dense.lora_B", "f32", (2, 64, 5))),
        ErrorCode.TENSOR,
    ),
    "an adapter of rank 257": (
        "forward",
        _with(FORWARD, ("dense.lora_A", "f32", (2, 257, 64)), ("dense.lora_B", "f32", (2, 64, 257))),
        ErrorCode.RESOURCES,
    ),
    "an adapter by name and as tensors": (
        "forward",
        _with(FORWARD, *((each.name, each.dtype, each.shape) for each in LORA), adapter="tone"),
        ErrorCode.BAD_REQUEST,
    ),
    "no gradient": ("backward", FORWARD | {"wanted": ["h"]}, ErrorCode.BAD_REQUEST),
    "a gradient of another shape": (
        "backward",
        _with(FORWARD, ("grad", "f16", (1, 3, 64)), wanted=["h"]),
        ErrorCode.TENSOR,
    ),
    "nothing wanted": ("backward", BACKWARD | {"wanted": []}, ErrorCode.BAD_REQUEST),
    "the gradient of the mask": (
        "backward",
        _with(BACKWARD, ("mask", "u8", (1, 2)), wanted=["mask"]),
        ErrorCode.BAD_REQUEST,
    ),
    "a gradient of what was not sent": ("backward", BACKWARD | {"wanted": ["prompts"]}, ErrorCode.BAD_REQUEST),
    "gradients of taps without taps": (
        "backward",
        _with(BACKWARD, ("tap_grads", "f16", (1, 1, 2, 64))),
        ErrorCode.BAD_REQUEST,
    ),
}
METHODS = m.METHODS | tr.TRAINING_METHODS


def make() -> dict[str, Any]:
    return {
        "note": "Heads as msgpack, hexadecimal, without the keys size, max and dl of chapter 03; 'kind' is the class "
        "in petalite/wire/messages.py or training.py. 'bad' are requests; 'error' is the code of the answer.",
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
        METHODS[method][0].from_wire(packing.decode(data))
    except RequestError as error:
        assert error.code is code, (name, error)
        return {"name": name, "method": method, "hex": data.hex(), "error": code.name.lower()}
    raise AssertionError(f"{name} was taken")
