"""Who a peer is, where it is, and the key of a private swarm (spec/01, chapters "Identity" and "Private swarms").

A peer is its Ed25519 key; its name is a hash of that key, so nobody hands out names and nobody can take one.
Everything here is a value or pure, apart from `load` and `save` of the two key files.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from petalite import limits
from petalite.errors import PetaliteError

Random = Callable[[int], bytes]
"""Gives that many unpredictable bytes: `os.urandom`, or a fixed stream in tests and vectors."""

KEY_BYTES = 32
SIGNATURE_BYTES = 64
PEER_ID_TEXT = 52  # base32 of 32 bytes, without padding; hex would not fit the 63 bytes of a DNS label


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


class PeerId(bytes):
    """32 bytes, `SHA-256(0x01 || Ed25519 public key)`; also the peer's DHT node id (PT-IDN-004).

    Raises:
        ValueError: not 32 bytes.
    """

    __slots__ = ()

    def __new__(cls, value: bytes) -> Self:
        if len(value) != KEY_BYTES:
            raise ValueError(f"a peer id has {KEY_BYTES} bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form: 52 characters of lower-case base32 (PT-IDN-005). ValueError: one line, what is wrong."""
        if len(text) != PEER_ID_TEXT:
            raise ValueError(f"a peer id has {PEER_ID_TEXT} characters, not {len(text)}")
        if not re.fullmatch("[a-z2-7]*", text):
            raise ValueError("a peer id has only the characters a-z and 2-7")
        value = cls(base64.b32decode(text.upper() + "===="))
        if value.text != text:  # 52 characters carry 260 bits; the last 4 must be zero, or one id had 16 spellings
            raise ValueError("the last character of this peer id is impossible: a typing error?")
        return value

    @property
    def text(self) -> str:
        """52 characters, for addresses and people."""
        return _base32(self)

    @property
    def short(self) -> str:
        """The first 8 characters of the text, for logs and tables; never for a decision."""
        return self.text[:8]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"PeerId({self.text!r})"


def peer_id_of(public_key: bytes) -> PeerId:
    """The name of an Ed25519 public key (32 bytes). The key itself is not checked: see `check_public_key`."""
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(hashlib.sha256(b"\x01" + public_key).digest())


# --- Ed25519 ---------------------------------------------------------------------------------------------------------

_P = 2**255 - 19
_SIGN_BIT = 1 << 255

# The y coordinates of the eight points whose order divides 8 (both signs of x share one y), and p, p + 1, which
# are 0 and 1 spelled non-canonically. With such a key OpenSSL accepts one signature for every message.
SMALL_ORDER_Y = frozenset(
    int.from_bytes(bytes.fromhex(text), "little")
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


def check_public_key(public_key: bytes) -> None:
    """Refuse Ed25519 public keys that name no honest peer: wrong length, small order, y not below p (PT-IDN-006, 007).

    Raises:
        ValueError: one line saying which.
    """
    if len(public_key) != KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(public_key)}")
    y = int.from_bytes(public_key, "little") & ~_SIGN_BIT
    if y in SMALL_ORDER_Y:
        raise ValueError("Ed25519 public key of small order")
    if y >= _P:
        raise ValueError("Ed25519 public key in non-canonical form")


def verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` (64 bytes) over `message` is by `public_key`; False for keys that are refused."""
    try:
        check_public_key(public_key)
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


class Identity:
    """An Ed25519 key pair: a peer that can prove its name."""

    __slots__ = ("_private", "_seed", "peer_id", "public_key")

    public_key: bytes
    peer_id: PeerId

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise ValueError(f"an identity seed has {KEY_BYTES} bytes, not {len(seed)}")
        self._seed = bytes(seed)
        self._private = Ed25519PrivateKey.from_private_bytes(self._seed)
        self.public_key = self._private.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls, random: Random = os.urandom) -> Self:
        """A new identity from 32 bytes of `random`."""
        return cls(random(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The identity of an Ed25519 seed (RFC 8032, the 32-byte private key)."""
        return cls(seed)

    def sign(self, message: bytes) -> bytes:
        """64 bytes. Callers begin `message` with a text that names its purpose, so no signature serves two."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id.text!r})"  # never the seed

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new file that only its owner can read; PetaliteError if it exists or cannot be written."""
        _write_key(path, _IDENTITY_HEADER, self._seed, f"peer id {self.peer_id.text}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote; PetaliteError, in one line, for anything else."""
        return cls(_read_key(path, _IDENTITY_HEADER))


# --- private swarms --------------------------------------------------------------------------------------------------


class SwarmKey:
    """The 32 random bytes that every member of a private swarm holds, and what is derived from them (PT-IDN-020..023).

    `psk` (32 bytes) goes into the handshake, `network_id` names the swarm in prologues and signatures, `lan_tag`
    (16 characters) is all that a LAN announcement shows. None gives away the key or another of the three.
    """

    __slots__ = ("_key", "lan_tag", "network_id", "psk")

    psk: bytes
    network_id: str
    lan_tag: str

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a swarm key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = bytes(key)
        self.psk = self._derive(b"petalite swarm psk v1", 32)
        self.network_id = "private-" + _base32(self._derive(b"petalite swarm network id v1", 20))
        self.lan_tag = _base32(self._derive(b"petalite swarm lan tag v1", 10))

    def _derive(self, info: bytes, length: int) -> bytes:
        return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(self._key)

    @classmethod
    def generate(cls, random: Random = os.urandom) -> Self:
        """A new key. It is random on purpose: a passphrase could be guessed at leisure from one recorded handshake."""
        return cls(random(KEY_BYTES))

    def __repr__(self) -> str:
        return f"SwarmKey(lan_tag={self.lan_tag!r})"  # never the key

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a new file that only its owner can read; PetaliteError if it exists or cannot be written."""
        _write_key(path, _SWARM_HEADER, self._key, "share this file with the members of the swarm and with nobody else")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote; PetaliteError, in one line, for anything else."""
        return cls(_read_key(path, _SWARM_HEADER))


# --- key files -------------------------------------------------------------------------------------------------------

_IDENTITY_HEADER = "petalite identity v1"
_SWARM_HEADER = "petalite swarm key v1"
_HEADERS = {_IDENTITY_HEADER: "an identity", _SWARM_HEADER: "a swarm key"}


def _write_key(path: str | os.PathLike[str], header: str, secret: bytes, remark: str) -> None:
    # PT-IDN-011, PT-IDN-012
    text = f"{header}\n# {remark}\n{secret.hex()}\n"
    try:
        # O_EXCL: an identity or a swarm that is overwritten is lost for ever; the mode holds from the first byte on
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise PetaliteError(f"{os.fspath(path)}: exists already, not overwritten") from None
    except OSError as error:
        raise PetaliteError(f"{os.fspath(path)}: {error.strerror}") from error
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _read_key(path: str | os.PathLike[str], header: str) -> bytes:
    # PT-IDN-010
    wanted = _HEADERS[header]
    try:
        with Path(path).open("rb") as file:
            data = file.read(limits.MAX_KEY_FILE + 1)
    except OSError as error:
        raise PetaliteError(f"{os.fspath(path)}: {error.strerror}") from error
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    if len(data) > limits.MAX_KEY_FILE or not lines or lines[0] not in _HEADERS:
        raise PetaliteError(f"{os.fspath(path)}: not {wanted} file (its first line would be '{header}')")
    if lines[0] != header:
        raise PetaliteError(f"{os.fspath(path)}: holds {_HEADERS[lines[0]]}, not {wanted}")
    body = [line for line in lines[1:] if line and not line.startswith("#")]
    if len(body) != 1 or not re.fullmatch("[0-9a-f]{64}", body[0]):
        raise PetaliteError(f"{os.fspath(path)}: damaged: expected one line of 64 hexadecimal digits after the header")
    return bytes.fromhex(body[0])


# --- addresses -------------------------------------------------------------------------------------------------------

_SCHEME = "petalite://"
_LABEL = re.compile("[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_SCOPE = re.compile("[A-Za-z0-9_.-]{1,32}")


@dataclass(frozen=True, slots=True)
class Address:
    """Whom to expect and where to dial: `petalite://PEER_ID@HOST:PORT` (PT-IDN-030).

    `host` is an IPv4 or IPv6 address (without brackets, perhaps with a scope: `fe80::1%eth0`) or a DNS name, in
    canonical spelling; `port` is 1..65535. ValueError, in one line, for anything else.
    """

    peer: PeerId
    host: str
    port: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", _canonical_host(self.host))
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"port {self.port} is not in 1..65535")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `petalite://PEER_ID@HOST:PORT`; ValueError says in one line which part is wrong."""
        if len(text) > limits.MAX_ADDRESS:
            raise ValueError(f"an address has at most {limits.MAX_ADDRESS} characters")
        if not text.startswith(_SCHEME):
            raise ValueError(f"an address looks like petalite://PEER_ID@HOST:PORT, not {text!r}")
        peer, at, place = text.removeprefix(_SCHEME).partition("@")
        if not at:
            raise ValueError(f"no '@' between peer id and host in {text!r}")
        host, colon, port = place.rpartition(":")
        if not colon or port.endswith("]"):
            raise ValueError(f"no port in {text!r}")
        if not re.fullmatch("[0-9]{1,5}", port):
            raise ValueError(f"the port in {text!r} is not a number in 1..65535")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if ":" not in host:
                raise ValueError(f"brackets in {text!r} are for IPv6 addresses")
        elif ":" in host:
            raise ValueError(f"an IPv6 address needs brackets: petalite://PEER_ID@[{host}]:{port}")
        return cls(PeerId.parse(peer), host, int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{_SCHEME}{self.peer.text}@{host}:{self.port}"


def _canonical_host(host: str) -> str:
    if ":" in host:
        plain, percent, scope = host.partition("%")
        if percent and not _SCOPE.fullmatch(scope):
            raise ValueError(f"{host!r} has an impossible scope")
        try:
            return str(ipaddress.IPv6Address(plain)) + percent + scope
        except ValueError:
            raise ValueError(f"{host!r} is not an IPv6 address") from None
    name = host.lower()
    labels = name.removesuffix(".").split(".")
    if labels[-1].isdecimal():  # no top-level domain is a number: 1.2.3 and 256.0.0.1 are mistakes, not names
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError(f"{host!r} is not an IPv4 address") from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{host!r} is not a host name or an IP address")
    return name
