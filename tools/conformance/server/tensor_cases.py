"""Tensors: descriptors, bodies, codecs (spec/05)."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tools.conformance import tensors
from tools.conformance.bench import Bench, Session
from tools.conformance.registry import case
from tools.conformance.tensors import Array
from tools.conformance.verdicts import require

NAN, INF = float("nan"), float("inf")


def _refused(number: int, requirements: str, codes: str, title: str, *changes: dict[str, Any]) -> None:
    """A step whose descriptor has these changes is refused, and nothing has changed."""

    def run(bench: Bench) -> None:
        session = bench.session()
        hidden = bench.hidden(2)
        session.step(hidden)
        for change in changes:
            described = tensors.descriptor(hidden) | change
            wanted = {name: value for name, value in described.items() if value != "absent"}
            _step_refused(session, hidden, codes, [wanted])

    case(f"tensors/{number:03}", requirements, title=f"{title}: ERR {codes}")(run)


def _step_refused(session: Session, hidden: Array, codes: str, described: Any, body: bytes | None = None) -> None:
    head = session.head(hidden) | {"t": described}
    answer = session.peer.call("step", head, session.body(hidden) if body is None else body)
    require(answer.code in codes.split(), f"expected: ERR {codes} for t {str(described)[:120]}; observed: {answer}")
    session.unchanged()


_refused(
    1,
    "PT-TEN-007",
    "tensor",
    "A shape of 1 GiB with a body of a few bytes",
    {"s": [1, 1 << 22, 64]},
    {"s": [1, 1 << 30, 64]},
)
_refused(
    2,
    "PT-TEN-007",
    "tensor",
    "A shape whose product overflows 64 bits",
    {"s": [2**32, 2**32, 64]},
    {"s": [2**63 - 1] * 8},
)
_refused(
    3, "PT-TEN-005", "tensor", "A dimension of 0 or below", {"s": [1, 0, 64]}, {"s": [1, -2, 64]}, {"s": [0, 2, 64]}
)
_refused(4, "PT-TEN-005", "tensor", "No dimension, or nine", {"s": []}, {"s": [1] * 8 + [128]})
_refused(
    5,
    "PT-TEN-005",
    "bad_request",
    "A dimension that is no integer",
    {"s": [1, "2", 64]},
    {"s": [True, 2, 64]},
    {"s": [1, None, 64]},
    {"s": 128},
)
_refused(
    6, "PT-TEN-004 PT-MSG-046", "unsupported", "An unknown type or codec", {"d": "f64"}, {"c": "zip"}, {"c": "i8b32"}
)
_refused(7, "PT-TEN-006", "unsupported", "i8b64 over integers", {"d": "i64", "c": "i8b64"}, {"d": "u8", "c": "i8b64"})
_refused(8, "PT-SES-021 PT-SES-002", "tensor", "Another hidden size, batch or number of dimensions",
         {"s": [1, 2, 63]}, {"s": [1, 4, 32]}, {"s": [2, 1, 64]}, {"s": [2, 64]}, {"s": [1, 1, 2, 64]})  # fmt: skip
_refused(
    9,
    "PT-SES-002",
    "tensor unsupported",
    "Integers where hidden states are due",
    {"d": "i64", "s": [1, 1, 64]},
    {"d": "u8", "s": [1, 8, 64]},
)
_refused(
    10,
    "PT-TEN-003 PT-SES-004",
    "bad_request",
    "A tensor of another name",
    {"n": "hidden"},
    {"n": "H"},
    {"n": ""},
    {"n": "n" * 65},
)
_refused(11, "PT-TEN-001 PT-MSG-041", "bad_request", "A descriptor without one of its keys",
         *[{name: "absent"} for name in "ndsc"], *[{name: None} for name in "ndsc"])  # fmt: skip
_refused(12, "PT-MSG-045 PT-TEN-001", "unsupported", "A critical key in a descriptor", {"!zstd": 1})
_refused(
    13,
    "PT-MSG-040 PT-TEN-001",
    "bad_request",
    "Keys of a descriptor of wrong types",
    {"n": b"h"},
    {"d": 1},
    {"c": True},
    {"d": ["f32"]},
)


@case("tensors/014", "PT-TEN-003 PT-SES-004")
def several(bench: Bench) -> None:
    """A name twice, two tensors, none, or a list that is none: ERR bad_request"""
    session = bench.session()
    hidden = bench.hidden(2)
    good = tensors.descriptor(hidden)
    wrong: list[Any] = [[good, good], [good, good | {"n": "x"}], [], {}, None, [good, 7], "h"]
    for described in wrong:
        _step_refused(session, hidden, "bad_request", described)


@case("tensors/015", "PT-TEN-002")
def sixty_five(bench: Bench) -> None:
    """65 descriptors: ERR bad_request"""
    session = bench.session()
    hidden = bench.hidden(1)
    described = [tensors.descriptor(hidden) | {"n": f"t{number}"} for number in range(65)]
    _step_refused(session, hidden, "bad_request", described)


@case("tensors/016", "PT-TEN-021 PT-TEN-020")
def other_size(bench: Bench) -> None:
    """A body whose size is not that of its tensors: ERR tensor"""
    session = bench.session()
    hidden = bench.hidden(2)
    body = session.body(hidden)
    for wrong in (body[:-1], body + b"\0", body[:4], body * 2, b""):
        _step_refused(session, hidden, "tensor", [tensors.descriptor(hidden)], wrong)


def _not_finite(number: int, dtype: str) -> None:
    def run(bench: Bench) -> None:
        session = bench.session(dtype=dtype)
        hidden = bench.hidden(3)
        session.step(hidden)
        for value in (NAN, INF, -INF):
            bad = hidden.copy()
            bad[0, 1, 17] = value
            session.refused({"tensor"}, bad)
            session.unchanged()
        session.step(hidden)

    case(f"tensors/{number:03}", "PT-TEN-024", title=f"NaN and infinity in {dtype}: ERR tensor, no cache changes")(run)


_not_finite(17, "f32")
_not_finite(18, "f16")
_not_finite(19, "bf16")


def _bad_int8(number: int, requirements: str, title: str, dtype: str, *changes: tuple[str, Any]) -> None:
    """Changes of a right i8b64 body: ("scale", f32) of the first block, or ("code", int8) of its second value."""

    def run(bench: Bench) -> None:
        session = bench.session(dtype=dtype, codec="i8b64")
        hidden = bench.hidden(2)
        session.step(hidden)
        for kind, value in changes:
            body = bytearray(session.body(hidden))
            blocks = 2 * -(-hidden.shape[2] // tensors.BLOCK)
            if kind == "code":
                body[4 * blocks + 1] = value & 0xFF
            else:
                body[:4] = struct.pack("<I", value) if isinstance(value, int) else struct.pack("<f", value)
            answer = session.peer.call("step", session.head(hidden), bytes(body))
            require(answer.code == "tensor", f"expected: ERR tensor for {kind} {value}; observed: {answer}")
            session.unchanged()

    case(f"tensors/{number:03}", requirements, title=f"{title}: ERR tensor")(run)


_bad_int8(
    20,
    "PT-TEN-044",
    "i8b64 with a scale of NaN or infinity",
    "f32",
    ("scale", NAN),
    ("scale", INF),
    ("scale", -INF),
    ("scale", 0x7F800001),
)
_bad_int8(
    21,
    "PT-TEN-044",
    "i8b64 with a negative scale, -0 included",
    "f32",
    ("scale", -1.0),
    ("scale", 0x80000000),
    ("scale", 0x80000001),
)
_bad_int8(22, "PT-TEN-044", "i8b64 with a scale of 2^121 or more", "f32", ("scale", 2.0**121), ("scale", 0x7F7FFFFF))
_bad_int8(
    23, "PT-TEN-044", "i8b64 for f16 with a scale of 515.875 or more", "f16", ("scale", 515.875), ("scale", 65_504.0)
)
_bad_int8(24, "PT-TEN-045", "i8b64 with the code -128", "f32", ("code", -128))
_bad_int8(25, "PT-TEN-045", "i8b64 with codes in a block of scale 0", "f32", ("scale", 0.0))


@case("tensors/026", "PT-TEN-046 PT-TEN-050")
def odd_scales(bench: Bench) -> None:
    """Scales that are subnormal or large but allowed are accepted"""
    session = bench.session(dtype="f32", codec="i8b64")
    hidden = bench.hidden(1)
    for value in (1e-44, 1e-30, 1e4, 3e30):
        body = bytearray(session.body(hidden))
        body[:4] = struct.pack("<f", value)
        answer = session.peer.call("step", session.head(hidden, pos=0), bytes(body))
        if value < 1e5 or answer.code != "tensor":  # squares of 1e32 overflow in a norm: the result cannot be sent
            session.accept(answer, hidden, pos=0)


def _round_trip(number: int, dtype: str, codec: str, tolerance: float) -> None:
    def run(bench: Bench) -> None:
        session = bench.session(dtype=dtype, codec=codec)
        hidden = bench.hidden(5)
        output = session.step(hidden)
        sent = tensors.decode(session.body(hidden), dtype, hidden.shape, codec)
        bench.close_to(output[0], bench.formula(sent[0]), f"{dtype} {codec}", tolerance)

    title = f"A step with {dtype} {codec} gives the formula model's numbers"
    case(
        f"tensors/{number:03}",
        "PT-TEN-010 PT-TEN-030 PT-TEN-040 PT-TEN-050 PT-TEN-051 PT-MDL-020 PT-MDL-060",
        title=title,
    )(run)


_round_trip(27, "f32", "raw", 0.0)
_round_trip(28, "f16", "raw", 2e-3)
_round_trip(29, "bf16", "raw", 1e-2)
_round_trip(30, "f32", "i8b64", 1.5e-2)
_round_trip(31, "f16", "i8b64", 1.5e-2)
_round_trip(32, "bf16", "i8b64", 2e-2)


@case("tensors/033", "PT-TEN-041 PT-TEN-042")
def int8_bytes(bench: Bench) -> None:
    """The server encodes i8b64 by the chapter's steps: the same bytes as from its raw reply"""
    coded = bench.session(dtype="f32", codec="i8b64", max_len=256)
    plain = bench.session(coded.peer, dtype="f32", max_len=256)
    hidden = bench.hidden(200)
    answer = coded.call(hidden)
    coded.check(answer, hidden)
    raw = plain.step(tensors.decode(coded.body(hidden), "f32", hidden.shape, "i8b64"))
    scales, codes = tensors.quantize(raw)
    count = 4 * scales.size
    found_scales = np.frombuffer(bytes(answer.body), "<f4", scales.size).reshape(scales.shape)
    found_codes = np.frombuffer(bytes(answer.body), np.int8, offset=count).reshape(codes.shape)
    off = np.abs(found_codes.astype(int) - codes)
    same = float((off == 0).mean())
    require(np.allclose(found_scales, scales, rtol=1e-4), "the scales are not max / 127 of each block")
    # the two sessions may differ in the last bits of their sums, so a value near a half may fall the other way
    require(
        off.max() <= 1 and same >= 0.98, f"expected: the same codes; observed: {same:.1%} the same, off by {off.max()}"
    )


