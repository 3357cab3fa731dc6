"""An honest server of the formula model on blocking sockets, each of whose acts a case may replace by a wrong one.

It also judges: whatever the client does against the spec is noted in `Stage.faults`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.conformance import tensors
from tools.conformance.codec import Malformed, unpack
from tools.conformance.constants import (
    CANCEL,
    DATA,
    END,
    ERR,
    ERRORS,
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
from tools.conformance.crypto import (
    MAGIC,
    CryptoError,
    Identity,
    KeyPair,
    Noise,
    check_certificate,
    peer_id_of,
    prologue_of,
)
from tools.conformance.link import Link, framed, read_message
from tools.conformance.peer import HELLO_MAP, check_hello
from tools.conformance.tensors import Array
from tools.conformance.verdicts import Closed, Failed, Hung

if TYPE_CHECKING:
    from tools.conformance.client.harness import Stage


@dataclass
class Request:
    """A request of the client as it comes in."""

    stream: int
    method: str
    head: dict[str, Any]
    size: int = 0
    body: bytearray = field(default_factory=bytearray)


@dataclass
class Held:
    """One session, its whole history by rows; so that any answer can be computed from nothing."""

    open: dict[str, Any]
    hidden: Array
    n: int = 0
    last: tuple[Any, Any] | None = None  # (content, reply) of the last step


class Refusal(Exception):
    """Answered with ERR."""

    def __init__(self, code: str, text: str = "", **detail: Any) -> None:
        super().__init__(text)
        self.code, self.text, self.detail = code, text or code, detail


class Conn:
    """One connection of the client to this server."""

    def __init__(self, server: Server, link: Link) -> None:
        self.server, self.link = server, link
        self.peer = b""
        self.hello: dict[str, Any] | None = None
        self.goaway = ""
        self.end = ""
        self.highest = 0
        self.requests: list[Request] = []
        self.open: dict[int, Request] = {}
        self.pings = 0
        self.pongs: list[bytes] = []
        self.cancelled: list[int] = []
        self.errors: list[list[Any]] = []

    def send(self, *frames: Any) -> None:
        self.link.send(*frames)

    def reply(self, request: Request, head: dict[str, Any], body: bytes = b"") -> None:
        """RES and its DATA."""
        frames: list[Any] = [[RES, request.stream, 0 if body else END, {"size": len(body), **head}]]
        for at in range(0, len(body), LIMIT["MAX_DATA"]):
            piece = body[at : at + LIMIT["MAX_DATA"]]
            frames.append([DATA, request.stream, END if at + len(piece) == len(body) else 0, piece])
        self.send(*frames)

    def refuse(self, request: Request, refusal: Refusal) -> None:
        self.send([ERR, request.stream, ERRORS[refusal.code], refusal.text, refusal.detail])


class Server:
    """Cases override what they need. One instance serves all connections of one identity."""

    blocks = (0, tensors.LAYERS)
    inline = False  # whether small bodies may travel in the frame of their head

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.identity = Identity()
        self.sessions: dict[tuple[bytes, bytes], Held] = {}
        self.lock = threading.RLock()
        self.steps = 0

    # life of a connection

    def serve(self, conn: Conn) -> None:
        """Until the client ends it. Runs in a thread of its own."""
        try:
            self.handshake(conn)
            self.greet(conn)
            while True:
                self.on_plain(conn, conn.link.receive_plain(time.monotonic() + 60))
        except Closed as end:
            conn.end = str(end)
        except Hung:
            conn.end = "hung"
        except (Failed, CryptoError) as failure:
            conn.end = str(failure)
            self.stage.fault(f"the client broke the protocol: {failure}")
        finally:
            conn.link.close()

    def read_message_1(self, conn: Conn) -> Noise:
        stage, link = self.stage, conn.link
        preamble = link.read_exactly(6, time.monotonic() + 10)
        pattern = 2 if stage.swarm_key else 1
        if preamble != MAGIC + bytes([1, pattern]):
            raise Failed(f"preamble {preamble.hex()}")
        psk = stage.swarm_key.psk if stage.swarm_key else None
        noise = Noise(False, pattern, prologue_of(preamble, stage.network), psk, *self.keys())
        message = read_message(link, 10)
        if len(message) != (48 if stage.swarm_key else 32):
            raise Failed(f"message 1 of {len(message)} bytes")
        if noise.read(message):
            raise Failed("message 1 has a payload")
        return noise

    def keys(self) -> tuple[KeyPair | None, KeyPair | None]:
        """Static and ephemeral key."""
        return None, None

    def certificate(self, noise: Noise) -> bytes:
        return self.identity.certificate(noise.s.public, self.stage.network, int(time.time()) + 43_200)

    def handshake(self, conn: Conn) -> None:
        noise = self.read_message_1(conn)
        conn.link.send_raw(framed(noise.write(self.certificate(noise))))
        self.finish(conn, noise)

    def finish(self, conn: Conn, noise: Noise) -> None:
        """Read and judge message 3."""
        payload = noise.read(read_message(conn.link, 10))
        key = check_certificate(payload, noise.rs, self.stage.network, time.time())
        ahead = unpack(payload)["x"] - time.time()
        if ahead > LIMIT["CERTIFICATE_SECONDS"] + 60:
            self.stage.fault(f"the client's certificate ends {ahead:.0f} s ahead")
        conn.peer = peer_id_of(key)
        self.stage.keys_seen.append((noise.re, noise.rs, conn.peer))
        conn.link.send_cipher, conn.link.recv_cipher = noise.split()

    def hello_map(self, conn: Conn) -> dict[str, Any]:
        caps: dict[str, Any] = {"inline": {}} if self.inline else {}
        return HELLO_MAP | {"caps": caps, "agent": "conformance server", "time": int(time.time())}

    def greet(self, conn: Conn) -> None:
        conn.send([HELLO, self.hello_map(conn)])

    # frames

    def on_plain(self, conn: Conn, plain: bytes) -> None:
        try:
            frame = unpack(plain)
        except Malformed as error:
            raise Failed(f"malformed frame: {error}") from None
        if type(frame) is not list or not frame:
            raise Failed("no frame")
        if conn.hello is None and frame[0] not in (HELLO, GOAWAY):
            raise Failed(f"first frame of type {frame[0]}")
        if frame[0] not in (DATA, ERR) and len(plain) > LIMIT["MAX_HEAD_FRAME"]:
            raise Failed(f"a frame of type {frame[0]} with {len(plain)} bytes")
        self.on_frame(conn, frame)

    def on_frame(self, conn: Conn, frame: list[Any]) -> None:
        kind = frame[0]
        if kind == HELLO:
            if conn.hello is not None:
                raise Failed("HELLO twice")
            conn.hello = check_hello(frame[1])
            self.stage.agent = str(conn.hello.get("agent") or "") or self.stage.agent
            self.greeted(conn)
        elif kind == PING:
            conn.pings += 1
            if type(frame[1]) is not bytes or len(frame[1]) != 8:
                raise Failed(f"PING {frame[1]!r}")
            self.on_ping(conn, frame[1])
        elif kind == PONG:
            conn.pongs.append(frame[1])
        elif kind == GOAWAY:
            conn.goaway = GOAWAY_NAMES.get(frame[1], str(frame[1]))
        elif kind == CANCEL:
            conn.cancelled.append(frame[1])
            conn.open.pop(frame[1], None)
        elif kind == REQ:
            self.on_req(conn, frame)
        elif kind == DATA:
            self.on_data(conn, frame)
        elif kind == ERR:
            conn.errors.append(frame)
        elif kind != RES and kind != PROGRESS and not 16 <= kind < 32:
            raise Failed(f"frame of type {kind}")

    def greeted(self, conn: Conn) -> None:
        """HELLO has come."""

    def on_ping(self, conn: Conn, payload: bytes) -> None:
        conn.send([PONG, payload])

    def on_req(self, conn: Conn, frame: list[Any]) -> None:
        inline = self.inline and len(frame) == 6 and type(frame[5]) is bytes and frame[2] == END
        if len(frame) != 5 and not inline:
            raise Failed(f"REQ with {len(frame)} elements")
        _, stream, flags, method, head = frame[:5]
        if type(stream) is not int or stream % 2 != 1 or stream <= conn.highest:
            raise Failed(f"stream id {stream} after {conn.highest}")
        if flags not in (0, END) or type(method) is not str or type(head) is not dict:
            raise Failed(f"REQ {str(frame)[:100]}")
        conn.highest = stream
        request = Request(stream, method, head, head.get("size") or 0)
        if inline:
            request.body += frame[5]
        if (flags == END) != (request.size == len(request.body)) or request.size > LIMIT["MAX_BODY"]:
            raise Failed(f"REQ with flags {flags} and size {request.size}")
        conn.requests.append(request)
        conn.open[stream] = request
        if flags == END:
            self.answer(conn, request)

    def on_data(self, conn: Conn, frame: list[Any]) -> None:
        if len(frame) != 4 or type(frame[3]) is not bytes or len(frame[3]) > LIMIT["MAX_DATA"]:
            raise Failed("DATA of a wrong form")
        request = conn.open.get(frame[1])
        if request is None:
            if frame[1] > conn.highest:
                raise Failed(f"DATA on stream {frame[1]}")
            return
        request.body += frame[3]
        if len(request.body) > request.size or (frame[2] == END) != (len(request.body) == request.size):
            raise Failed(f"a body of {len(request.body)} bytes, {request.size} declared, flags {frame[2]}")
        if frame[2] == END:
            self.answer(conn, request)

    def answer(self, conn: Conn, request: Request) -> None:
        """The whole request is here."""
        with self.lock:
            try:
                handler = getattr(self, "do_" + request.method.replace(".", "_"), None)
                if handler is None:
                    raise Refusal("unsupported", f"method {request.method!r} is not offered")
                handler(conn, request)
            except Refusal as refusal:
                conn.refuse(request, refusal)
        conn.open.pop(request.stream, None)

    # methods

    def info_map(self) -> dict[str, Any]:
        return {
            "model": tensors.FORMULA_ID, "name": "formula", "blocks": list(self.blocks), "layers": tensors.LAYERS,
            "hidden": tensors.HIDDEN, "dtype": "float32", "codecs": ["raw", "i8b64"], "max_len": 4_096,
            "max_batch": 16, "cache_left": 65_536, "state": "online", "version": "1",
        }  # fmt: skip

    def do_info(self, conn: Conn, request: Request) -> None:
        conn.reply(request, self.info_map())

    def do_dht_ping(self, conn: Conn, request: Request) -> None:
        conn.reply(request, {})

    def do_dht_find_node(self, conn: Conn, request: Request) -> None:
        conn.reply(request, {"contacts": []})

    def do_dht_find_value(self, conn: Conn, request: Request) -> None:
        conn.reply(request, {"records": [], "contacts": []})

    def do_dht_store(self, conn: Conn, request: Request) -> None:
        raise Refusal("resources", "nothing is stored here")

    def do_open(self, conn: Conn, request: Request) -> None:
        head = request.head
        shape_ok = (
            len(head.get("sid", b"")) == 16 and type(head.get("max_len")) is int and type(head.get("batch")) is int
        )
        if not shape_ok or head.get("dtype") not in ("f32", "f16", "bf16") or head.get("codec") not in ("raw", "i8b64"):
            raise Failed(f"open {str(head)[:200]}")
        if head.get("model") != tensors.FORMULA_ID:
            raise Failed("open of another model than info names")
        if not self.blocks[0] <= head["blocks"][0] < head["blocks"][1] <= self.blocks[1]:
            raise Failed(f"open of blocks {head['blocks']}, info names {self.blocks}")
        key = (conn.peer, head["sid"])
        if key in self.sessions and (self.sessions[key].n or self.sessions[key].open != _plain(head)):
            raise Refusal("conflict")
        self.sessions[key] = Held(_plain(head), np.zeros((head["batch"], 0, tensors.HIDDEN)))
        self.stage.opens.append((self, head))
        conn.reply(request, {"pos": 0, "ttl": 600})

    def held(self, conn: Conn, request: Request) -> Held:
        found = self.sessions.get((conn.peer, request.head.get("sid", b"")))
        if found is None:
            raise Refusal("no_session", "no such session")
        return found

    def do_status(self, conn: Conn, request: Request) -> None:
        held = self.held(conn, request)
        conn.reply(request, {"n": held.n, "pos": held.hidden.shape[1], "max_len": held.open["max_len"]})

    def do_extend(self, conn: Conn, request: Request) -> None:
        self.held(conn, request).open["max_len"] = request.head["max_len"]
        conn.reply(request, {"max_len": request.head["max_len"]})

    def do_close(self, conn: Conn, request: Request) -> None:
        self.sessions.pop((conn.peer, request.head.get("sid", b"")), None)
        conn.reply(request, {})

    def do_step(self, conn: Conn, request: Request) -> None:
        held = self.held(conn, request)
        head, body = request.head, bytes(request.body)
        self.steps += 1
        self.stage.steps.append((self, head, body))
        content = (_plain(head), body)
        if held.last is not None and head["n"] == held.n - 1:
            if held.last[0] != content:
                self.stage.fault(f"step {head['n']} came again with other content")
                raise Refusal("conflict")
            self.reply_step(conn, request, *held.last[1])
            return
        reply = self.run_step(held, head, body)
        held.last = (content, reply)
        self.reply_step(conn, request, *reply)

    def run_step(self, held: Held, head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """The honest reply; what the client asks wrongly is a fault of its."""
        tensor, opened = head["t"][0], held.open
        shape = tuple(tensor["s"])
        if head["n"] != held.n:
            self.stage.fault(f"step {head['n']} came where {held.n} was due")
            raise Refusal("out_of_order", n=held.n)
        if head["pos"] > held.hidden.shape[1]:
            self.stage.fault(f"a step at {head['pos']} came where {held.hidden.shape[1]} tokens are held")
            raise Refusal("position", pos=held.hidden.shape[1])
        if (tensor["n"], tensor["d"], tensor["c"]) != ("h", opened["dtype"], opened["codec"]):
            raise Failed(f"step with {tensor} in a session of {opened['dtype']} {opened['codec']}")
        if len(shape) != 3 or shape[0] != opened["batch"] or shape[2] != tensors.HIDDEN:
            raise Failed(f"step with shape {shape}")
        if tensors.encoded_size(shape, tensor["d"], tensor["c"]) != len(body):
            raise Failed(f"step with {len(body)} bytes for {tensor}")
        if head["pos"] + shape[1] > opened["max_len"]:
            raise Refusal("length", max_len=opened["max_len"], pos=held.hidden.shape[1])
        hidden = tensors.decode(body, tensor["d"], shape, tensor["c"])
        if not np.isfinite(hidden).all():
            raise Failed("step with NaN or infinity")
        kept = held.hidden[:, : head["pos"]]
        if head.get("hypo") is not None:
            kept = kept[head["hypo"]]
        held.hidden = np.concatenate([kept, hidden], axis=1)
        held.n += 1
        pads = head.get("pad") or [0] * shape[0]
        start, end = opened["blocks"]
        rows = [tensors.run_blocks(row, start, end, pad) for row, pad in zip(held.hidden, pads, strict=True)]
        output = np.stack(rows)[:, head["pos"] :].astype(np.float32)
        last = head.get("last")
        if last is not None and not 1 <= last <= shape[1]:
            raise Failed(f"step with last {last} for shape {shape}")
        output = output[:, -self.answered(head) :]
        made = {
            "n": head["n"],
            "pos": head["pos"] + shape[1],
            "t": [tensors.descriptor(output, tensor["d"], tensor["c"])],
        }
        return made, tensors.encode(output, tensor["d"], tensor["c"])

    def answered(self, head: dict[str, Any]) -> int:
        """Tokens of each row in the reply (PT-SES-037)."""
        tokens = int(head["t"][0]["s"][1])
        return tokens if head.get("next") else int(head.get("last") or tokens)

    def reply_step(self, conn: Conn, request: Request, head: dict[str, Any], body: bytes) -> None:
        conn.reply(request, head, body)


def _plain(head: dict[str, Any]) -> dict[str, Any]:
    """A head without the connection's own keys, the route, and what is wanted of the output."""
    return {name: value for name, value in head.items() if name not in ("size", "max", "dl", "next", "last")}
