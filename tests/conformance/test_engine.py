"""The tool's own engine against vectors and numbers that come from elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.wire import tensors as reference
from tools.conformance import tensors
from tools.conformance.codec import Malformed, Pairs, pack, unpack, wide
from tools.conformance.constants import SPEC
from tools.conformance.crypto import PATTERNS, CryptoError, KeyPair, Noise, SwarmKey

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=40) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=8), inner, max_size=20),
    max_leaves=20,
)


@given(VALUES)
def test_msgpack_agrees_with_the_library(value: object) -> None:
    assert pack(value) == msgpack.packb(value)
    assert unpack(pack(value)) == value
    assert unpack(wide(value)) == value
    assert msgpack.unpackb(wide(value), strict_map_key=True) == value


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_malformed(data: bytes) -> None:
    try:
        value = unpack(data)
    except Malformed:
        return
    assert msgpack.unpackb(data, strict_map_key=True) == value


def test_wrong_things_can_be_said() -> None:
    with pytest.raises(Malformed, match="twice"):
        unpack(pack(Pairs(("a", 1), ("a", 2))))


def _vectors() -> list[dict[str, object]]:
    found = json.loads((SPEC / "vectors" / "noise.json").read_text())["vectors"]
    names = {name for name, _ in PATTERNS.values()}
    return [vector for vector in found if vector["protocol_name"] in names]


@pytest.mark.parametrize("vector", _vectors(), ids=lambda vector: vector["protocol_name"])
def test_noise_agrees_with_published_vectors(vector: dict[str, object]) -> None:
    def data(name: str) -> bytes:
        return bytes.fromhex(str(vector[name]))

    pattern = next(number for number, (name, _) in PATTERNS.items() if name == vector["protocol_name"])
    psks = [bytes.fromhex(psk) for psk in vector.get("psks", vector.get("init_psks", []))]  # type: ignore[attr-defined]
    if len(set(psks)) > 1:
        pytest.skip("two psks, where the protocol uses one")
    sides = [
        Noise(side == "init", pattern, data(f"{side}_prologue"), psks[0] if psks else None,
              KeyPair(data(f"{side}_static")), KeyPair(data(f"{side}_ephemeral")))
        for side in ("init", "resp")
    ]  # fmt: skip
    messages: list[dict[str, str]] = vector["messages"]  # type: ignore[assignment]
    for number, message in enumerate(messages[:3]):
        sender, receiver = sides[number % 2], sides[(number + 1) % 2]
        written = sender.write(bytes.fromhex(message["payload"]))
        assert written.hex() == message["ciphertext"]
        assert receiver.read(written).hex() == message["payload"]
    ciphers = [side.split() for side in sides]
    for number, message in enumerate(messages[3:], start=3):
        sealed = ciphers[number % 2][0].encrypt(bytes.fromhex(message["payload"]))
        assert sealed.hex() == message["ciphertext"]
        assert ciphers[(number + 1) % 2][1].decrypt(sealed).hex() == message["payload"]


def test_the_private_swarm_of_the_chapter() -> None:
    key = SwarmKey(bytes([7]) * 32)
    assert key.psk.hex() == "4b27b29885399fb854fb815c632b01e28ba113dd101cf3d12438911beab9b49a"
    assert key.network == b"private-cwatgxznptzmtw5qbt3u5bl7dsgi373u"


def test_low_order_keys_are_noticed() -> None:
    with pytest.raises(CryptoError):
        KeyPair().exchange(bytes(32))


def test_the_formula_model_of_the_chapter() -> None:
    tokens = [80, 101, 116, 97, 108]
    assert tensors.greedy(tokens, 8) == [181, 226, 132, 132, 132, 226, 226, 226]
    hidden = tensors.run_blocks(tensors.embed(tokens)[0], 0, 2)
    assert np.allclose(tensors.head(hidden)[-1, :4], [-0.232138, -2.149123, 3.126666, 0.107834], atol=1e-5)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("codec", ["raw", "i8b64"])
def test_tensors_agree_with_the_librarys(dtype: str, codec: str) -> None:
    values = np.random.default_rng(3).standard_normal((2, 3, 100)).astype(np.float32) * 50
    values[0, 0, :64] = 0
    bits = tensors.narrow(values, dtype)
    sent = tensors.decode(bits.tobytes(), dtype, values.shape)
    described = reference.describe("h", bits.view(np.uint16) if dtype == "bf16" else bits, codec)
    body = b"".join(
        bytes(piece) for piece in reference.encode(bits.view(np.uint16) if dtype == "bf16" else bits, codec)
    )
    assert tensors.encode(sent, dtype, codec) == body
    assert tensors.encoded_size(values.shape, dtype, codec) == described.nbytes == len(body)
    back = reference.decode(described, body)
    assert tensors.encode(tensors.decode(body, dtype, values.shape, codec), dtype) == back.tobytes()


def test_the_engine_shares_no_code_with_petalite() -> None:
    names = "('petalite', 'trio', 'torch', 'msgpack')"
    code = "import sys; from tools.conformance import command, suite; suite.load_cases(); " \
           "print([name for name in sys.modules if name.split('.')[0] in " + names + "])"  # fmt: skip
    output = subprocess.run([sys.executable, "-c", code], cwd=SPEC.parent, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_cases_are_listed_without_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.conformance.command import main

    assert main(["server", "--list", "--case", "frames/00*"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].split()[:2] == ["frames/001", "must"]
    assert len(listed) == 9
    assert main(["server", "--case", "no/such*", "--list"]) == 0
    assert main(["client", "--case", "client/001"]) == 2  # no command
