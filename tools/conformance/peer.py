"""A well-behaved requester on a link, who checks every frame that comes back against spec/02 and spec/03."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tools.conformance.constants import (
    CANCEL,
    DATA,
    END,
    ERR,
    ERROR_NAMES,
    GOAWAY,
    GOAWAY_NAMES,
    HELLO,
    LIMIT,
    PING,
    PONG,
    PROGRESS,
    REQ,
    RES,
)  # fmt: skip
from tools.conformance.crypto import Identity
from tools.conformance.link import WAIT, Link, Target, Transcript, dial, frame_name
from tools.conformance.verdicts import Closed, Failed, require

_TELLTALES = ("Traceback", 'File "', "/site-packages/", "panicked at")


_ARITY = {HELLO: 2, REQ: 5, RES: 4, DATA: 4, ERR: 5, CANCEL: 2, PING: 2, PONG: 2, GOAWAY: 4, PROGRESS: 3}


@dataclass
class Answer:
    """What has come back on one stream so far."""

    stream: int
    head: dict[str, Any] | None = None
    body: bytearray = field(default_factory=bytearray)
    code: str = ""
    text: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    ended: bool = False
    progress: int = 0
    max_reply: int = 0
    cancelled: bool = False

    def __str__(self) -> str:
        if self.code:
            return f"ERR {self.code} ({self.text[:80]!r}) {self.detail}"
        if self.head is not None:
            return f"RES {str(self.head)[:120]} with {len(self.body)} bytes" + ("" if self.ended else ", not ended")
        return "no reply"


HELLO_MAP: dict[str, Any] = {
    "v": 0, "caps": {}, "limits": {"body": 64 << 20, "streams": 256}, "agent": "conformance", "time": 0,
    "observed": "",
}  # fmt: skip


def hello_frame(**changes: Any) -> list[Any]:
    return [HELLO, HELLO_MAP | {"time": int(time.time())} | changes]


class Peer:
    """Requests over one established link. After `go`, HELLO has been exchanged."""

    def __init__(self, link: Link, first_stream: int = 1, identity: Identity | None = None) -> None:
        self.link = link
        self.identity = identity or Identity()
        self.next_stream = first_stream
        self.answers: dict[int, Answer] = {}
        self.hello: dict[str, Any] | None = None
        self.goaway: list[Any] | None = None
        self.pongs: list[bytes] = []
        self.inline = False  # we have offered to take a reply's body in the frame of its head

    @classmethod
    def dial(cls, target: Target, identity: Identity | None = None, transcript: Transcript | None = None) -> Peer:
        """Handshake, then HELLO both ways."""
        identity = identity or Identity()
        peer = cls(dial(target, identity, transcript), identity=identity)
        peer.link.send(hello_frame())
        try:
            peer.pump(lambda: peer.hello is not None, WAIT, "HELLO")
        except BaseException:
            peer.close()
            raise
        return peer

    def close(self) -> None:
        self.link.close()

    # requests

    def new_stream(self) -> int:
        self.next_stream += 2
        return self.next_stream - 2

    def expect(self, stream: int, max_reply: int = 64 << 20) -> Answer:
        """Take what comes back on a stream that the case opens by hand."""
        self.answers[stream] = Answer(stream, max_reply=max_reply)
        return self.answers[stream]

    def send_request(self, method: str, head: Any = None, body: bytes = b"", max_reply: int = 64 << 20) -> Answer:
        """REQ and its DATA, in one segment for a short body."""
        answer = self.expect(self.new_stream(), max_reply)
        fields = head if head is not None and not isinstance(head, dict) else {
            "size": len(body), "max": max_reply, **(head or {})
        }  # fmt: skip
        frames: list[Any] = [[REQ, answer.stream, 0 if body else END, method, fields]]
        for at in range(0, len(body), LIMIT["MAX_DATA"]):
            piece = body[at : at + LIMIT["MAX_DATA"]]
            frames.append([DATA, answer.stream, END if at + len(piece) == len(body) else 0, piece])
        self.link.send(*frames)
        return answer

    def wait(self, answer: Answer, within: float = WAIT) -> Answer:
        """Until the stream has ended. Raises Closed, Hung, Failed."""
        self.pump(lambda: answer.ended, within, f"a reply on stream {answer.stream}")
        return answer

    def call(self, method: str, head: Any = None, body: bytes = b"", within: float = WAIT) -> Answer:
        """Ask; whatever the answer is."""
        return self.wait(self.send_request(method, head, body), within)

    def ask(self, method: str, head: Any = None, body: bytes = b"", within: float = WAIT) -> Answer:
        """Ask; an error is a failure of the case."""
        answer = self.call(method, head, body, within)
        require(not answer.code, f"expected: {method} answered; observed: {answer}")
        return answer

    def refused(
        self, codes: set[str], method: str, head: Any = None, body: bytes = b"", within: float = WAIT
    ) -> Answer:
        """Ask; the answer must be ERR with one of `codes`."""
        return expect_error(self.call(method, head, body, within), codes)

    def ping(self, within: float = WAIT) -> None:
        payload = os.urandom(8)
        self.link.send([PING, payload])
        self.pump(lambda: payload in self.pongs, within, "PONG with the payload of PING")

    def alive(self, within: float = WAIT) -> None:
        """The connection goes on: a PING is answered and no GOAWAY has come."""
        self.ping(within)
        require(self.goaway is None, f"expected: the connection goes on; observed: {self.goaway_text}")

    @property
    def goaway_text(self) -> str:
        return f"GOAWAY({GOAWAY_NAMES.get(self.goaway[1], self.goaway[1])})" if self.goaway else "no GOAWAY"

    def cancel(self, answer: Answer) -> None:
        answer.cancelled = True
        self.link.send([CANCEL, answer.stream])

    # frames in

    def pump(self, done: Callable[[], bool], within: float, what: str) -> None:
        """Read frames until `done()`. Raises Closed and Hung that say `what` was awaited."""
        deadline = time.monotonic() + within
        while not done():
            try:
                frame = self.link.receive(deadline - time.monotonic())
            except Failed as error:
                text = f"expected: {what}; observed: {error}"
                if isinstance(error, Closed) and self.goaway:
                    text += f" after {self.goaway_text} {self.goaway[3]!a}"
                raise type(error)(text) from None
            self.take(frame)

    def drain(self, seconds: float) -> None:
        """Take whatever comes for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.take(self.link.receive(left))
            except Closed:
                return
            except Failed as error:
                if "nothing came" in str(error):
                    return
                raise

    def take(self, frame: list[Any]) -> None:
        """One frame of the target, checked."""
        kind = frame[0]
        if kind in _ARITY:
            inline = kind == RES and self.inline and len(frame) == 5 and type(frame[4]) is bytes
            wrong = f"the target sent {frame_name(frame)} with {len(frame)} elements"
            require(inline or len(frame) == _ARITY[kind], wrong)
        require(self.hello is not None or kind in (HELLO, GOAWAY), f"the target's first frame is {frame_name(frame)}")
        if kind == HELLO:
            require(self.hello is None, "the target sent HELLO twice")
            self.hello = check_hello(frame[1])
        elif kind == PING:
            self.link.send([PONG, frame[1]])
        elif kind == PONG:
            self.pongs.append(frame[1])
        elif kind == GOAWAY:
            require(type(frame[1]) is int and type(frame[2]) is int and type(frame[3]) is str, f"bad GOAWAY {frame}")
            check_text(frame[3])
            self.goaway = frame
        elif kind in (RES, DATA, ERR, PROGRESS):
            self.take_reply(kind, frame)
        elif kind in (REQ, CANCEL):
            if kind == REQ:  # a target may ask us; we serve nothing
                require(frame[1] % 2 == 0, f"the responder opened stream {frame[1]}, its ids are even")
                self.link.send([ERR, frame[1], 2, "nothing is served here", {}])
        else:
            require(16 <= kind < 32, f"the target sent a frame of type {kind}")

    def take_reply(self, kind: int, frame: list[Any]) -> None:
        answer = self.answers.get(frame[1])
        name = frame_name(frame)
        require(answer is not None, f"the target sent {name} on stream {frame[1]}, which has no request")
        if answer is None:
            return
        require(not answer.ended, f"the target sent {name} on stream {answer.stream} after its end")
        if kind == PROGRESS:
            require(answer.head is None and type(frame[2]) is dict, f"the target sent {frame}")
            answer.progress += 1
        elif kind == ERR:
            self.take_error(answer, frame)
        elif kind == RES:
            require(answer.head is None and type(frame[3]) is dict, f"the target sent a second RES or {frame}")
            answer.head = frame[3]
            size = answer.head.get("size", 0)
            require(
                type(size) is int and 0 <= size <= answer.max_reply, f"RES with size {size}, max {answer.max_reply}"
            )
            if len(frame) == 5:
                require(
                    frame[2] == END and len(frame[4]) == size > 0, f"RES with a body of {len(frame[4])} bytes inline"
                )
                answer.body += frame[4]
                answer.ended = True
                return
            require(frame[2] == (END if size == 0 else 0), f"RES with flags {frame[2]} and size {size}")
            answer.ended = size == 0
        else:
            self.take_data(answer, frame)

    def take_data(self, answer: Answer, frame: list[Any]) -> None:
        require(answer.head is not None, f"DATA before RES on stream {answer.stream}")
        require(frame[2] in (0, END) and type(frame[3]) is bytes, "DATA with other flags than 0 and 1, or no bin")
        require(len(frame[3]) <= LIMIT["MAX_DATA"], f"DATA of {len(frame[3])} bytes")
        answer.body += frame[3]
        size = (answer.head or {}).get("size", 0)
        require(len(answer.body) <= size, f"a reply body of {len(answer.body)} bytes, {size} declared")
        require((frame[2] == END) == (len(answer.body) == size), f"END at {len(answer.body)} of {size} bytes")
        answer.ended = frame[2] == END

    def take_error(self, answer: Answer, frame: list[Any]) -> None:
        code, text, detail = frame[2:]
        well_formed = type(code) is int and type(text) is str and type(detail) is dict
        require(
            well_formed and len(text) <= LIMIT["MAX_ERROR_TEXT"], f"the target sent a malformed ERR {str(frame)[:80]}"
        )
        check_text(text)
        answer.code, answer.text, answer.detail = ERROR_NAMES.get(code, f"code {code}"), text, detail
        answer.ended = True


def check_text(text: str) -> None:
    for telltale in _TELLTALES:
        require(telltale not in text, f"the target shows its inside: {ascii(text)[:100]}")


def check_hello(head: Any) -> dict[str, Any]:
    require(type(head) is dict and type(head.get("v")) is int, f"HELLO holds {str(head)[:80]}, a map with v is due")
    for name, kind in (("caps", dict), ("limits", dict), ("agent", str), ("time", int), ("observed", str)):
        require(head.get(name) is None or type(head[name]) is kind, f"HELLO's {name} is {head.get(name)!r}")
    return dict(head)


def expect_error(answer: Answer, codes: set[str]) -> Answer:
    require(answer.code in codes, f"expected: ERR {'/'.join(sorted(codes))}; observed: {answer}")
    return answer
