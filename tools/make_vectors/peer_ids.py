"""Peer ids (chapter 01): from a seed to the text form, and public keys and texts that must be refused."""

from __future__ import annotations

from typing import Any

from petalite.identity import Identity, PeerId, check_public_key

REFUSED_KEYS = {
    "order 4": bytes(32),
    "order 1": bytes([1]) + bytes(31),
    "order 2": bytes.fromhex("ec" + "ff" * 30 + "7f"),
    "order 8": bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    "order 1, top bit set": bytes([1]) + bytes(30) + b"\x80",
    "y = p + 1, not canonical": bytes.fromhex("ee" + "ff" * 30 + "7f"),
    "y = 2^255 - 1, not canonical": bytes.fromhex("ff" * 31 + "7f"),
}
GOOD = Identity.from_seed(bytes([1]) * 32).peer_id.text
REFUSED_TEXTS = {
    "upper case": GOOD.upper(),
    "51 characters": GOOD[:-1],
    "53 characters": GOOD + "a",
    "padding": GOOD[:-4] + "====",
    "last character with bits that do not count": GOOD[:-1] + "b",
    "a character outside of the alphabet": "1" + GOOD[1:],
}


def make() -> dict[str, Any]:
    for key in REFUSED_KEYS.values():
        _must_fail(check_public_key, key)
    for text in REFUSED_TEXTS.values():
        _must_fail(PeerId.parse, text)
    ids = []
    for seed in (bytes(32), bytes([1]) * 32, bytes(range(32)), bytes([255]) * 32):
        identity = Identity.from_seed(seed)
        ids.append(
            {
                "seed": seed.hex(),
                "public_key": identity.public_key.hex(),
                "peer_id": bytes(identity.peer_id).hex(),
                "text": identity.peer_id.text,
            }
        )
    return {
        "note": "Ed25519 seed, public key, SHA-256(01 || public key), and its text form.",
        "peer_ids": ids,
        "refused_keys": [{"name": name, "public_key": key.hex()} for name, key in REFUSED_KEYS.items()],
        "refused_texts": [{"name": name, "text": text} for name, text in REFUSED_TEXTS.items()],
    }


def _must_fail(check: Any, value: Any) -> None:
    try:
        check(value)
    except ValueError:
        return
    raise AssertionError(f"{value!r} was taken")
