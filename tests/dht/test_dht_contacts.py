"""Ids, keys and addresses against literal values (spec/09, "Ids" and "Contacts")."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.dht.contacts import Contact, Reach, claimed_contact, is_sane, parse_place, reach_of_host, subnet_of_host
from petalite.dht.ids import bucket_index, distance, model_key, models_key, number, puzzle_bits, random_in_bucket

PEER = bytes(range(32))


def test_keys_are_hashes_of_purpose_network_and_model() -> None:
    model = bytes(32)
    assert model_key("net", model) == hashlib.sha256(b"petalite dht\x00net\x00model\x00" + model).digest()
    assert models_key("net") == hashlib.sha256(b"petalite dht\x00net\x00models").digest()
    assert models_key("net") != models_key("other")


def test_distance_is_xor_of_big_endian_numbers() -> None:
    assert distance(bytes(31) + b"\x05", bytes(31) + b"\x03") == 6
    assert number(b"\x01" + bytes(31)) == 1 << 248


@given(st.integers(0, 255), st.integers(0, 2**256 - 1), st.integers(0, 2**32))
def test_random_id_lands_in_the_wanted_bucket(index: int, own: int, seed: int) -> None:
    assert bucket_index(own, random_in_bucket(own, index, random.Random(seed))) == index


def test_puzzle_counts_leading_zero_bits_of_the_double_hash() -> None:
    for i in range(300):
        key = i.to_bytes(32, "big")
        digest = hashlib.sha256(hashlib.sha256(key).digest()).digest()
        bits = "".join(f"{byte:08b}" for byte in digest)
        assert puzzle_bits(key) == len(bits) - len(bits.lstrip("0"))


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        ("127.0.0.1:1", Reach.HOST),
        ("[::1]:1", Reach.HOST),
        ("10.1.2.3:1", Reach.LINK),
        ("192.168.0.1:65535", Reach.LINK),
        ("169.254.0.1:1", Reach.LINK),
        ("100.64.0.1:1", Reach.LINK),
        ("[fd00::1]:1", Reach.LINK),
        ("[fe80::1%eth0]:1", Reach.LINK),
        ("[fe80::1]:1", Reach.NOWHERE),
        ("8.8.8.8:31337", Reach.GLOBAL),
        ("[2a00:1450::1]:31337", Reach.GLOBAL),
        ("8.8.8.8:0", Reach.NOWHERE),
        ("0.0.0.0:1", Reach.NOWHERE),
        ("0.1.2.3:1", Reach.NOWHERE),
        ("[::]:1", Reach.NOWHERE),
        ("224.0.0.251:1", Reach.NOWHERE),
        ("[ff02::fb]:1", Reach.NOWHERE),
        ("255.255.255.255:1", Reach.NOWHERE),
        ("240.0.0.1:1", Reach.NOWHERE),
    ],
)
def test_reach_of_an_address_decides_whether_it_is_dialled(text: str, reach: Reach) -> None:
    place = parse_place(text)
    assert place.reach is reach
    assert is_sane(place.reach, lan=False) == (reach is Reach.GLOBAL)
    assert is_sane(place.reach, lan=True) == (reach is not Reach.NOWHERE)


@pytest.mark.parametrize(
    "text",
    [
        *("", "8.8.8.8", "8.8.8.8:70000", "8.8.8.8:-1", "example.org:1", "8.8.8:1", "[8.8.8.8]:1", "::1:1", "[::1]"),
        *("8.8.8.8:\u0663", "1.2.3.4:1 ", "[fe80::1%a b]:1", "08.8.8.8:1", "256.1.1.1:1", "[::ffff:127.0.0.1]:1"),
        *("8.8.8.8:080", "[2A00::1]:1", "[2a00:0:0::1]:1"),
    ],
)
def test_what_is_no_ip_literal_with_a_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_place(text)


def test_subnet_is_a_24_or_a_48() -> None:
    assert Contact(PEER, ("8.8.4.9:1",)).subnet == bytes([8, 8, 4])
    assert Contact(PEER, ("[2a00:1450:1::9]:1",)).subnet == bytes.fromhex("2a0014500001")
    assert subnet_of_host("2a00:1450:1:ffff::1") == bytes.fromhex("2a0014500001")
    assert subnet_of_host("::ffff:8.8.4.9") == bytes([8, 8, 4])
    assert reach_of_host("192.168.1.1") is Reach.LINK


def test_contact_reaches_as_far_as_its_nearest_address() -> None:
    assert Contact(PEER, ("8.8.8.8:1", "127.0.0.1:1")).reach is Reach.HOST


@pytest.mark.parametrize("addrs", [(), ("8.8.8.8:1",) * 5, ("name:1",)])
def test_contact_with_no_too_many_or_bad_addresses_is_refused(addrs: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        Contact(PEER, addrs)
    with pytest.raises(ValueError):
        Contact(PEER[:31], ("8.8.8.8:1",))


def test_claimed_address_counts_only_at_the_ip_that_we_see() -> None:
    """PT-DHT-013: else a peer has the swarm dial its victim."""
    claims = ("9.9.9.9:443", "8.8.8.8:31337", "127.0.0.1:1")
    contact = claimed_contact(PEER, claims, "8.8.8.8", lan=False)
    assert contact is not None and contact.addrs == ("8.8.8.8:31337",)
    assert claimed_contact(PEER, claims, "::ffff:8.8.8.8", lan=False) == contact
    assert claimed_contact(PEER, ("9.9.9.9:443",), "8.8.8.8", lan=False) is None
    on_lan = claimed_contact(PEER, ("192.168.1.2:1", "0.0.0.0:1"), "192.168.7.7", lan=True)
    assert on_lan is not None and on_lan.addrs == ("192.168.1.2:1",)


def test_link_local_claim_gets_the_interface_through_which_it_was_seen() -> None:
    contact = claimed_contact(PEER, ("[fe80::5]:7",), "fe80::5%eth0", lan=True)
    assert contact is not None and contact.addrs == ("[fe80::5%eth0]:7",) and contact.scoped
