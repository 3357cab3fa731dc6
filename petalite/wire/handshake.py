"""From the first byte to two cipher states and a proven peer id, without I/O (spec/01).

The initiator sends a 6-byte preamble and message 1, the responder message 2, the initiator message 3. Each message is
preceded by its length, u16 big endian. Messages 2 and 3 carry the identity certificate; nothing else is ever carried.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from petalite.errors import HandshakeError, HandshakeFault, LocalProtocolError
from petalite.identity import Identity, PeerId, Random, SwarmKey
from petalite.limits import CERTIFICATE_ISSUE_SECONDS, MAX_HANDSHAKE_MESSAGE, MAX_NETWORK_ID
from petalite.wire import certificate
from petalite.wire.noise import DHLEN, TAGLEN, HandshakeState, KeyPair, TransportCipher

MAGIC = b"PTLT"
MAJOR = 1
PATTERN_XX = 1
PATTERN_XX_PSK = 2
REFUSAL = 0xFF  # in the place of the pattern: the responder's whole answer to a major version it does not speak
PREAMBLE_BYTES = 6
PROTOCOL_XX = "Noise_XX_25519_ChaChaPoly_SHA256"
PROTOCOL_XX_PSK = "Noise_XXpsk0+psk3_25519_ChaChaPoly_SHA256"


class Role(Enum):
    """Who dialled and who accepted; fixed for the life of the connection."""

    INITIATOR = "initiator"
    RESPONDER = "responder"


@dataclass(frozen=True, slots=True)
class Established:
    """What a handshake leaves behind."""

    peer: PeerId
    public_key: bytes
    """The peer's Ed25519 key, 32 bytes."""
    encrypt: TransportCipher
    decrypt: TransportCipher
    trailing: bytes
    """Bytes that came after the handshake's last one: the beginning of the peer's records."""


def network_bytes(network: str) -> bytes:
    """The UTF-8 of a network id; LocalProtocolError unless it has 1..64 bytes (PT-TRN-014)."""
    try:
        data = network.encode()
    except UnicodeEncodeError:
        raise LocalProtocolError("a network id is Unicode text") from None
    if not 1 <= len(data) <= MAX_NETWORK_ID:
        raise LocalProtocolError(f"a network id has 1 to {MAX_NETWORK_ID} bytes, not {len(data)}")
    return data


def prologue(preamble: bytes, network: bytes) -> bytes:
    """What both sides must agree on beforehand: preamble (6 bytes) || u8 length || network id (PT-TRN-013)."""
    return preamble + bytes([len(network)]) + network


