"""TXT records against literal bytes (spec/11), and every kind of rubbish."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalite.identity import Identity, PeerId, SwarmKey
from petalite.lan.announcement import Announcement, Kind, Membership, network_hint, random_label

PEER = Identity(bytes(32)).peer_id
KEY = SwarmKey(bytes(range(32)))

# The examples of spec/11, section 4
PUBLIC = bytes.fromhex(
    "09747874766572733d31"
    "3769643d"
    + PEER.text.encode().hex()
    + "03763d31"
    "0c6e65743d3434353032353734"
)  # fmt: skip
PRIVATE = bytes.fromhex("09747874766572733d3103763d31147461673d" + KEY.lan_tag.encode().hex())


def test_public_announcement_is_these_bytes() -> None:
    assert Membership.of(PEER, "petalite", None).announcement().to_txt() == PUBLIC
    assert hashlib.sha256(b"petalite").hexdigest()[:8] == network_hint("petalite") == PUBLIC[-8:].decode()


def test_private_announcement_shows_the_tag_and_nothing_else() -> None:
    txt = Membership.of(PEER, KEY.network_id, KEY).announcement().to_txt()
    assert txt == PRIVATE
    assert PEER.text[:8].encode() not in txt
    assert network_hint(KEY.network_id).encode() not in txt


@pytest.mark.parametrize("txt", [PUBLIC, PRIVATE])
def test_reads_what_it_writes(txt: bytes) -> None:
    assert Announcement.from_txt(txt).to_txt() == txt
    assert len(txt) <= 400


def test_keys_of_any_case_and_unknown_ones_are_fine() -> None:
    strings = [
        b"TXTVERS=1",
        b"V=1",
        b"Net=0123abcd",
        b"ID=" + PEER.text.encode(),
        b"mood=\xff\xfe",
        b"flag",
        b"=x",
        b"",
    ]
    seen = Announcement.from_txt(b"".join(bytes([len(s)]) + s for s in strings))
    assert seen == Announcement(peer=PEER, network="0123abcd")


def test_the_first_of_equal_keys_counts() -> None:
    assert Announcement.from_txt(b"\x03v=1\x03v=2").version == 1


@pytest.mark.parametrize(
    "txt",
    [
        b"",
        b"\x00",
        b"\x09txtvers=1",
        b"\x02v=",
        b"\x04v=-1",
        b"\x08v=100000",
        b"\x05v=\xd9\xa3\xff",
        b"\x03v=1\x09id=short",
        b"\x03v=1" + bytes([55]) + b"id=" + b"!" * 52,
        b"\x03v=1\x0cnet=0123ABCD",
        b"\x03v=1\x07net=012",
        b"\x03v=1\x08tag=aaaa",
        b"\x03v=1\x14tag=AAAAAAAAAAAAAAAA",
        b"\x03v=1\x14tag=1111111111111111",
        b"\x03v=1\xffid=a",  # cut off
        b"\x03v=1" + bytes([255]) + b"id=" + b"\xff" * 252,  # N03: 255 bytes that are no text
        b"\x03v=1" + (b"\xff" + b"x" * 255) * 34,  # N03: 8,708 bytes
        b"\x03v=1" + (b"\xff" + b"x" * 255) + (b"\x9f" + b"x" * 159),  # 420: over the limit, though well formed
    ],
)
def test_rubbish_is_refused(txt: bytes) -> None:
    with pytest.raises(ValueError, match=r"TXT|peer id"):
        Announcement.from_txt(txt)


@given(st.binary(max_size=500))
def test_any_bytes_are_read_or_refused(txt: bytes) -> None:
    try:
        seen = Announcement.from_txt(txt)
    except ValueError:
        return
    assert Announcement.from_txt(seen.to_txt()) == seen


def test_whom_an_instance_belongs_to() -> None:
    other = Identity(bytes([7]) * 32).peer_id
    public, private = Membership.of(PEER, "petalite", None), Membership.of(PEER, KEY.network_id, KEY)
    hint = network_hint("petalite")
    for member, seen, kind in [
        (public, Announcement(peer=other, network=hint), Kind.OURS),
        (public, Announcement(peer=PEER, network=hint), Kind.ITSELF),
        (public, Announcement(peer=other, network="00000000"), Kind.OTHER_NETWORK),
        (public, Announcement(peer=other), Kind.OTHER_NETWORK),
        (public, Announcement(network=hint), Kind.OTHER_NETWORK),
        (public, Announcement(tag=KEY.lan_tag), Kind.OTHER_NETWORK),
        (public, Announcement(peer=other, network=hint, version=2), Kind.OTHER_VERSION),
        (private, Announcement(tag=KEY.lan_tag), Kind.OURS),
        (private, Announcement(tag=SwarmKey(bytes(32)).lan_tag), Kind.OTHER_NETWORK),
        (private, Announcement(peer=other, network=hint), Kind.OTHER_NETWORK),
        (private, Announcement(tag=KEY.lan_tag, version=9), Kind.OTHER_VERSION),
    ]:
        assert member.judge(seen) is kind


def test_labels_are_random_and_fit_a_dns_label() -> None:
    assert random_label(lambda count: bytes(range(count))) == "aaaqeayeaudaocajbifq"
    assert random_label(bytes) != random_label(lambda count: b"\xff" * count)
    assert len(PeerId(bytes(32)).text[:20]) == 20
