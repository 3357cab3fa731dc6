"""Where fuzzing starts: valid and nearly valid inputs of each target, from the vectors and chapters of spec/."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.decoders import step_frame
from petalite.dht import messages as dht
from petalite.dht.contacts import Contact
from petalite.identity import Identity, PeerId
from petalite.lan.announcement import Announcement
from petalite.wire import certificate, frames, packing, tensors
from petalite.wire.hello import Hello
from petalite.wire.messages import METHODS
from petalite.wire.training import TRAINING_METHODS

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "spec"
REGRESSIONS = ROOT / "fuzz" / "regressions"

_HEX = re.compile(r"\b(?:[0-9a-f]{2} ?){2,}\b")
_SID, _PEER, _MODEL = bytes(range(16)), bytes(range(32)), bytes(32)


def chapter_bytes(name: str) -> Iterator[bytes]:
    """Every example in hexadecimal of a chapter; what is none does no harm."""
    for path in SPEC.glob(f"{name}*.md"):
        for found in _HEX.findall(path.read_text(encoding="utf-8")):
            yield bytes.fromhex(found)


def vector_bytes(*names: str) -> Iterator[bytes]:
    """Every string in hexadecimal of some files of spec/vectors, where they are there."""

    def walk(value: Any) -> Iterator[bytes]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from walk(item)
        elif isinstance(value, str) and re.fullmatch("(?:[0-9a-f]{2})+", value):
            yield bytes.fromhex(value)

    for name in names:
        path = SPEC / "vectors" / f"{name}.json"
        if path.exists():
            yield from walk(json.loads(path.read_text(encoding="utf-8")))


def of(target: str) -> list[bytes]:
    """All seeds of one target, with the inputs that once were findings."""
    found = list(_SEEDS[target]()) + [path.read_bytes() for path in sorted((REGRESSIONS / target).glob("*"))]
    return [b"", *dict.fromkeys(found)]


def near_misses(name: str, count: int) -> list[bytes]:
    """Seeds with some bytes changed, cut out or doubled; the same ones every time."""
    draw, found = random.Random(name), of(name)
    start = list(found)
    for _ in range(count):
        data = bytearray(draw.choice(start))
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(3):
                case 0 if at < len(data):
                    data[at] = draw.randrange(256)
                case 1:
                    del data[at : at + draw.randrange(1, 9)]
                case _:
                    data[at:at] = draw.choice((data[at : at + 5], draw.randbytes(2), b"\xdd\xff\xff\xff\xff"))
        found.append(bytes(data))
    return found


def _frames() -> Iterator[bytes]:
    made: list[frames.Frame] = [
        frames.Hello(Hello(agent="x").to_wire()),
        frames.Req(1, True, "step", {"size": 0}),
        frames.Res(1, False, {"size": 3}),
        frames.Data(1, True, b"abc"),
        frames.Err(1, 10, "busy", {"retry": True}),
        frames.Cancel(5),
        frames.Ping(bytes(8)),
        frames.Pong(bytes(8)),
        frames.GoAway(9, 7, "restart"),
        frames.Progress(1, {"s": "running"}),
        frames.Ignorable(31),
    ]
    yield from map(frames.encode, made)
    yield from chapter_bytes("02")
    yield from chapter_bytes("03")
    yield from vector_bytes("frames")


def _repeats() -> Iterator[bytes]:
    for number in (4, 200, 70_000, 2**40):
        yield step_frame({"sid": bytes(range(32)), "n": number, "size": 8}, 2 * number + 1)
        yield step_frame({"n": number, "size": 8, "t": [{"s": [1, 1, 4]}], "pos": number}, number)
    yield from _frames()


def _packing() -> Iterator[bytes]:
    yield from chapter_bytes("04")
    yield from vector_bytes("strict_msgpack")
    yield from _frames()


def _hello() -> Iterator[bytes]:
    yield packing.encode(Hello(agent="x/1", time=1, observed="[::1]:1").to_wire())
    yield packing.encode({"v": 0, "caps": {"push": {"v": 1}}, "limits": {"body": 1, "streams": 1}, "!": 1})


def _certificate() -> Iterator[bytes]:
    yield certificate.issue(Identity(bytes(32)), bytes(range(32)), b"petalite", 1_700_000_000 + 43_200)
    yield from (data for data in chapter_bytes("01") if data[:1] == b"\x83")


def _tensors() -> Iterator[bytes]:
    draw = np.random.default_rng(1)
    for dtype, codec, shape in (
        ("f32", "raw", (2, 3)),
        ("f16", "i8b64", (1, 70)),
        ("bf16", "i8b64", (2, 1, 64)),
        ("u8", "raw", (5,)),
    ):
        values = draw.standard_normal(shape).astype(np.float32)
        array = values.astype(np.uint8) if dtype == "u8" else tensors._narrow(values, dtype)
        head = packing.encode([tensors.describe("h", array, codec).to_wire()])
        yield bytes([len(head)]) + head + b"".join(tensors.encode(array, codec))
    for names in ("ab", "aa"):
        head = packing.encode([tensors.Descriptor(name, "f32", (2,)).to_wire() for name in names])
        yield bytes([len(head)]) + head + bytes(16)
    head = packing.encode([tensors.Descriptor("h", "f16", (2,)).to_wire()])
    yield bytes([len(head)]) + head + b"\x00\x3c\x00\x7c"
    yield from (bytes([len(data) % 256]) + data + bytes(8) for data in chapter_bytes("05"))
    yield from (_with_body(each) for each in _tensor_vectors())


def _tensor_vectors() -> Iterator[dict[str, Any]]:
    path = SPEC / "vectors" / "tensors.json"
    if path.exists():
        whole = json.loads(path.read_text(encoding="utf-8"))
        yield from (each for key in ("good", "bad_bodies") for each in whole[key])


def _with_body(vector: dict[str, Any]) -> bytes:
    head = packing.encode([vector["descriptor"]])
    return bytes([len(head)]) + head + bytes.fromhex(vector["body"])


def _examples() -> dict[str, list[dict[str, Any]]]:
    """Heads of requests and replies, a pair a method."""
    hidden = [{"n": "h", "d": "f16", "s": [1, 2, 4], "c": "raw"}]
    step = {
        "sid": _SID,
        "n": 3,
        "pos": 17,
        "hypo": [0],
        "pad": [1],
        "last": 1,
        "next": [{"peer": _PEER, "sid": _SID}],
        "t": hidden,
    }
    done = {"n": 3, "pos": 19, "t": hidden}
    info: dict[str, Any] = {
        "model": _MODEL,
        "name": "m",
        "blocks": [0, 4],
        "layers": 8,
        "hidden": 64,
        "dtype": "float32",
    }
    info |= {"codecs": ["raw"], "max_len": 2048, "max_batch": 8, "cache_left": 9, "state": "online", "version": "1"}
    info |= {"next_hops": [{"id": bytes(8), "us": 5}], "moving_to": [4, 8], "addrs": ["127.0.0.1:1"], "queue": 3}
    opening = {"sid": _SID, "model": _MODEL, "blocks": [0, 4], "max_len": 8, "batch": 1, "dtype": "f16", "codec": "raw"}
    tensor = {"n": "h", "d": "f16", "s": [1, 2, 64], "c": "raw"}
    passing = {"model": _MODEL, "blocks": [0, 4], "t": [tensor]}
    return {
        "info": [{}, info],
        "manifest": [{"model": _MODEL}, {"t": [{"n": "manifest", "d": "u8", "s": [5], "c": "raw"}]}],
        "open": [opening | {"from": _PEER}, {"pos": 0, "ttl": 600}],
        "step": [step, done],
        "extend": [{"sid": _SID, "max_len": 16}, {"max_len": 16}],
        "status": [{"sid": _SID}, {"n": 1, "pos": 2, "max_len": 8}],
        "close": [{"sid": _SID}, {}],
        "await": [{"sid": _SID, "n": 1}, done],
        "push": [step | {"owner": _PEER}, {}],
        "forward": [passing | {"taps": [1]}, {"t": [tensor]}],
        "backward": [passing | {"wanted": ["h"], "t": [tensor, tensor | {"n": "grad"}]}, {"t": [tensor]}],
    }


def _messages() -> Iterator[bytes]:
    known = _examples()
    methods = METHODS | TRAINING_METHODS
    for number, name in enumerate(methods):
        for side, head in enumerate(known.get(name, [{}, {}])):
            yield bytes([2 * number + side]) + packing.encode(head)
    too_much = packing.encode(known["step"][0] | {"last": 9})
    yield from (bytes([2 * list(methods).index(name)]) + too_much for name in ("step", "push"))
    yield from (bytes([kind % len(methods) * 2]) + data for kind, data in enumerate(vector_bytes("messages")))


def _manifest() -> Iterator[bytes]:
    whole = (ROOT / "petalite" / "fairytale" / "petalite-manifest.json").read_bytes()
    yield whole
    config = json.loads(whole)["config"] | {"hidden_size": 4, "n_head": 1, "n_layer": 1, "vocab_size": 4}
    small = {"config": config, "format": "petalite-manifest-1", "tensors": {"h.0.x": ["F16", [4], "00" * 32]}}
    yield json.dumps(small, separators=(",", ":"), sort_keys=True).encode()


def _dht_records() -> Iterator[bytes]:
    yield from vector_bytes("dht")
    yield from chapter_bytes("10")


def _dht_messages() -> Iterator[bytes]:
    made: tuple[dht.Request | dht.Reply, ...] = (
        dht.Ping(addrs=("1.2.3.4:5",), client=True),
        dht.FindNode(target=_PEER),
        dht.FindValue(key=_PEER, cursor=_PEER),
        dht.Store(records=(bytes(65),)),
        dht.Pong(),
        dht.Nodes(contacts=(Contact(_PEER, ("1.2.3.4:5", "[2a00::1]:6")),)),
        dht.Values(records=(bytes(65),), cursor=_PEER),
        dht.Stored(codes=(0, 7)),
    )
    for kind, message in enumerate(made):
        yield bytes([kind]) + packing.encode(dht.to_map(message))
    yield from (bytes([kind % 8]) + data for kind, data in enumerate(chapter_bytes("09")))


def _txt() -> Iterator[bytes]:
    yield Announcement(peer=PeerId(_PEER), network="01234567").to_txt()
    yield Announcement(tag="a" * 16).to_txt()


def _addresses() -> Iterator[bytes]:
    peer = PeerId(_PEER).text
    for host in ("127.0.0.1", "[2001:db8::1]", "[fe80::1%eth0]", "a.example.", "xn--mnchen-3ya.example"):
        yield f"petalite://{peer}@{host}:31337".encode()
    yield from (peer.encode(), b"1.2.3.4:31337", b"[2a00::1]:6", b"[fe80::1%eth0]:7")


def _handshake() -> Iterable[bytes]:
    refusal = b"\x00PTLT\x02\xff"
    return [
        bytes([mode + 4 * part]) + tail
        for mode in range(4)
        for part in (0, 20, 40, 63)
        for tail in (b"", b"\0\x20", refusal)
    ]


def _connection() -> Iterator[bytes]:
    """Scripts (see `connections.script`): a frame's opcode and its numbers, deeds of the owner from 176 on."""
    answer, error, finish, ask, cancel, tick, write = ([200, 255, verb, 1, 0, 9] for verb in (2, 3, 4, 0, 1, 6, 5))
    for mode in range(32):
        theirs, ours = (2, 1) if mode & 1 else (1, 2)  # stream ids: the initiator's are odd
        request = [0, 1, theirs, 3, 3, 0, 0, 0x83, theirs, 3]  # 300 bytes of body, and a reply of as many
        short = [0, 0x81, theirs + 2, 0, 3, 1]
        reply = [0, 2, ours, 2, 0, 0x83, ours, 2]
        yield bytes([mode, 0, 0x89, theirs, 2, *write, *answer, *write, *finish, 0, 0x89, theirs + 2, 0, 3])
        yield bytes([mode, *ask, *write, 0, 0x8B, ours, 2, *write, *ask, *write, 0, 0x8B, ours + 2, 0, 0])
        yield bytes([mode, *request, *write, *answer, *write, *finish, *tick, *tick])
        yield bytes([mode, *request, *short, *tick, *error, *finish, 0, 5, theirs + 2, *finish, 0, 8, 0, 0])
        yield bytes([mode, *ask, *write, 0, 14, ours, *reply, *ask, *write, *cancel, *write, *reply])
        yield bytes([mode, *ask, *ask, *write, 0, 4, ours, 10, 0, 5, ours + 2, *write, 0, 8, 9, 0])
        yield bytes([mode, 0, 6, 1, 0, 7, 1, *write, 0, 7, 1, 0, 15, 4, 1, 2, 3, 4])
        yield bytes([mode, *request, 0, 5, theirs, *finish, 0, 0, 0, 252, 1, 2, 3, 4, 5, 6, 7])


_SEEDS = {
    "packing": _packing,
    "frames": _frames,
    "repeats": _repeats,
    "hello": _hello,
    "certificate": _certificate,
    "tensors": _tensors,
    "messages": _messages,
    "manifest": _manifest,
    "dht_records": _dht_records,
    "dht_messages": _dht_messages,
    "txt": _txt,
    "addresses": _addresses,
    "handshake": _handshake,
    "records": lambda: [bytes([3, 0x92, 5, 1, 1, 0xC0, 0x85, 0, 17, 1, 2, 3]), bytes([127]) + bytes(127)],
    "connection": _connection,
    "whole_connection": _connection,
}
