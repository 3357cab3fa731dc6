"""Hostile connections one after the other, of every kind, and what is left of a server after them.

Every connection is judged by nothing: what the server owes each of them is the business of the cases. What counts here
is the server's state after thousands of them: it still serves, the honest session still gets its numbers, and it holds
as much memory and as many descriptors as after the first of them.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.conformance import registry, tensors
from tools.conformance.bench import Bench, Keeper
from tools.conformance.codec import Malformed, pack
from tools.conformance.constants import CANCEL, DATA, END, GOAWAY, HELLO, LIMIT, PING, PROGRESS, REQ, RES
from tools.conformance.crypto import Identity
from tools.conformance.link import Link, Target, framed, read_message
from tools.conformance.peer import Peer, hello_frame
from tools.conformance.server.dht import record
from tools.conformance.verdicts import Failed, Hung, Skipped

MIB = 1 << 20
WORKERS = 12  # at once; a cap by address must leave room for whoever is honest behind the same address
SETTLE_SECONDS = 20.0  # for the server to notice what is gone; a handshake may take 10 s
GROWTH_BYTES = 10 * MIB
MOST_CACHE, PIECE = 20_000, 256  # tokens of cache that are filled first, and at a time
NASTY: list[Any] = [
    -1, 0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, True, None, "", "x" * 300, "\x00\x1b[2J", b"", bytes(32), [], {},
    [[[[[]]]]], {"!x": 1}, {"size": 2**40}, 0.5, -(2**63),
]  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What the server's process holds: resident bytes and open descriptors."""

    memory: int
    descriptors: int

    @classmethod
    def by(cls, pid: int) -> Held:
        """Raises Failed when there is no such process, or no /proc."""
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))
        except OSError as error:
            raise Failed(f"the server's process cannot be looked at: {error}") from None

    def __str__(self) -> str:
        return f"{self.memory / MIB:.1f} MiB, {self.descriptors} descriptors"


# --- what is sent wrongly ---------------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One thing about the bytes is different."""
    made = bytearray(data)
    at = rng.randrange(len(made) + 1)
    match rng.randrange(5):
        case 0 if made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        case 1:
            del made[at:]
        case 2:
            made[at:at] = rng.randbytes(rng.randrange(1, 40))
        case 3:
            made[at : at + 4] = b"\xff\xff\xff\xff"
        case _:
            made += made[at:]
    return bytes(made[: LIMIT["MAX_FRAME"]])


def twisted(rng: random.Random, value: Any) -> Any:
    """One place in a frame holds something else."""
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [twisted(rng, item) if index == at else item for index, item in enumerate(value)]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        chosen = rng.choice(list(value))
        return {name: twisted(rng, item) if name == chosen else item for name, item in value.items()}
    return rng.choice(NASTY)


def requests(bench: Bench, peer: Peer, sid: bytes) -> list[list[Any]]:
    """A life of frames as an honest client says them, on new streams."""
    rng, heads = bench.rng, list[tuple[str, dict[str, Any], bytes]]()
    if bench.info is not None:
        hidden = bench.hidden(rng.choice((1, 1, 3, 40)))
        step = {"sid": sid, "n": 0, "pos": 0, "t": [tensors.descriptor(hidden)]}
        heads += [
            ("open", bench.open_head(sid, max_len=rng.choice((8, 64, 1_000))), b""),
            ("step", step, tensors.encode(hidden)),
            ("await", {"sid": sid, "n": 1}, b""),
            ("push", step | {"owner": rng.randbytes(32)}, tensors.encode(hidden)),
            ("extend", {"sid": sid, "max_len": 2_000}, b""),
            ("status", {"sid": sid}, b""),
            ("manifest", {"model": bench.info["model"]}, b""),
            ("close", {"sid": sid}, b""),
        ]
    heads += [
        ("info", {}, b""),
        ("dht.ping", {"addrs": ["127.0.0.1:9"]}, b""),
        ("dht.find_node", {"target": rng.randbytes(32)}, b""),
        ("dht.find_value", {"key": rng.randbytes(32)}, b""),
        ("dht.store", {"records": [record(bench, publisher(rng), rng.randbytes(32))]}, b""),
    ]
    frames: list[list[Any]] = [[PING, rng.randbytes(8)], [PROGRESS, 1, {}], [RES, 2, END, {"size": 0}]]
    for method, head, body in heads:
        stream = peer.new_stream()
        frames.append([REQ, stream, 0 if body else END, method, head | {"size": len(body), "max": MIB}])
        frames += [[DATA, stream, END, body]] if body else []
        frames += [[CANCEL, stream]] if rng.random() < 0.1 else []
    return frames


