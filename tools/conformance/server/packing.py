"""msgpack in frames: what is refused, what must be accepted, and the fields of heads (spec/04)."""

from __future__ import annotations

from typing import Any

from tools.conformance.bench import Bench
from tools.conformance.codec import Pairs, Raw, pack, wide
from tools.conformance.constants import END, PING, REQ
from tools.conformance.registry import case
from tools.conformance.verdicts import require


def req(head: Any) -> bytes:
    return pack([REQ, 1, END, "info", head])


def _refused(number: int, requirements: str, title: str, *plains: bytes) -> None:
    def run(bench: Bench) -> None:
        for plain in plains:
            bench.reacts(plain, {"frame"})

    case(f"msgpack/{number:03}", f"{requirements} PT-MSG-030", title=f"{title}: GOAWAY(frame)")(run)


def nested(depth: int) -> Raw:
    """A value whose own depth is `depth`."""
    return Raw(b"\x91" * depth + b"\xc0")


_refused(1, "PT-MSG-011", "A map key twice", req(Pairs(("max", 1), ("max", 2))))
_refused(2, "PT-MSG-011", "A map key twice in two spellings", req(Raw(bytes.fromhex("82a16101d9016102"))))
_refused(3, "PT-MSG-011", "A map key twice deep inside", req({"a": [{"b": Pairs(("c", 1), ("c", 1))}]}))
_refused(4, "PT-MSG-010", "A bin key", req(Pairs((b"max", 1))), req({"a": Pairs((b"b", 1))}))
_refused(
    5, "PT-MSG-010", "Keys that are integers, nil, bool or array", *[req(Pairs((k, 1))) for k in (1, None, True, [1])]
)
_refused(6, "PT-MSG-007", "A str that is not UTF-8", req({"a": Raw(b"\xa2\xff\xfe")}), req({"a": Raw(b"\xa1\xc3")}))
_refused(7, "PT-MSG-007", "A str with a surrogate, or overlong", req({"a": "\ud800"}), req({"a": Raw(b"\xa2\xc0\x80")}))
_refused(8, "PT-MSG-003", "A float", *[req({"a": Raw(bytes.fromhex(t))}) for t in ("ca40400000", "cb4008000000000000")])
_refused(
    9, "PT-MSG-003", "NaN and infinity", req({"a": float("nan")}), req({"a": float("inf")}), req({"max": float("nan")})
)
_refused(
    10, "PT-MSG-004", "Extension types of every form",
    *[req({"a": Raw(bytes.fromhex(t))}) for t in ("d60001020304", "c70000", "c70105ff", "d40000", "c8000100aa")],
    req({"a": Raw(bytes.fromhex("d8ff" + "00" * 16))}),
)  # fmt: skip
_refused(
    11,
    "PT-MSG-004",
    "Timestamps",
    req({"a": Raw(bytes.fromhex("d6ff00000000"))}),
    req({"a": Raw(bytes.fromhex("d7ff" + "00" * 8))}),
)
_refused(12, "PT-MSG-002 PT-MSG-001", "The byte c1", req({"a": Raw(b"\xc1")}), b"\xc1")
_refused(13, "PT-MSG-009", "Bytes after the value", pack([PING, bytes(8)]) + b"\xc0", pack([PING, bytes(8)]) * 2)
_refused(
    14,
    "PT-MSG-009",
    "A value that ends early",
    pack([PING, bytes(8)])[:-1],
    b"\x92\x06",
    b"\x95",
    req({"a": b"abc"})[:-1],
)
_refused(
    15,
    "PT-MSG-021 PT-MSG-020",
    "An array of 2^32 - 1 entries in five bytes",
    b"\xdd\xff\xff\xff\xff",
    req(Raw(b"\xdd\xff\xff\xff\xff")),
)
_refused(
    16, "PT-MSG-021 PT-MSG-020", "A map of 2^32 - 1 pairs", b"\xdf\xff\xff\xff\xff", req(Raw(b"\xdf\xff\xff\xff\xff"))
)
_refused(
    17,
    "PT-MSG-021",
    "A str and a bin of 2^32 - 1 bytes",
    req({"a": Raw(b"\xdb\xff\xff\xff\xff")}),
    req({"a": Raw(b"\xc6\xff\xff\xff\xffab")}),
)
_refused(18, "PT-MSG-020", "Nesting 17 deep", req({"a": nested(15)}))
_refused(19, "PT-MSG-020", "Nesting 2,000 and 60,000 deep", pack([24, nested(2_000)]), pack([24, nested(60_000)]))
_refused(
    20,
    "PT-MSG-020 PT-MSG-022",
    "65,000 empty maps in a frame",
    pack([24, Raw(b"\xdc" + (65_000).to_bytes(2, "big") + b"\x80" * 65_000)]),
)
_refused(21, "PT-MSG-020", "4,097 elements", pack([24, *[0] * 4_096]), pack([24, [[0] * 2_048, [0] * 2_047]]))
_refused(
    22,
    "PT-MSG-020",
    "A key of 65 bytes, and of 60 kB",
    pack([24, {"k" * 65: 1}]),
    pack([24, {"k" * 60_000: 1}]),
    pack([24, {"é" * 33: 1}]),
)
_refused(23, "PT-MSG-020", "3,000 unknown keys", req({f"k{number}": 0 for number in range(3_000)}))


