"""Run a file of Noise test vectors: `python tools/noise_vectors.py FILE`.

FILE is JSON in the common form (see spec/vectors/noise.json): messages alternate initiator, responder, initiator, ...
and go on alternating after the handshake. Both roles are played: each message is written and compared, then read and
its payload compared. Patterns other than NN NK KK IK XX and their psk forms are skipped by name. The last line is
`N passed, M failed`; exit code 0 means that none failed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from petalite.errors import PetaliteError
from petalite.wire.noise import PATTERNS, HandshakeState, KeyPair, parse_protocol_name


class VectorError(Exception):
    """A vector does not come out as it says; the text says where."""


def has_pattern(name: str) -> bool:
    """Whether the pattern of this protocol name is one that is run here."""
    match = re.match(r"Noise_([A-Z0-9]+)(psk[0-9](?:\+psk[0-9])*)?_", name)
    return match is not None and match[1] in PATTERNS


def build(vector: dict[str, Any], role: str) -> HandshakeState:
    """One side of a vector; `role` is "init" or "resp"."""

    def part(key: str) -> bytes | None:
        value = vector.get(f"{role}_{key}")
        return None if value is None else bytes.fromhex(value)

    initiator = role == "init"
    protocol = parse_protocol_name(vector["protocol_name"])
    static, ephemeral = part("static"), part("ephemeral")
    knows_peer = protocol.pre_messages[initiator] == "s"
    return HandshakeState(
        protocol.name,
        initiator=initiator,
        prologue=part("prologue") or b"",
        random=lambda size: ephemeral or b"",
        s=None if static is None else KeyPair.from_private(static),
        rs=part("remote_static") if knows_peer else None,
        psks=[bytes.fromhex(psk) for psk in vector.get(f"{role}_psks") or ()],
    )


def run_vector(vector: dict[str, Any]) -> None:
    """Play one vector through both roles; raises VectorError at the first difference."""
    sides = build(vector, "init"), build(vector, "resp")
    messages = [(bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in vector["messages"]]
    steps = len(sides[0].protocol.messages)
    if len(messages) < steps:
        raise VectorError(f"{len(messages)} messages, the pattern alone has {steps}")
    for number, (payload, ciphertext) in enumerate(messages[:steps]):
        writer, reader = sides[number % 2], sides[1 - number % 2]
        compare(f"message {number + 1}", writer.write_message(payload), ciphertext)
        compare(f"payload {number + 1}", reader.read_message(ciphertext), payload)
    for side in sides:
        compare("handshake hash", side.h, bytes.fromhex(vector.get("handshake_hash") or side.h.hex()))
    senders, receivers = sides[0].split(), sides[1].split()
    for number, (payload, ciphertext) in enumerate(messages[steps:], steps):
        # The initiator's messages are the even ones, whatever the length of the pattern.
        compare(f"message {number + 1}", senders[number % 2].encrypt_with_ad(b"", payload), ciphertext)
        compare(f"payload {number + 1}", receivers[number % 2].decrypt_with_ad(b"", ciphertext), payload)


def compare(what: str, observed: bytes, expected: bytes) -> None:
    if observed != expected:
        raise VectorError(f"{what}: expected {expected.hex()}, got {observed.hex()}")


def load(path: str) -> list[dict[str, Any]]:
    """The vectors of a file; VectorError in one line if it is not one."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise VectorError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VectorError(f"{path}: not JSON: {error}") from error
    vectors = document.get("vectors") if isinstance(document, dict) else None
    if not isinstance(vectors, list) or not vectors:
        raise VectorError(f'{path}: holds no list "vectors"')
    return vectors


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python tools/noise_vectors.py FILE", file=sys.stderr)
        return 2
    try:
        vectors = load(arguments[0])
    except VectorError as error:
        print(error, file=sys.stderr)
        return 1
    passed = failed = 0
    skipped: list[str] = []
    for index, vector in enumerate(vectors):
        name = str(vector.get("protocol_name") or vector.get("name")) if isinstance(vector, dict) else "not an object"
        if isinstance(vector, dict) and name.startswith("Noise_") and not has_pattern(name):
            skipped.append(name)
            continue
        try:
            run_vector(vector)
        # What a vector may hold is anybody's guess; whatever is wrong with it is that vector's failure, and is printed.
        except (VectorError, PetaliteError, KeyError, TypeError, ValueError, AttributeError) as error:
            failed += 1
            print(f"FAILED vector {index}, {name}: {type(error).__name__}: {error}")
        else:
            passed += 1
    for name in skipped:
        print(f"skipped {name}")
    print(f"{passed} passed, {failed} failed" + (f", {len(skipped)} skipped" if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