def publisher(rng: random.Random) -> Identity:
    """One of eight: what a node keeps for each is bounded, while for all it is 50,000 records (PT-REC-022)."""
    return Identity(bytes([rng.randrange(8)]) * 32)


# --- kinds of connections ---------------------------------------------------------------------------------------------


def noise_of_bytes(bench: Bench) -> None:
    """Bytes without sense, at once or behind the right preamble."""
    link = bench.tcp()
    start = bench.rng.choice((b"", bench.target.preamble, b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"))
    link.send_raw(start + bench.rng.randbytes(bench.rng.choice((0, 1, 50, 3_000, 200_000))))
    linger(bench, link)


def damaged_handshake(bench: Bench) -> None:
    """A handshake with one thing wrong in message 1 or 3, or which stops there."""
    rng, link, noise = bench.rng, bench.tcp(), bench.target.noise()
    opening = bench.target.preamble + framed(noise.write(b""))
    if rng.random() < 0.4:
        link.send_raw(damaged(rng, opening))
    else:
        link.send_raw(opening)
        noise.read(read_message(link))
        certificate = Identity().certificate(noise.s.public, bench.target.network, int(time.time()) + 43_200)
        link.send_raw(damaged(rng, framed(noise.write(rng.choice((certificate, damaged(rng, certificate)))))))
    linger(bench, link)


def damaged_records(bench: Bench) -> None:
    """Honest frames, sealed, and the sealed bytes damaged."""
    peer = bench.peer()
    frames = requests(bench, peer, bench.rng.randbytes(16))[: bench.rng.randrange(1, 6)]
    sealed = b"".join(peer.link.seal(pack(frame)) for frame in frames)
    peer.link.send_raw(damaged(bench.rng, sealed))
    linger(bench, peer.link)


def damaged_frames(bench: Bench) -> None:
    """Honest requests of all methods, some of them damaged as bytes of msgpack or twisted as values."""
    rng, peer = bench.rng, bench.peer()
    for frame in requests(bench, peer, rng.randbytes(16)):
        match rng.randrange(8):
            case 0:
                peer.link.send_plain(damaged(rng, pack(frame)) or b"\xc1")
            case 1 | 2 | 3:
                peer.link.send(twisted_frame(rng, frame))
            case _:
                peer.link.send(frame)
    linger(bench, peer.link)


def twisted_frame(rng: random.Random, frame: list[Any]) -> list[Any]:
    """The type of the frame stays what it was, for otherwise nothing of it is read."""
    if len(frame) == 1:
        return frame
    at = rng.randrange(1, len(frame))
    return [*frame[:at], twisted(rng, frame[at]), *frame[at + 1 :]]


def rude_greeting(bench: Bench) -> None:
    """A wrong first frame, or HELLO with a twist."""
    rng, link = bench.rng, bench.link()
    first = rng.choice((hello_frame(), [REQ, 1, END, "info", {}], [GOAWAY, 0, 0, "bye"], [HELLO, {}], [HELLO]))
    link.send(twisted_frame(rng, first), [PING, bytes(8)])
    linger(bench, link)


def abandoned_session(bench: Bench) -> None:
    """A session is opened, used or not, and left; mostly in the middle of a body."""
    if bench.info is None:
        raise Skipped("the target serves no blocks")
    rng, peer = bench.rng, bench.peer()
    sid, hidden = rng.randbytes(16), bench.hidden(rng.choice((1, 8, 64)))
    peer.call("open", bench.open_head(sid, max_len=rng.choice((64, 256))))
    body = tensors.encode(hidden)
    step = {"sid": sid, "n": 0, "pos": 0, "t": [tensors.descriptor(hidden)], "size": len(body), "max": MIB}
    peer.link.send([REQ, 3, 0, "step", step], [DATA, 3, 0, body[: rng.randrange(len(body))]])
    linger(bench, peer.link)


def endless_bodies(bench: Bench) -> None:
    """Bodies are declared as large as may be, hardly begun, and never ended."""
    peer = bench.peer()
    for _ in range(bench.rng.randrange(1, 8)):
        stream = peer.new_stream()
        size = bench.rng.choice((1_000, MIB, 64 * MIB))
        peer.link.send([REQ, stream, 0, "step", {"size": size, "max": 0}], [DATA, stream, 0, bytes(900)])
    linger(bench, peer.link)


def unread_replies(bench: Bench) -> None:
    """Large replies are asked for and not read."""
    if bench.info is None:
        raise Skipped("the target serves no blocks")
    peer = bench.peer()
    for _ in range(bench.rng.randrange(1, 60)):
        peer.link.send([REQ, peer.new_stream(), END, "manifest", {"model": bench.info["model"], "max": MIB}])
    time.sleep(bench.rng.random() / 2)


def full_store(bench: Bench) -> None:
    """Records by the dozen, soon more than their publishers may have."""
    peer, rng = bench.peer(), bench.rng
    for _ in range(rng.randrange(1, 4)):
        peer.call("dht.store", {"records": [record(bench, publisher(rng), rng.randbytes(32)) for _ in range(10)]})


def same_identity_again(bench: Bench) -> None:
    """One peer connects again before it has left."""
    identity = Identity()
    for _ in range(3):
        bench.peer(identity).link.send([PING, bytes(8)])


def silent(bench: Bench) -> None:
    """Nothing is said, at whatever point."""
    match bench.rng.randrange(3):
        case 0:
            bench.tcp()
        case 1:
            bench.tcp().send_raw(bench.target.preamble[:3])
        case _:
            bench.link()
    time.sleep(bench.rng.random())


def linger(bench: Bench, link: Link) -> None:
    """Leave: at once, after what the server has to say, or with half of the connection closed."""
    match bench.rng.randrange(4):
        case 0:
            return
        case 1:
            link.shut_down()
            wait_for_end(link, 0.5)
        case _:
            wait_for_end(link, bench.rng.choice((0.02, 0.2)))


def wait_for_end(link: Link, seconds: float) -> None:
    try:
        link.read_to_end(seconds)
    except Hung:
        pass


KINDS: tuple[Callable[[Bench], None], ...] = (
    noise_of_bytes, damaged_handshake, damaged_records, damaged_frames, damaged_frames, rude_greeting,
    abandoned_session, endless_bodies, unread_replies, full_store, same_identity_again, silent,
)  # fmt: skip


# --- thousands of them ------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """So many connections at so many a second; `pid` is the server's process, where it can be looked at.

    The level that later ones are compared with is that after the first tenth, or another one that `level_at` names: by
    then everything is loaded, every cache that has a bound is in use, and what still grows grows for ever.
    """

    target: Target
    info: dict[str, Any] | None
    count: int
    rate: float
    seed: int
    pid: int | None = None
    say: Callable[[str], None] = print
    level_at: int = 1
    settle_seconds: float = SETTLE_SECONDS
    opened: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def cases(self) -> list[registry.Case]:
        """Those that need not wait for clocks."""
        networks = ("any", "private" if self.target.swarm_key else "public")
        known = registry.select("server", [], "should")
        quick = [case for case in known if not case.slow and not case.long and case.network in networks]
        return [case for case in quick if case.id != "handshake/043"]  # 300 connections at once are not paced

    def run(self) -> list[str]:
        """Returns what was found wrong, one line each."""
        keeper = Keeper(self.target, self.info, self.seed)
        started = time.monotonic()
        try:
            self._use_whole_cache()
            keeper.probe()
            first: Held | None = None
            for tenth in range(1, 11):
                self._until(self.count * tenth // 10)
                keeper.probe()
                held = self._settled(first) if tenth in (self.level_at, 10) else self._held()
                first = held if tenth == self.level_at else first
                took = time.monotonic() - started
                self.say(f"{self.opened:>6} connections, {took:5.0f} s, {held or 'no process to look at'}")
            self._compare(first, held)
        except Failed as failure:
            self.faults.append(f"after {self.opened} connections: {failure}")
        finally:
            keeper.close()
        return self.faults

    def _use_whole_cache(self) -> None:
        """Write to all of a small cache once: memory that is taken as a whole is resident only where it was used."""
        left = int(self.info["cache_left"]) if self.info else 0
        if not 0 < left <= MOST_CACHE:
            return
        bench = Bench(self.target, self.info, random.Random(self.seed))
        try:
            session = bench.session(max_len=left)
            for at in range(0, left, PIECE):
                session.step(bench.hidden(min(PIECE, left - at)))
        finally:
            bench.close()

    def _compare(self, first: Held | None, last: Held | None) -> None:
        if first is None or last is None:
            return
        if last.memory - first.memory > GROWTH_BYTES:
            self.faults.append(
                f"memory grew by {(last.memory - first.memory) / MIB:.1f} MiB, {GROWTH_BYTES // MIB} may be"
            )
        if last.descriptors != first.descriptors:
            self.faults.append(f"{last.descriptors} descriptors are open, {first.descriptors} were")

    def _held(self) -> Held | None:
        return Held.by(self.pid) if self.pid else None

    def _settled(self, wanted: Held | None) -> Held | None:
        """What is held once nothing is being closed any more: the descriptors are few again, or stay as they are."""
        deadline = time.monotonic() + self.settle_seconds
        held = self._held()
        quiet = 0
        while held is not None and time.monotonic() < deadline and quiet < 4:
            time.sleep(0.25)
            before, held = held, Held.by(self.pid or 0)
            quiet = quiet + 1 if held.descriptors == (wanted or before).descriptors else 0
        return held

    def _until(self, count: int) -> None:
        """Open connections until there have been `count`, several at once, and wait for the last."""
        begun, so_far, number = time.monotonic(), self.opened, sum(self.kinds.values())
        free = threading.Semaphore(WORKERS)
        running = []
        with ThreadPoolExecutor(WORKERS) as pool:
            while self.opened < count:
                free.acquire()
                time.sleep(max(0.0, (self.opened - so_far) / self.rate - (time.monotonic() - begun)))
                number += 1
                running.append(pool.submit(self._one, random.Random(f"{self.seed} {number}")))
                running[-1].add_done_callback(lambda _: free.release())
        for done in running:
            done.result()  # a fault of ours

    def _one(self, rng: random.Random) -> None:
        """One kind of misbehaviour, with as many connections as it takes."""
        bench = Bench(self.target, self.info, rng)
        case = rng.choice(self.cases) if rng.random() < 0.3 else None
        kind = rng.choice(KINDS)
        name = f"case {case.id.partition('/')[0]}" if case else kind.__name__.replace("_", " ")
        end = "as it should"
        try:
            case.run(bench) if case else kind(bench)
        except Skipped:
            end = "skipped"
        except (Failed, Malformed, OSError):
            end = "otherwise"
        finally:
            if case:
                bench.close()
            for link in bench.links:
                link.close(reset=rng.random() < 0.3)
        with self._lock:
            self.opened += len(bench.links)
            self.kinds[f"{name}: {end}"] += 1
