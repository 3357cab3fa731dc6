"""What a server case gets: the target, its description, fresh peers, sessions, and the probe that follows each case."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.conformance import tensors
from tools.conformance.constants import END, LIMIT, REQ
from tools.conformance.crypto import Identity
from tools.conformance.link import WAIT, Link, Target, Transcript, dial
from tools.conformance.peer import Answer, Peer, expect_error, hello_frame
from tools.conformance.tensors import Array
from tools.conformance.verdicts import Closed, Failed, Hung, Skipped, require


class Session:
    """One session on a server, by its rules; `n` and `pos` are what the client counts."""

    def __init__(
        self, bench: Bench, peer: Peer, *, max_len: int = 64, batch: int = 1, dtype: str = "f32", codec: str = "raw",
        sid: bytes | None = None, additions: Mapping[str, Array] | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        self.bench, self.peer = bench, peer
        self.sid = sid or os.urandom(16)
        self.batch, self.dtype, self.codec = batch, dtype, codec
        self.n = self.pos = 0
        self.open_head = bench.open_head(self.sid, max_len=max_len, batch=batch, dtype=dtype, codec=codec) | changes
        self.open_body = b""
        if additions is not None:
            described, self.open_body = tensors.pack(additions)
            self.open_head |= {"t": described}
        bench.sessions.append(self)
        self.opened = peer.ask("open", self.open_head, self.open_body)

    def head(self, hidden: Array, **changes: Any) -> dict[str, Any]:
        tensor = tensors.descriptor(hidden, self.dtype, self.codec)
        return {"sid": self.sid, "n": self.n, "pos": self.pos, "t": [tensor]} | changes

    def body(self, hidden: Array) -> bytes:
        return tensors.encode(hidden, self.dtype, self.codec)

    def send(self, hidden: Array, **changes: Any) -> Answer:
        return self.peer.send_request("step", self.head(hidden, **changes), self.body(hidden))

    def call(self, hidden: Array, **changes: Any) -> Answer:
        """A step, whatever comes of it; `n` and `pos` are not moved."""
        return self.peer.wait(self.send(hidden, **changes), 30)

    def step(self, hidden: Array, **changes: Any) -> Array:
        """A step that must work; checks the reply and moves on. Returns (B, T, C), or what `last` asks for."""
        return self.accept(self.call(hidden, **changes), hidden, **changes)

    def accept(self, answer: Answer, hidden: Array, **changes: Any) -> Array:
        output = self.check(answer, hidden, **changes)
        self.n = changes.get("n", self.n) + 1
        self.pos = changes.get("pos", self.pos) + hidden.shape[1]
        return output

    def check(self, answer: Answer, hidden: Array, **changes: Any) -> Array:
        """The output of a step's reply, its fields checked (PT-SES-027, PT-SES-014)."""
        require(not answer.code, f"expected: the step answered; observed: {answer}")
        head = answer.head or {}
        n, pos = changes.get("n", self.n), changes.get("pos", self.pos) + hidden.shape[1]
        require((head.get("n"), head.get("pos")) == (n, pos), f"expected: n {n} pos {pos}; observed: {answer}")
        due = hidden[:, -changes["last"] :] if "last" in changes and "next" not in changes else hidden
        wanted = [tensors.descriptor(due, self.dtype, self.codec)]
        require(head.get("t") == wanted, f"expected: t {wanted}; observed: {head.get('t')}")
        return tensors.decode(bytes(answer.body), self.dtype, due.shape, self.codec)

    def refused(self, codes: set[str], hidden: Array, **changes: Any) -> Answer:
        return expect_error(self.call(hidden, **changes), codes)

    def status(self) -> tuple[int, int]:
        head = self.peer.ask("status", {"sid": self.sid}).head or {}
        return head.get("n", -1), head.get("pos", -1)

    def unchanged(self) -> None:
        found = self.status()
        require(found == (self.n, self.pos), f"expected: n {self.n} pos {self.pos} still; observed: n, pos = {found}")


