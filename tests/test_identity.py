"""Identities, swarm keys and addresses. Oracles: RFC 8032, RFC 5869, curve arithmetic in the open."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import stat
from itertools import count
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from petalite.errors import PetaliteError
from petalite.identity import Address, Identity, PeerId, SwarmKey, check_public_key, peer_id_of, verify

ALICE = Identity.from_seed(bytes([1]) * 32)

# RFC 8032, section 7.1, tests 1 to 3: seed, public key, message, signature
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_signing_is_rfc_8032(seed: str, public: str, message: str, signature: str) -> None:
    identity = Identity.from_seed(bytes.fromhex(seed))
    assert identity.public_key.hex() == public
    assert identity.sign(bytes.fromhex(message)).hex() == signature
    assert verify(identity.public_key, bytes.fromhex(signature), bytes.fromhex(message))
    assert not verify(identity.public_key, bytes.fromhex(signature), bytes.fromhex(message) + b"!")


def test_peer_id_is_the_hash_of_the_key() -> None:
    """PT-IDN-004, PT-IDN-005."""
    digest = hashlib.sha256(b"\x01" + ALICE.public_key).digest()
    assert peer_id_of(ALICE.public_key) == digest == ALICE.peer_id
    text = base64.b32encode(digest).decode().lower().rstrip("=")
    assert ALICE.peer_id.text == str(ALICE.peer_id) == text
    assert len(text) == 52
    assert ALICE.peer_id.short == text[:8]


@given(st.binary(min_size=32, max_size=32))
def test_peer_id_text_round_trip(value: bytes) -> None:
    assert PeerId.parse(PeerId(value).text) == value


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52))
def test_peer_id_has_one_spelling(text: str) -> None:
    """PT-IDN-005."""
    try:
        assert PeerId.parse(text).text == text
    except ValueError:
        assert text[-1] not in "aq"  # the last character holds one bit of the id


@pytest.mark.parametrize(
    "text", ["", "a" * 51, "a" * 53, "A" * 52, "a" * 51 + "\n", "a" * 51 + "b", "a" * 50 + "=a", "ä" * 52]
)
def test_peer_id_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="peer id") as caught:
        PeerId.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_sizes_are_checked(size: int) -> None:
    for make in (PeerId, peer_id_of, Identity.from_seed, SwarmKey, check_public_key):
        with pytest.raises(ValueError, match="32 bytes"):
            make(bytes(size))


# --- small order, found again by arithmetic ---------------------------------------------------------------------------

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    (x1, y1), (x2, y2) = a, b
    k = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P


def _torsion_points() -> set[tuple[int, int]]:
    """The eight points whose order divides 8: any point times the prime L loses all but its torsion part."""
    for y in count(2):
        x = _sqrt((y * y - 1) * pow(D * y * y + 1, -1, P) % P)
        if x is not None:
            generator = _times((x, y), L)
            if _times(generator, 4) != (0, 1):
                return {_times(generator, n) for n in range(8)}
    raise AssertionError


def _times(point: tuple[int, int], n: int) -> tuple[int, int]:
    result = (0, 1)
    while n:
        if n & 1:
            result = _add(result, point)
        point, n = _add(point, point), n >> 1
    return result


def _sqrt(a: int) -> int | None:
    root = pow(a, (P + 3) // 8, P)
    for candidate in (root, root * pow(2, (P - 1) // 4, P) % P):
        if candidate * candidate % P == a % P:
            return candidate
    return None


def _encodings(point: tuple[int, int]) -> set[bytes]:
    """Every 32-byte string that decoders may take for this point: y or y + p, either sign where x = 0."""
    x, y = point
    signs = {0, 1} if x == 0 else {x & 1}
    return {(v | s << 255).to_bytes(32, "little") for v in (y, y + P) if v < 2**255 for s in signs}


def test_every_small_order_key_is_refused() -> None:
    """PT-IDN-006: all fourteen encodings of the eight points."""
    points = _torsion_points()
    assert len(points) == 8
    encodings = set().union(*map(_encodings, points))
    assert len(encodings) == 14
    for encoding in encodings:
        with pytest.raises(ValueError, match="small order"):
            check_public_key(encoding)


def test_identity_point_would_sign_everything() -> None:
    """The trap behind PT-IDN-006: the primitive itself accepts R = identity, S = 0 for any message."""
    key = bytes([1]) + bytes(31)
    signature = bytes([1]) + bytes(63)
    Ed25519PublicKey.from_public_bytes(key).verify(signature, b"anything")  # does not raise
    assert not verify(key, signature, b"anything")


@pytest.mark.parametrize("y", range(P, 2**255))
def test_non_canonical_keys_are_refused(y: int) -> None:
    """PT-IDN-007."""
    for sign in (0, 1 << 255):
        with pytest.raises(ValueError, match=r"canonical|small order"):
            check_public_key((y | sign).to_bytes(32, "little"))


def test_signature_with_s_over_the_order_is_refused() -> None:
    """PT-IDN-008."""
    signature = ALICE.sign(b"m")
    s = int.from_bytes(signature[32:], "little") + L
    assert not verify(ALICE.public_key, signature[:32] + s.to_bytes(32, "little"), b"m")


@given(st.binary(max_size=40), st.binary(max_size=70), st.binary(max_size=8))
def test_verify_never_raises(key: bytes, signature: bytes, message: bytes) -> None:
    assert not verify(key, signature, message)


# --- key files -------------------------------------------------------------------------------------------------------


def test_identity_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    ALICE.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path).public_key == ALICE.public_key
    assert path.read_text() == f"petalite identity v1\n# peer id {ALICE.peer_id.text}\n{'01' * 32}\n"


def test_swarm_key_file_round_trip(tmp_path: Path) -> None:
    """PT-IDN-010, PT-IDN-012."""
    path = tmp_path / "swarm"
    key = SwarmKey.generate(lambda size: bytes([7]) * size)
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SwarmKey.load(path).psk == key.psk


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    """PT-IDN-011."""
    path = tmp_path / "identity"
    ALICE.save(path)
    with pytest.raises(PetaliteError, match="exists already"):
        Identity.generate().save(path)
    assert Identity.load(path).peer_id == ALICE.peer_id


def test_the_wrong_kind_of_key_file_is_named(tmp_path: Path) -> None:
    ALICE.save(tmp_path / "identity")
    with pytest.raises(PetaliteError, match="holds an identity, not a swarm key"):
        SwarmKey.load(tmp_path / "identity")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
        b"\xff\xfe\x00" * 100,
        b"petalite swarm key v2\n" + b"07" * 32,
        b"petalite swarm key v1\n",
        b"petalite swarm key v1\n" + b"07" * 31 + b"\n",
        b"petalite swarm key v1\n" + b"07" * 32 + b"\n" + b"07" * 32,
        b"petalite swarm key v1\n" + b"0g" * 32,
        b"petalite swarm key v1\n" + b"07" * 32 + b"\n" * 5000,
    ],
)
def test_a_wrong_key_file_gives_one_clear_line(tmp_path: Path, content: bytes) -> None:
    """PT-IDN-010, PT-IDN-011."""
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(PetaliteError) as caught:
        SwarmKey.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "07" * 8 not in str(caught.value)  # nothing of a key in a message


def test_a_missing_file_and_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(PetaliteError, match="No such file"):
        Identity.load(tmp_path / "none")
    with pytest.raises(PetaliteError, match="No such file"):
        ALICE.save(tmp_path / "none" / "identity")
    with pytest.raises(PetaliteError, match="directory"):
        SwarmKey.load(tmp_path)


def test_swarm_key_derivation_is_rfc_5869() -> None:
    """PT-IDN-021 to PT-IDN-023."""

    def hkdf(info: bytes, length: int) -> bytes:  # a single block is enough below 32 bytes
        extracted = hmac.digest(bytes(32), bytes([7]) * 32, "sha256")
        return hmac.digest(extracted, info + b"\x01", "sha256")[:length]

    def base32(data: bytes) -> str:
        return base64.b32encode(data).decode().lower().rstrip("=")

    key = SwarmKey(bytes([7]) * 32)
    assert key.psk == hkdf(b"petalite swarm psk v1", 32)
    assert key.network_id == "private-" + base32(hkdf(b"petalite swarm network id v1", 20))
    assert key.lan_tag == base32(hkdf(b"petalite swarm lan tag v1", 10))
    assert len(key.network_id.encode()) <= 64


def test_secrets_are_not_shown() -> None:
    key = SwarmKey(bytes([7]) * 32)
    for shown in (repr(key), repr(ALICE)):
        assert "07" * 4 not in shown
        assert "01" * 4 not in shown
        assert "\\x0" not in shown


def test_generate_draws_32_bytes() -> None:
    drawn: list[int] = []

    def random(size: int) -> bytes:
        drawn.append(size)
        return os.urandom(size)

    assert Identity.generate(random).peer_id != Identity.generate(random).peer_id
    SwarmKey.generate(random)
    assert drawn == [32, 32, 32]


# --- addresses -------------------------------------------------------------------------------------------------------

ID = ALICE.peer_id.text


@pytest.mark.parametrize(
    ("place", "host", "port"),
    [
        ("10.0.0.7:31337", "10.0.0.7", 31337),
        ("[2001:db8::1]:1", "2001:db8::1", 1),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
        ("laptop.local:31337", "laptop.local", 31337),
        ("localhost:80", "localhost", 80),
    ],
)
def test_address_forms(place: str, host: str, port: int) -> None:
    """PT-IDN-030, PT-IDN-031."""
    text = f"petalite://{ID}@{place}"
    address = Address.parse(text)
    assert (address.peer, address.host, address.port) == (ALICE.peer_id, host, port)
    assert str(address) == text


def test_address_is_made_canonical() -> None:
    for written, canonical in [("[2001:DB8:0::1]:7", "[2001:db8::1]:7"), ("Laptop.LOCAL:007", "laptop.local:7")]:
        assert str(Address.parse(f"petalite://{ID}@{written}")) == f"petalite://{ID}@{canonical}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "looks like"),
        (f"http://{ID}@h:1", "looks like"),
        (f"petalite://{ID}", "no '@'"),
        (f"petalite://{ID}@h", "no port"),
        (f"petalite://{ID}@[::1]", "no port"),
        (f"petalite://{ID}@h:", "not a number"),
        (f"petalite://{ID}@h:0", "1..65535"),
        (f"petalite://{ID}@h:65536", "1..65535"),
        (f"petalite://{ID}@h:-1", "not a number"),
        (f"petalite://{ID}@h:+1", "not a number"),
        (f"petalite://{ID}@h:1 ", "not a number"),
        (f"petalite://{ID}@h:٣", "not a number"),
        (f"petalite://{ID}@h:1/", "not a number"),
        (f"petalite://{ID}@::1:7", "brackets"),
        (f"petalite://{ID}@[10.0.0.1]:7", "IPv6"),
        (f"petalite://{ID}@[::g]:7", "not an IPv6"),
        (f"petalite://{ID}@[fe80::1%]:7", "scope"),
        (f"petalite://{ID}@[fe80::1%e th]:7", "scope"),
        (f"petalite://{ID}@:7", "host name"),
        (f"petalite://{ID}@a b:7", "host name"),
        (f"petalite://{ID}@a..b:7", "host name"),
        (f"petalite://{ID}@256.0.0.1:7", "IPv4"),
        (f"petalite://{ID}@1.2.3:7", "IPv4"),
        (f"petalite://{ID[:-1]}@h:7", "52 characters"),
        (f"petalite://{ID}@{'a' * 600}:7", "at most"),
        (f"petalite://{ID}@h\n:7", "host name"),
    ],
)
def test_address_errors_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Address.parse(text)
    assert "\n" not in str(caught.value)


_LIKE = rf"petalite://({ID}|[a-z2-7]{{50,54}})@[a-z0-9.:%\[\]]{{1,20}}:[0-9]{{1,6}}"
ADDRESS_LIKE = st.from_regex(_LIKE, fullmatch=True)


@given(st.text(max_size=90) | ADDRESS_LIKE)
def test_address_parse_round_trips_or_raises_value_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(address)) == address
    assert str(Address.parse(str(address))) == str(address)
