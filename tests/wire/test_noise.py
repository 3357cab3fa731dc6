"""Noise against vectors of other people, and its edge rules by name."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import GoAwayCode, HandshakeError, LocalProtocolError, RemoteProtocolError
from petalite.wire import noise
from petalite.wire.noise import CipherState, HandshakeState, KeyPair, TransportCipher, parse_protocol_name

ROOT = Path(__file__).resolve().parents[2]
VECTORS: list[dict[str, Any]] = json.loads((ROOT / "spec/vectors/noise.json").read_text())["vectors"]
XX = "Noise_XX_25519_ChaChaPoly_SHA256"
PSK = "Noise_XXpsk0+psk3_25519_ChaChaPoly_SHA256"

# The seven X25519 inputs whose result is zero, order 1, 2, 4 and 8, three of them in non-canonical form
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def _side(vector: dict[str, Any], role: str) -> HandshakeState:
    def part(key: str) -> bytes | None:
        return bytes.fromhex(vector[f"{role}_{key}"]) if f"{role}_{key}" in vector else None

    initiator = role == "init"
    static = part("static")
    knows_peer = parse_protocol_name(vector["protocol_name"]).pre_messages[initiator] == "s"
    return HandshakeState(
        vector["protocol_name"],
        initiator=initiator,
        prologue=part("prologue") or b"",
        random=lambda size: part("ephemeral") or b"",
        s=KeyPair.from_private(static) if static else None,
        rs=part("remote_static") if knows_peer else None,
        psks=[bytes.fromhex(psk) for psk in vector.get(f"{role}_psks", [])],
    )


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["protocol_name"] for vector in VECTORS])
def test_vector(vector: dict[str, Any]) -> None:
    sides = [_side(vector, "init"), _side(vector, "resp")]
    ciphers: list[Sequence[CipherState]] = []
    for number, message in enumerate(vector["messages"]):
        payload, ciphertext = bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"])
        writer, reader = sides[number % 2], sides[(number + 1) % 2]
        if not writer.complete:
            assert writer.write_message(payload) == ciphertext
            assert reader.read_message(ciphertext) == payload
            continue
        if not ciphers:
            assert sides[0].h == sides[1].h
            if "handshake_hash" in vector:
                assert sides[0].h.hex() == vector["handshake_hash"]
            ciphers = [side.split() for side in sides]
        assert ciphers[0][number % 2].encrypt_with_ad(b"", payload) == ciphertext
        assert ciphers[1][number % 2].decrypt_with_ad(b"", ciphertext) == payload
    assert ciphers, "each vector reaches the transport phase"


@pytest.mark.parametrize(
    "name",
    [
        "Noise_IN_25519_ChaChaPoly_SHA256",
        "Noise_XX_448_ChaChaPoly_SHA256",
        "Noise_XX_25519_AESGCM_SHA256",
        "Noise_XX_25519_ChaChaPoly_SHA512",
        "Noise_XXfallback_25519_ChaChaPoly_SHA256",
        "Noise_XXpsk4_25519_ChaChaPoly_SHA256",
        "Noise_NNpsk3_25519_ChaChaPoly_SHA256",
        "Noise_XXpsk0+_25519_ChaChaPoly_SHA256",
        "noise_XX_25519_ChaChaPoly_SHA256",
        "",
    ],
)
def test_unknown_protocol_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"psk|not offered"):
        parse_protocol_name(name)


def test_psk_tokens_stand_where_section_9_says() -> None:
    assert parse_protocol_name(PSK).messages == (("psk", "e"), ("e", "ee", "s", "es"), ("s", "se", "psk"))


def test_a_missing_key_is_a_value_error() -> None:
    for name in (XX, "Noise_NK_25519_ChaChaPoly_SHA256", PSK):
        with pytest.raises(ValueError, match="needs"):
            HandshakeState(name, initiator=True, prologue=b"", random=os.urandom)


# --- handshake state -------------------------------------------------------------------------------------------------


def _pair(name: str = XX) -> tuple[HandshakeState, HandshakeState]:
    psks = [bytes([7]) * 32] * parse_protocol_name(name).psks

    def side(seed: int) -> HandshakeState:
        key = KeyPair.from_private(bytes([seed]) * 32)
        return HandshakeState(
            name, initiator=seed == 1, prologue=b"p", random=lambda n: bytes([seed + 16]) * n, s=key, psks=psks
        )

    return side(1), side(2)


def _state(handshake: HandshakeState) -> tuple[object, ...]:
    symmetric = handshake.symmetric
    cipher = symmetric.cipher
    return handshake.e, handshake.re, handshake.rs, symmetric.h, symmetric.ck, cipher.k, cipher.n, handshake.complete


@pytest.mark.parametrize("name", [XX, PSK])
def test_a_refused_message_leaves_no_trace(name: str) -> None:
    """Each message is first delivered with each byte flipped and at each shorter length, then as it is."""
    sides = _pair(name)
    for number in range(3):
        writer, reader = sides[number % 2], sides[1 - number % 2]
        message = writer.write_message(b"")
        before = _state(reader)
        for place in range(len(message)):
            # Message 1 of XX is all in clear: nothing in it can be wrong but its length.
            if number > 0 or name == PSK:
                with pytest.raises(HandshakeError):
                    reader.read_message(message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :])
                assert _state(reader) == before
            with pytest.raises(HandshakeError):
                reader.read_message(message[:place])
            assert _state(reader) == before
        assert reader.read_message(message) == b""
    first, second = sides[0].split(), sides[1].split()
    assert second[0].decrypt_with_ad(b"", first[0].encrypt_with_ad(b"", b"hello")) == b"hello"


@pytest.mark.parametrize("point", LOW_ORDER)
def test_low_order_ephemeral_is_a_handshake_error_and_rolls_back(point: str) -> None:
    _, responder = _pair()
    responder.read_message(bytes.fromhex(point))
    before = _state(responder)
    with pytest.raises(HandshakeError, match="low-order"):
        responder.write_message(b"")
    assert _state(responder) == before


def test_oversized_messages() -> None:
    initiator, responder = _pair()
    before = _state(initiator)
    with pytest.raises(LocalProtocolError, match="over 65535"):
        initiator.write_message(bytes(65_536 - 32))
    assert _state(initiator) == before
    message = initiator.write_message(bytes(65_535 - 32))
    with pytest.raises(HandshakeError, match="65536 bytes"):
        responder.read_message(message + b"x")
    assert len(responder.read_message(message)) == 65_503


def test_turns_are_kept() -> None:
    initiator, responder = _pair()
    with pytest.raises(LocalProtocolError, match="turn"):
        responder.write_message(b"")
    with pytest.raises(LocalProtocolError, match="turn"):
        initiator.read_message(bytes(32))
    with pytest.raises(LocalProtocolError, match="complete"):
        initiator.split()


def test_split_once_and_the_secrets_are_gone() -> None:
    """PT-TRN-044."""
    initiator, responder = _pair(PSK)
    responder.read_message(initiator.write_message())
    initiator.read_message(responder.write_message())
    responder.read_message(initiator.write_message())
    initiator.split()
    assert initiator.e is None
    assert initiator.s is None
    assert initiator.symmetric.cipher.k is None
    with pytest.raises(LocalProtocolError, match="split"):
        initiator.split()
    with pytest.raises(LocalProtocolError, match="turn"):
        initiator.write_message(b"")


# --- cipher states ---------------------------------------------------------------------------------------------------

KEY = bytes(range(32))


def test_maximum_nonce_is_refused_both_ways() -> None:
    """PT-TRN-065."""
    cipher = CipherState(KEY)
    cipher.n = 2**64 - 2
    last = cipher.encrypt_with_ad(b"", b"x")
    assert cipher.n == 2**64 - 1
    with pytest.raises(LocalProtocolError, match="nonces"):
        cipher.encrypt_with_ad(b"", b"x")
    with pytest.raises(RemoteProtocolError, match="nonces") as caught:
        cipher.decrypt_with_ad(b"", last)
    assert caught.value.code is GoAwayCode.DECRYPT
    assert cipher.n == 2**64 - 1
    transport = TransportCipher(KEY)
    transport.n = 2**64 - 1
    with pytest.raises(LocalProtocolError):
        transport.encrypt_into(b"x", bytearray(17))
    with pytest.raises(RemoteProtocolError):
        transport.decrypt_into(last, bytearray(1))


def test_rekey_is_the_sentence_of_section_4_2() -> None:
    cipher = CipherState(KEY)
    cipher.n = 5
    cipher.rekey()
    nonce = bytes(4) + b"\xff" * 8
    assert cipher.k == ChaCha20Poly1305(KEY).encrypt(nonce, bytes(32), b"")[:32]
    assert cipher.n == 5


def test_an_empty_cipher_state_passes_data_through() -> None:
    cipher = CipherState()
    assert cipher.encrypt_with_ad(b"h", b"x") == b"x" == cipher.decrypt_with_ad(b"h", b"x")
    assert cipher.n == 0
    with pytest.raises(LocalProtocolError, match="empty"):
        cipher.rekey()


class PlainTwin:
    """The obvious way: one fresh cipher object a record, the key chain recomputed from the start each time."""

    def __init__(self, every: int) -> None:
        self.every, self.n = every, 0

    def encrypt(self, plaintext: bytes) -> bytes:
        key = KEY
        for _ in range(self.n // self.every):
            key = ChaCha20Poly1305(key).encrypt(bytes(4) + b"\xff" * 8, bytes(32), b"")[:32]
        self.n += 1
        return ChaCha20Poly1305(key).encrypt(bytes(4) + (self.n - 1).to_bytes(8, "little"), plaintext, b"")


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 7))
def test_transport_records_equal_the_plain_twin_across_rekeys(plaintexts: list[bytes], every: int) -> None:
    twin, sender, receiver = PlainTwin(every), TransportCipher(KEY, every), TransportCipher(KEY, every)
    for plaintext in plaintexts:
        record = bytearray(b"\xee" * (len(plaintext) + 20))
        size = sender.encrypt_into(memoryview(plaintext), memoryview(record)[2:])
        assert size == len(plaintext) + 16
        assert record[2 : 2 + size] == twin.encrypt(plaintext)
        assert record[:2] + record[2 + size :] == b"\xee" * 4  # nothing beside its place
        out = bytearray(len(plaintext) + 3)
        assert receiver.decrypt_into(memoryview(record)[2 : 2 + size], out) == len(plaintext)
        assert out == plaintext + bytes(3)


def test_the_key_changes_at_record_65536() -> None:
    """PT-TRN-063, with the example of spec/01: record 65,536, counted from 0, is the first under the second key."""
    cipher = TransportCipher(KEY)
    cipher.n = 65_535
    out = bytearray(19)
    cipher.encrypt_into(b"\x92\x05\x01", out)
    assert out.hex() == "8d771d1181fbf369ea711811a782fd8e443ddf"
    assert out == ChaCha20Poly1305(KEY).encrypt(bytes(4) + (65_535).to_bytes(8, "little"), b"\x92\x05\x01", b"")
    assert cipher.n == 65_536
    assert cipher.k is not None
    assert cipher.k.hex() == "50835543a205b22c9323f2022bc4f67d838f90e61d5ccf33c4513e01f85b5042"
    cipher.encrypt_into(b"\x92\x05\x01", out)
    assert out.hex() == "f0f62d798d63ec731e1fb7ea5210192daac1c8"


def test_a_failed_decrypt_moves_nothing_and_wipes_the_buffer() -> None:
    """PT-TRN-064."""
    sender, receiver = TransportCipher(KEY), TransportCipher(KEY)
    record = bytearray(26)
    sender.encrypt_into(b"0123456789", record)
    for place in range(len(record)):
        out = bytearray(b"\xaa" * 12)
        tampered = bytearray(record)
        tampered[place] ^= 0x80
        with pytest.raises(RemoteProtocolError, match="decrypt") as caught:
            receiver.decrypt_into(tampered, out)
        assert caught.value.code is GoAwayCode.DECRYPT
        assert out == bytes(10) + b"\xaa" * 2
        assert receiver.n == 0
    out = bytearray(10)
    receiver.decrypt_into(record, out)
    assert out == b"0123456789"
    with pytest.raises(RemoteProtocolError):
        receiver.decrypt_into(record, out)  # a replay: n has moved on


def test_sizes_of_records() -> None:
    """PT-TRN-060."""
    cipher = TransportCipher(KEY)
    assert cipher.encrypt_into(bytes(65_519), bytearray(65_535)) == 65_535
    assert cipher.n == 1
    for plaintext, room in ((bytes(65_520), 70_000), (b"abc", 18)):
        with pytest.raises(LocalProtocolError):
            cipher.encrypt_into(plaintext, bytearray(room))
    with pytest.raises(LocalProtocolError, match="does not fit"):
        cipher.decrypt_into(bytes(30), bytearray(13))
    for size in (0, 1, 15, 65_536):
        with pytest.raises(RemoteProtocolError, match=f"{size} bytes"):
            cipher.decrypt_into(bytes(size), bytearray(70_000))
    assert cipher.n == 1


def test_a_record_reflected_to_its_sender_is_refused() -> None:
    initiator, responder = _pair()
    responder.read_message(initiator.write_message())
    initiator.read_message(responder.write_message())
    responder.read_message(initiator.write_message())
    sending, receiving = initiator.split()
    record = sending.encrypt_with_ad(b"", b"x")
    with pytest.raises(RemoteProtocolError):
        receiving.decrypt_with_ad(b"", record)


def test_no_key_in_a_repr() -> None:
    for shown in (repr(KeyPair.from_private(KEY)), repr(TransportCipher(KEY)), repr(_pair()[0])):
        assert KEY.hex()[:8] not in shown
        assert repr(KEY)[2:10] not in shown


# --- tools/noise_vectors.py ------------------------------------------------------------------------------------------


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/noise_vectors.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_tool_passes_the_published_vectors() -> None:
    result = _run(str(ROOT / "spec/vectors/noise.json"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == f"{len(VECTORS)} passed, 0 failed"


def test_tool_sees_each_kind_of_fault_and_skips_by_name(tmp_path: Path) -> None:
    good = VECTORS[0]
    faults: list[Any] = ["not a vector", {}, {**good, "messages": []}, {**good, "init_ephemeral": "zz"}]
    faults.append({**good, "protocol_name": "Noise_NN_25519_AESGCM_SHA256"})
    for key in ("handshake_hash", "init_prologue", "resp_ephemeral"):
        faults.append({**good, key: "00" * 32})
    for number, key in ((1, "ciphertext"), (4, "payload")):
        faults.append(copy.deepcopy(good))
        faults[-1]["messages"][number][key] += "00"
    skipped = {**good, "protocol_name": "Noise_IXpsk2_25519_ChaChaPoly_SHA256"}
    (tmp_path / "v.json").write_text(json.dumps({"vectors": [good, skipped, *faults]}))
    result = _run(str(tmp_path / "v.json"))
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert result.stderr == ""
    assert lines[-1] == f"1 passed, {len(faults)} failed, 1 skipped"
    assert lines[-2] == "skipped Noise_IXpsk2_25519_ChaChaPoly_SHA256"


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"vectors": 3}', b'{"vectors": []}', b"\xff", b"[" * 9999])
def test_tool_says_in_one_line_that_a_file_is_no_vectors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "v.json"
    if content is not None:
        path.write_bytes(content)
    result = _run(str(path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"{path}: ")
    assert result.stderr.count("\n") == 1


def test_low_order_list_is_what_the_primitive_refuses() -> None:
    """PT-TRN-041."""
    for point in LOW_ORDER:
        with pytest.raises(HandshakeError, match="low-order"):
            noise.dh(KeyPair.from_private(KEY), bytes.fromhex(point))
