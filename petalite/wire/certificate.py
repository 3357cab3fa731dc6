"""The identity certificate: which peer a Noise static key speaks for, until when, in which network (spec/01).

It is the payload of handshake messages 2 and 3: msgpack `{"k": Ed25519 key, "x": not after, "s": signature}`.
"""

from __future__ import annotations

from dataclasses import dataclass

from petalite.errors import HandshakeError, HandshakeFault, RemoteProtocolError
from petalite.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, PeerId, check_public_key, peer_id_of
from petalite.identity import verify as verify_signature
from petalite.limits import CERTIFICATE_SECONDS, CLOCK_SKEW_SECONDS, MAX_CERTIFICATE
from petalite.wire import packing

_PURPOSE = b"petalite noise static key v1\0"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that has passed `verify`."""

    public_key: bytes
    """Ed25519, 32 bytes."""
    not_after: int
    """Unix seconds; still valid in that second."""

    @property
    def peer(self) -> PeerId:
        return peer_id_of(self.public_key)


def issue(identity: Identity, static_public: bytes, network: bytes, not_after: int) -> bytes:
    """The payload binding `static_public` (X25519, 32 bytes) to `identity` until `not_after` (unix s) (PT-TRN-030)."""
    signature = identity.sign(_signed(static_public, network, not_after))
    return packing.encode({"k": identity.public_key, "x": not_after, "s": signature})


def verify(
    payload: bytes, static_public: bytes, network: bytes, now: int, expected: PeerId | None = None
) -> Certificate:
    """The certificate in a handshake payload, after every check of PT-TRN-032, in that order.

    Args:
        static_public: the static key that the handshake has just proven (32 bytes).
        network: network id in UTF-8.
        now: unix seconds of our clock.
        expected: the peer id that was dialled, None for whoever comes.

    Raises:
        HandshakeError: the first check that fails, in one line.
    """
    public_key, not_after, signature = _fields(payload)
    try:
        check_public_key(public_key)
    except ValueError as error:
        raise HandshakeError(f"identity certificate: {error}") from None
    _check_times(not_after, now)
    if not verify_signature(public_key, signature, _signed(static_public, network, not_after)):
        raise HandshakeError("identity certificate: the signature does not fit")
    certificate = Certificate(public_key, not_after)
    if expected is not None and certificate.peer != expected:
        text = f"peer id mismatch: dialled {expected.text}, reached {certificate.peer.text}"
        raise HandshakeError(text, HandshakeFault.WRONG_PEER)
    return certificate


def _signed(static_public: bytes, network: bytes, not_after: int) -> bytes:
    parts = (_PURPOSE, len(network).to_bytes(2, "big"), network, static_public, not_after.to_bytes(8, "big"))
    return b"".join(parts)


def _fields(payload: bytes) -> tuple[bytes, int, bytes]:
    """k, x, s of the right types and lengths; nothing about their meaning."""
    try:
        fields = packing.decode(payload, max_size=MAX_CERTIFICATE)
    except RemoteProtocolError as error:
        raise HandshakeError(f"identity certificate: {error}") from None
    if type(fields) is not dict:
        raise HandshakeError("identity certificate: not a map")
    for name in fields:
        if name.startswith("!"):
            raise HandshakeError(f"identity certificate: unknown critical field {name!r}")  # PT-TRN-033
    public_key, not_after, signature = fields.get("k"), fields.get("x"), fields.get("s")
    if type(public_key) is not bytes or len(public_key) != KEY_BYTES:
        raise HandshakeError(f"identity certificate: 'k' is not {KEY_BYTES} bytes")
    if type(not_after) is not int or not 0 <= not_after < 2**64:
        raise HandshakeError("identity certificate: 'x' is not a time")
    if type(signature) is not bytes or len(signature) != SIGNATURE_BYTES:
        raise HandshakeError(f"identity certificate: 's' is not {SIGNATURE_BYTES} bytes")
    return public_key, not_after, signature


def _check_times(not_after: int, now: int) -> None:
    if not_after < now:
        late = now - not_after
        text = f"identity certificate expired {late} s ago by our clock: is one of the two clocks wrong?"
        raise HandshakeError(text, HandshakeFault.CLOCK)
    if not_after > now + CERTIFICATE_SECONDS + CLOCK_SKEW_SECONDS:
        early = not_after - now
        text = f"identity certificate ends {early} s ahead of our clock: is one of the two clocks wrong?"
        raise HandshakeError(text, HandshakeFault.CLOCK)
