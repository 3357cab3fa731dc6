"""spec/07: each message round trips; what a peer sends becomes a message or a RequestError with the right code."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import ErrorCode, LocalProtocolError, RemoteProtocolError, RequestError
from petalite.limits import MAX_BATCH, MAX_HEAD_FRAME, MAX_SESSION_LENGTH
from petalite.wire import messages as m
from petalite.wire.packing import decode, encode
from petalite.wire.tensors import Descriptor

SID, PEER, MODEL = bytes(range(16)), b"p" * 32, b"m" * 32
H = (Descriptor("h", "f16", (2, 3, 64), "i8b64"),)
HOPS = (m.Hop(peer=b"1" * 32, sid=b"a" * 16), m.Hop(peer=b"2" * 32, sid=b"b" * 16))
INFO = m.InfoReply(
    model=MODEL,
    name="fairytale",
    blocks=(2, 4),
    layers=8,
    hidden=64,
    dtype="float32",
    codecs=("raw", "i8b64"),
    max_len=2_048,
    max_batch=8,
    cache_left=100_000,
    state="online",
    version="0.1.0",
)
EXAMPLES: list[m.Message] = [
    m.Empty(),
    INFO,
    dataclasses.replace(INFO, quant="int8"),
    m.Manifest(model=MODEL),
    m.ManifestReply(tensors=(Descriptor("manifest", "u8", (100,)),)),
    m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=128, batch=1, dtype="f32", codec="raw"),
    m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=128, batch=1, dtype="bf16", codec="i8b64", from_=PEER),
    m.OpenReply(pos=0, ttl=600),
    m.Step(sid=SID, n=0, pos=0, tensors=H),
    m.Step(sid=SID, n=2**63 - 1, pos=MAX_SESSION_LENGTH, hypo=(1, 0), pad=(0, 9), next=HOPS, tensors=H),
    m.Step(sid=SID, n=0, pos=0, last=3, next=HOPS, tensors=H),
    m.StepReply(n=1, pos=3, tensors=H),
    m.Extend(sid=SID, max_len=256),
    m.ExtendReply(max_len=256),
    m.Status(sid=SID),
    m.StatusReply(n=1, pos=3, max_len=256),
    m.Close(sid=SID),
    m.Await(sid=SID, n=1),
    m.Push(owner=PEER, sid=SID, n=1, pos=3, hypo=(0, 0), pad=(1, 2), next=HOPS, tensors=H),
    m.Push(owner=PEER, sid=SID, n=1, pos=3, last=1, tensors=H),
    m.Unpushed(sid=SID, n=1),
]
KINDS = sorted({*map(type, EXAMPLES), m.Hop}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_message_round_trips(example: m.Message) -> None:
    wire = decode(encode(example.to_wire()))
    assert type(example).from_wire(wire) == example
    assert type(example).from_wire(wire | {"later": [1], "size": 5, "max": 6, "dl": 7}) == example
    assert not {"size", "max", "dl"} & set(wire), "these keys belong to the connection"
    assert None not in wire.values()


def test_every_message_of_the_method_table_has_an_example() -> None:
    assert {kind for pair in m.METHODS.values() for kind in pair} <= set(KINDS)


def test_step_has_the_keys_of_the_specification() -> None:
    step = m.Step(sid=SID, n=1, pos=5, hypo=(1, 0), pad=(0, 2), last=3, next=HOPS[:1], tensors=H)
    assert decode(encode(step.to_wire())) == {
        "sid": SID,
        "n": 1,
        "pos": 5,
        "hypo": [1, 0],
        "pad": [0, 2],
        "last": 3,
        "next": [{"peer": b"1" * 32, "sid": b"a" * 16}],
        "t": [{"n": "h", "d": "f16", "s": [2, 3, 64], "c": "i8b64"}],
    }
    opened = m.Open(sid=SID, model=MODEL, blocks=(0, 2), max_len=9, batch=1, dtype="f32", codec="raw", from_=PEER)
    assert set(opened.to_wire()) == {"sid", "model", "blocks", "max_len", "batch", "dtype", "codec", "from"}


def test_examples_of_the_specification() -> None:
    sid, tail = "a3736964c410" + SID.hex(), "a1749184a16ea168a164a3663136a17393010104a163a3726177"
    small = (Descriptor("h", "f16", (1, 1, 4)),)
    opened = m.Open(sid=SID, model=bytes(32), blocks=(0, 4), max_len=128, batch=1, dtype="f16", codec="raw")
    assert encode(opened.to_wire()).hex() == (
        f"87{sid}a56d6f64656cc420{'00' * 32}a6626c6f636b73920004a76d61785f6c656ecc80a5626174636801"
        "a56474797065a3663136a5636f646563a3726177"
    )
    assert encode(m.OpenReply(pos=0, ttl=600).to_wire()).hex() == "82a3706f7300a374746ccd0258"
    assert encode(m.Step(sid=SID, n=3, pos=17, tensors=small).to_wire()).hex() == f"84{sid}a16e03a3706f7311{tail}"
    assert encode(m.StepReply(n=3, pos=18, tensors=small).to_wire()).hex() == f"83a16e03a3706f7312{tail}"
    prompt = m.Step(sid=SID, n=0, pos=0, last=1, tensors=(Descriptor("h", "f16", (1, 3, 4)),))
    assert encode(prompt.to_wire()).hex() == (
        f"85{sid}a16e00a3706f7300a46c61737401a1749184a16ea168a164a3663136a17393010304a163a3726177"
    )
    assert encode(m.StepReply(n=0, pos=3, tensors=small).to_wire()).hex() == f"83a16e00a3706f7303{tail}"


def test_where_a_route_goes_on_its_owner_gets_all_tokens() -> None:
    step = m.Step(sid=SID, n=0, pos=0, tensors=H)
    assert [
        each.answered
        for each in (
            step,
            dataclasses.replace(step, last=1),
            dataclasses.replace(step, last=3),
            dataclasses.replace(step, last=1, next=HOPS),
        )
    ] == [3, 1, 3, 3]


def test_largest_heads_fit() -> None:
    rows = (Descriptor("h", "f16", (MAX_BATCH, 1, 64)),)
    hops = tuple(m.Hop(peer=bytes([i]) * 32, sid=SID) for i in range(15))
    last = (MAX_SESSION_LENGTH,) * MAX_BATCH
    step = m.Step(sid=SID, n=1, pos=5, hypo=(1_023,) * MAX_BATCH, pad=last, next=hops, tensors=rows)
    data = encode(step.to_wire())
    assert len(data) < MAX_HEAD_FRAME - 100
    assert m.Step.from_wire(decode(data)) == step


OPEN = decode(encode(EXAMPLES[5].to_wire()))
STEP = decode(encode(EXAMPLES[8].to_wire()))
HOP = {"peer": b"1" * 32, "sid": SID}
TENSOR = {"n": "h", "d": "f16", "s": [2, 3, 64], "c": "raw"}
BAD, UNSUPPORTED, RESOURCES = ErrorCode.BAD_REQUEST, ErrorCode.UNSUPPORTED, ErrorCode.RESOURCES


@pytest.mark.parametrize(
    ("kind", "base", "change", "code", "text"),
    [
        (m.Open, OPEN, {"sid": b""}, BAD, "'sid' has 0 bytes, must have 16"),
        (m.Open, OPEN, {"sid": bytes(15)}, BAD, "'sid'"),
        (m.Open, OPEN, {"sid": bytes(17)}, BAD, "'sid'"),
        (m.Open, OPEN, {"sid": bytes(1_000)}, BAD, "'sid'"),
        (m.Open, OPEN, {"sid": "a" * 16}, BAD, "'sid'"),
        (m.Open, OPEN, {"sid": None}, BAD, "'sid' is missing"),
        (m.Open, OPEN, {"model": bytes(31)}, BAD, "'model'"),
        (m.Open, OPEN, {"blocks": [2, 2]}, ErrorCode.NOT_SERVED, "'blocks' is [2, 2]"),
        (m.Open, OPEN, {"blocks": [3, 2]}, ErrorCode.NOT_SERVED, "'blocks'"),
        (m.Open, OPEN, {"blocks": [-1, 2]}, ErrorCode.NOT_SERVED, "'blocks'"),
        (m.Open, OPEN, {"blocks": [0, 2**40]}, ErrorCode.NOT_SERVED, "4096"),
        (m.Open, OPEN, {"blocks": [0, 1, 2]}, BAD, "'blocks'"),
        (m.Open, OPEN, {"blocks": [0, True]}, BAD, "'blocks'"),
        (m.Open, OPEN, {"blocks": {}}, BAD, "'blocks'"),
        (m.Open, OPEN, {"max_len": 2**31}, RESOURCES, "'max_len'"),
        (m.Open, OPEN, {"max_len": 0}, RESOURCES, "'max_len'"),
        (m.Open, OPEN, {"batch": 10**6}, RESOURCES, "1..1024"),
        (m.Open, OPEN, {"batch": True}, BAD, "'batch'"),
        (m.Open, OPEN, {"dtype": "f64"}, UNSUPPORTED, "'dtype'"),
        (m.Open, OPEN, {"dtype": "i64"}, UNSUPPORTED, "'dtype'"),
        (m.Open, OPEN, {"codec": "zip"}, UNSUPPORTED, "'codec'"),
        (m.Open, OPEN, {"from": bytes(5)}, BAD, "'from'"),
        (m.Open, OPEN, {"!new": 1}, UNSUPPORTED, "'!new'"),
        (m.Step, STEP, {"n": -1}, BAD, "'n'"),
        (m.Step, STEP, {"n": 2**63}, BAD, "'n'"),
        (m.Step, STEP, {"pos": -1}, ErrorCode.POSITION, "'pos' is -1"),
        (m.Step, STEP, {"pos": 2**40}, ErrorCode.POSITION, "'pos'"),
        (m.Step, STEP, {"hypo": [0]}, BAD, "'hypo' has 1 entries, tensor 'h' has 2 rows"),
        (m.Step, STEP, {"hypo": [0, 2]}, BAD, "'hypo' must hold integers in 0..1"),
        (m.Step, STEP, {"hypo": [0, -1]}, BAD, "'hypo'"),
        (m.Step, STEP, {"hypo": [0] * 1_025}, BAD, "'hypo'"),
        (m.Step, STEP, {"hypo": []}, BAD, "'hypo'"),
        (m.Step, STEP, {"pad": [0, 1, 2]}, BAD, "'pad'"),
        (m.Step, STEP, {"pad": [0, 2**30]}, BAD, "'pad'"),
        (m.Step, STEP, {"last": 0}, BAD, "'last' is 0"),
        (m.Step, STEP, {"last": -1}, BAD, "'last'"),
        (m.Step, STEP, {"last": 4}, BAD, "'last' is 4, tensor 'h' has 3 tokens"),
        (m.Step, STEP, {"last": True}, BAD, "'last'"),
        (m.Step, STEP, {"last": [1]}, BAD, "'last'"),
        (m.Push, STEP | {"owner": PEER}, {"last": 4}, BAD, "'last' is 4"),
        (m.Step, STEP, {"next": []}, BAD, "'next'"),
        (m.Step, STEP, {"next": [HOP] * 16}, BAD, "1..15"),
        (m.Step, STEP, {"next": [HOP, HOP]}, BAD, "twice"),
        (m.Step, STEP, {"next": [{"peer": bytes(32)}]}, BAD, "in 'next'"),
        (m.Step, STEP, {"next": [1]}, BAD, "in 'next'"),
        (m.Step, STEP, {"next": [HOP | {"!": 1}]}, UNSUPPORTED, "critical"),
        (m.Step, STEP, {"t": []}, BAD, "must describe 'h'"),
        (m.Step, STEP, {"t": [TENSOR, TENSOR]}, BAD, "twice"),
        (m.Step, STEP, {"t": [TENSOR | {"n": "x"}]}, BAD, "not known"),
        (m.Step, STEP, {"t": [TENSOR | {"d": "i64"}]}, ErrorCode.TENSOR, "3-dimensional"),
        (m.Step, STEP, {"t": [TENSOR | {"d": "f8"}]}, UNSUPPORTED, "'f8'"),
        (m.Step, STEP, {"t": [TENSOR | {"s": [2, 64]}]}, ErrorCode.TENSOR, "3-dimensional"),
        (m.Step, STEP, {"t": [TENSOR | {"s": [1_025, 1, 1]}]}, ErrorCode.TENSOR, "1025 rows"),
        (m.Step, STEP, {"t": [TENSOR | {"s": [2**32, 2**32, 1]}]}, ErrorCode.TENSOR, "larger than a body"),
        (m.InfoReply, INFO.to_wire(), {"dtype": "int4"}, UNSUPPORTED, "'dtype'"),
        (m.InfoReply, INFO.to_wire(), {"state": "x"}, UNSUPPORTED, "'state'"),
        (m.InfoReply, INFO.to_wire(), {"blocks": [6, 9]}, BAD, "8 layers"),
        (m.InfoReply, INFO.to_wire(), {"name": "n" * 65}, BAD, "'name'"),
        (m.InfoReply, INFO.to_wire(), {"codecs": ["raw"] * 17}, BAD, "'codecs'"),
    ],
)
def test_bad_field_is_refused_by_its_code(
    kind: type[m.Message], base: dict[str, Any], change: dict[str, Any], code: ErrorCode, text: str
) -> None:
    with pytest.raises(RequestError) as caught:
        kind.from_wire(decode(encode(base)) | change)
    assert caught.value.code is code
    assert text in caught.value.text and len(caught.value.text) < 300


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_required_field_is_missed(kind: type[m.Message]) -> None:
    example = next(example for example in [*EXAMPLES, *HOPS] if type(example) is kind)
    wire = decode(encode(example.to_wire()))
    for each in kind.FIELDS:
        without = {key: value for key, value in wire.items() if key != each.key}
        if each.required:
            with pytest.raises(RequestError, match=f"'{each.key}' is missing"):
                kind.from_wire(without)
        else:
            kind.from_wire(without)


def test_our_own_bad_message_is_our_mistake_and_unchangeable() -> None:
    with pytest.raises(LocalProtocolError, match="'n' is -1"):
        m.Await(sid=SID, n=-1)
    with pytest.raises(LocalProtocolError, match="tuple"):
        m.Step(sid=SID, n=0, pos=0, tensors=list(H))  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError, match="Hop"):
        m.Step(sid=SID, n=0, pos=0, tensors=H, next=(STEP,))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        m.Await(SID, 1)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.Close(sid=SID).sid = b""  # type: ignore[misc]
    assert not hasattr(m.Close(sid=SID), "__dict__")


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=20), st.binary(max_size=40)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_any_map_becomes_a_message_or_a_request_error(example: m.Message, data: st.DataObject) -> None:
    wire: Any = decode(encode(example.to_wire()))
    for _ in range(data.draw(st.integers(1, 3))):
        target = wire
        while isinstance(target, (dict, list)) and target:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(target[key], (dict, list)) or data.draw(st.booleans()):
                target[key] = data.draw(anything)
                break
            target = target[key]
    try:
        made = type(example).from_wire(wire)
    except RequestError as error:
        assert error.code in ErrorCode
    else:
        assert type(example).from_wire(decode(encode(made.to_wire()))) == made


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.binary(max_size=100) | anything.map(encode))
def test_any_bytes_become_a_message_or_one_of_two_errors(kind: type[m.Message], data: bytes) -> None:
    try:
        kind.from_wire(decode(data))
    except (RequestError, RemoteProtocolError):
        pass
