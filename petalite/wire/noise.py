"""The Noise protocol framework, revision 34, by its own names (https://noiseprotocol.org/noise.html).

`CipherState`, `SymmetricState` and `HandshakeState` are sections 5.1 to 5.3; a reviewer can hold each method against
its sentence there. Patterns are data. Only what petalite and its vectors use: 25519, ChaChaPoly, SHA256 and BLAKE2s.
`TransportCipher` adds what spec/01 says about records: no copies, and Rekey() at fixed record numbers.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from petalite.errors import GoAwayCode, HandshakeError, LocalProtocolError, RemoteProtocolError
from petalite.limits import REKEY_RECORDS

Random = Callable[[int], bytes]
Buffer = bytes | bytearray | memoryview

DHLEN = 32
HASHLEN = 32  # of both hashes
TAGLEN = 16
MAX_MESSAGE = 65_535  # section 3: every Noise message fits a 16-bit length
MAX_NONCE = 2**64 - 1  # section 5.1: reserved, so that Rekey() has a nonce of its own

# Section 7.4 and 7.5. A pattern is its pre-messages (initiator's, responder's) and its messages, initiator first.
PATTERNS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "NN": (("", ""), ("e", "e ee")),
    "NK": (("", "s"), ("e es", "e ee")),
    "KK": (("s", "s"), ("e es ss", "e ee se")),
    "IK": (("", "s"), ("e es s ss", "e ee se")),
    "XX": (("", ""), ("e", "e ee s es", "s se")),
}
HASHES = {"SHA256": "sha256", "BLAKE2s": "blake2s"}


@dataclass(frozen=True)
class Protocol:
    """A parsed protocol name (section 8): what to hash first, and the tokens of each message."""

    name: str
    hash_name: str
    pre_messages: tuple[str, str]
    messages: tuple[tuple[str, ...], ...]

    @property
    def psks(self) -> int:
        """How many psk tokens there are."""
        return sum(tokens.count("psk") for tokens in self.messages)


def parse_protocol_name(name: str) -> Protocol:
    """`Noise_XXpsk0+psk3_25519_ChaChaPoly_SHA256` and its like; ValueError for what is not offered here."""
    match = re.fullmatch(r"Noise_([A-Z]+)((?:psk[0-9](?:\+psk[0-9])*)?)_25519_ChaChaPoly_([A-Za-z0-9]+)", name)
    if match is None or match[1] not in PATTERNS or match[3] not in HASHES:
        raise ValueError(f"Noise protocol {name!r} is not offered")
    pre_messages, messages = PATTERNS[match[1]]
    tokens = [message.split() for message in messages]
    for modifier in match[2].split("+") if match[2] else ():
        place = int(modifier.removeprefix("psk"))
        if place > len(tokens):
            raise ValueError(f"{modifier} in {name!r}: the pattern has {len(tokens)} messages")
        # Section 9.4: psk0 opens the first message, pskN ends the N-th.
        if place == 0:
            tokens[0].insert(0, "psk")
        else:
            tokens[place - 1].append("psk")
    return Protocol(name, HASHES[match[3]], pre_messages, tuple(map(tuple, tokens)))


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair (section 4.1); `public` is its 32 bytes."""

    private: X25519PrivateKey = field(repr=False)
    public: bytes

    @classmethod
    def from_private(cls, private: bytes) -> KeyPair:
        key = X25519PrivateKey.from_private_bytes(private)
        return cls(key, key.public_key().public_bytes_raw())


def dh(pair: KeyPair, public: bytes) -> bytes:
    """DH of section 4.1. HandshakeError for low-order points, whose result would be known to everybody (PT-TRN-041)."""
    try:
        return pair.private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # OpenSSL refuses the all-zero result
        raise HandshakeError("low-order Diffie-Hellman key") from None


_nonce = struct.Struct("<4xQ").pack  # section 12: 32 bits of zeros, then n little-endian (PT-TRN-062)


