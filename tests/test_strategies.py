"""The strategies that others may use, run against this implementation: what they make is what it takes and refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from petalite import strategies, testing
from petalite.dht.records import check_times, read_record
from petalite.errors import GoAwayCode, RemoteProtocolError
from petalite.identity import Address, Identity, PeerId
from petalite.net.call import Call, Reply
from petalite.net.endpoint import open_endpoint
from petalite.wire import frames, packing, tensors

NOW_MS = 1_700_000_000_000


@given(st.data(), strategies.values())
def test_every_spelling_of_a_value_is_read(data: st.DataObject, value: Any) -> None:
    assert packing.decode(data.draw(strategies.spellings(value))) == value


@given(strategies.broken_msgpack())
def test_broken_msgpack_is_refused(case: strategies.Broken) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        packing.decode(case.data)
    assert caught.value.code is case.code is GoAwayCode.FRAME


@given(st.data(), strategies.frames())
def test_every_spelling_of_a_frame_is_read(data: st.DataObject, frame: list[Any]) -> None:
    made = frames.decode(memoryview(data.draw(strategies.spellings(frame))))
    if isinstance(made, frames.Ignorable):
        assert made.type == frame[0]
    else:
        assert packing.decode(frames.encode(made), max_str=65_519) == frame


@given(strategies.broken_frames())
def test_a_broken_frame_costs_what_it_should(case: strategies.Broken) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        frames.decode(memoryview(case.data))
    assert caught.value.code is case.code, case.rule


@given(
    st.sampled_from(("f32", "f16", "bf16")).flatmap(
        lambda dtype: st.tuples(st.just(dtype), strategies.activations(dtype))
    )
)
def test_activations_travel(case: tuple[str, npt.NDArray[Any]]) -> None:
    dtype, array = case
    for codec in tensors.CODECS:
        descriptor = tensors.describe("h", array, codec)
        assert descriptor.dtype == dtype
        back = tensors.decode(descriptor, b"".join(tensors.encode(array, codec)))
        if codec == tensors.RAW:
            assert (back == array).all()
        else:
            wide = tensors._widen(array, dtype)
            least = 2.0**-24 if dtype == "f16" else 2.0**-118  # what is smaller may become zero
            assert np.abs(tensors._widen(back, dtype) - wide).max() <= np.abs(wide).max() / 100 + least


@given(strategies.descriptors())
def test_descriptors_are_taken(descriptor: dict[str, Any]) -> None:
    size = np.prod(descriptor["s"], dtype=object) * 8
    if size <= 64 * 2**20:
        [made] = tensors.parse_descriptors([descriptor])
        assert made.to_wire() == {**descriptor, "s": tuple(descriptor["s"])}


@given(strategies.addresses(), strategies.peer_ids())
def test_addresses_are_read_back(address: Address, peer: PeerId) -> None:
    assert Address.parse(str(address)) == address
    assert PeerId.parse(peer.text) == peer


@given(strategies.records(now_ms=NOW_MS))
def test_records_are_valid(raw: bytes) -> None:
    check_times(read_record(raw, "petalite"), NOW_MS)


def sent_by(peer: testing.RawPeer, script: strategies.Script) -> bytes:
    """The records of a script, one of them damaged if it says so."""
    said = [peer.record(frame) for frame in script.frames]
    if script.tamper is not None:
        number, how = script.tamper
        record = said[number]
        said[number] = {
            "flip": record[:-1] + bytes([record[-1] ^ 1]),
            "repeat": record + record,
            "short": b"\0\x10" + record[2:18],
        }[how]
    return b"".join(said)


async def reaction_of(peer: testing.RawPeer, stream: int) -> tuple[str, int, bytes]:
    """What the peer does about a stream, or about the connection: reaction, code, body."""
    body = b""
    while True:
        match await peer.receive():
            case frames.GoAway(code=code):
                return "goaway", code, body
            case frames.Err(stream=number, code=code) if number == stream:
                return "err", code, body
            case frames.Res(stream=number, end=True) if number == stream:
                return "answered", 0, body
            case frames.Data(stream=number, end=end, body=piece) if number == stream:
                body += piece
                if end:
                    return "answered", 0, body
            case None:
                return "closed", 0, body


@pytest.mark.parametrize("mutation", strategies.MUTATIONS)
@settings(max_examples=5)
@given(st.data())
def test_one_mutation_gets_the_reaction_that_the_spec_names(mutation: str, data: st.DataObject) -> None:
    script = data.draw(strategies.scripts(mutation))
    trio.run(play, script, clock=MockClock(autojump_threshold=0))  # nothing here waits for real time


async def play(script: strategies.Script) -> None:
    async def echo(call: Call) -> Reply:
        return Reply({}, [bytes(call.body)])

    net = testing.MemoryNet()
    async with open_endpoint(Identity(b"\x05" * 32), carrier=net.host("10.0.0.2"), handlers={"echo": echo}) as endpoint:
        peer, _ = await testing.raw_peer(endpoint)
        await peer.send_bytes(sent_by(peer, script))
        reaction, code, body = await reaction_of(peer, script.stream)
        assert (reaction, code) == (script.reaction, script.code), script.rule
        if reaction == "goaway":
            rest = await peer.receive_all()
            assert not any(isinstance(frame, frames.GoAway) for frame in rest)  # one, and the end of the stream
            return
        await peer.send(frames.Ping(b"lasting!"))
        while (frame := await peer.receive()) != frames.Pong(b"lasting!"):
            assert frame is not None, f"{script.rule} cost the connection"
        if reaction == "answered":
            wanted = [frames.decode(memoryview(plain)) for plain in script.frames]
            pieces = [each.body for each in wanted if isinstance(each, frames.Data) and each.stream == script.stream]
            assert body == b"".join(map(bytes, pieces))


@given(strategies.scripts())
def test_a_script_can_be_kept_as_a_case(script: strategies.Script) -> None:
    assert strategies.Script.from_json(script.to_json()) == script
