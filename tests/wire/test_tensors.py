"""spec/05: sizes before memory, exact bytes, and an int8 codec that equals its plain twin."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.limits import MAX_BODY
from petalite.wire.packing import FieldError
from petalite.wire.tensors import (
    DTYPES,
    INT8,
    Array,
    Descriptor,
    decode,
    describe,
    encode,
    is_finite,
    parse_descriptors,
    total_size,
)

FLOAT_MAX = float(np.finfo(np.float32).max)


def f32(value: float) -> float:
    """Rounded to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def plain_encode(rows: list[list[float]]) -> bytes:
    """i8b64 with Python's loops. A float64 quotient of two float32 rounds to the same float32 as the exact one."""
    scales, codes = [], []
    for row in rows:
        for start in range(0, len(row), 64):
            block = row[start : start + 64]
            peak = max(abs(value) for value in block)
            scale = 0.0 if peak < 2.0**-118 else f32(peak / 127)
            scales.append(scale)
            codes += [round(f32(value / scale)) if scale else 0 for value in block]
    return struct.pack(f"<{len(scales)}f", *scales) + struct.pack(f"{len(codes)}b", *codes)


def plain_decode(data: bytes, rows: int, width: int) -> list[list[float]]:
    blocks = math.ceil(width / 64)
    scales = struct.unpack_from(f"<{rows * blocks}f", data)
    codes = struct.unpack_from(f"{rows * width}b", data, 4 * rows * blocks)
    return [
        [f32(scales[row * blocks + column // 64] * codes[row * width + column]) for column in range(width)]
        for row in range(rows)
    ]


def joined(array: Array, codec: str = "raw") -> bytes:
    return b"".join(encode(array, codec))


def refusal(raw: object, names: tuple[str, ...] | None = None) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_descriptors(raw, names=names)
    return caught.value


# ------------------------------------------------------------------------------------------------------ descriptors


def test_descriptors_round_trip_in_order() -> None:
    made = (Descriptor("h", "f16", (2, 3, 64), "i8b64"), Descriptor("x", "u8", (7,)))
    assert parse_descriptors([d.to_wire() | {"s": list(d.shape), "later": 1} for d in made]) == made
    assert total_size(made) == 2 * 3 * 64 + 4 * 6 + 7


@pytest.mark.parametrize(
    ("dtype", "codec", "shape", "size"),
    [
        ("f32", "raw", (3, 5), 60),
        ("f16", "raw", (3, 5), 30),
        ("bf16", "raw", (3, 5), 30),
        ("i64", "raw", (3, 5), 120),
        ("u8", "raw", (3, 5), 15),
        ("f32", "i8b64", (3, 64), 3 * (64 + 4)),
        ("f16", "i8b64", (2, 3, 65), 6 * (65 + 8)),
        ("bf16", "i8b64", (1,), 5),
        ("u8", "raw", (MAX_BODY,), MAX_BODY),
    ],
)
def test_encoded_size(dtype: str, codec: str, shape: tuple[int, ...], size: int) -> None:
    assert Descriptor("h", dtype, shape, codec).nbytes == size


GOOD = {"n": "h", "d": "f32", "s": [1, 2], "c": "raw"}


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"s": [2**28, 2]}, ErrorCode.TENSOR, "larger than a body"),
        ({"s": [2**32, 2**32]}, ErrorCode.TENSOR, "larger than a body"),
        ({"s": [2**64 - 1] * 8}, ErrorCode.TENSOR, "larger than a body"),
        ({"s": [MAX_BODY], "c": "i8b64"}, ErrorCode.TENSOR, "larger than a body"),
        ({"s": [0, 2]}, ErrorCode.TENSOR, "dimension 0"),
        ({"s": [-1, 2]}, ErrorCode.TENSOR, "dimension -1"),
        ({"s": []}, ErrorCode.TENSOR, "0 dimensions"),
        ({"s": [1] * 9}, ErrorCode.TENSOR, "9 dimensions"),
        ({"s": [True]}, ErrorCode.BAD_REQUEST, "integer"),
        ({"s": ["1"]}, ErrorCode.BAD_REQUEST, "integer"),
        ({"s": 5}, ErrorCode.BAD_REQUEST, "'s'"),
        ({"s": None}, ErrorCode.BAD_REQUEST, "'s'"),
        ({"d": "f64"}, ErrorCode.UNSUPPORTED, "'f64'"),
        ({"d": 1}, ErrorCode.BAD_REQUEST, "'d'"),
        ({"c": "zip"}, ErrorCode.UNSUPPORTED, "'zip'"),
        ({"c": "i8b32"}, ErrorCode.UNSUPPORTED, "'i8b32'"),
        ({"c": None}, ErrorCode.BAD_REQUEST, "'c' is missing"),
        ({"c": "i8b64", "d": "i64"}, ErrorCode.UNSUPPORTED, "takes no i64"),
        ({"n": ""}, ErrorCode.BAD_REQUEST, "'n'"),
        ({"n": "n" * 65}, ErrorCode.BAD_REQUEST, "1..64"),
        ({"n": "other"}, ErrorCode.BAD_REQUEST, "not known"),
        ({"!x": 1}, ErrorCode.UNSUPPORTED, "critical"),
    ],
)
def test_bad_descriptor_is_refused_by_its_code(change: dict[str, object], code: ErrorCode, text: str) -> None:
    error = refusal([GOOD | change], names=("h",))
    assert error.code is code and text in error.text