@case("msgpack/024", "PT-MSG-006 PT-MSG-012")
def longest_forms(bench: Bench) -> None:
    """Every width of msgpack's forms is accepted"""
    peer = bench.peer()
    answer = peer.expect(1)
    peer.link.send(wide([REQ, 1, END, "info", {"max": 65_536, "size": 0, "dl": 5_000}]))
    peer.wait(answer)
    require(answer.code != "bad_request", f"expected: accepted; observed: {answer}")


@case("msgpack/025", "PT-MSG-020 PT-MSG-044")
def at_the_limits(bench: Bench) -> None:
    """Nesting of 16, a key of 64 bytes, 4,096 elements and integers at their ends are accepted"""
    peer = bench.peer()
    values: list[Any] = [
        nested(14),
        {"k" * 64: 1},
        {"é" * 32: 1},
        -(2**63),
        2**64 - 1,
        "s" * 4_000,
        b"",
        "",
        [],
        {},
        None,
    ]
    for value in values:
        answer = peer.call("info", {"later": value})
        require(answer.code in ("", "unsupported"), f"expected: {str(value)[:30]} ignored; observed: {answer}")
    peer.link.send([24, *[0] * 4_095])
    peer.alive()


@case("msgpack/026", "PT-MSG-043")
def nil_is_absent(bench: Bench) -> None:
    """nil in an optional field is read as absent"""
    peer = bench.peer()
    require(peer.call("info", {"size": None, "dl": None}).code in ("", "unsupported"), "nil is not read as absent")


@case("msgpack/027", "PT-MSG-044")
def unknown_keys(bench: Bench) -> None:
    """Unknown keys of a request are ignored"""
    session = bench.session()
    session.step(bench.hidden(2), later={"a": [1, 2]}, x=b"y")


@case("msgpack/028", "PT-MSG-045")
def critical_keys(bench: Bench) -> None:
    """A request with an unknown key that begins with "!": ERR unsupported, and nothing is done"""
    peer = bench.peer()
    require(peer.call("info", {"!secure": 1}).code == "unsupported", "expected: ERR unsupported")
    session = bench.session(peer)
    session.refused({"unsupported"}, bench.hidden(1), **{"!verify": True})
    session.unchanged()


_REQUIRED = ("sid", "model", "blocks", "max_len", "batch", "dtype", "codec")


def _field(number: int, requirements: str, title: str, codes: str, *changes: dict[str, Any]) -> None:
    """`open` with each of these changes is refused."""

    def run(bench: Bench) -> None:
        peer = bench.peer()
        for change in changes:
            head = {k: v for k, v in (bench.open_head(bench.rng.randbytes(16)) | change).items() if v != "absent"}
            answer = peer.call("open", head)
            wrong = f"expected: open with {change} refused with {codes}; observed: {answer}"
            require(answer.code in codes.split(), wrong)
            if answer.code == "bad_request":
                bench.should(next(iter(change)) in answer.text, f"the text names the field: {answer.text!r}")

    case(f"msgpack/{number:03}", requirements, title=f"{title}: ERR {codes}")(run)


_field(29, "PT-MSG-040 PT-MSG-041 PT-SES-001", "A bool, str, bin or array where an integer is due", "bad_request",
       {"max_len": True}, {"max_len": "64"}, {"batch": True}, {"batch": b"1"}, {"max_len": [64]})  # fmt: skip
_field(30, "PT-MSG-040 PT-MSG-008", "A str where bin is due, and the reverse", "bad_request",
       {"sid": "0123456789abcdef"}, {"dtype": b"f32"}, {"model": "m" * 32})  # fmt: skip
_field(31, "PT-MSG-041 PT-SES-001", "A required field left out, or nil", "bad_request",
       *[{name: value} for name in _REQUIRED for value in ("absent", None)])  # fmt: skip
_field(32, "PT-MSG-046", "Unknown words", "unsupported", {"dtype": "f64"}, {"codec": "zip"}, {"dtype": "i64"})
_field(33, "PT-MSG-042 PT-SES-001", "Values out of range", "resources",
       {"max_len": 0}, {"max_len": 2**31}, {"max_len": -1}, {"batch": 0},
       {"batch": 10**6}, {"max_len": 2**64 - 1})  # fmt: skip
