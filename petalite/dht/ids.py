"""The key space: 256-bit ids under the XOR metric (Maymounkov and Mazieres 2002, section 2; spec/09, "Ids").

Ids travel as 32 bytes; inside this package they are integers too (`number`), since XOR and comparison are all we do.
"""

from __future__ import annotations

import hashlib
import random

ID_BITS = 256
ID_BYTES = 32
SPACE = 1 << ID_BITS

_PREFIX = b"petalite dht\0"


def number(node_id: bytes) -> int:
    """A 32-byte id as an integer, most significant byte first (PT-DHT-001)."""
    return int.from_bytes(node_id, "big")


def distance(a: bytes, b: bytes) -> int:
    """XOR distance of two ids (PT-DHT-002)."""
    return number(a) ^ number(b)


def bucket_index(own: int, other: int) -> int:
    """Index 0..255 of the bucket that holds `other`: the position of the highest bit in which the ids differ.

    -1 for the own id, which no bucket holds.
    """
    return (own ^ other).bit_length() - 1


def random_in_bucket(own: int, index: int, rng: random.Random) -> int:
    """A random id whose `bucket_index` is `index`: the target of a bucket refresh."""
    return own ^ (1 << index) ^ rng.getrandbits(index) if index else own ^ 1


def model_key(network_id: str, model_id: bytes) -> bytes:
    """The 32-byte key under which servers of one model announce themselves (PT-DHT-004)."""
    return hashlib.sha256(_PREFIX + network_id.encode() + b"\0model\0" + model_id).digest()


def models_key(network_id: str) -> bytes:
    """The 32-byte key under which the models of a network are listed (PT-DHT-004)."""
    return hashlib.sha256(_PREFIX + network_id.encode() + b"\0models").digest()


def puzzle_bits(public_key: bytes) -> int:
    """Leading zero bits of SHA-256(SHA-256(public key)): the static crypto puzzle (S/Kademlia, section 4.1)."""
    digest = hashlib.sha256(hashlib.sha256(public_key).digest()).digest()
    return ID_BITS - number(digest).bit_length()