class Handshake:
    """One side of one handshake.

    Loop: send `data_to_send()`, give what arrives to `receive_data`, until `result` is set. An empty `receive_data`
    means that the peer closed. After HandshakeError: send what `data_to_send()` still offers (nothing, or a version
    refusal), close, and say nothing else. The caller keeps the deadline of 10 s over the whole (PT-TRN-022).

    Args:
        role: which side this is.
        identity: what the certificate is signed with.
        network: network id, 1..64 bytes of UTF-8; for a private swarm normally `swarm_key.network_id`.
        swarm_key: None for a public network. It decides the pattern; there is no falling back.
        expected: the peer id that was dialled; None takes whoever proves an identity.
        now: unix seconds.
        random: called twice for 32 bytes, first for the static, then for the ephemeral private key.
    """

    def __init__(
        self,
        role: Role,
        identity: Identity,
        network: str,
        swarm_key: SwarmKey | None = None,
        expected: PeerId | None = None,
        *,
        now: int,
        random: Random = os.urandom,
    ) -> None:
        self.role = role
        self.result: Established | None = None
        self._identity = identity
        self._network = network_bytes(network)
        self._expected = expected
        self._now = now
        self._private = swarm_key is not None
        self._preamble = MAGIC + bytes([MAJOR, PATTERN_XX_PSK if self._private else PATTERN_XX])
        self._failure: HandshakeError | None = None
        self._input = bytearray()
        self._output = bytearray()
        static = KeyPair.from_private(random(DHLEN))
        self._static_public = static.public  # the private half lives in the noise state, which forgets it
        self._noise = HandshakeState(
            PROTOCOL_XX_PSK if self._private else PROTOCOL_XX,
            initiator=role is Role.INITIATOR,
            prologue=prologue(self._preamble, self._network),
            random=random,
            s=static,
            psks=[swarm_key.psk, swarm_key.psk] if swarm_key is not None else [],
        )
        # Each step takes its part of the input and names the step after it, or returns False: not enough yet.
        self._step: Callable[[], bool] = self._read_preamble
        if role is Role.INITIATOR:
            self._output += self._preamble
            self._write(b"")
            self._step = self._read_message_2

    def data_to_send(self) -> bytes:
        """The bytes that are due; empty when there are none. Each is returned once."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes from the peer, in pieces of any size; empty means that it closed the connection.

        Raises:
            HandshakeError: in one local line; it stays failed. Send `data_to_send()`, then close.
            LocalProtocolError: called after `result` was set; these bytes belong to the record layer.
        """
        if self._failure is not None:
            raise HandshakeError(str(self._failure), self._failure.fault)
        if self.result is not None:
            raise LocalProtocolError("the handshake is over; its bytes go to the record layer")
        try:
            if not data:
                raise self._closed()
            self._input += data
            while self.result is None and self._step():
                pass
        except HandshakeError as error:
            self._fail(error)
            raise

    def _fail(self, error: HandshakeError) -> None:
        self._failure = error
        self._input.clear()
        # Only a refusal may still go out (PT-TRN-040): a message 2 that was due when the next bytes turned out wrong
        # may not.
        if self._output != self._refusal():
            self._output.clear()

    def _refusal(self) -> bytes:
        return MAGIC + bytes([MAJOR, REFUSAL])

    def _closed(self) -> HandshakeError:
        if self.role is Role.INITIATOR:
            return _other_network("the peer closed the connection without an answer")
        return HandshakeError("the peer closed the connection during the handshake")

    # --- steps ---

    def _read_preamble(self) -> bool:
        if len(self._input) < PREAMBLE_BYTES:
            return False
        preamble = bytes(self._input[:PREAMBLE_BYTES])
        del self._input[:PREAMBLE_BYTES]
        if not preamble.startswith(MAGIC):
            raise _not_petalite("it does not begin with the preamble")  # PT-TRN-011
        major, pattern = preamble[4], preamble[5]
        if major != MAJOR:
            # PT-TRN-012; but a private swarm does not answer those who hold no key, not even this (PT-TRN-015).
            if not self._private:
                self._output += self._refusal()
            raise _version_refused(f"the peer speaks protocol version {major}, we speak {MAJOR}")
        if preamble != self._preamble:  # PT-TRN-016
            raise _other_network(f"the peer asks for pattern {pattern}, ours is {self._preamble[5]}")
        self._step = self._read_message_1
        return True

    def _read_message_1(self) -> bool:
        # The length is exact: a longer message 1 would hold a payload, which would be replayable (PT-TRN-024).
        size = DHLEN + TAGLEN if self._private else DHLEN
        message = self._take_message(size, size)
        if message is None:
            return False
        self._read(message)
        self._write(self._issue())
        self._step = self._read_message_3
        return True

    def _read_message_2(self) -> bool:
        # No message can begin like a refusal (PT-TRN-017): "PT" as a length is far over the cap.
        if self._input[:2] == MAGIC[:2]:
            return self._read_refusal()
        message = self._take_message(DHLEN + DHLEN + TAGLEN + TAGLEN, MAX_HANDSHAKE_MESSAGE)
        if message is None:
            return False
        payload = self._read(message)
        peer = self._check(payload)
        self._write(self._issue())
        self._establish(peer)
        return True

    def _read_message_3(self) -> bool:
        message = self._take_message(DHLEN + TAGLEN + TAGLEN, MAX_HANDSHAKE_MESSAGE)
        if message is None:
            return False
        self._establish(self._check(self._read(message)))
        return True

    def _read_refusal(self) -> bool:
        if len(self._input) < PREAMBLE_BYTES:
            return False
        if not self._input.startswith(MAGIC) or self._input[5] != REFUSAL:
            raise _not_petalite("its answer is no handshake message")
        raise _version_refused(f"we speak protocol version {MAJOR}, the peer up to {self._input[4]}")

    # --- parts of steps ---

    def _take_message(self, low: int, high: int) -> bytes | None:
        """The next message, None until all is here; a length not in low..high is refused on sight (PT-TRN-021)."""
        if len(self._input) < 2:
            return None
        size = int.from_bytes(self._input[:2], "big")
        if not low <= size <= high:
            raise _not_petalite(f"handshake message of {size} bytes where {low} to {high} are possible")
        if len(self._input) < 2 + size:
            return None
        message = bytes(self._input[2 : 2 + size])
        del self._input[: 2 + size]
        return message

    def _read(self, message: bytes) -> bytes:
        try:
            return self._noise.read_message(message)
        except HandshakeError as error:
            raise _other_network(str(error)) from None

    def _write(self, payload: bytes) -> None:
        message = self._noise.write_message(payload)
        self._output += len(message).to_bytes(2, "big") + message

    def _issue(self) -> bytes:
        not_after = self._now + CERTIFICATE_ISSUE_SECONDS
        return certificate.issue(self._identity, self._static_public, self._network, not_after)

    def _check(self, payload: bytes) -> certificate.Certificate:
        static = self._noise.rs
        if static is None:  # the pattern's s token has set it
            raise LocalProtocolError("no static key to check a certificate against")
        return certificate.verify(payload, static, self._network, self._now, self._expected)

    def _establish(self, peer: certificate.Certificate) -> None:
        first, second = self._noise.split()
        encrypt, decrypt = (first, second) if self.role is Role.INITIATOR else (second, first)
        self.result = Established(peer.peer, peer.public_key, encrypt, decrypt, bytes(self._input))
        self._input.clear()


# --- what a failure is called ---


# One verdict for everything that a wrong prologue or a wrong key can look like: telling them apart is impossible here,
# and saying it to the peer would be an oracle (PT-TRN-042).
def _other_network(text: str) -> HandshakeError:
    return HandshakeError(f"handshake failed: other network or other key ({text})", HandshakeFault.OTHER_NETWORK)


def _version_refused(text: str) -> HandshakeError:
    return HandshakeError(f"version refused: {text}", HandshakeFault.VERSION)


def _not_petalite(text: str) -> HandshakeError:
    return HandshakeError(f"not a petalite peer: {text}", HandshakeFault.NOT_PETALITE)
