"""The bridge gives the bytes of wire.tensors, whatever torch does in between."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalite.bridge import (
    FEW_BYTES,
    Inlet,
    all_finite,
    few_from_wire,
    few_to_wire,
    from_wire,
    to_wire,
    torch_dtype,
    wire_dtype,
)
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.wire import tensors
from petalite.wire.tensors import Descriptor

MANY = 2**14  # values, of which numpy makes no short work
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "u8": torch.uint8}


def twin(tensor: torch.Tensor, codec: str) -> bytes:
    """The same tensor by way of numpy."""
    if tensor.dtype is torch.bfloat16:
        return b"".join(tensors.encode(tensor.view(torch.int16).numpy().view(np.uint16), codec))
    return b"".join(tensors.encode(tensor.numpy(), codec))


@pytest.mark.parametrize("dtype", TORCH)
def test_raw_bytes_and_values_are_those_of_the_twin(dtype: str) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) * 3).to(TORCH[dtype])
    descriptor, pieces = to_wire(tensor, dtype, name="x")
    assert descriptor == Descriptor("x", dtype, (2, 3, 4), "raw")
    assert b"".join(pieces) == twin(tensor, "raw")
    back = from_wire(descriptor, bytearray(b"".join(pieces)))
    assert back.dtype is TORCH[dtype] and torch.equal(back, tensor)
    assert wire_dtype(tensor.dtype) == dtype


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["f32", "f16", "bf16"]), st.integers(1, 3), st.integers(1, 200), st.integers(0, 2**32))
def test_int8_bytes_and_values_are_those_of_the_twin(dtype: str, rows: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.standard_normal((rows, width)), rng.integers(-149, 100)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = 0
    if dtype == "f16":
        values = np.clip(values, -65504, 65504)
    tensor = torch.from_numpy(values).to(TORCH[dtype])
    check_int8(tensor, dtype)


def check_int8(tensor: torch.Tensor, dtype: str) -> None:
    descriptor, pieces = to_wire(tensor, dtype, "i8b64")
    body = bytearray(b"".join(pieces))
    assert body == twin(tensor, "i8b64")
    back = from_wire(descriptor, body)
    expected = tensors.decode(descriptor, body)
    got = back.view(torch.int16).numpy().view(np.uint16) if dtype == "bf16" else back.numpy()
    assert np.array_equal(got, expected) and back.dtype is TORCH[dtype]


def test_int8_of_every_exponent_subnormals_and_ties_equals_the_twin() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, (200, 130), np.uint32).view(np.float32)
    bits[~(np.abs(bits) < 2.0**127)] = 0
    tiny = rng.integers(0, 2**24, (64, 64), np.uint32).view(np.float32)
    ties = rng.integers(-253, 254, (64, 100)).astype(np.float32) / 2
    ties[:, [0, 64]] = 127
    for array in (bits, tiny, ties, np.zeros((2, 65), np.float32)):
        check_int8(torch.from_numpy(array), "f32")


def test_cast_happens_before_the_codec() -> None:
    tensor = torch.randn(2, 70, generator=torch.Generator().manual_seed(0))
    for dtype in ("f16", "bf16"):
        for codec in ("raw", "i8b64"):
            assert b"".join(to_wire(tensor, dtype, codec)[1]) == twin(tensor.to(TORCH[dtype]), codec)


def test_raw_shares_memory_both_ways() -> None:
    tensor = torch.ones(MANY)
    _, (piece,) = to_wire(tensor, "f32")
    tensor[0] = 2
    assert bytes(piece[:4]) == b"\x00\x00\x00\x40"
    for count in (4, MANY):
        body = bytearray(piece[: 4 * count])
        back = from_wire(Descriptor("h", "f32", (count,)), body)
        body[:4] = bytes(4)
        assert back[:4].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
def test_few_values_are_cast_as_torch_does(dtype: str, to: torch.dtype) -> None:
    """Every half there is, and what lies beside and between them, in messages of few values."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    if dtype == "f32":
        bits = halves.float().view(torch.int32)
        near = torch.cat([bits + off for off in (-1, 0, 1, 2**11, 2**12 - 1, 2**12, 2**12 + 1)]).view(torch.float32)
        halves = near[near.isfinite() & (near.abs() < 65520)]
    for values in halves.split(1000):
        descriptor, (piece,) = to_wire(values, dtype)
        back = from_wire(descriptor, bytearray(piece), dtype=to, shape=(1, -1))
        assert torch.equal(back, values.to(to)[None])
        sent = to_wire(values, "f16", shape=(1, len(values)))
        assert bytes(sent[1][0]) == values.half().numpy().tobytes() and sent[0].shape == (1, len(values))


