"""Targets for bytes that come over time: handshakes, records, and whole connections with every key fixed.

Each input is run twice, once in large pieces and once in small ones, and must come to the same end: a peer decides
how its bytes are cut, and that must not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fuzz.decoders import NETWORK, NOW, Finding, Target, check
from petalite.errors import ErrorCode, GoAwayCode, HandshakeError, PetaliteError, RemoteProtocolError, RequestError
from petalite.identity import Identity, SwarmKey
from petalite.wire import events, frames, packing
from petalite.wire.connection import Connection
from petalite.wire.handshake import Established, Handshake, Role
from petalite.wire.hello import INLINE, Hello
from petalite.wire.noise import TransportCipher
from petalite.wire.quota import Quota
from petalite.wire.records import RecordReader, Scratch
from petalite.wire.streams import OwnRequest, PeerRequest
from petalite.wire.writer import Priority

QUOTA = 1 << 20
KEY = bytes(range(32))
SWARM = SwarmKey(b"\x07" * 32)
OURS, THEIRS = Identity(b"\x01" * 32), Identity(b"\x02" * 32)
_SCRATCH = Scratch()


class Input:
    """Numbers and byte strings taken from the front of fuzz bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def fixed(*keys: int) -> Callable[[int], bytes]:
    """Randomness that gives 32 equal bytes each time."""
    left = iter(keys)
    return lambda count: bytes([next(left)]) * count


def handshake(role: Role, private: bool) -> Handshake:
    mine, other = (OURS, THEIRS) if role is Role.INITIATOR else (THEIRS, OURS)
    base = 0x11 if role is Role.INITIATOR else 0x21
    network, key = (SWARM.network_id, SWARM) if private else (NETWORK, None)
    return Handshake(role, mine, network, key, other.peer_id, now=NOW, random=fixed(base, base + 1))


# --- handshakes -------------------------------------------------------------------------------------------------------


def shake(role: Role, private: bool, data: bytes, size: int) -> str:
    """Give `data` to one side in pieces; how it ended, and all it said."""
    side = handshake(role, private)
    said = side.data_to_send()
    try:
        for piece in pieces(data, size):
            side.receive_data(piece)
            if side.result is not None:
                return f"established with {side.result.peer}, {len(said)} bytes said"
    except HandshakeError as error:
        said += side.data_to_send()
        check(role is Role.INITIATOR or len(said) <= 6, "a failed responder said more than a refusal")
        return f"{error}, said {said.hex()}"
    check(len(side._input) <= 2 + 1_200, "more bytes kept than a message has")
    return "not yet"