@dataclass
class Bench:
    """One case's view of the target. Everything that it opens is closed after it."""

    target: Target
    info: dict[str, Any] | None
    rng: random.Random
    quick: bool = False
    transcript: Transcript = field(default_factory=Transcript)
    links: list[Link] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    # connections

    def tcp(self) -> Link:
        link = self.target.connect(self.transcript)
        self.links.append(link)
        return link

    def link(self, identity: Identity | None = None, tail: bytes = b"") -> Link:
        """Handshake done, HELLO not said."""
        link = dial(self.target, identity or Identity(), self.transcript, tail)
        self.links.append(link)
        return link

    def peer(self, identity: Identity | None = None) -> Peer:
        peer = Peer.dial(self.target, identity, self.transcript)
        self.links.append(peer.link)
        return peer

    def close(self) -> None:
        """End everything; owners close their sessions, so that the target's cache has room for the next case."""
        owners: dict[bytes, tuple[Identity, list[bytes]]] = {}
        for session in self.sessions:
            identity = session.peer.identity
            owners.setdefault(identity.peer, (identity, []))[1].append(session.sid)
        for identity, sids in owners.values():
            try:
                peer = self.peer(identity)
                for answer in [peer.send_request("close", {"sid": sid}) for sid in sids]:
                    peer.wait(answer)
            except Failed:
                pass  # whoever is not there any more shows in the probe
        for link in self.links:
            link.close()

    # sessions

    @property
    def model(self) -> dict[str, Any]:
        """The target's info. Raises Skipped if it serves no blocks."""
        if self.info is None:
            raise Skipped("the target serves no blocks")
        return self.info

    @property
    def width(self) -> int:
        return int(self.model["hidden"])

    def open_head(self, sid: bytes, **changes: Any) -> dict[str, Any]:
        info = self.model
        made = {
            "sid": sid, "model": info["model"], "blocks": info["blocks"], "max_len": 64, "batch": 1, "dtype": "f32",
            "codec": "raw",
        }  # fmt: skip
        return made | changes

    def session(self, peer: Peer | None = None, **changes: Any) -> Session:
        return Session(self, peer or self.peer(), **changes)

    def hidden(self, tokens: int, batch: int = 1) -> Array:
        """Hidden states like those a client sends; for the formula model, embeddings of random tokens."""
        if self.info and self.info["model"] == tensors.FORMULA_ID:
            rows = [tensors.embed([self.rng.randrange(256) for _ in range(tokens)])[0] for _ in range(batch)]
            return np.stack(rows).astype(np.float32)
        values = np.random.default_rng(self.rng.randrange(2**32)).standard_normal((batch, tokens, self.width))
        return values.astype(np.float32)

    def formula(self, row: Array, pad: int = 0) -> Array:
        """What the target's blocks make of one whole row (T, C). Raises Skipped for other models than the formula's."""
        if self.model["model"] != tensors.FORMULA_ID:
            raise Skipped("the target does not serve the formula model, so its numbers are unknown here")
        start, end = self.model["blocks"]
        return tensors.run_blocks(row, start, end, pad)

    # judgement

    def should(self, condition: object, text: str) -> None:
        """A SHOULD inside of a case of level must: missing it makes the case non-strict."""
        if not condition:
            self.misses.append(text)

    def close_to(self, found: Array, wanted: Array, what: str, tolerance: float = 0.0) -> None:
        """Relative L2 distance of each token's vector within what the target's compute class may differ by."""
        if not tolerance:
            rough = self.model["dtype"] != "float32" or self.model.get("quant")
            tolerance = 0.1 if rough else 2e-4
        distance = np.linalg.norm(found - wanted, axis=-1) / np.maximum(np.linalg.norm(wanted, axis=-1), 1e-9)
        require(distance.max() <= tolerance, f"{what}: differs by {distance.max():.2g}, tolerance {tolerance:.2g}")

    def reacts(self, frame_or_plain: Any, codes: set[str]) -> None:
        """A fresh connection after HELLO that sends this must be ended, with GOAWAY of one of `codes` or without."""
        peer = self.peer()
        if isinstance(frame_or_plain, bytes):
            peer.link.send_plain(frame_or_plain)
        else:
            peer.link.send(frame_or_plain)
        seen = peer.link.expect_close(codes)
        self.should(seen, f"GOAWAY({'/'.join(sorted(codes))}) before the end")


class Keeper:
    """The honest session that goes on beside all cases, and the probe that a server lives."""

    def __init__(self, target: Target, info: dict[str, Any] | None, seed: int) -> None:
        self.target, self.info, self.seed = target, info, seed
        self.identity = Identity()
        self.lock = threading.Lock()
        self.peer: Peer | None = None
        self.session: Session | None = None
        self.first: Array | None = None
        self.stepped = 0.0

    def probe(self) -> None:
        """Raises Failed when the server does not take a new connection, or the known session has other numbers."""
        with self.lock:
            fresh = Peer.dial(self.target)
            try:
                fresh.ping()
            finally:
                fresh.close()
            if self.info is not None:
                self._go_on()

    def _go_on(self) -> None:
        try:
            self._step()
        except (Closed, Hung):  # idle since the last case: dial again, the session goes on
            if self.peer is not None:
                self.peer.close()
            self.peer = None
            self._step()

    def _step(self) -> None:
        if self.peer is None:
            self.peer = Peer.dial(self.target, self.identity)
            if self.session is not None:
                self.session.peer = self.peer
        bench = Bench(self.target, self.info, random.Random(self.seed))
        hidden = bench.hidden(8)
        if self.session is not None and self._parked():
            self.session = None
        if self.session is None:
            self.session = Session(bench, self.peer, max_len=16)
            self.session.step(hidden[:, :7])
        output = self.session.step(hidden[:, 7:], pos=7)
        self.stepped = time.monotonic()
        if self.first is None:
            self.first = output
        bench.close_to(output, self.first, "the honest session's step, compared with its first")

    def _parked(self) -> bool:
        """Unused for so long that others may have got its room (PT-SES-053)."""
        if self.session is None or time.monotonic() - self.stepped < LIMIT["PARK_SECONDS"]:
            return False
        return self.session.peer.call("status", {"sid": self.session.sid}).code == "no_session"

    def close(self) -> None:
        if self.peer is not None:
            self.peer.close()


def describe(target: Target) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The target's HELLO, and its info if it serves blocks. Raises Failed."""
    peer = Peer.dial(target)
    try:
        answer = peer.call("info")
        return peer.hello or {}, None if answer.code else answer.head
    finally:
        peer.close()


def settle(seconds: float) -> None:
    """Let time pass in a case about clocks."""
    time.sleep(seconds)


__all__ = ["END", "REQ", "WAIT", "Bench", "Keeper", "Session", "describe", "hello_frame", "settle"]