class CipherState:
    """Section 5.1: a key and a nonce. `k` None means empty: data then passes as it is.

    Decryption that fails, or meets a used-up nonce, raises RemoteProtocolError(DECRYPT) and leaves `n` as it was.
    A used-up nonce on the sending side is a LocalProtocolError: the connection must have ended long before.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.initialize_key(key)

    def initialize_key(self, key: bytes | None) -> None:
        self.k = key
        self.n = 0
        self._aead = None if key is None else ChaCha20Poly1305(key)

    def has_key(self) -> bool:
        return self._aead is not None

    def encrypt_with_ad(self, ad: bytes, plaintext: Buffer) -> bytes:
        if self._aead is None:
            return bytes(plaintext)
        self._check_sending(len(plaintext) + TAGLEN)
        ciphertext = self._aead.encrypt(_nonce(self.n), plaintext, ad)
        self.n += 1
        return ciphertext

    def decrypt_with_ad(self, ad: bytes, ciphertext: Buffer) -> bytes:
        if self._aead is None:
            return bytes(ciphertext)
        self._check_receiving(len(ciphertext))
        try:
            plaintext = self._aead.decrypt(_nonce(self.n), ciphertext, ad)
        except InvalidTag:
            raise RemoteProtocolError("does not decrypt", GoAwayCode.DECRYPT) from None
        self.n += 1
        return plaintext

    def rekey(self) -> None:
        """Section 4.2 and 11.3: k = the first 32 bytes of ENCRYPT(k, 2^64-1, "", 32 zero bytes); n goes on counting."""
        self.k = self._keyed().encrypt(_nonce(MAX_NONCE), bytes(32), b"")[:32]
        self._aead = ChaCha20Poly1305(self.k)

    def _keyed(self) -> ChaCha20Poly1305:
        if self._aead is None:
            raise LocalProtocolError("this cipher state is empty")
        return self._aead

    def _check_sending(self, size: int) -> None:
        if self.n >= MAX_NONCE:
            raise LocalProtocolError("all nonces of this direction are used up")
        if size > MAX_MESSAGE:
            raise LocalProtocolError(f"a Noise message of {size} bytes is over {MAX_MESSAGE}")

    def _check_receiving(self, size: int) -> None:
        if self.n >= MAX_NONCE:
            raise RemoteProtocolError("all nonces of this direction are used up", GoAwayCode.DECRYPT)
        if not TAGLEN <= size <= MAX_MESSAGE:
            raise RemoteProtocolError(f"a Noise message cannot have {size} bytes", GoAwayCode.DECRYPT)


class TransportCipher(CipherState):
    """One direction after the handshake: records into buffers of the caller, Rekey() each `REKEY_RECORDS` (PT-TRN-063).

    The record with number n (from 0) is under the key that Rekey() has replaced n // REKEY_RECORDS times. n itself
    goes on, so both ends agree without a word. The prefix with the record's length is not authenticated and not ours.
    """

    def __init__(self, key: bytes, rekey_records: int = REKEY_RECORDS) -> None:
        super().__init__(key)
        self._rekey_records = rekey_records

    def encrypt_into(self, plaintext: Buffer, out: bytearray | memoryview) -> int:
        """Write the ciphertext to the start of `out`, which has room for `len(plaintext) + 16`; returns that number.

        The two must not overlap. LocalProtocolError: plaintext over 65,519 bytes, or `out` too small.
        """
        n, aead, size = self.n, self._aead, len(plaintext) + TAGLEN
        if aead is None or n >= MAX_NONCE or size > MAX_MESSAGE or len(out) < size:
            self._keyed()
            self._check_sending(size)
            raise LocalProtocolError(f"a record of {size} bytes does not fit a buffer of {len(out)}")
        aead.encrypt_into(_nonce(n), plaintext, None, out if len(out) == size else memoryview(out)[:size])
        self.n = n + 1
        if self.n % self._rekey_records == 0:
            self.rekey()
        return size

    def decrypt_into(self, ciphertext: Buffer, out: bytearray | memoryview) -> int:
        """Write the plaintext to the start of `out`, which has room for `len(ciphertext) - 16`; returns that number.

        A trap of the primitive: it fills the buffer before it has judged the tag. So after a failure the part of
        `out` that was written is wiped here, and nobody else may look at `out` until this returns.

        Raises:
            RemoteProtocolError(DECRYPT): tag or length is wrong. `n` has not moved; close (PT-TRN-064).
            LocalProtocolError: `out` is too small.
        """
        n, aead, size = self.n, self._aead, len(ciphertext) - TAGLEN
        if aead is None or n >= MAX_NONCE or not 0 <= size <= MAX_MESSAGE - TAGLEN or len(out) < size:
            self._keyed()
            self._check_receiving(size + TAGLEN)
            raise LocalProtocolError(f"a plaintext of {size} bytes does not fit a buffer of {len(out)}")
        target = out if len(out) == size else memoryview(out)[:size]
        try:
            aead.decrypt_into(_nonce(n), ciphertext, None, target)
        except InvalidTag:
            target[:] = bytes(size)
            raise RemoteProtocolError("does not decrypt", GoAwayCode.DECRYPT) from None
        self.n = n + 1
        if self.n % self._rekey_records == 0:
            self.rekey()
        return size


class SymmetricState:
    """Section 5.2: the chaining key `ck`, the transcript hash `h`, and a cipher state."""

    def __init__(self, protocol: Protocol) -> None:
        self._hash_name = protocol.hash_name
        name = protocol.name.encode()
        self.h = name.ljust(HASHLEN, b"\0") if len(name) <= HASHLEN else self._hash(name)
        self.ck = self.h
        self.cipher = CipherState()

    def mix_key(self, input_key_material: bytes) -> None:
        self.ck, temp_k = self._hkdf(input_key_material, 2)
        self.cipher.initialize_key(temp_k)

    def mix_hash(self, data: bytes) -> None:
        self.h = self._hash(self.h + data)

    def mix_key_and_hash(self, input_key_material: bytes) -> None:
        self.ck, temp_h, temp_k = self._hkdf(input_key_material, 3)
        self.mix_hash(temp_h)
        self.cipher.initialize_key(temp_k)

    def encrypt_and_hash(self, plaintext: Buffer) -> bytes:
        ciphertext = self.cipher.encrypt_with_ad(self.h, plaintext)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        plaintext = self.cipher.decrypt_with_ad(self.h, ciphertext)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[TransportCipher, TransportCipher]:
        """The initiator's sending cipher and the responder's, in this order on both sides."""
        temp_k1, temp_k2 = self._hkdf(b"", 2)
        return TransportCipher(temp_k1), TransportCipher(temp_k2)

    def copy(self) -> SymmetricState:
        twin = copy.copy(self)
        twin.cipher = copy.copy(self.cipher)
        return twin

    def _hash(self, data: bytes) -> bytes:
        return hashlib.new(self._hash_name, data).digest()

    def _hkdf(self, input_key_material: bytes, outputs: int) -> list[bytes]:
        """HKDF of section 4.3: `outputs` (2 or 3) blocks chained from `ck`."""
        temp_key = hmac.digest(self.ck, input_key_material, self._hash_name)
        blocks = [b""]
        for number in range(1, outputs + 1):
            blocks.append(hmac.digest(temp_key, blocks[-1] + bytes([number]), self._hash_name))
        return blocks[1:]


_Checkpoint = tuple[KeyPair | None, bytes | None, bytes | None, tuple[bytes, ...], SymmetricState]

# For each DH token: which of our keys and which of theirs, seen by the initiator; the responder swaps the two.
_DH_TOKENS = {"ee": ("e", "e"), "es": ("e", "s"), "se": ("s", "e"), "ss": ("s", "s")}


class HandshakeState:
    """Section 5.3. Call `write_message` and `read_message` in turns; when `complete`, take `split()` once.

    Args:
        protocol_name: for instance `Noise_XX_25519_ChaChaPoly_SHA256`.
        initiator: whether the first message is ours.
        prologue: bytes both sides must agree on.
        s, rs: our static key pair and the peer's static public key, where the pattern needs them beforehand.
        psks: one 32-byte key for each psk token, in the order of the messages.
        random: gives the 32 private bytes of `e` when its token comes.

    A message that fails, ours or theirs, leaves no trace: every value is as it was before the call.
    ValueError: the protocol is unknown, or a key that it needs is missing.
    """

    def __init__(
        self,
        protocol_name: str,
        *,
        initiator: bool,
        prologue: bytes,
        random: Random,
        s: KeyPair | None = None,
        rs: bytes | None = None,
        psks: Sequence[bytes] = (),
    ) -> None:
        self.protocol = parse_protocol_name(protocol_name)
        self.initiator = initiator
        self.s, self.rs = s, rs
        self.e: KeyPair | None = None
        self.re: bytes | None = None
        self._random = random
        self._psks = tuple(psks)
        self._next = 0  # index of the message that comes next
        if [len(psk) for psk in self._psks] != [32] * self.protocol.psks:
            raise ValueError(f"{protocol_name} needs {self.protocol.psks} pre-shared keys of 32 bytes")
        self.symmetric = SymmetricState(self.protocol)
        self.symmetric.mix_hash(prologue)
        for by_initiator, pre_message in zip((True, False), self.protocol.pre_messages, strict=True):
            if pre_message == "s":
                self.symmetric.mix_hash(self._own("s").public if by_initiator is initiator else self._their("s"))
        ours = self.protocol.messages[0 if initiator else 1 :: 2]
        if any("s" in tokens for tokens in ours):
            self._own("s")

    @property
    def complete(self) -> bool:
        return self._next == len(self.protocol.messages)

    @property
    def h(self) -> bytes:
        """The transcript hash so far; the channel binding of section 11.2 once `complete`."""
        return self.symmetric.h

    def write_message(self, payload: bytes = b"") -> bytes:
        """The next message of the pattern, with `payload` in it.

        LocalProtocolError: not our turn, or over 65,535 bytes. HandshakeError: the peer's key is of low order.
        """
        tokens = self._tokens(ours=True)
        saved = self._checkpoint()
        try:
            message = b"".join([self._write_token(token) for token in tokens])
            message += self.symmetric.encrypt_and_hash(payload)
            if len(message) > MAX_MESSAGE:
                raise LocalProtocolError(f"a Noise message of {len(message)} bytes is over {MAX_MESSAGE}")
        except (LocalProtocolError, HandshakeError):
            self._restore(saved)
            raise
        self._next += 1
        return message

    def read_message(self, message: bytes) -> bytes:
        """The payload of the peer's next message.

        LocalProtocolError: not their turn. HandshakeError: wrong length, does not decrypt, or a key of low order.
        """
        tokens = self._tokens(ours=False)
        saved = self._checkpoint()
        try:
            if len(message) > MAX_MESSAGE:
                raise HandshakeError(f"a Noise message cannot have {len(message)} bytes")
            rest = message
            for token in tokens:
                rest = self._read_token(token, rest)
            payload = self.symmetric.decrypt_and_hash(rest)
        except RemoteProtocolError as error:
            self._restore(saved)
            raise HandshakeError(f"handshake message {self._next + 1} {error}") from None
        except HandshakeError:
            self._restore(saved)
            raise
        self._next += 1
        return payload

    def split(self) -> tuple[TransportCipher, TransportCipher]:
        """(initiator's sending cipher, responder's), after which every secret of the handshake is dropped here."""
        if not self.complete or not self.symmetric.ck:
            raise LocalProtocolError("the handshake is not complete, or has been split")
        ciphers = self.symmetric.split()
        # Python cannot wipe memory; without references the keys at least do not outlive the handshake by design.
        self.e = self.s = None
        self._psks = ()
        self.symmetric.ck = b""
        self.symmetric.cipher.initialize_key(None)
        return ciphers

    def _tokens(self, ours: bool) -> tuple[str, ...]:
        turn_is_ours = (self._next % 2 == 0) is self.initiator
        if self.complete or turn_is_ours is not ours:
            raise LocalProtocolError("it is not this side's turn in the handshake")
        return self.protocol.messages[self._next]

    def _write_token(self, token: str) -> bytes:
        if token == "e":
            self.e = KeyPair.from_private(self._random(DHLEN))
            self._mix_ephemeral(self.e.public)
            return self.e.public
        if token == "s":
            return self.symmetric.encrypt_and_hash(self._own("s").public)
        self._mix_token(token)
        return b""

    def _read_token(self, token: str, message: bytes) -> bytes:
        """Take what `token` takes from `message`; returns the rest."""
        if token == "e":
            self.re, message = _take(message, DHLEN)
            self._mix_ephemeral(self.re)
        elif token == "s":
            part, message = _take(message, DHLEN + TAGLEN if self.symmetric.cipher.has_key() else DHLEN)
            self.rs = self.symmetric.decrypt_and_hash(part)
        else:
            self._mix_token(token)
        return message

    def _mix_ephemeral(self, public: bytes) -> None:
        self.symmetric.mix_hash(public)
        if self.protocol.psks:  # section 9.2: or two sessions under one psk could share a key
            self.symmetric.mix_key(public)

    def _mix_token(self, token: str) -> None:
        if token == "psk":
            psk, *rest = self._psks
            self._psks = tuple(rest)
            self.symmetric.mix_key_and_hash(psk)
            return
        mine, theirs = _DH_TOKENS[token] if self.initiator else reversed(_DH_TOKENS[token])
        self.symmetric.mix_key(dh(self._own(mine), self._their(theirs)))

    def _own(self, key: str) -> KeyPair:
        pair = self.e if key == "e" else self.s
        if pair is None:
            raise ValueError(f"{self.protocol.name} needs our key {key!r}")
        return pair

    def _their(self, key: str) -> bytes:
        public = self.re if key == "e" else self.rs
        if public is None or len(public) != DHLEN:
            raise ValueError(f"{self.protocol.name} needs the peer's key {key!r}, of {DHLEN} bytes")
        return public

    def _checkpoint(self) -> _Checkpoint:
        return self.e, self.re, self.rs, self._psks, self.symmetric.copy()

    def _restore(self, saved: _Checkpoint) -> None:
        self.e, self.re, self.rs, self._psks, self.symmetric = saved


def _take(message: bytes, size: int) -> tuple[bytes, bytes]:
    if len(message) < size:
        raise HandshakeError("handshake message is too short")
    return message[:size], message[size:]