def fuzz_handshake(data: bytes) -> None:
    """First byte: role and kind of network, and how many bytes of the honest exchange come before the fuzz bytes."""
    if not data:
        return
    role = Role.INITIATOR if data[0] & 1 else Role.RESPONDER
    honest = _HONEST[role, bool(data[0] & 2)]
    whole = honest[: (data[0] >> 2) * len(honest) // 63] + data[1:]
    ends = [shake(role, bool(data[0] & 2), whole, size) for size in (len(whole) or 1, 7)]
    # a failure may leave a message 2 unsaid that a slower sender has got already
    check(ends[0].partition(", said")[0] == ends[1].partition(", said")[0], f"whole {ends[0]!r}, in pieces {ends[1]!r}")


def conversation(private: bool) -> tuple[dict[Role, bytes], dict[Role, bytes]]:
    """An honest handshake with fixed keys: the bytes that arrive at each side, and the key it sends with."""
    sides = {role: handshake(role, private) for role in Role}
    heard = dict.fromkeys(Role, b"")
    for sender, receiver in itertools.cycle(((Role.INITIATOR, Role.RESPONDER), (Role.RESPONDER, Role.INITIATOR))):
        data = sides[sender].data_to_send()
        if not data:
            break
        heard[receiver] += data
        sides[receiver].receive_data(data)
    return heard, {role: _key(side.result) for role, side in sides.items()}


def _key(result: Established | None) -> bytes:
    key = result.encrypt.k if result is not None else None
    if key is None:
        raise Finding("an honest handshake failed")
    return key


_CONVERSATIONS = {private: conversation(private) for private in (False, True)}
_HONEST = {(role, private): heard[role] for private, (heard, _) in _CONVERSATIONS.items() for role in Role}


# --- records ----------------------------------------------------------------------------------------------------------


def seal(cipher: TransportCipher, plain: bytes) -> bytes:
    out = bytearray(len(plain) + 16)
    cipher.encrypt_into(plain, out)
    return len(out).to_bytes(2, "big") + out


def read_records(data: bytes, size: int) -> list[bytes | str]:
    reader = RecordReader(TransportCipher(KEY, 4), scratch=_SCRATCH)
    found: list[bytes | str] = []
    try:
        for piece in pieces(data, size):
            found += map(bytes, reader.feed(piece))
    except RemoteProtocolError as error:
        found.append(f"{error.code.name} {error}")
    return found


def fuzz_records(data: bytes) -> None:
    """A byte below 128 seals so many of the bytes behind it, one above stands for raw bytes of the wire."""
    given, wire, cipher = Input(data), b"", TransportCipher(KEY, 4)
    while given:
        count = given.byte()
        chunk = given.bytes(count & 0x7F)
        wire += chunk if count & 0x80 or not chunk else seal(cipher, chunk)
    check(read_records(wire, len(wire) or 1) == read_records(wire, 17), "another result in pieces")


# --- connections ------------------------------------------------------------------------------------------------------


@dataclass
class Owner:
    """Owns one side: does what the input says, keeps what came out, knows what must hold."""

    connection: Connection
    quota: Quota
    now: float = 0.0
    trace: list[str] = field(default_factory=list)
    asked: list[OwnRequest] = field(default_factory=list)
    ended: dict[int, OwnRequest] = field(default_factory=dict)  # by id(), and kept alive so that ids stay unique
    taken: list[PeerRequest] = field(default_factory=list)

    def act(self, given: Input) -> None:
        """One thing that an owner may do at any time."""
        verb = given.byte() % 8
        try:
            self._do(verb, given)
        except (PetaliteError, RequestError) as error:
            self.trace.append(f"{type(error).__name__} {error}")

    def _do(self, verb: int, given: Input) -> None:
        connection = self.connection
        if verb == 0:
            body = [bytes(given.byte() * 300)]
            priority = Priority(given.byte() % 3)
            self.asked.append(
                connection.send_request("m", {}, body, now=self.now, priority=priority, max_reply=given.byte() * 1000)
            )
        elif verb == 1 and self.asked:
            own = self.asked.pop(0)
            self.ended[id(own)] = own
            connection.cancel(own)
        elif verb == 2 and self.taken:
            connection.send_reply(self.taken[0], {"ok": True}, [bytes(given.byte() * 300)])
        elif verb == 3 and self.taken:
            connection.send_error(self.taken[0], RequestError(ErrorCode.BUSY, "busy", {"retry": True}))
        elif verb == 4 and self.taken:
            connection.finish(self.taken.pop(0))
        elif verb == 5:
            connection.ping(self.now)
        elif verb == 6:
            self.now += given.byte() / 8
            connection.handle_timer(self.now)
        elif verb == 7 and given.byte() > 250:
            connection.send_goaway(GoAwayCode.NORMAL)
        self.collect()

    def receive(self, plain: memoryview) -> None:
        self.connection.receive_frame(plain, self.now)
        self.collect()

    def collect(self) -> None:
        while (event := self.connection.next_event()) is not None:
            match event:
                case events.RequestReceived(request=request):
                    self.taken.append(request)
                    self.trace.append(f"request {request.stream} {request.method} {bytes(request.data).hex()}")
                case events.ReplyReceived(request=own) | events.RequestFailed(request=own):
                    check(id(own) not in self.ended, "a request ended twice")
                    self.ended[id(own)] = own
                    self.trace.append(f"{type(event).__name__} {own.stream}")
                case _:
                    self.trace.append(type(event).__name__)
        check(0 <= self.quota.used <= QUOTA, "bodies beyond the quota")
        check(self.connection.open_requests <= 512, "more requests open than are allowed")

    def write(self, budget: int) -> None:
        for prefix, body in self.connection.writer.take(budget):
            plain = prefix + bytes(body or b"")
            check(len(plain) <= 65_519, "a frame larger than a record")
            frames.decode(memoryview(plain))  # what we send, we would take
            self.trace.append(f"> {plain[:24].hex()} {len(plain)}")

    def end(self) -> None:
        """The connection is lost: everything reserved is given back, every request has ended."""
        self.connection.lost("end of input")
        self.collect()
        for request in self.taken:
            self.connection.finish(request)
        check(self.quota.used == 0, f"{self.quota.used} bytes of quota lost")
        check(self.connection.open_requests == 0, "a request stays open")
        check(all(id(own) in self.ended for own in self.asked), "a request that never ended")


_METHODS = ("step", "info", "", "x" * 65)
_SIZES = (0, 1, 3, 300, 70_000, QUOTA + 1, 1 << 40, 2**63)


def frame_of(given: Input) -> bytes:
    """A frame in one of the ways that are nearly right; what the input says may also be raw."""
    kind, stream = given.byte(), given.byte()
    end = kind >> 7
    match kind & 0x0F:
        case 0:
            return packing.encode([0, {"v": 0, "limits": {"body": _SIZES[stream % 8], "streams": stream}}])
        case 9:  # with its body (PT-FRM-014)
            size = given.byte() * 200
            return packing.encode([1, stream, end, "step", {"size": size, "max": size}, bytes(size or given.byte())])
        case 11:
            size = given.byte() * 200
            return packing.encode([2, stream, end, {"size": size}, bytes(size or given.byte())])
        case 1 | 10:
            head = {"size": _SIZES[given.byte() % 8], "max": _SIZES[given.byte() % 8]}
            return packing.encode([1, stream, end, _METHODS[given.byte() % 4], head])
        case 2:
            return packing.encode([2, stream, end, {"size": _SIZES[given.byte() % 8]}])
        case 3 | 12 | 13:
            return packing.encode([3, stream, end, bytes(_SIZES[given.byte() % 4])])
        case 4:
            return packing.encode([4, stream, given.byte(), "why", {}])
        case 5:
            return packing.encode([5, stream])
        case 6 | 7:
            return packing.encode([kind & 0x0F, stream.to_bytes(8, "big")])
        case 8:
            return packing.encode([8, given.byte(), stream, "bye"])
        case 14:
            return packing.encode([16, stream, {}])
        case _:
            return given.bytes(stream) or b"\xc0"


@dataclass(frozen=True)
class Step:
    """Bytes that arrive, or (None) something that the owner does, by `choice`."""

    wire: bytes | None
    choice: bytes = b""


def script(data: bytes, cipher: TransportCipher, greet: bool, capabilities: dict[str, Any]) -> list[Step]:
    """What happens, in order: made before it is run, so that it can be run twice."""
    given = Input(data)
    steps = [Step(seal(cipher, packing.encode([0, {"v": 0, "caps": capabilities}])))] if greet else []
    while given and len(steps) < 400:
        what = given.byte()
        if what < 176:
            steps.append(Step(seal(cipher, frame_of(given))))
        elif what < 250:
            steps.append(Step(None, given.bytes(5)))
        else:
            steps.append(Step(given.bytes(what - 245)))  # raw bytes: the records behind are lost too
    return steps


def play(
    steps: list[Step], role: Role, capabilities: dict[str, Any], cipher: TransportCipher, trailing: bytes, size: int
) -> list[str]:
    """Run a script; what came of it."""
    quota = Quota(QUOTA)
    hello = Hello(agent="fuzz", capabilities=capabilities)
    connection = Connection(initiator=role is Role.INITIATOR, hello=hello, quota=quota, now=0.0)
    owner = Owner(connection, quota)
    reader = RecordReader(cipher, trailing, _SCRATCH)
    try:
        for step in steps:
            if step.wire is None:
                choice = Input(step.choice)
                owner.write(choice.byte() * 64)
                owner.act(choice)
                continue
            for piece in pieces(step.wire, size):
                for plain in reader.feed(piece):
                    owner.receive(plain)
    except RemoteProtocolError as error:
        connection.fail(error)
        owner.trace.append(f"{error.code.name} {error}")
    owner.write(1 << 22)
    owner.end()
    return owner.trace


def fuzz_connection(data: bytes) -> None:
    """After the handshake. First byte: role, whether the peer greets as it should, and what both offer."""
    if not data:
        return
    role = Role.INITIATOR if data[0] & 1 else Role.RESPONDER
    capabilities: dict[str, Any] = {INLINE: {}} if data[0] & 16 else {}
    steps = script(data[1:], TransportCipher(KEY, 64), not data[0] & 2, capabilities)
    first, second = (play(steps, role, capabilities, TransportCipher(KEY, 64), b"", size) for size in (70_000, 100))
    check(first == second, "another end in pieces")


def fuzz_whole_connection(data: bytes) -> None:
    """From the first byte on: an honest handshake, then the script; what follows may arrive with message 3."""
    if not data:
        return
    private, role = bool(data[0] & 4), Role.INITIATOR if data[0] & 1 else Role.RESPONDER
    peer = Role.RESPONDER if role is Role.INITIATOR else Role.INITIATOR
    capabilities: dict[str, Any] = {INLINE: {}} if data[0] & 16 else {}
    steps = script(data[1:], TransportCipher(_CONVERSATIONS[private][1][peer]), not data[0] & 2, capabilities)
    early = steps.pop(0).wire if steps and data[0] & 8 and steps[0].wire is not None else b""
    side = handshake(role, private)
    rest: list[Step] = []
    for piece in pieces(_HONEST[role, private] + (early or b""), 50 + data[0]):
        if side.result is None:
            side.receive_data(piece)
            side.data_to_send()
        else:
            rest.append(Step(piece))
    if side.result is None:
        raise Finding("an honest handshake failed")
    play(rest + steps, role, capabilities, side.result.decrypt, side.result.trailing, 70_000)


TARGETS: dict[str, Target] = {
    "handshake": fuzz_handshake,
    "records": fuzz_records,
    "connection": fuzz_connection,
    "whole_connection": fuzz_whole_connection,
}