@case("tensors/034", "PT-TEN-011")
def narrowing(bench: Bench) -> None:
    """Replies in f16 and bf16 are rounded to nearest: the same values as from the f32 reply"""
    peer = bench.peer()
    values = bench.hidden(100)
    for dtype in ("f16", "bf16"):
        narrow = bench.session(peer, dtype=dtype, max_len=128)
        wide = bench.session(peer, dtype="f32", max_len=128)
        sent = tensors.decode(narrow.body(values), dtype, values.shape)
        found = narrow.step(values)
        wanted = tensors.decode(tensors.encode(wide.step(sent), dtype), dtype, values.shape)
        same = float((found == wanted).mean())
        require(same >= 0.98, f"expected: {dtype} rounded to nearest; observed: {same:.1%} of the values")


@case("tensors/035", "PT-TEN-043 PT-MDL-031")
def cut_independent(bench: Bench) -> None:
    """A token's i8b64 code does not depend on its neighbours: the same step in other company, the same bytes"""
    session = bench.session(codec="i8b64", batch=2)
    row = bench.hidden(1)
    first = session.step(np.concatenate([row, row]))
    second = session.step(np.concatenate([row, 100 * bench.hidden(1)]), pos=0)
    bench.close_to(second[0], first[0], "row 0 beside another row 1", 1e-3)


@case("tensors/036", "PT-TEN-020")
def tiny_blocks(bench: Bench) -> None:
    """A token of zeros, and one with a block of zeros, travel in i8b64"""
    session = bench.session(codec="i8b64")
    hidden = bench.hidden(2)
    hidden[0, 1, : min(64, hidden.shape[2])] = 0
    session.step(hidden)
    session.step(np.zeros_like(hidden))
