"""Identity certificates in message 3 (spec/01, section 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.conformance.bench import Bench
from tools.conformance.codec import Pairs, Raw, pack, wide
from tools.conformance.constants import LIMIT
from tools.conformance.crypto import SMALL_ORDER, Identity, KeyPair, L, Noise, P, signed_bytes
from tools.conformance.link import framed
from tools.conformance.registry import case
from tools.conformance.server.handshake import HALF_DAY, drops_payload, fields_of, now, takes_payload, until_message_2


@case("handshake/020", "PT-TRN-030 PT-TRN-032")
def certificate_of_other_static(bench: Bench) -> None:
    """A certificate over another static key: dropped"""
    drops_payload(bench, Identity().certificate(KeyPair().public, bench.target.network, now() + HALF_DAY))


@case("handshake/021", "PT-TRN-030 PT-TRN-032")
def certificate_of_other_network(bench: Bench) -> None:
    """A certificate for another network: dropped"""
    link, noise = until_message_2(bench)
    link.send_raw(framed(noise.write(Identity().certificate(noise.s.public, b"elsewhere", now() + HALF_DAY))))
    link.expect_silent_close()


@case("handshake/022", "PT-IDN-009 PT-TRN-030")
def certificate_of_other_purpose(bench: Bench) -> None:
    """A signature made for another purpose: dropped"""
    link, noise = until_message_2(bench)
    identity, end = Identity(), now() + HALF_DAY
    data = signed_bytes(noise.s.public, bench.target.network, end).replace(b"static key v1", b"static key v2")
    link.send_raw(framed(noise.write(pack({"k": identity.public, "x": end, "s": identity.key.sign(data)}))))
    link.expect_silent_close()


def _certificate_time(number: int, name: str, offset: int, accepted: bool) -> None:
    def run(bench: Bench) -> None:
        def make(noise: Noise) -> bytes:
            return Identity().certificate(noise.s.public, bench.target.network, now() + offset)

        if accepted:
            takes_payload(bench, make)
        else:
            link, noise = until_message_2(bench)
            link.send_raw(framed(noise.write(make(noise))))
            link.expect_silent_close()

    case(f"handshake/{number:03}", "PT-TRN-032", title=f"A certificate that {name}")(run)


_certificate_time(23, "expired a minute ago: dropped", -60, False)
_certificate_time(24, "ends 24 h 11 min ahead: dropped", 86_400 + 660, False)
_certificate_time(25, "ends 24 h 9 min ahead, within the tolerance of clocks: accepted", 86_400 + 540, True)


@case("handshake/026", "PT-IDN-006 PT-TRN-032")
def small_order_identity(bench: Bench) -> None:
    """Identity keys of small order, with the signature that some libraries take for valid: dropped"""
    forged = bytes([1]) + bytes(31) + bytes(32)
    for key in SMALL_ORDER:
        for top in (0, 0x80):
            drops_payload(bench, pack({"k": key[:31] + bytes([key[31] | top]), "x": now() + 3_600, "s": forged}))


@case("handshake/027", "PT-IDN-007 PT-TRN-032")
def non_canonical_identity(bench: Bench) -> None:
    """Identity keys whose y is not below 2^255 - 19: dropped"""
    for y in (P + 3, P + 9, P + 18):
        drops_payload(bench, pack({"k": y.to_bytes(32, "little"), "x": now() + 3_600, "s": bytes(64)}))


@case("handshake/028", "PT-IDN-008")
def malleable_signature(bench: Bench) -> None:
    """A signature whose S has the group order added: dropped"""
    link, noise = until_message_2(bench)
    fields = fields_of(bench, noise)
    s = int.from_bytes(fields["s"][32:], "little") + L
    link.send_raw(framed(noise.write(pack(fields | {"s": fields["s"][:32] + s.to_bytes(32, "little")}))))
    link.expect_silent_close()


@case("handshake/029", "PT-TRN-033")
def unknown_certificate_key(bench: Bench) -> None:
    """Unknown keys of a certificate are ignored"""
    takes_payload(bench, lambda noise: pack(fields_of(bench, noise, later="something", more=[1, {"a": b"b"}])))


@case("handshake/030", "PT-TRN-033")
def critical_certificate_key(bench: Bench) -> None:
    """A key of a certificate that begins with "!": dropped"""
    link, noise = until_message_2(bench)
    link.send_raw(framed(noise.write(pack(fields_of(bench, noise) | {"!x": 1}))))
    link.expect_silent_close()


@case("handshake/031", "PT-MSG-006 PT-MSG-012 PT-TRN-032")
def wide_certificate(bench: Bench) -> None:
    """A certificate in another order and in msgpack's longest forms is accepted"""
    takes_payload(bench, lambda noise: wide(dict(sorted(fields_of(bench, noise).items(), reverse=True))))


@case("handshake/032", "PT-TRN-032")
def long_certificate(bench: Bench) -> None:
    """A certificate of 1,025 bytes, otherwise right: dropped; one of 1,024: accepted"""

    def padded(noise: Noise, size: int) -> bytes:
        room = size - len(pack(fields_of(bench, noise, p=bytes(300)))) + 300
        return pack(fields_of(bench, noise, p=bytes(room)))

    takes_payload(bench, lambda noise: padded(noise, LIMIT["MAX_CERTIFICATE"]))
    link, noise = until_message_2(bench)
    link.send_raw(framed(noise.write(padded(noise, LIMIT["MAX_CERTIFICATE"] + 1))))
    link.expect_silent_close()


@case("handshake/033", "PT-TRN-032 PT-MSG-031 PT-MSG-011 PT-MSG-009 PT-MSG-010 PT-MSG-004")
def malformed_certificate(bench: Bench) -> None:
    """Certificates that are no strict msgpack, or whose fields have other types or lengths: dropped"""
    for make in _MALFORMED:
        link, noise = until_message_2(bench)
        good = fields_of(bench, noise)
        link.send_raw(framed(noise.write(make(good))))
        link.expect_silent_close()


_MALFORMED: tuple[Callable[[dict[str, Any]], bytes], ...] = (
    lambda good: b"",
    lambda good: pack(good) + b"\xc0",
    lambda good: pack(good)[:-1],
    lambda good: pack(list(good.values())),
    lambda good: pack(Pairs(*good.items(), ("x", good["x"]))),
    lambda good: pack(Pairs(*good.items(), (b"z", 1))),
    lambda good: pack(good | {"z": Raw(b"\xd6\xff\0\0\0\0")}),
    lambda good: pack({name: good[name] for name in "kx"}),
    lambda good: pack(good | {"k": good["k"][:31]}),
    lambda good: pack(good | {"k": good["k"].hex()}),
    lambda good: pack(good | {"s": good["s"] + b"\0"}),
    lambda good: pack(good | {"x": float(good["x"])}),
    lambda good: pack(good | {"x": -1}),
    lambda good: pack(good | {"x": None}),
)
