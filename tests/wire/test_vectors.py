"""spec/vectors: the files are what the tool makes, and the code reads them as they say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from petalite.errors import ErrorCode, GoAwayCode, RemoteProtocolError, RequestError
from petalite.identity import Identity, PeerId, SwarmKey, check_public_key
from petalite.wire import frames, messages, packing, tensors, training
from petalite.wire.handshake import Handshake, Role
from petalite.wire.noise import TransportCipher
from petalite.wire.records import RecordReader, RecordWriter
from tools.make_vectors import FOLDER, make_all
from tools.make_vectors.frames import meaning


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return document


def named(vectors: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def test_the_files_are_what_the_tool_makes() -> None:
    for name, text in make_all().items():
        assert (FOLDER / name).read_text() == text, f"run `python tools/make_vectors`: {name} differs"


FRAMES = load("frames")


@named(FRAMES["valid"])
def test_a_valid_frame(vector: dict[str, Any]) -> None:
    assert meaning(frames.decode(memoryview(bytes.fromhex(vector["hex"])))) == vector["frame"]


@named(FRAMES["invalid"])
def test_an_invalid_frame(vector: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        frames.decode(memoryview(bytes.fromhex(vector["hex"])))
    assert GoAwayCode(caught.value.code).name.lower() == vector["goaway"]


RECORDS = load("records")


def test_records_over_a_rekey() -> None:
    for row in RECORDS["records"]:
        cipher = TransportCipher(bytes.fromhex(row["key"]))  # the key that record n is under, so no need to count
        cipher.n = row["n"]
        assert RecordWriter(cipher).pack([(bytes.fromhex(RECORDS["frame"]), None)]).hex() == row["record"]
        cipher = TransportCipher(bytes.fromhex(row["key"]))
        cipher.n = row["n"]
        plain = next(iter(RecordReader(cipher).feed(bytes.fromhex(row["record"]))))
        assert plain.hex() == RECORDS["frame"]


@named(RECORDS["refused"])
def test_a_refused_record(vector: dict[str, Any]) -> None:
    reader = RecordReader(TransportCipher(bytes.fromhex(RECORDS["key"])))
    with pytest.raises(RemoteProtocolError) as caught:
        list(reader.feed(bytes.fromhex(vector["stream"])))
    assert GoAwayCode(caught.value.code).name.lower() == vector["goaway"]


HANDSHAKES = load("handshake")


@named(HANDSHAKES["handshakes"])
@pytest.mark.parametrize("role", ["initiator", "responder"])
@pytest.mark.parametrize("piece", [10_000, 1])
def test_a_handshake_played_from_one_side(vector: dict[str, Any], role: str, piece: int) -> None:
    own, other = vector[role], vector["responder" if role == "initiator" else "initiator"]
    keys = [bytes.fromhex(own["static"]), bytes.fromhex(own["ephemeral"])]
    side = Handshake(
        Role(role),
        Identity.from_seed(bytes.fromhex(own["seed"])),
        vector["network"],
        SwarmKey(bytes.fromhex(vector["swarm_key"])) if vector["swarm_key"] else None,
        PeerId.parse(other["peer"]),
        now=HANDSHAKES["now"],
        random=lambda _: keys.pop(0),
    )
    *steps, first, second = vector["bytes"]
    for step in steps:
        data = bytes.fromhex(step["hex"])
        if step["from"] == role:
            assert side.data_to_send() == data
        else:
            for at in range(0, len(data), piece):
                side.receive_data(data[at : at + piece])
    assert side.result is not None and side.result.peer.text == other["peer"]
    plain = bytes.fromhex(HANDSHAKES["frame"])
    mine, theirs = (first, second) if role == "initiator" else (second, first)
    assert RecordWriter(side.result.encrypt).pack([(plain, None)]).hex() == mine["hex"]
    assert next(iter(RecordReader(side.result.decrypt).feed(bytes.fromhex(theirs["hex"])))) == plain


PEERS = load("peer_ids")


def test_peer_ids() -> None:
    for vector in PEERS["peer_ids"]:
        identity = Identity.from_seed(bytes.fromhex(vector["seed"]))
        assert identity.public_key.hex() == vector["public_key"]
        assert bytes(identity.peer_id).hex() == vector["peer_id"] and identity.peer_id.text == vector["text"]
        assert PeerId.parse(vector["text"]) == identity.peer_id


@named(PEERS["refused_keys"])
def test_a_refused_public_key(vector: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        check_public_key(bytes.fromhex(vector["public_key"]))


@named(PEERS["refused_texts"])
def test_a_refused_text_of_a_peer_id(vector: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PeerId.parse(vector["text"])


MSGPACK = load("strict_msgpack")


@named(MSGPACK["valid"])
def test_valid_msgpack(vector: dict[str, Any]) -> None:
    value = packing.decode(bytes.fromhex(vector["hex"]))
    expected = vector["value"]
    assert value == (bytes.fromhex(expected["bin"]) if isinstance(expected, dict) and "bin" in expected else expected)
    assert packing.encode(value).hex() == vector["shortest"]


@named(MSGPACK["invalid"])
def test_invalid_msgpack(vector: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        packing.decode(bytes.fromhex(vector["hex"]))


TENSORS = load("tensors")


@named(TENSORS["good"])
def test_a_tensor(vector: dict[str, Any]) -> None:
    (descriptor,) = tensors.parse_descriptors([vector["descriptor"]])
    dtype = tensors.DTYPES[descriptor.dtype]
    values = np.frombuffer(bytes.fromhex(vector["values"]), dtype).reshape(descriptor.shape)
    body = bytes.fromhex(vector["body"])
    assert b"".join(tensors.encode(values, descriptor.codec)) == body
    assert tensors.decode(descriptor, body).tobytes().hex() == vector["decoded"]


@named(TENSORS["bad_bodies"])
def test_a_bad_body(vector: dict[str, Any]) -> None:
    (descriptor,) = tensors.parse_descriptors([vector["descriptor"]])
    with pytest.raises(RequestError) as caught:
        tensors.decode(descriptor, bytes.fromhex(vector["body"]))
    assert caught.value.code.name.lower() == vector["error"]


@named(TENSORS["bad_descriptors"])
def test_a_bad_descriptor(vector: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        tensors.parse_descriptors([vector["descriptor"]])
    assert caught.value.code.name.lower() == vector["error"]


MESSAGES = load("messages")


@named(MESSAGES["good"])
def test_a_message(vector: dict[str, Any]) -> None:
    kind = getattr(messages, vector["kind"], None) or getattr(training, vector["kind"])
    made = kind.from_wire(packing.decode(bytes.fromhex(vector["hex"])))
    assert packing.encode(made.to_wire()).hex() == vector["hex"]


@named(MESSAGES["bad"])
def test_a_bad_message(vector: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        (messages.METHODS | training.TRAINING_METHODS)[vector["method"]][0].from_wire(
            packing.decode(bytes.fromhex(vector["hex"]))
        )
    assert caught.value.code is ErrorCode[vector["error"].upper()]