def test_few_bfloat16_numbers_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one that is finite, without a look by torch; and one that is not is found."""
    monkeypatch.setattr("petalite.bridge.all_finite", None)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    for values in every[every.float().abs() < 2.0**126].clone().split(1000):
        descriptor, (piece,) = to_wire(values, "bf16")
        body = bytearray(piece)
        assert body == values.view(torch.int16).numpy().tobytes()
        back = from_wire(descriptor, body, dtype=torch.bfloat16, shape=(1, -1))
        assert back.dtype == torch.bfloat16
        assert torch.equal(back.view(torch.int16), values.view(torch.int16)[None])
        mine = few_to_wire(values, "bf16")
        values.zero_()
        assert mine == body
    monkeypatch.undo()
    bad = torch.full((9,), float("inf"), dtype=torch.bfloat16)
    with pytest.raises(LocalProtocolError, match="NaN or infinity"):
        to_wire(bad, "bf16")
    with pytest.raises(RequestError, match="NaN or infinity"):
        from_wire(Descriptor("h", "bf16", (9,)), bytearray(bad.view(torch.int16).numpy().tobytes()))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("to", [torch.float32, torch.float16])
def test_an_inlet_gives_what_decoding_gives_in_one_place(dtype: str, to: torch.dtype) -> None:
    _check_inlet(dtype, to)


def test_an_inlet_keeps_the_bits_of_bfloat16() -> None:
    _check_inlet("bf16", torch.bfloat16)
    assert not Inlet.serves(Descriptor("h", "bf16", (1, 1, 8)), torch.float32)


def _check_inlet(dtype: str, to: torch.dtype) -> None:
    descriptor = Descriptor("h", dtype, (1, 2, 20))
    assert Inlet.serves(descriptor, to)
    inlet = Inlet(descriptor, to, (2, 20))
    places = set()
    for seed in range(5):
        values = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        _, (piece,) = to_wire(values, dtype)
        got = inlet.take(bytearray(piece))
        assert got is not None
        assert torch.equal(got, from_wire(descriptor, bytearray(piece), dtype=to, shape=(2, 20)))
        places.add(got.data_ptr())
    assert len(places) == 1
    for bad in (bytearray(piece)[:-2], bytearray(piece) + b"\0\0", bytearray(b"\xff" * len(piece))):
        assert inlet.take(bad) is None


def test_many_values_and_those_in_blocks_have_no_inlet() -> None:
    assert not Inlet.serves(Descriptor("h", "f16", (1, 1, FEW_BYTES)), torch.float32)
    assert not Inlet.serves(Descriptor("h", "f16", (1, 1, 64), "i8b64"), torch.float32)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_few_values_go_out_and_come_back(dtype: str) -> None:
    values = torch.randn(2, 3, 8).to(torch_dtype(dtype))
    body = few_to_wire(values, dtype)
    assert body is not None
    back = few_from_wire(Descriptor("h", dtype, (2, 3, 8)), body)
    assert back.dtype == values.dtype and torch.equal(back, values)


@pytest.mark.parametrize("count", [1, 9, MANY])
def test_the_largest_values_are_sent_and_taken(count: int) -> None:
    for dtype, plain in TORCH.items():
        if plain.is_floating_point:
            values = torch.full((count,), torch.finfo(plain).max, dtype=plain)
            descriptor, pieces = to_wire(values, dtype)
            assert torch.equal(from_wire(descriptor, bytearray(b"".join(pieces))), values)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("codec", ["raw", "i8b64"])
@pytest.mark.parametrize("readonly", [False, True])
def test_any_buffer_at_any_alignment_decodes(offset: int, codec: str, readonly: bool) -> None:
    tensor = torch.arange(-66.0, 66.0).reshape(2, 66)
    descriptor, pieces = to_wire(tensor, "f32", codec)
    whole = bytearray(offset) + b"".join(pieces)
    part = memoryview(bytes(whole) if readonly else whole)[offset:]
    assert torch.allclose(from_wire(descriptor, part), tensor, atol=66 / 254)


def test_layout_gradient_and_casts_do_not_matter() -> None:
    tensor = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    for dtype in ("f32", "f16", "bf16"):
        for codec in ("raw", "i8b64"):
            descriptor, pieces = to_wire(tensor, dtype, codec)
            assert descriptor.shape == (64, 3)
            back = from_wire(descriptor, bytearray(b"".join(pieces)), "cpu", torch.float64)
            assert back.dtype is torch.float64 and not back.requires_grad
            assert torch.allclose(back, tensor.detach().double(), atol=0.03)


def test_overflow_of_the_cast_names_value_and_type() -> None:
    for codec in ("raw", "i8b64"):
        with pytest.raises(LocalProtocolError, match=r"'h': value of size 70000 does not fit into f16"):
            to_wire(torch.tensor([[1.0, -70000.0]]), "f16", codec)
        to_wire(torch.tensor([[1.0, -70000.0]]), "bf16", codec)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_one_value_that_is_not_finite_is_neither_sent_nor_taken(bad: float, dtype: str) -> None:
    tensor = torch.zeros(2, 65)
    tensor[1, 64] = bad
    for codec in ("raw", "i8b64"):
        with pytest.raises(LocalProtocolError, match="NaN or infinity"):
            to_wire(tensor, dtype, codec)
    body = bytearray(tensor.to(TORCH[dtype]).view(torch.uint8).numpy().tobytes())
    with pytest.raises(RequestError, match="NaN or infinity") as caught:
        from_wire(Descriptor("h", dtype, (2, 65)), body)
    assert caught.value.code is ErrorCode.TENSOR


def test_finite_values_whose_sum_is_not_are_finite() -> None:
    largest = torch.full((8,), torch.finfo(torch.float32).max)
    assert all_finite(largest)
    assert not all_finite(torch.tensor([math.inf, -math.inf]))
    to_wire(torch.full((1, 100_000), 65504.0), "f16")


def test_value_that_does_not_fit_the_wanted_type_is_refused() -> None:
    descriptor, (piece,) = to_wire(torch.tensor([70000.0]), "f32")
    with pytest.raises(RequestError, match="does not fit") as caught:
        from_wire(descriptor, bytearray(piece), dtype=torch.float16)
    assert caught.value.code is ErrorCode.TENSOR


@pytest.mark.parametrize("codec", ["raw", "i8b64"])
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_bytes_is_refused(codec: str, change: int) -> None:
    descriptor = Descriptor("h", "f32", (2, 64), codec)
    with pytest.raises(RequestError, match="bytes, must be"):
        from_wire(descriptor, bytearray(descriptor.nbytes + change))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["f32", "f16", "bf16"]), st.integers(1, 70), st.data())
def test_any_int8_bytes_are_judged_as_by_the_twin(dtype: str, width: int, data: st.DataObject) -> None:
    descriptor = Descriptor("h", dtype, (1, width), "i8b64")
    size = descriptor.nbytes
    head = data.draw(st.sampled_from([b"", bytes(4), b"\x00\x00\x80\x3f", b"\xff\xff\xff\x7b", b"\x00\x00\x00\x80"]))
    body = bytearray((head + data.draw(st.binary(min_size=size, max_size=size)))[:size])
    try:
        expected = tensors.decode(descriptor, body)
    except RequestError as error:
        with pytest.raises(RequestError) as caught:
            from_wire(descriptor, body)
        assert caught.value.text == error.text
    else:
        back = from_wire(descriptor, body)
        got = back.view(torch.int16).numpy().view(np.uint16) if dtype == "bf16" else back.numpy()
        assert np.array_equal(got, expected)


def test_type_that_does_not_travel() -> None:
    with pytest.raises(LocalProtocolError, match="float64"):
        wire_dtype(torch.float64)
