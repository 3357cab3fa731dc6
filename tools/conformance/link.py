"""One TCP connection by blocking sockets: raw bytes, records, frames, each of which may be sent wrongly."""

from __future__ import annotations

import base64
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

from tools.conformance.codec import Malformed, pack, unpack
from tools.conformance.constants import FRAME_NAMES, GOAWAY, GOAWAY_NAMES, LIMIT
from tools.conformance.crypto import (
    MAGIC,
    Cipher,
    CryptoError,
    Identity,
    KeyPair,
    Noise,
    SwarmKey,
    check_certificate,
    peer_id_of,
    peer_text,
    prologue_of,
)  # fmt: skip
from tools.conformance.verdicts import Closed, Failed, Hung

MAJOR = 1
WAIT = 5.0  # seconds for whatever should come at once: generous, since slow machines conform too
_KEPT = 400  # entries of a transcript, and bytes of each
_KEPT_BYTES = 240


@dataclass
class Transcript:
    """What went over the connections of one case."""

    started: float = field(default_factory=time.monotonic)
    entries: list[dict[str, Any]] = field(default_factory=list)
    dropped: int = 0

    def add(self, way: str, kind: str, data: bytes) -> None:
        if len(self.entries) >= _KEPT:
            del self.entries[_KEPT // 2]
            self.dropped += 1
        self.entries.append(
            {
                "ms": round(1000 * (time.monotonic() - self.started), 1), "way": way, "kind": kind, "size": len(data),
                "data": base64.b64encode(data[:_KEPT_BYTES]).decode(),
            }
        )  # fmt: skip


class Link:
    """A connected socket. `received` of the last frames and the ciphers are open to the cases."""

    def __init__(self, sock: socket.socket, transcript: Transcript | None = None) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.transcript = transcript or Transcript()
        self.buffer = b""
        self.send_cipher: Cipher | None = None
        self.recv_cipher: Cipher | None = None
        self.ended: str = ""

    # raw bytes

    def send_raw(self, data: bytes) -> None:
        """Send, even if the other side has gone already: what it does next is what the case looks at."""
        self.transcript.add(">", "raw", data)
        self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            self.sock.settimeout(30.0)
            self.sock.sendall(data)
        except OSError as error:
            self.ended = self.ended or f"send: {error.strerror or error}"

    def _more(self, deadline: float) -> bool:
        """Read once into the buffer; False at the end of the stream. Raises Hung."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise Hung("nothing came in time, and the connection is still open")
        try:
            self.sock.settimeout(left)
            data = self.sock.recv(1 << 20)
        except TimeoutError:
            raise Hung("nothing came in time, and the connection is still open") from None
        except OSError as error:
            self.ended = f"reset ({error.strerror or error})"
            return False
        if not data:
            self.ended = self.ended or "closed"
        self.buffer += data
        return bool(data)

    def read_exactly(self, count: int, deadline: float) -> bytes:
        while len(self.buffer) < count:
            if not self._more(deadline):
                raise Closed(f"the connection ended ({self.ended}) with {len(self.buffer)} of {count} bytes due")
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_to_end(self, within: float = WAIT) -> bytes:
        """All bytes up to the end of the stream, undecrypted. Raises Hung if it does not come."""
        deadline = time.monotonic() + within
        try:
            while self._more(deadline):
                pass
        except Hung:
            raise Hung(f"still open after {within:.0f} s, {len(self.buffer)} bytes came") from None
        data, self.buffer = self.buffer, b""
        if data:
            self.transcript.add("<", "raw", data)
        return data

    def expect_silent_close(self, within: float = WAIT) -> None:
        data = self.read_to_end(within)
        if data:
            raise Failed(f"expected: closed without a byte; observed: {len(data)} bytes {data[:16].hex()}, then closed")

    def shut_down(self) -> None:
        """No more will be sent; what the other side sends can still be read."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.ended = self.ended or f"shutdown: {error.strerror or error}"

    def close(self, reset: bool = False) -> None:
        if reset and self.sock.fileno() >= 0:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    # records and frames

    def seal(self, plain: bytes) -> bytes:
        """One record, length included."""
        if self.send_cipher is None:
            raise RuntimeError("no handshake yet")
        sealed = self.send_cipher.encrypt(plain)
        return len(sealed).to_bytes(2, "big") + sealed

    def send_plain(self, *plains: bytes) -> None:
        """Each as one record, all in one segment."""
        for plain in plains:
            self.transcript.add(">", "frame", plain)
        self._send(b"".join(map(self.seal, plains)))

    def send(self, *frames: Any) -> None:
        self.send_plain(*[pack(frame) for frame in frames])

    def receive_plain(self, deadline: float) -> bytes:
        """The next record's plaintext. Raises Closed, Hung, Failed."""
        size = int.from_bytes(self.read_exactly(2, deadline), "big")
        if size < LIMIT["MIN_RECORD"]:
            raise Failed(f"a record of {size} bytes")
        sealed = self.read_exactly(size, deadline)
        if self.recv_cipher is None:
            raise RuntimeError("no handshake yet")
        try:
            plain = self.recv_cipher.decrypt(sealed)
        except CryptoError as error:
            raise Failed(str(error)) from None
        self.transcript.add("<", "frame", plain)
        return plain

    def receive(self, within: float = WAIT) -> list[Any]:
        """The next frame. Raises Closed, Hung, and Failed for one that spec/02 forbids a sender."""
        plain = self.receive_plain(time.monotonic() + within)
        try:
            frame = unpack(plain)
        except Malformed as error:
            raise Failed(f"the target sent a malformed frame: {error}") from None
        if type(frame) is not list or not frame or type(frame[0]) is not int:
            raise Failed(f"the target sent no frame: {str(frame)[:80]}")
        return frame

    def expect_close(self, codes: set[str], within: float = WAIT, or_plain_close: bool = True) -> str:
        """Read to the end; a GOAWAY must have one of `codes` (empty: any).

        Returns what was seen. Frames before it are passed over. Raises Hung, Failed.
        """
        deadline = time.monotonic() + within
        seen = ""
        try:
            while True:
                frame = self.receive(deadline - time.monotonic())
                if frame[0] == GOAWAY and not seen:
                    seen = GOAWAY_NAMES.get(frame[1], f"code {frame[1]}")
        except Closed:
            pass
        except Hung:
            after = f"GOAWAY({seen}) but no end" if seen else "no GOAWAY and no end"
            raise Hung(f"expected: connection closed; observed: {after} within {within:.0f} s") from None
        wanted = "/".join(sorted(codes)) or "any"
        if seen and codes and seen not in codes:
            raise Failed(f"expected: GOAWAY({wanted}); observed: GOAWAY({seen})")
        if not seen and not or_plain_close:
            raise Failed(f"expected: GOAWAY({wanted}); observed: {self.ended} without GOAWAY")
        return seen


@dataclass(frozen=True)
class Target:
    """Where and whom to dial, and in which network."""

    host: str
    port: int
    peer: bytes
    network: bytes
    swarm_key: SwarmKey | None = None

    @property
    def pattern(self) -> int:
        return 2 if self.swarm_key else 1

    @property
    def preamble(self) -> bytes:
        return MAGIC + bytes([MAJOR, self.pattern])

    def connect(self, transcript: Transcript | None = None) -> Link:
        """A TCP connection and nothing else."""
        try:
            return Link(socket.create_connection((self.host, self.port), WAIT), transcript)
        except OSError as error:
            raise Failed(f"no TCP connection to {self.host}:{self.port}: {error}") from None

    def noise(self, static: KeyPair | None = None, ephemeral: KeyPair | None = None) -> Noise:
        psk = self.swarm_key.psk if self.swarm_key else None
        return Noise(True, self.pattern, prologue_of(self.preamble, self.network), psk, static, ephemeral)


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message


def read_message(link: Link, within: float = WAIT) -> bytes:
    """One handshake message."""
    deadline = time.monotonic() + within
    size = int.from_bytes(link.read_exactly(2, deadline), "big")
    if size > LIMIT["MAX_HANDSHAKE_MESSAGE"]:
        raise Failed(f"a handshake message of {size} bytes")
    message = link.read_exactly(size, deadline)
    link.transcript.add("<", "handshake", message)
    return message


def check_message_2(target: Target, noise: Noise, message: bytes) -> bytes:
    """The responder's Ed25519 key, its certificate checked and its peer id the one dialled. Raises Failed."""
    try:
        key = check_certificate(noise.read(message), noise.rs, target.network, time.time())
    except CryptoError as error:
        raise Failed(f"message 2: {error}") from None
    if peer_id_of(key) != target.peer:
        raise Failed(f"dialled {peer_text(target.peer)}, reached {peer_text(peer_id_of(key))}")
    return key


def dial(target: Target, identity: Identity, transcript: Transcript | None = None, tail: bytes = b"") -> Link:
    """Connect and shake hands properly; `tail` frames travel in the segment of message 3 as records."""
    link = target.connect(transcript)
    try:
        noise = target.noise()
        link.send_raw(target.preamble + framed(noise.write(b"")))
        check_message_2(target, noise, read_message(link))
        certificate = identity.certificate(noise.s.public, target.network, int(time.time()) + 43_200)
        message = noise.write(certificate)
        link.send_cipher, link.recv_cipher = noise.split()
        link.send_raw(framed(message) + (link.seal(tail) if tail else b""))
    except BaseException:
        link.close()
        raise
    return link


def frame_name(frame: list[Any]) -> str:
    return FRAME_NAMES.get(frame[0], f"frame {frame[0]}")
