"""Hypothesis strategies for whoever implements the protocol: valid things, and things with one fault each.

They make bytes and plain values, so any implementation in reach of Python can be tested with them:

    @given(strategies.broken_frames())
    def test_a_broken_frame_costs_the_connection(case):
        assert my_decoder(case.data) == case.reaction

Needs hypothesis, which petalite itself does not.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from petalite import limits
from petalite.dht.records import make_record
from petalite.errors import ErrorCode, GoAwayCode
from petalite.identity import Address, Identity, PeerId
from petalite.wire import tensors

Reaction = Literal["goaway", "err", "answered"]

# --- msgpack (spec 04) ------------------------------------------------------------------------------------------------

_INTEGERS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-130, 260))
_KEYS = st.text(max_size=16).filter(lambda text: len(text.encode()) <= limits.MAX_KEY)
_LEAVES = st.one_of(st.none(), st.booleans(), _INTEGERS, st.text(max_size=40), st.binary(max_size=40))


def values() -> SearchStrategy[Any]:
    """Any value of the protocol: None, bool, int, str, bytes, and lists and dicts of them."""
    return st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=5) | maps(inner), max_leaves=20)


def maps(inner: SearchStrategy[Any] | None = None) -> SearchStrategy[dict[str, Any]]:
    return st.dictionaries(_KEYS, values() if inner is None else inner, max_size=5)


def spellings(value: Any) -> SearchStrategy[bytes]:
    """`value` as msgpack in any of its forms, the longer than needed too (PT-MSG-006)."""
    return st.composite(_spell)(value)


def _spell(draw: DrawFn, value: Any) -> bytes:
    """One form of `value`, each length and integer in a width that is drawn."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return draw(st.sampled_from(_integer_forms(value)))
    if isinstance(value, str):
        data = value.encode()
        return draw(st.sampled_from(_lengths(len(data), 0xA0, 31, (0xD9, 0xDA, 0xDB)))) + data
    if isinstance(value, bytes):
        return draw(st.sampled_from(_lengths(len(value), 0, -1, (0xC4, 0xC5, 0xC6)))) + value
    if isinstance(value, dict):
        body = b"".join(_spell(draw, key) + _spell(draw, item) for key, item in value.items())
        return draw(st.sampled_from(_lengths(len(value), 0x80, 15, (None, 0xDE, 0xDF)))) + body
    return draw(st.sampled_from(_lengths(len(value), 0x90, 15, (None, 0xDC, 0xDD)))) + b"".join(
        _spell(draw, item) for item in value
    )


def _integer_forms(value: int) -> list[bytes]:
    forms = [bytes([value & 0xFF])] if -32 <= value <= 127 else []
    for width, (unsigned, signed) in zip("BHIQ", ((0xCC, 0xD0), (0xCD, 0xD1), (0xCE, 0xD2), (0xCF, 0xD3)), strict=True):
        for tag, form in ((unsigned, f">B{width}"), (signed, f">B{width.lower()}")):
            try:
                forms.append(struct.pack(form, tag, value))
            except struct.error:  # does not fit
                continue
    return forms


def _lengths(count: int, fix: int, most: int, tags: tuple[int | None, ...]) -> list[bytes]:
    forms = [bytes([fix | count])] if count <= most else []
    for tag, width in zip(tags, "BHI", strict=True):
        if tag is not None and count < 1 << 8 * struct.calcsize(width):
            forms.append(struct.pack(f">B{width}", tag, count))
    return forms


@dataclass(frozen=True)
class Broken:
    """Bytes with one fault: the requirement that they break, and the GOAWAY that they cost where they are a frame."""

    data: bytes
    rule: str
    code: GoAwayCode = GoAwayCode.FRAME


def broken_msgpack() -> SearchStrategy[Broken]:
    """A map that would be fine but for one fault in it."""
    return st.composite(_break_msgpack)()


