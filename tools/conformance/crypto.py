"""Identities and Noise, straight from the framework's text (revision 34) on the `cryptography` primitives (spec/01).

Written apart from any implementation under test; what a case needs to send wrongly (another payload, static key,
ephemeral, prologue, a bit) is an argument or an attribute.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import struct
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from tools.conformance.codec import Malformed, pack, unpack
from tools.conformance.constants import LIMIT

MAGIC = b"PTLT"
PURPOSE = b"petalite noise static key v1\0"
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
SMALL_ORDER = tuple(
    bytes.fromhex(text)
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
LOW_ORDER_X = tuple(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


class CryptoError(Exception):
    """A tag, signature or certificate of the other side does not fit."""


# --- identities ------------------------------------------------------------------------------------------------------


def peer_id_of(public_key: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + public_key).digest()


def peer_text(peer: bytes) -> str:
    return base64.b32encode(peer).decode().rstrip("=").lower()


def parse_peer(text: str) -> bytes:
    peer = base64.b32decode(text.upper() + "====")
    if len(text) != 52 or peer_text(peer) != text:
        raise ValueError(f"{text!r} is not a peer id")
    return peer


class Identity:
    """An Ed25519 key pair."""

    def __init__(self, seed: bytes | None = None) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(seed or os.urandom(32))
        self.public = self.key.public_key().public_bytes_raw()
        self.peer = peer_id_of(self.public)

    def certificate(self, static: bytes, network: bytes, not_after: int) -> bytes:
        """The payload of handshake messages 2 and 3."""
        signature = self.key.sign(signed_bytes(static, network, not_after))
        return pack({"k": self.public, "x": not_after, "s": signature})


def signed_bytes(static: bytes, network: bytes, not_after: int) -> bytes:
    return PURPOSE + struct.pack(">H", len(network)) + network + static + struct.pack(">Q", not_after)


def check_certificate(payload: bytes, static: bytes, network: bytes, now: float) -> bytes:
    """The Ed25519 key in a certificate, after the checks of PT-TRN-032. Raises CryptoError."""
    if len(payload) > LIMIT["MAX_CERTIFICATE"]:
        raise CryptoError(f"certificate of {len(payload)} bytes")
    try:
        fields = unpack(payload)
    except Malformed as error:
        raise CryptoError(f"certificate: {error}") from None
    key, end, signature = (fields.get(name) for name in "kxs") if type(fields) is dict else (None, None, None)
    if type(key) is not bytes or len(key) != 32 or type(end) is not int or type(signature) is not bytes:
        raise CryptoError("certificate: k, x and s are a bin of 32 bytes, an integer and a bin of 64 bytes")
    y = int.from_bytes(key, "little") & (2**255 - 1)
    if y.to_bytes(32, "little") in SMALL_ORDER or y >= P:
        raise CryptoError("certificate: a public key that is to be refused")
    if not now - 1 <= end <= now + LIMIT["CERTIFICATE_SECONDS"] + LIMIT["CLOCK_SKEW_SECONDS"]:
        raise CryptoError(f"certificate ends {end - now:.0f} s from now")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_bytes(static, network, end))
    except (InvalidSignature, ValueError):
        raise CryptoError("certificate: the signature does not fit") from None
    return key


class SwarmKey:
    """The psk and the network id of a private swarm."""

    def __init__(self, key: bytes) -> None:
        self.psk = _hkdf_info(key, b"petalite swarm psk v1", 32)
        self.network = b"private-" + peer_text(_hkdf_info(key, b"petalite swarm network id v1", 20)).encode()

    @classmethod
    def load(cls, path: Path) -> SwarmKey:
        """From a swarm key file (PT-IDN-010). Raises ValueError."""
        lines = [line.strip() for line in path.read_text().splitlines()]
        body = [line for line in lines[1:] if line and not line.startswith("#")]
        if lines[:1] != ["petalite swarm key v1"] or len(body) != 1:
            raise ValueError(f"{path}: not a swarm key file")
        return cls(bytes.fromhex(body[0]))


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()


def _hkdf_info(key: bytes, info: bytes, size: int) -> bytes:
    return _hmac(_hmac(bytes(32), key), info + b"\x01")[:size]


# --- Noise -----------------------------------------------------------------------------------------------------------


class KeyPair:
    """X25519."""

    def __init__(self, private: bytes | None = None) -> None:
        self.private = X25519PrivateKey.from_private_bytes(private or os.urandom(32))
        self.public = self.private.public_key().public_bytes_raw()

    def exchange(self, other: bytes) -> bytes:
        try:
            return self.private.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:
            raise CryptoError("a Diffie-Hellman result of zeros") from None


class LowOrder(KeyPair):
    """A public point of low order: every exchange with it gives zeros, and both sides know it."""

    def __init__(self, point: bytes) -> None:
        super().__init__()
        self.public = point

    def exchange(self, other: bytes) -> bytes:
        return bytes(32)


class Cipher:
    """A cipher state with Noise's Rekey() after each REKEY_RECORDS records."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.n = 0

    def _nonce(self, n: int) -> bytes:
        return bytes(4) + n.to_bytes(8, "little")

    def encrypt(self, plain: bytes, associated: bytes = b"") -> bytes:
        self._rekey()
        sealed = ChaCha20Poly1305(self.key).encrypt(self._nonce(self.n), plain, associated)
        self.n += 1
        return sealed

    def decrypt(self, sealed: bytes, associated: bytes = b"") -> bytes:
        self._rekey()
        try:
            plain = ChaCha20Poly1305(self.key).decrypt(self._nonce(self.n), sealed, associated)
        except (InvalidTag, ValueError):
            raise CryptoError(f"record or message {self.n} does not decrypt") from None
        self.n += 1
        return plain

    def _rekey(self) -> None:
        if self.n and self.n % LIMIT["REKEY_RECORDS"] == 0:
            self.key = ChaCha20Poly1305(self.key).encrypt(self._nonce(2**64 - 1), bytes(32), b"")[:32]