def test_list_of_descriptors_is_bounded() -> None:
    assert refusal([GOOD, GOOD]).code is ErrorCode.BAD_REQUEST
    assert refusal(None).code is ErrorCode.BAD_REQUEST
    assert refusal({}).code is ErrorCode.BAD_REQUEST
    assert refusal([1]).code is ErrorCode.BAD_REQUEST
    many = [GOOD | {"n": f"t{i}"} for i in range(65)]
    assert "0..64" in refusal(many).text
    assert len(parse_descriptors(many[:64])) == 64
    halves = [GOOD | {"n": name, "d": "u8", "s": [MAX_BODY // 2 + 1]} for name in "ab"]
    assert refusal(halves).code is ErrorCode.TENSOR


def test_own_bad_descriptor_is_our_mistake() -> None:
    with pytest.raises(LocalProtocolError):
        Descriptor("h", "f32", (0,))
    with pytest.raises(FieldError):
        total_size([Descriptor("a", "u8", (MAX_BODY,)), Descriptor("b", "u8", (1,))])
    with pytest.raises(LocalProtocolError):
        describe("h", np.zeros(2, np.float64))


# -------------------------------------------------------------------------------------------------------------- raw


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_round_trips_without_a_copy(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(DTYPES[dtype])
    (piece,) = encode(array)
    assert np.shares_memory(np.frombuffer(piece, np.uint8), array)
    descriptor = describe("h", array)
    assert descriptor == Descriptor("h", dtype, (2, 3, 4))
    body = bytearray(piece)
    view = decode(descriptor, body)
    assert view.dtype == DTYPES[dtype] and np.array_equal(view, array)
    body[0] ^= 1
    assert not np.array_equal(view, array)


def test_raw_is_little_endian_c_order_whatever_the_array() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    assert joined(array) == struct.pack("<6f", 0, 3, 1, 4, 2, 5)
    assert joined(np.array([1.0, -2.0], np.float16)).hex() == "003c00c0"


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("codec", ["raw", "i8b64"])
def test_unaligned_slice_decodes(offset: int, codec: str) -> None:
    array = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    data = joined(array, codec)
    padded = bytearray(offset) + data
    got = decode(describe("h", array, codec), memoryview(padded)[offset:])
    assert np.array_equal(got, decode(describe("h", array, codec), data))
    assert float(got.sum()) == pytest.approx(float(array.sum()), abs=1)


@pytest.mark.parametrize("codec", ["raw", "i8b64"])
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_bytes_is_refused(codec: str, change: int) -> None:
    descriptor = Descriptor("h", "f32", (2, 64), codec)
    with pytest.raises(RequestError, match="bytes, must be") as caught:
        decode(descriptor, bytes(descriptor.nbytes + change))
    assert caught.value.code is ErrorCode.TENSOR


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_check_sees_one_bad_value(bad: float) -> None:
    for dtype in ("f32", "f16", "bf16"):
        values = np.array([1, -65504, 0, 6e-8], np.float32)
        for position in (None, 0, 3):
            changed = values.copy()
            if position is not None:
                changed[position] = bad
            as_bits = (changed.view(np.uint32) >> 16).astype(np.uint16)
            array = as_bits if dtype == "bf16" else changed.astype(DTYPES[dtype])
            assert is_finite(dtype, array) is (position is None)
            if position is not None:
                for codec in ("raw", "i8b64"):
                    with pytest.raises(LocalProtocolError):
                        encode(array, codec)
    assert is_finite("i64", np.array([-1, 2**62]))


# ------------------------------------------------------------------------------------------------------------- i8b64


def test_example_of_the_specification() -> None:
    array = np.array([[127.0, -63.5, 0.5, 1.5]], np.float32)
    assert joined(array, INT8).hex() == "0000803f" + "7fc00002"
    assert decode(describe("h", array, INT8), bytes.fromhex("0000803f7fc00002")).tolist() == [[127.0, -64.0, 0.0, 2.0]]
    array = np.zeros((1, 66), np.float32)
    array[0, [0, 1, 64, 65]] = 1, -0.5, 3, -3
    assert joined(array, INT8).hex() == "0402013c0683c13c" + "7fc0" + "00" * 62 + "7f81"
    assert joined(np.array([1, -2, 0.5, 65504], np.float16)).hex() == "003c00c00038ff7b"
    assert joined(np.array([0x3F80, 0xC000], np.uint16)).hex() == "803f00c0"


finite = st.floats(-(2.0**126), 2.0**126, width=32)
rows_of = st.integers(1, 3).flatmap(
    lambda rows: st.integers(1, 140).flatmap(
        lambda width: npst.arrays(
            np.float32, (rows, width), elements=st.one_of(finite, st.floats(-10, 10, width=32), st.just(0.0))
        )
    )
)


@settings(max_examples=100, deadline=None)
@given(rows_of)
def test_int8_equals_its_plain_twin_and_keeps_its_bound(array: Array) -> None:
    data = joined(array, INT8)
    assert data == plain_encode(array.tolist())
    got = decode(describe("h", array, INT8), data)
    assert got.tolist() == plain_decode(data, *array.shape)
    for start in range(0, array.shape[1], 64):
        block, back = array[:, start : start + 64].astype(np.float64), got[:, start : start + 64].astype(np.float64)
        peak = np.abs(block).max(axis=1, keepdims=True)
        bound = np.where(peak < 2.0**-118, peak, peak / 254 * (1 + 2.0**-15))
        assert (np.abs(block - back) <= bound).all()


def test_int8_of_random_bits_equals_the_plain_twin() -> None:
    """Every exponent, subnormals too; ties to even by small integers over a peak of 127."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, (64, 100), np.uint32).view(np.float32)
    bits[~(np.abs(bits) < 2.0**127)] = 0
    tiny = rng.integers(0, 2**24, (64, 100), np.uint32).view(np.float32)
    ties = rng.integers(-253, 254, (64, 100)).astype(np.float32) / 2
    ties[:, [0, 64]] = 127
    edge = np.full((3, 64), 2.0**-118, np.float32) * np.array([[1.0], [1 - 2.0**-24], [1 + 2.0**-23]], np.float32)
    for array in (bits, tiny, ties, edge, np.zeros((2, 65), np.float32), -ties):
        assert joined(array, INT8) == plain_encode(array.tolist())


def test_scales_are_never_subnormal() -> None:
    for peak, zero in ((2.0**-118, False), (np.nextafter(np.float32(2.0**-118), np.float32(0)), True), (1e-45, True)):
        data = joined(np.full((1, 64), peak, np.float32), INT8)
        (scale,) = struct.unpack_from("<f", data)
        assert scale == 0 if zero else scale >= 2.0**-126
        assert set(data[4:]) == ({0} if zero else {127})


@settings(max_examples=50, deadline=None)
@given(rows_of, st.data())
def test_int8_bytes_do_not_depend_on_how_rows_are_cut(array: Array, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, array.shape[0]))
    blocks = math.ceil(array.shape[1] / 64)
    whole = joined(array, INT8)
    scales, codes = whole[: 4 * len(array) * blocks], whole[4 * len(array) * blocks :]
    for part, start in ((array[:cut], 0), (array[cut:], cut)):
        if len(part):
            end = start + len(part)
            width = array.shape[1]
            expected = scales[4 * start * blocks : 4 * end * blocks] + codes[start * width : end * width]
            assert joined(part, INT8) == expected


@pytest.mark.parametrize("top", [65504.0, -65504.0, 1.0, 2.0**-14, 6e-8])
def test_int8_of_halves_stays_finite(top: float) -> None:
    array = np.array([[top, top / 3, 0]], np.float16)
    got = decode(describe("h", array, INT8), joined(array, INT8))
    assert got.dtype == np.float16 and np.isfinite(got).all()
    assert np.abs(got.astype(float) - array.astype(float)).max() <= abs(top) / 254 * 1.01 + abs(top) * 2.0**-10


def test_int8_of_bfloat16_rounds_to_even() -> None:
    floats = np.random.default_rng(2).standard_normal((4, 65)).astype(np.float32) * 2.0**100
    bits = (floats.view(np.uint32) >> 16).astype(np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    data = joined(bits, INT8)
    assert data == plain_encode(exact.tolist())
    got = decode(Descriptor("h", "bf16", (4, 65), INT8), data)
    back = (got.astype(np.uint32) << 16).view(np.float32)
    wanted = np.array(plain_decode(data, 4, 65))
    spacing = 2.0 ** (np.floor(np.log2(np.abs(wanted) + (wanted == 0))) - 7)
    assert got.dtype == np.uint16 and (np.abs(back - wanted) <= spacing / 2).all()


@pytest.mark.parametrize("value", [FLOAT_MAX, -FLOAT_MAX, 2.0**127])
def test_int8_encoder_refuses_what_could_overflow(value: float) -> None:
    with pytest.raises(LocalProtocolError):
        encode(np.array([[value]], np.float32), INT8)
    largest = np.nextafter(np.float32(2.0**127), np.float32(0)).reshape(1, 1)
    assert np.isfinite(decode(describe("h", largest, INT8), joined(largest, INT8))).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "scale", [math.nan, -math.nan, math.inf, -math.inf, -1.0, -0.0, -1e-45, FLOAT_MAX, 2.0**121], ids=repr
)
def test_int8_decoder_refuses_scales_that_no_encoder_makes(dtype: str, scale: float) -> None:
    data = struct.pack("<2f", 1.0, scale) + bytes(2)
    with pytest.raises(RequestError, match="scale") as caught:
        decode(Descriptor("h", dtype, (2, 1), INT8), data)
    assert caught.value.code is ErrorCode.TENSOR


def test_int8_decoder_refuses_what_overflows_half() -> None:
    descriptor = Descriptor("h", "f16", (1, 1), INT8)
    assert decode(descriptor, struct.pack("<fb", 515.8125, 127)).tolist() == [[65504.0]]
    with pytest.raises(RequestError):
        decode(descriptor, struct.pack("<fb", 515.875, 1))


def test_int8_decoder_refuses_codes_that_no_encoder_makes() -> None:
    descriptor = Descriptor("h", "f32", (1, 65), INT8)
    good = bytearray(struct.pack("<2f", 1.0, 0.0) + b"\x01" * 64 + b"\x00")
    assert decode(descriptor, good).tolist() == [[1.0] * 64 + [0.0]]
    minimum = bytearray(good)
    minimum[8] = 0x80
    nonzero = bytearray(good)
    nonzero[-1] = 1
    for data, text in ((minimum, "code -128"), (nonzero, "scale 0")):
        with pytest.raises(RequestError, match=text) as caught:
            decode(descriptor, data)
        assert caught.value.code is ErrorCode.TENSOR


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["f32", "f16", "bf16"]), st.integers(1, 70), st.data())
def test_any_bytes_decode_to_finite_values_or_are_refused(dtype: str, width: int, data: st.DataObject) -> None:
    descriptor = Descriptor("h", dtype, (1, width), INT8)
    size = descriptor.nbytes
    try:
        got = decode(descriptor, data.draw(st.binary(min_size=size, max_size=size)))
    except RequestError as error:
        assert error.code is ErrorCode.TENSOR
    else:
        assert is_finite(dtype, got)