_MSGPACK_FAULTS: dict[str, list[bytes]] = {
    "PT-MSG-002": [b"\xc1"],
    "PT-MSG-003": [b"\xca\x40\x40\0\0", b"\xcb\x7f\xf8" + bytes(6), b"\xcb" + bytes(8)],
    "PT-MSG-004": [b"\xd6\xff\0\0\0\0", b"\xd4\x01\0", b"\xc7\0\x05", b"\xd8\x07" + bytes(16)],
    "PT-MSG-007": [b"\xa3\xed\xa0\x80", b"\xa1\xff", b"\xa2\xc0\x80"],
    "PT-MSG-010": [b"\x81\xc4\x01a\x01", b"\x81\x01\x01", b"\x81\xc0\x01"],
    "PT-MSG-011": [b"\x82\xa1a\x01\xa1a\x02", b"\x82\xa1a\x01\xd9\x01a\x01"],
    "PT-MSG-020": [b"\x91" * 17 + b"\x90", b"\xdc\x10\x01" + bytes(4_097), b"\x81\xd9\x41" + b"k" * 65 + b"\x01"],
    "PT-MSG-021": [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"],
}


def _break_msgpack(draw: DrawFn) -> Broken:
    """A faulty value among good ones, at a depth that is drawn."""
    good = draw(spellings(draw(values())))
    rule = draw(st.sampled_from(["PT-MSG-009", *_MSGPACK_FAULTS]))
    if rule == "PT-MSG-009":  # a byte too many, or one too few
        return Broken(good + b"\xc0" if draw(st.booleans()) else b"\x92" + good, rule)
    fault = draw(st.sampled_from(_MSGPACK_FAULTS[rule]))
    around = draw(st.sampled_from((b"", b"\x91", b"\x81\xa1x")))
    return Broken(b"\x92" + good + around + fault, rule)


# --- frames (spec 02) -------------------------------------------------------------------------------------------------

_STREAMS = st.integers(1, 2**53 - 1)
_FLAGS = st.integers(0, 1)
_CODES = st.integers(0, 2**32 - 1)
_PAYLOADS = st.binary(min_size=limits.PING_BYTES, max_size=limits.PING_BYTES)
_METHODS = st.text(max_size=limits.MAX_METHOD)
_TEXTS = st.text(max_size=80)
_BODIES = st.binary(max_size=300)


def frames() -> SearchStrategy[list[Any]]:
    """A valid frame as the list that it is in msgpack, ignorable ones too."""
    return st.one_of(
        st.tuples(st.just(0), maps().map(lambda head: {"v": 0, **head})),
        st.tuples(st.just(1), _STREAMS, _FLAGS, _METHODS, maps()),
        st.tuples(st.just(2), _STREAMS, _FLAGS, maps()),
        st.tuples(st.just(3), _STREAMS, _FLAGS, _BODIES),
        st.tuples(st.just(4), _STREAMS, _CODES, _TEXTS, maps()),
        st.tuples(st.just(5), _STREAMS),
        st.tuples(st.sampled_from((6, 7)), _PAYLOADS),
        st.tuples(st.just(8), _CODES, st.integers(0, 2**53 - 1), _TEXTS),
        st.tuples(st.just(16), _STREAMS, maps()),
        st.tuples(st.integers(17, 31), values()),
    ).map(list)


def broken_frames() -> SearchStrategy[Broken]:
    """The plaintext of a record with one fault, of msgpack or of the frame."""
    return broken_msgpack() | st.composite(_break_frame)()


def _break_frame(draw: DrawFn) -> Broken:
    frame = draw(frames().filter(lambda each: each[0] <= 16))
    faults: dict[str, Callable[[], tuple[Any, GoAwayCode]]] = {
        "PT-FRM-002": lambda: (draw(_misshapen(frame)), GoAwayCode.FRAME),
        "PT-FRM-011": lambda: ([draw(st.sampled_from((9, 15, 32, 255, -1))), *frame[1:]], GoAwayCode.PROTOCOL),
    }
    if frame[0] in (1, 2, 3, 4, 5, 16):
        wrong = draw(st.sampled_from((0, 2**53, 2**64 - 1, -1)))
        faults["PT-FRM-005"] = lambda: ([frame[0], wrong, *frame[2:]], GoAwayCode.PROTOCOL)
    if frame[0] in (1, 2, 3):
        faults["PT-FRM-006"] = lambda: (
            [*frame[:2], frame[2] | draw(st.sampled_from((2, 4, 128))), *frame[3:]],
            GoAwayCode.FRAME,
        )
    if frame[0] == 3:
        faults["PT-FRM-007"] = lambda: ([*frame[:3], bytes(limits.MAX_DATA + 1)], GoAwayCode.FRAME)
    if frame[0] == 1:
        faults["PT-FRM-009"] = lambda: ([*frame[:3], "m" * (limits.MAX_METHOD + 1), frame[4]], GoAwayCode.FRAME)
    rule = draw(st.sampled_from(sorted(faults)))
    value, code = faults[rule]()
    return Broken(draw(spellings(value)), rule, code)


def _misshapen(frame: list[Any]) -> SearchStrategy[Any]:
    """An element too few or too many, no array, or a type that is no integer."""
    return st.sampled_from(
        ([*frame, None], frame[:-1], {"0": frame[0]}, [True, *frame[1:]], [str(frame[0]), *frame[1:]])
    )


# --- a conversation with one mutation (spec 02 and 03) ----------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """What an initiator says, frame by frame, and how a responder that knows the method `echo` must react to it.

    `echo` answers with the body of its request. `tamper`: which frame's record is to be damaged on its way and how
    ("flip" a byte, "repeat" the record, "short": a length below 17), None for none. `reaction`: what must come of it,
    with the code of GOAWAY or ERR, and the stream that is answered or refused.
    """

    frames: tuple[bytes, ...]
    rule: str
    reaction: Reaction
    code: int = 0
    stream: int = 0
    tamper: tuple[int, str] | None = None

    def to_json(self) -> str:
        """One line, to keep a failure as a case of its own."""
        plain = {**self.__dict__, "frames": [frame.hex() for frame in self.frames]}
        return json.dumps(plain, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Script:
        plain = json.loads(text)
        tamper = tuple(plain["tamper"]) if plain["tamper"] else None
        return cls(**{**plain, "frames": tuple(map(bytes.fromhex, plain["frames"])), "tamper": tamper})


def scripts(*mutations: str) -> SearchStrategy[Script]:
    """A valid conversation, or one with a single structured mutation at any layer above the handshake.

    `mutations`: some of MUTATIONS, all by default.
    """
    return st.composite(_mutate)(mutations or MUTATIONS)


def _exchange(draw: DrawFn, stream: int) -> list[list[Any]]:
    """A request on `stream` and its body in pieces."""
    body = draw(_BODIES)
    head = {"size": len(body), "max": len(body), **draw(st.dictionaries(st.just("unknown"), values(), max_size=1))}
    cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=2))})
    pieces = [body[start:end] for start, end in itertools.pairwise(cuts)]
    data = [[3, stream, int(number == len(pieces) - 1), piece] for number, piece in enumerate(pieces)]
    return [[1, stream, int(not body), "echo", head], *data]


def _mutate(draw: DrawFn, mutations: Sequence[str]) -> Script:
    hello: list[Any] = [0, {"v": 0}]
    before = _exchange(draw, 1)
    last = _exchange(draw, draw(st.sampled_from((3, 5, 1_001))))
    rule = draw(st.sampled_from(mutations))
    said, reaction, code, tamper = _MUTATIONS[rule](hello, before, last)
    plain = tuple(frame if isinstance(frame, bytes) else draw(spellings(frame)) for frame in said)
    return Script(plain, rule.partition(" ")[0], reaction, code, last[0][1], tamper)


Said = list[Any]
Mutation = Callable[[Said, list[Said], list[Said]], tuple[list[Any], Reaction, int, "tuple[int, str] | None"]]
_FRAME, _PROTOCOL, _DECRYPT = GoAwayCode.FRAME, GoAwayCode.PROTOCOL, GoAwayCode.DECRYPT


def _goaway(*said: Any, code: GoAwayCode = _PROTOCOL, tamper: tuple[int, str] | None = None) -> Any:
    return list(said), "goaway", int(code), tamper


def _err(said: list[Any], code: ErrorCode) -> Any:
    return said, "err", int(code), None


def _with(request: Said, **head: Any) -> Said:
    """The request with other keys in its head; `critical` stands for a key that begins with an exclamation mark."""
    renamed = {("!new" if key == "critical" else key): value for key, value in head.items()}
    return [*request[:4], {**request[4], **renamed}]


_MUTATIONS: dict[str, Mutation] = {
    "PT-STR-004 nothing wrong": lambda hello, one, two: ([hello, *one, *two], "answered", 0, None),
    "PT-FRM-010": lambda hello, one, two: ([hello, [31, "new"], *two], "answered", 0, None),
    "PT-FRM-032": lambda hello, one, two: ([hello, [7, bytes(8)], *two], "answered", 0, None),
    "PT-STR-005": lambda hello, one, two: ([hello, *one, [5, 1], [5, 1], *two], "answered", 0, None),
    "PT-FRM-020": lambda hello, one, two: _goaway(*two, hello),
    "PT-FRM-021": lambda hello, one, two: _goaway(hello, hello, *two),
    "PT-FRM-024": lambda hello, one, two: _goaway([0, {}], *two),
    "PT-FRM-042": lambda hello, one, two: _goaway(hello, [8, 0, 0, ""], *two),
    "PT-FRM-023": lambda hello, one, two: _goaway([0, {"v": 0, "agent": "x", "pad": bytes(4_096)}], code=_FRAME),
    "PT-STR-002 parity": lambda hello, one, two: _goaway(hello, [1, 2, 1, "echo", {}]),
    "PT-STR-002 again": lambda hello, one, two: _goaway(hello, *one, one[0]),
    "PT-STR-006": lambda hello, one, two: _goaway(hello, [3, 1, 1, b""], *two),
    "PT-STR-006 reply": lambda hello, one, two: _goaway(hello, [2, 2, 1, {}], *two),
    "PT-TRN-064 flip": lambda hello, one, two: _goaway(hello, *two, code=_DECRYPT, tamper=(1, "flip")),
    "PT-TRN-064 repeat": lambda hello, one, two: _goaway(hello, *two, code=_DECRYPT, tamper=(0, "repeat")),
    "PT-TRN-061": lambda hello, one, two: _goaway(hello, *two, code=_FRAME, tamper=(1, "short")),
    "PT-STR-012 method": lambda hello, one, two: _err(
        [hello, [*two[0][:3], "none", two[0][4]], *two[1:]], ErrorCode.UNSUPPORTED
    ),
    "PT-STR-012 key": lambda hello, one, two: _err([hello, _with(two[0], critical=1), *two[1:]], ErrorCode.UNSUPPORTED),
    "PT-STR-011 size": lambda hello, one, two: _err([hello, _with(two[0], size=-1), *two[1:]], ErrorCode.BAD_REQUEST),
    "PT-STR-011 type": lambda hello, one, two: _err([hello, _with(two[0], max="1"), *two[1:]], ErrorCode.BAD_REQUEST),
    "PT-STR-011 end": lambda hello, one, two: _err(
        [hello, [*two[0][:2], 1, "echo", {"size": 1}]], ErrorCode.BAD_REQUEST
    ),
    "PT-STR-011 large": lambda hello, one, two: _err(
        [hello, [*two[0][:2], 0, "echo", {"size": limits.MAX_BODY + 1}]], ErrorCode.BAD_REQUEST
    ),
    "PT-STR-023 long": lambda hello, one, two: _err(
        [hello, [*two[0][:2], 0, "echo", {"size": 1}], [3, two[0][1], 1, b"12"]], ErrorCode.TENSOR
    ),
    "PT-STR-023 short": lambda hello, one, two: _err(
        [hello, [*two[0][:2], 0, "echo", {"size": 3}], [3, two[0][1], 1, b"12"]], ErrorCode.TENSOR
    ),
    "PT-STR-023 no end": lambda hello, one, two: _err(
        [hello, [*two[0][:2], 0, "echo", {"size": 2}], [3, two[0][1], 0, b"12"]], ErrorCode.TENSOR
    ),
}


MUTATIONS = tuple(_MUTATIONS)
"""What `scripts` can do: the requirement, and a word where it can be broken in several ways."""

# --- tensors (spec 05) ------------------------------------------------------------------------------------------------


def activations(dtype: str = "f32", most: int = 300) -> SearchStrategy[npt.NDArray[Any]]:
    """Finite values of a float type, of any magnitude it has, in 1 to 3 dimensions; uint16 holds the bits of bf16."""
    return st.composite(_activations)(dtype, most)


def _activations(draw: DrawFn, dtype: str, most: int) -> npt.NDArray[Any]:
    shape = draw(st.lists(st.integers(1, 4), max_size=2).map(tuple).flatmap(_last_dimension(most)))
    seed, power = draw(st.integers(0, 2**32 - 1)), draw(st.integers(-130, 100))
    values = np.random.default_rng(seed).standard_normal(shape) * 2.0**power
    top = {"f32": 2.0**126, "f16": 65_504.0, "bf16": 2.0**126}[dtype]
    narrow = np.clip(values, -top, top).astype(np.float32)
    return narrow.astype(np.float16) if dtype == "f16" else _bf16(narrow) if dtype == "bf16" else narrow


def _last_dimension(most: int) -> Callable[[tuple[int, ...]], SearchStrategy[tuple[int, ...]]]:
    widths = st.one_of(st.integers(1, most), st.sampled_from((1, 63, 64, 65, 128, 129)))
    return lambda shape: widths.map(lambda width: (*shape, width))


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def descriptors() -> SearchStrategy[dict[str, Any]]:
    """A valid descriptor as it stands in a head."""
    shapes = st.lists(st.integers(1, 9), min_size=1, max_size=limits.MAX_DIMENSIONS - 1)
    names = st.text("abchmnst_", min_size=1, max_size=limits.MAX_TENSOR_NAME)
    floats = st.tuples(st.sampled_from(sorted(tensors.FLOATS)), st.sampled_from(tensors.CODECS))
    kinds = floats | st.tuples(st.sampled_from(("i64", "u8")), st.just(tensors.RAW))
    return st.builds(
        lambda name, kind, shape: {"n": name, "d": kind[0], "s": shape, "c": kind[1]}, names, kinds, shapes
    )


# --- peers, addresses, records (spec 01 and 10) -----------------------------------------------------------------------


def identities() -> SearchStrategy[Identity]:
    return st.binary(min_size=32, max_size=32).map(Identity)


def peer_ids() -> SearchStrategy[PeerId]:
    return st.binary(min_size=32, max_size=32).map(PeerId)


def addresses() -> SearchStrategy[Address]:
    """With an IPv4 or IPv6 address or a name."""
    labels = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
    names = st.lists(labels, min_size=1, max_size=3).map(".".join)
    hosts = st.one_of(st.ip_addresses().map(str), names)
    return st.builds(Address, peer_ids(), hosts, st.integers(1, 65_535))


def records(network: str = "petalite", now_ms: int = 1_700_000_000_000) -> SearchStrategy[bytes]:
    """Signed records that are valid at `now_ms`, of any publisher under any key; a withdrawal now and then."""

    def make(identity: Identity, key: bytes, val: Mapping[str, Any] | None, age: int, left: int) -> bytes:
        return make_record(
            network,
            key,
            None if val is None else dict(val),
            seq=now_ms - age,
            exp=now_ms + left,
            public_key=identity.public_key,
            sign=identity.sign,
        )

    times = st.integers(0, 600_000), st.integers(1, limits.RECORD_EXPIRY_SECONDS * 1000)
    small = st.dictionaries(st.text("abc", max_size=4), _LEAVES, max_size=4)
    return st.builds(make, identities(), st.binary(min_size=32, max_size=32), st.none() | small, *times)