class _Keyless:
    """EncryptAndHash before the first key."""

    def encrypt(self, plain: bytes, associated: bytes) -> bytes:
        return plain

    def decrypt(self, sealed: bytes, associated: bytes) -> bytes:
        return sealed


PATTERNS = {
    1: ("Noise_XX_25519_ChaChaPoly_SHA256", (("e",), ("e", "ee", "s", "es"), ("s", "se"))),
    2: (
        "Noise_XXpsk0+psk3_25519_ChaChaPoly_SHA256",
        (("psk", "e"), ("e", "ee", "s", "es"), ("s", "se", "psk")),
    ),
}


class Noise:
    """The handshake of one side: three calls of `write` and `read` in turn, then `split`."""

    def __init__(
        self, initiator: bool, pattern: int, prologue: bytes, psk: bytes | None,
        static: KeyPair | None = None, ephemeral: KeyPair | None = None,
    ) -> None:  # fmt: skip
        name, self.messages = PATTERNS[pattern]
        self.initiator = initiator
        self.psk = psk
        self.s = static or KeyPair()
        self.e = ephemeral or KeyPair()
        self.rs = self.re = b""
        raw = name.encode()
        self.h = raw + bytes(32 - len(raw)) if len(raw) <= 32 else hashlib.sha256(raw).digest()
        self.ck = self.h
        self.cipher: Cipher | _Keyless = _Keyless()
        self.turn = 0
        self.mix_hash(prologue)

    def mix_hash(self, data: bytes) -> None:
        self.h = hashlib.sha256(self.h + data).digest()

    def mix_key(self, material: bytes) -> None:
        secret = _hmac(self.ck, material)
        self.ck = _hmac(secret, b"\x01")
        self.cipher = Cipher(_hmac(secret, self.ck + b"\x02"))

    def mix_psk(self) -> None:
        secret = _hmac(self.ck, self.psk or b"")
        self.ck = _hmac(secret, b"\x01")
        extra = _hmac(secret, self.ck + b"\x02")
        self.mix_hash(extra)
        self.cipher = Cipher(_hmac(secret, extra + b"\x03"))

    def seal(self, plain: bytes) -> bytes:
        sealed = self.cipher.encrypt(plain, self.h)
        self.mix_hash(sealed)
        return sealed

    def unseal(self, sealed: bytes) -> bytes:
        plain = self.cipher.decrypt(sealed, self.h)
        self.mix_hash(sealed)
        return plain

    def dh(self, token: str) -> None:
        ours, theirs = list(token if self.initiator else token[::-1])
        key = self.e if ours == "e" else self.s
        self.mix_key(key.exchange(self.re if theirs == "e" else self.rs))

    def write(self, payload: bytes) -> bytes:
        out = b""
        for token in self.messages[self.turn]:
            if token == "e":
                out += self.e.public
                self.mix_hash(self.e.public)
                if self.psk is not None:
                    self.mix_key(self.e.public)
            elif token == "s":
                out += self.seal(self.s.public)
            elif token == "psk":
                self.mix_psk()
            else:
                self.dh(token)
        self.turn += 1
        return out + self.seal(payload)

    def read(self, message: bytes) -> bytes:
        """The payload. Raises CryptoError."""
        for token in self.messages[self.turn]:
            if token == "e":
                self.re, message = message[:32], message[32:]
                self.mix_hash(self.re)
                if self.psk is not None:
                    self.mix_key(self.re)
            elif token == "s":
                size = 32 if isinstance(self.cipher, _Keyless) else 48
                self.rs, message = self.unseal(message[:size]), message[size:]
            elif token == "psk":
                self.mix_psk()
            else:
                self.dh(token)
        self.turn += 1
        return self.unseal(message)

    def split(self) -> tuple[Cipher, Cipher]:
        """(to send with, to receive with)."""
        secret = _hmac(self.ck, b"")
        first = _hmac(secret, b"\x01")
        second = _hmac(secret, first + b"\x02")
        ciphers = Cipher(first), Cipher(second)
        return ciphers if self.initiator else (ciphers[1], ciphers[0])


def prologue_of(preamble: bytes, network: bytes) -> bytes:
    return preamble + bytes([len(network)]) + network
