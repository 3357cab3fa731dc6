"""`python tools/make_first_session.py [--check]`: spec/vectors/first_session.json, the bytes of spec/first-client.md.

A whole session with fixed keys and a fixed clock, made by the conformance tool's engine: each entry is what one side
sends, as plaintext frame and as record. Hidden states are left out: their last bits differ between processors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.conformance import tensors
from tools.conformance.codec import pack
from tools.conformance.constants import END, HELLO, PING, PONG, REQ, RES, SPEC
from tools.conformance.crypto import MAGIC, Identity, KeyPair, Noise, peer_text, prologue_of

TARGET = SPEC / "vectors" / "first_session.json"
NETWORK = b"petalite"
NOW = 1_700_000_000
SID = bytes(range(16))


def made() -> dict[str, Any]:
    """The session, as JSON holds it."""
    client, server = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
    preamble = MAGIC + b"\1\1"
    initiator = Noise(True, 1, prologue_of(preamble, NETWORK), None, KeyPair(b"\x11" * 32), KeyPair(b"\x12" * 32))
    responder = Noise(False, 1, prologue_of(preamble, NETWORK), None, KeyPair(b"\x21" * 32), KeyPair(b"\x22" * 32))
    messages = []
    for sender, receiver, identity in (
        (initiator, responder, None),
        (responder, initiator, server),
        (initiator, responder, client),
    ):
        payload = identity.certificate(sender.s.public, NETWORK, NOW + 43_200) if identity else b""
        message = sender.write(payload)
        receiver.read(message)
        messages.append((len(message).to_bytes(2, "big") + message).hex())
    sending, receiving = initiator.split()
    frames = []
    for way, name, frame in _frames():
        plain = pack(frame)
        sealed = (sending if way == ">" else receiving).encrypt(plain)
        record = len(sealed).to_bytes(2, "big") + sealed
        frames.append({"way": way, "name": name, "plain": plain.hex(), "record": record.hex()})
    return {
        "note": "public network 'petalite'; identity seeds 01 and 02, static keys 11 and 21, ephemeral keys 12 and 22, "
        "each byte 32 times; both clocks at 1,700,000,000; > is sent by the client",
        "server": peer_text(server.peer),
        "preamble": preamble.hex(),
        "handshake": messages,
        "frames": frames,
        "model": tensors.FORMULA_ID.hex(),
        "prompt": [80, 101, 116, 97, 108],
        "greedy": tensors.greedy([80, 101, 116, 97, 108], 8),
    }  # fmt: skip


def _frames() -> list[tuple[str, str, list[Any]]]:
    """Way, name and frame, in the order of sending; bodies are left out, so records stop before the first body."""
    info = {
        "size": 0, "model": tensors.FORMULA_ID, "name": "formula", "blocks": [0, 2], "layers": 2, "hidden": 64,
        "dtype": "float32", "codecs": ["raw", "i8b64"], "max_len": 1024, "max_batch": 4, "cache_left": 1024,
        "state": "online", "version": "1",
    }  # fmt: skip
    opened = {
        "size": 0, "max": 0, "sid": SID, "model": tensors.FORMULA_ID, "blocks": [0, 2], "max_len": 16, "batch": 1,
        "dtype": "f32", "codec": "raw",
    }  # fmt: skip
    tensor = {"n": "h", "d": "f32", "s": [1, 5, 64], "c": "raw"}
    step = {"size": 1280, "max": 1280, "sid": SID, "n": 0, "pos": 0, "t": [tensor]}
    return [
        (">", "HELLO", [HELLO, {"v": 0}]),
        ("<", "HELLO", [HELLO, {"v": 0}]),
        (">", "PING", [PING, b"12345678"]),
        ("<", "PONG", [PONG, b"12345678"]),
        (">", "REQ info", [REQ, 1, END, "info", {"size": 0, "max": 0}]),
        ("<", "RES info", [RES, 1, END, info]),
        (">", "REQ open", [REQ, 3, END, "open", opened]),
        ("<", "RES open", [RES, 3, END, {"size": 0, "pos": 0, "ttl": 600}]),
        (">", "REQ step", [REQ, 5, 0, "step", step]),
    ]


def main() -> int:
    text = json.dumps(made(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        if TARGET.read_text() != text:
            print(f"{TARGET.name} is not what this tool makes: run python tools/make_first_session.py")
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
