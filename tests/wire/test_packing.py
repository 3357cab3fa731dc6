"""spec/04: what decodes, what never does, and that nothing but RemoteProtocolError leaves the decoder."""

import tracemalloc
from enum import IntEnum

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.errors import ErrorCode, GoAwayCode, LocalProtocolError, RemoteProtocolError, RequestError
from petalite.limits import MAX_ELEMENTS, MAX_FRAME, MAX_KEY, MAX_NESTING, MAX_STR
from petalite.wire.packing import (
    Bin,
    Bool,
    FieldError,
    Int,
    Ints,
    ListOf,
    Map,
    OneOf,
    Rule,
    Str,
    decode,
    encode,
    field,
    refuse_critical,
)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=50), st.binary(max_size=50)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)

ARRAY_4095 = b"\xdc\x0f\xff"
REFUSED = {
    "nothing at all": b"",
    "0xc1 (PT-MSG-002)": b"\xc1",
    "cut in a map": b"\x82\xa1a\x01",
    "cut in a string": b"\xa5abc",
    "trailing byte": b"\xc0\xc0",
    "duplicate key": b"\x82\xa1a\x01\xa1a\x02",
    "duplicate key in two spellings": b"\x82\xa1a\x01\xd9\x01a\x02",
    "duplicate key below": b"\x91\x81\xa1x\x82\xa1a\x01\xa1a\x01",
    "integer key": b"\x81\x01\x01",
    "boolean key": b"\x81\xc3\x01",
    "null key": b"\x81\xc0\x01",
    "array key": b"\x81\x90\x01",
    "bin key": b"\x81\xc4\x01a\x01",
    "bin key beside a str key": b"\x82\xa1a\x01\xc4\x01b\x01",
    "float32": b"\xca\x40\x40\x00\x00",
    "float64 in a map": b"\x81\xa1a\xcb\x40\x08\x00\x00\x00\x00\x00\x00",
    "NaN in an array": b"\x91\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    "infinity": b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
    "ext": b"\xd4\x05\x00",
    "ext of no bytes": b"\xc7\x00\x05",
    "ext32": b"\xc9\xff\xff\xff\xff\x05",
    "timestamp 32": b"\xd6\xff\x00\x00\x00\x00",
    "timestamp 64": b"\xd7\xff" + bytes(8),
    "timestamp 96": b"\xc7\x0c\xff" + bytes(12),
    "timestamp of no bytes": b"\xc7\x00\xff",
    "bad UTF-8": b"\xa2\xc3\x28",
    "bad UTF-8 key": b"\x81\xa1\xff\x01",
    "surrogate": b"\xa3\xed\xa0\x80",
    "array32 of 2^32-1": b"\xdd\xff\xff\xff\xff",
    "map32 of 2^32-1": b"\xdf\xff\xff\xff\xff",
    "bin32 of 2^32-1": b"\xc6\xff\xff\xff\xff",
    "str32 of 2^32-1": b"\xdb\xff\xff\xff\xff",
    "nested one too deep": b"\x91" * MAX_NESTING + b"\x90",
    "maps nested one too deep": b"\x81\xa1a" * MAX_NESTING + b"\x80",
    "nested beyond the decoder's stack": b"\x91" * 60_000 + b"\xc0",
    "one element too many": b"\xdc" + (MAX_ELEMENTS + 1).to_bytes(2, "big") + b"\x01" * (MAX_ELEMENTS + 1),
    "elements too many in sum": b"\x92" + (ARRAY_4095 + b"\x01" * 4095) * 2,
    "keys too many in sum": b"\x93" + b"".join(encode({str(key): 1 for key in range(2_000)}) for _ in range(3)),
    "key of one byte too many": b"\x81\xd9\x41" + b"k" * (MAX_KEY + 1) + b"\x01",
    "key too long in bytes, not in characters": b"\x81\xd9\x42" + "é".encode() * 33 + b"\x01",
    "key of 60 kB": b"\x81\xda\xea\x60" + b"k" * 60_000 + b"\x01",
    "str of one byte too many": b"\xda\x10\x01" + b"s" * (MAX_STR + 1),
    "larger than a frame": b"\xc5\xff\xf0" + bytes(0xFFF0),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_forbidden_input_is_refused_with_one_error(data: bytes, buffer: type) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(buffer(data))
    assert caught.value.code is GoAwayCode.FRAME
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


ACCEPTED = {
    "uint64 that needs one byte": (b"\xcf" + bytes(7) + b"\x05", 5),
    "int64 that needs one byte": (b"\xd3" + b"\xff" * 8, -1),
    "str32 of one byte": (b"\xdb\x00\x00\x00\x01a", "a"),
    "bin32 of one byte": (b"\xc6\x00\x00\x00\x01a", b"a"),
    "map32 and array32": (b"\xdf\x00\x00\x00\x01\xa1a\xdd\x00\x00\x00\x00", {"a": []}),
    "deepest": (b"\x91" * (MAX_NESTING - 1) + b"\x90", None),
    "most elements": (b"\xdc\x10\x00" + b"\xc2" * MAX_ELEMENTS, [False] * MAX_ELEMENTS),
    "most elements as empty maps": (b"\xdc\x10\x00" + b"\x80" * MAX_ELEMENTS, [{}] * MAX_ELEMENTS),
    "longest key": (b"\x81\xd9\x40" + b"k" * MAX_KEY + b"\x01", {"k" * MAX_KEY: 1}),
    "many short keys": (encode({f"key{i}": i for i in range(40)}), {f"key{i}": i for i in range(40)}),
    "longest str": (b"\xda\x10\x00" + b"s" * MAX_STR, "s" * MAX_STR),
    "control characters": (b"\xa4\x00\n\x1b\x7f", "\x00\n\x1b\x7f"),
}


@pytest.mark.parametrize(("data", "expected"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_allowed_forms_decode(data: bytes, expected: object) -> None:
    value = decode(data)
    if expected is not None:
        assert value == expected and type(value) is type(expected)


def test_max_size_is_checked_before_anything_else() -> None:
    assert decode(b"\x93\x01\x02\x03", max_size=4) == [1, 2, 3]
    with pytest.raises(RemoteProtocolError, match="limit 3"):
        decode(b"\x93\x01\x02\x03", max_size=3)
    big = encode(bytes(100_000))
    assert decode(big, max_size=len(big)) == bytes(100_000)


def test_example_of_the_specification() -> None:
    head = {"sid": bytes(range(16)), "n": 0}
    assert encode(head).hex() == "82a3736964c410000102030405060708090a0b0c0d0e0fa16e00"
    assert decode(bytes.fromhex("82a3736964c410000102030405060708090a0b0c0d0e0fa16e00")) == head


@pytest.mark.parametrize(
    "data",
    [
        b"\xdc\x00\x10" + (b"\xdc\x0f\xdc" + b"\x80" * 4060) * 16,  # 65,000 empty maps
        b"\xdc\x00\x10" + (b"\xdc\x0f\xdc" + b"\x90" * 4060) * 16,
        b"\xdc\x00\x07" + (b"\xdc\x0f\xff" + b"\x81\xa0" * 4095) * 7,
        b"\xdc\x0f\xff" + (b"\x8f" + b"\xa0\x80" * 15) * 2_000,
        b"\x81\xa0" * 32_000 + b"\x80",
    ],
)
def test_small_frame_cannot_become_many_objects(data: bytes) -> None:
    assert len(data) <= MAX_FRAME
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


@given(values)
def test_what_is_encoded_decodes_to_itself(value: object) -> None:
    assert decode(encode(value)) == value


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_the_one_error(data: bytes) -> None:
    try:
        value = decode(data)
    except RemoteProtocolError:
        return
    assert decode(encode(value)) == value
    assert msgpack.unpackb(data, strict_map_key=False) == value


@given(values, st.data())
def test_one_changed_byte_decodes_or_raises_the_one_error(value: object, data: st.DataObject) -> None:
    packed = bytearray(encode(value))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(packed)
    except RemoteProtocolError as error:
        assert error.code is GoAwayCode.FRAME


class Code(IntEnum):
    ONE = 1


def test_encoder_takes_tuples_buffers_and_enums() -> None:
    assert decode(encode((Code.ONE, bytearray(b"a"), memoryview(b"b"), (2,)))) == [1, b"a", b"b", [2]]


@pytest.mark.parametrize(
    "value",
    [
        1.0,
        [float("nan")],
        {"a": (1, 2.5)},
        {1: 2},
        {b"a": 1},
        {"k" * 65: 1},
        "s" * 4_097,
        [["é" * 2_049]],
        [0] * 4_097,
        [[0] * 4_000, [0] * 4_000],
        2**64,
        -(2**63) - 1,
        {"a": {1, 2}},
        pytest.param(object(), id="object"),
        "\ud800",
        {"\ud800": 1},
        msgpack.Timestamp(0),
        msgpack.ExtType(5, b""),
    ],
    ids=repr,
)
def test_encoder_refuses_what_a_peer_would(value: object) -> None:
    with pytest.raises(LocalProtocolError):
        encode(value)


def test_encoder_refuses_deep_nesting() -> None:
    value: list[object] = []
    for _ in range(MAX_NESTING - 1):
        value = [value]
    encode(value)
    with pytest.raises(LocalProtocolError, match="nested"):
        encode([value])
    value[0] = value
    with pytest.raises(LocalProtocolError, match="nested"):
        encode(value)


BAD_FIELDS: list[tuple[Rule, object, str]] = [
    (Int(0, 9), 10, "'x' is 10, must be 0..9"),
    (Int(0, 9), -1, "'x' is -1, must be 0..9"),
    (Int(0, 9), True, "must be an integer, not bool"),
    (Int(0, 9), "1", "must be an integer, not str"),
    (Int(0, 9), None, "'x' is missing"),
    (Bool(), 1, "must be a boolean"),
    (Str(1, 3), "", "has 0 bytes, must have 1..3"),
    (Str(1, 3), "éé", "has 4 bytes, must have 1..3"),
    (Str(1, 3), b"a", "must be a string, not bin"),
    (Bin(16), bytes(15), "has 15 bytes, must have 16..16"),
    (Bin(16), bytes(17), "has 17 bytes"),
    (Bin(0, 4), "a", "must be bin, not str"),
    (Map(), [], "must be a map, not array"),
    (ListOf(Int(0, 9), 1, 2), [], "has 0 entries, must have 1..2"),
    (ListOf(Int(0, 9), 1, 2), [1, 2, 3], "has 3 entries"),
    (ListOf(Int(0, 9), 1, 2), [1, 10], "'x' is 10"),
    (ListOf(Int(0, 9), 1, 2), {}, "must be an array, not map"),
    (Ints(1, 2, 9), [1, True], "integers only"),
    (Ints(1, 2, 9), [-1], "in 0..9"),
    (Ints(1, 2, 9), [10], "in 0..9"),
    (Ints(1, 2, 9), [1, 2, 3], "has 3 entries"),
    (Ints(1, 2, 9), 1, "must be an array"),
    (OneOf("a", "b"), 1, "must be a string"),
]


@pytest.mark.parametrize(("rule", "value", "text"), BAD_FIELDS)
def test_wrong_field_is_a_bad_request_that_names_it(rule: Rule, value: object, text: str) -> None:
    with pytest.raises(RequestError, match="'x'") as caught:
        field({"x": value}, "x", rule)
    assert caught.value.code is ErrorCode.BAD_REQUEST
    assert text in caught.value.text


def test_unknown_word_is_unsupported() -> None:
    with pytest.raises(RequestError, match="known are a, b") as caught:
        field({"x": "c" * 5_000}, "x", OneOf("a", "b"))
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert len(caught.value.text) < 200


def test_good_fields_come_back() -> None:
    fields = {"i": 3, "s": "abc", "b": b"12", "l": [[1], [2]], "m": {"a": 1}, "t": True}
    assert field(fields, "i", Int(3, 3)) == 3
    assert field(fields, "s", Str(3, 3)) == "abc"
    assert field(fields, "b", Bin(2)) == b"12"
    assert field(fields, "l", ListOf(Ints(1, 1, 2), 2, 2)) == ((1,), (2,))
    assert field(fields, "m", Map()) == {"a": 1}
    assert field(fields, "t", Bool()) is True
    assert field(fields, "absent", Int(), None) is None


def test_a_rule_used_by_ourselves_blames_ourselves() -> None:
    with pytest.raises(FieldError) as caught:
        Int(0, 9, ErrorCode.POSITION).check("x", 10)
    assert isinstance(caught.value, LocalProtocolError) and caught.value.code is ErrorCode.POSITION


def test_unknown_keys_pass_unless_critical() -> None:
    refuse_critical({"n": 1, "later": 2, "a!": 3, "": 4})
    with pytest.raises(RequestError) as caught:
        refuse_critical({"n": 1, "!later": 2})
    assert caught.value.code is ErrorCode.UNSUPPORTED


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=3), values))
def test_any_field_is_returned_or_refused_with_a_request_error(fields: dict[str, object]) -> None:
    rules: list[Rule] = [Int(0, 9), Str(), Bin(0, 9), Bool(), Map(), Ints(0, 9, 9), ListOf(Str(), 0, 3), OneOf("a")]
    for rule in rules:
        for name in [*fields, "x"]:
            try:
                field(fields, name, rule)
            except RequestError as error:
                assert error.code in (ErrorCode.BAD_REQUEST, ErrorCode.UNSUPPORTED)
