"""Handshakes (chapter 01) with every key fixed, public and private, down to the first record each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from petalite.identity import Identity, SwarmKey
from petalite.wire.handshake import Handshake, Role
from petalite.wire.records import RecordWriter

NOW = 1_700_000_000
FRAME = bytes.fromhex("92 05 01")
INITIATOR_SEED, RESPONDER_SEED = bytes([1]) * 32, bytes([2]) * 32
INITIATOR_KEYS, RESPONDER_KEYS = (bytes([0x11]) * 32, bytes([0x12]) * 32), (bytes([0x21]) * 32, bytes([0x22]) * 32)
SWARM_KEY = bytes([7]) * 32


def make() -> dict[str, Any]:
    return {
        "note": "Private halves of static and ephemeral keys before clamping. 'bytes': what each side sends, in order.",
        "now": NOW,
        "frame": FRAME.hex(),
        "handshakes": [
            _one("public", "petalite", None),
            _one("private", SwarmKey(SWARM_KEY).network_id, SWARM_KEY),
        ],
    }


def random_of(keys: tuple[bytes, bytes]) -> Callable[[int], bytes]:
    """A random source that gives the static key, then the ephemeral one."""
    left = list(keys)
    return lambda count: left.pop(0)[:count]


def _one(name: str, network: str, swarm_key: bytes | None) -> dict[str, Any]:
    key = SwarmKey(swarm_key) if swarm_key else None
    here, there = Identity.from_seed(INITIATOR_SEED), Identity.from_seed(RESPONDER_SEED)
    initiator = Handshake(
        Role.INITIATOR, here, network, key, there.peer_id, now=NOW, random=random_of(INITIATOR_KEYS)
    )  # fmt: skip
    responder = Handshake(Role.RESPONDER, there, network, key, now=NOW, random=random_of(RESPONDER_KEYS))
    sent: list[tuple[str, bytes]] = []
    while initiator.result is None or responder.result is None:
        for side, other, who in ((initiator, responder, "initiator"), (responder, initiator, "responder")):
            if data := side.data_to_send():
                sent.append((who, data))
                other.receive_data(data)
    for side, who in ((initiator, "initiator"), (responder, "responder")):
        assert side.result is not None
        sent.append((who, bytes(RecordWriter(side.result.encrypt).pack([(FRAME, None)]))))
    return {
        "name": name,
        "network": network,
        "swarm_key": swarm_key.hex() if swarm_key else None,
        "initiator": _side(here, INITIATOR_SEED, INITIATOR_KEYS),
        "responder": _side(there, RESPONDER_SEED, RESPONDER_KEYS),
        "bytes": [{"from": who, "hex": data.hex()} for who, data in sent],
    }


def _side(identity: Identity, seed: bytes, keys: tuple[bytes, bytes]) -> dict[str, str]:
    return {"seed": seed.hex(), "peer": identity.peer_id.text, "static": keys[0].hex(), "ephemeral": keys[1].hex()}
