"""Cases about generating over servers that answer wrongly, refuse, forget or vanish (spec/05, spec/07, spec/08)."""

from __future__ import annotations

import struct
import time
from typing import Any

import numpy as np

from tools.conformance import tensors
from tools.conformance.client.harness import PROMPT, Stage
from tools.conformance.client.responder import Conn, Held, Refusal, Request, Server
from tools.conformance.constants import DATA, END, ERR, RES
from tools.conformance.registry import case
from tools.conformance.verdicts import Closed, require

Reply = tuple[dict[str, Any], bytes]


def _generates(number: int, requirements: str, title: str, *servers: type[Server], **options: Any) -> None:
    def run(stage: Stage) -> None:
        stage.generated(stage.generate(*[server(stage) for server in servers], **options))

    case(f"client/{number:03}", requirements, side="client", title=title)(run)


_generates(
    60, "PT-MDL-011 PT-MDL-040 PT-MDL-041 PT-SES-010", "The formula model's greedy tokens over one server", Server
)


class _Front(Server):
    blocks = (0, 1)


class _Back(Server):
    blocks = (1, 2)


_generates(61, "PT-SES-011 PT-MDL-041", "The same tokens over a chain of two servers with a block each", _Front, _Back)


class Liar(Server):
    """The first server that is asked for a step answers wrongly for ever; any other is honest."""

    def do_step(self, conn: Conn, request: Request) -> None:
        if not self.stage.is_first(self):
            super().do_step(conn, request)
            return
        self.steps += 1
        self.stage.steps.append((self, request.head, bytes(request.body)))
        self.lie(conn, request, self.held(conn, request))

    def lie(self, conn: Conn, request: Request, held: Held) -> None:
        head, body = self.wrong(*self.run_step(held, request.head, bytes(request.body)))
        conn.reply(request, head, body)

    def wrong(self, head: dict[str, Any], body: bytes) -> Reply:
        raise NotImplementedError


def _replaced(number: int, requirements: str, title: str, wrong: Any, wire: str = "f32") -> None:
    """One of two servers gives this reply: the other is used, and the tokens are right."""

    def run(stage: Stage) -> None:
        liar = type("Lie", (Liar,), {"wrong": lambda self, head, body: wrong(head, body)})
        outcome = stage.generate(liar(stage), liar(stage), wire=wire)
        stage.generated(outcome) if wire != "int8" else stage.succeeded(outcome)
        first = stage.first
        require(first is not None and first.steps <= 3, f"the server that lied was asked {first and first.steps} times")

    case(f"client/{number:03}", requirements, side="client", title=f"{title}: the server is replaced")(run)


def _changed(**changes: Any) -> Any:
    """A reply whose tensor has these changes, with a body of the size that it then has."""

    def wrong(head: dict[str, Any], body: bytes) -> Reply:
        tensor = head["t"][0] | changes
        size = tensors.encoded_size(tuple(tensor["s"]), tensor["d"], tensor["c"])
        return head | {"t": [tensor]}, bytes(size)

    return wrong


def _with_value(value: float) -> Any:
    def wrong(head: dict[str, Any], body: bytes) -> Reply:
        return head, body[:8] + struct.pack("<f", value) + body[12:]

    return wrong


_replaced(62, "PT-SES-029", "A reply of another shape", _changed(s=[1, 1, 32]))
_replaced(63, "PT-SES-029 PT-TEN-051", "A reply of another type", _changed(d="f16"))
_replaced(64, "PT-SES-029 PT-TEN-051", "A reply in another codec", _changed(c="i8b64"))
_replaced(65, "PT-SES-029", "A reply with another n", lambda head, body: (head | {"n": head["n"] + 1}, body))
_replaced(66, "PT-SES-029", "A reply with another pos", lambda head, body: (head | {"pos": head["pos"] + 1}, body))
_replaced(67, "PT-TEN-024", "A reply with NaN", _with_value(float("nan")))
_replaced(68, "PT-TEN-024", "A reply with infinity", _with_value(float("inf")))
_replaced(69, "PT-TEN-021", "A reply whose body is shorter than its tensor", lambda head, body: (head, body[:-4]))
_replaced(
    70,
    "PT-TEN-003 PT-SES-004",
    "A reply with a tensor of another name",
    lambda head, body: (head | {"t": [head["t"][0] | {"n": "x"}]}, body),
)
_replaced(
    71,
    "PT-SES-029 PT-MSG-041",
    "A reply without n",
    lambda head, body: ({k: v for k, v in head.items() if k != "n"}, body),
)
_replaced(
    72,
    "PT-MSG-040 PT-SES-029",
    "A reply whose pos is a str",
    lambda head, body: (head | {"pos": str(head["pos"])}, body),
)
_replaced(73, "PT-MSG-045", 'A reply with a key that begins with "!"', lambda head, body: (head | {"!x": 1}, body))
_replaced(
    74,
    "PT-TEN-007",
    "A reply that describes a tensor of 2^96 values",
    lambda head, body: (head | {"t": [head["t"][0] | {"s": [2**32] * 3}]}, body),
)
_replaced(
    75,
    "PT-TEN-044",
    "An i8b64 reply with a scale of NaN",
    lambda head, body: (head, struct.pack("<f", float("nan")) + body[4:]),
    "int8",
)
_replaced(76, "PT-TEN-045", "An i8b64 reply with the code -128", lambda head, body: (head, body[:-1] + b"\x80"), "int8")


def _lies(number: int, requirements: str, title: str, lie: Any, seconds: float = 15) -> None:
    def run(stage: Stage) -> None:
        liar = type("Lie", (Liar,), {"lie": lambda self, conn, request, held: lie(conn, request)})
        outcome = stage.generate(liar(stage), liar(stage), seconds=seconds)
        stage.generated(outcome)
        require(outcome.seconds < 9, f"expected: noticed at once, before a body counts as stalled; observed: {outcome}")

    case(f"client/{number:03}", requirements, side="client", title=f"{title}: another server goes on")(run)


def _frames(*make: Any) -> Any:
    return lambda conn, request: conn.send(*[one(request.stream) for one in make])


def _refusing(code: str, text: str = "", **detail: Any) -> Any:
    def lie(conn: Conn, request: Request) -> None:
        raise Refusal(code, text, **detail)

    return lie


_lies(
    77,
    "PT-TEN-022",
    "More body than RES declared",
    _frames(lambda s: [RES, s, 0, {"size": 10}], lambda s: [DATA, s, 0, bytes(11)]),
)
_lies(
    78,
    "PT-TEN-022",
    "END before all of the body",
    _frames(lambda s: [RES, s, 0, {"size": 10}], lambda s: [DATA, s, END, bytes(9)]),
)
_lies(
    79,
    "PT-STR-013 PT-STR-042",
    "A reply larger than the request takes",
    _frames(lambda s: [RES, s, 0, {"size": 2**20}]),
)
_lies(110, "PT-STR-013 PT-STR-020 PT-STR-021", "A reply of 8 GiB", _frames(lambda s: [RES, s, 0, {"size": 2**33}]))
_lies(80, "PT-STR-007", "DATA before RES", _frames(lambda s: [DATA, s, 0, bytes(10)]))
_lies(81, "PT-STR-007", "RES twice", _frames(lambda s: [RES, s, 0, {"size": 10}], lambda s: [RES, s, 0, {"size": 10}]))
_lies(82, "PT-STR-013", "A size that is no count", _frames(lambda s: [RES, s, 0, {"size": -1}]))
_lies(83, "PT-ERR-003", "ERR internal", _refusing("internal", "out of memory"))
_lies(84, "PT-ERR-005 PT-ERR-006", "ERR resources with retry", _refusing("resources", "full", retry=True, after=200))
_lies(85, "PT-ERR-003 PT-ERR-005", "ERR unavailable", _refusing("unavailable", "draining", retry=True))
_lies(86, "PT-SES-020", "ERR no_session, each time", _refusing("no_session", "no such session"))
_lies(87, "PT-ERR-004", "ERR with an unknown code", _frames(lambda s: [ERR, s, 4_000, "what is this", {}]))
_lies(88, "PT-FRM-013 PT-ERR-013", "ERR with 60 kB of escapes", _frames(lambda s: [ERR, s, 15, "\x1b[2J" * 15_000, {}]))
_lies(
    89,
    "PT-ERR-006",
    "ERR with after of a year",
    _frames(lambda s: [ERR, s, 10, "busy", {"retry": True, "after": 31_536_000_000}]),
)


def _reset(conn: Conn, request: Request) -> None:
    conn.link.close(reset=True)
    raise Closed("reset")


def _half(conn: Conn, request: Request) -> None:
    conn.send([RES, request.stream, 0, {"size": 256}], [DATA, request.stream, 0, bytes(100)])
    _reset(conn, request)


_lies(90, "PT-STR-054 PT-ERR-009", "A reset in the place of a reply", _reset)
_lies(91, "PT-STR-054 PT-ERR-009", "A reset in the middle of a reply's body", _half)


class _LosesReplies(Server):
    """Does each step, and loses every second reply together with the connection."""

    def reply_step(self, conn: Conn, request: Request, head: dict[str, Any], body: bytes) -> None:
        if self.steps % 2:
            conn.link.close(reset=True)
            raise Closed("reset")
        super().reply_step(conn, request, head, body)


@case("client/092", "PT-SES-030 PT-SES-010", side="client")
def lost_replies(stage: Stage) -> None:
    """A step whose reply was lost is sent again with the same n and content, over a new connection"""
    server = _LosesReplies(stage)
    stage.generated(stage.generate(server))
    heads = [head for _, head, _ in stage.steps]
    again = [
        a
        for a, b in zip(stage.steps, stage.steps[1:], strict=False)
        if (a[1]["n"], a[1]["sid"]) == (b[1]["n"], b[1]["sid"])
    ]
    stage.should(again, "a retry in the same session instead of a replay")
    for first, second in zip(stage.steps, stage.steps[1:], strict=False):
        if (first[1]["sid"], first[1]["n"]) == (second[1]["sid"], second[1]["n"]):
            require(first[2] == second[2], "the retry has another body")
    require(len(heads) >= 4, f"{len(heads)} steps were asked for")


class _Hangup(Server):
    """Ends the connection after each reply."""

    def reply_step(self, conn: Conn, request: Request, head: dict[str, Any], body: bytes) -> None:
        super().reply_step(conn, request, head, body)
        conn.link.close()
        raise Closed("as often")


@case("client/093", "PT-SES-010", side="client")
def connections_that_end(stage: Stage) -> None:
    """A server that closes after each reply: the session goes on over new connections"""
    stage.generated(stage.generate(_Hangup(stage)))
    sids = {head["sid"] for _, head in stage.opens}
    stage.should(len(sids) == 1, f"one session over all connections, not {len(sids)}")


class _Forgetful(Server):
    """Forgets the session once."""

    def do_step(self, conn: Conn, request: Request) -> None:
        if self.steps == 2:
            self.steps += 1
            self.sessions.clear()
        super().do_step(conn, request)


_generates(94, "PT-SES-020", "A session that was forgotten is opened anew and replayed", _Forgetful)


class _OtherModel(Server):
    def info_map(self) -> dict[str, Any]:
        return super().info_map() | {"model": bytes(32)}

    def do_open(self, conn: Conn, request: Request) -> None:
        self.stage.fault("a session was opened at a server of another model")
        raise Refusal("not_served")


@case("client/095", "PT-SES-005 PT-MDL-057", side="client")
def other_model(stage: Stage) -> None:
    """A server whose info names another model is not used"""
    stage.generated(stage.generate(_OtherModel(stage), Server(stage)))


@case("client/096", "PT-SES-005", side="client")
def only_other_model(stage: Stage) -> None:
    """Where no server has the model, the client says so"""
    stage.failed(stage.generate(_OtherModel(stage), seconds=6), within=8)


def _bad_info(number: int, title: str, **changes: Any) -> None:
    class BadInfo(Server):
        def info_map(self) -> dict[str, Any]:
            return super().info_map() | changes

        def do_open(self, conn: Conn, request: Request) -> None:
            self.stage.fault(f"a session was opened at a server whose info says {changes}")
            raise Refusal("not_served")

    def run(stage: Stage) -> None:
        stage.generated(stage.generate(BadInfo(stage), Server(stage)))

    case(
        f"client/{number:03}", "PT-MSG-040 PT-SES-005", side="client", title=f"A server whose info {title} is not used"
    )(run)


_bad_info(97, "has blocks beyond its layers", blocks=[0, 3])
_bad_info(98, "has an empty range", blocks=[1, 1])
_bad_info(99, "has a str as hidden size", hidden="64")
_bad_info(100, "lacks its codecs", codecs=None)


class _Redirect(Server):
    """Names other servers in its replies, which no client may follow."""

    def reply_step(self, conn: Conn, request: Request, head: dict[str, Any], body: bytes) -> None:
        more = {
            "next": [{"peer": bytes(32), "sid": bytes(16)}],
            "redirect": "petalite://elsewhere",
            "addrs": ["1.2.3.4:5"],
        }
        super().reply_step(conn, request, head | more, body)


_generates(101, "PT-MSG-044", "A redirect or a list of hops in a reply is ignored", _Redirect)


class _Unknown(Server):
    def reply_step(self, conn: Conn, request: Request, head: dict[str, Any], body: bytes) -> None:
        super().reply_step(conn, request, head | {"later": {"x": [1, b"2"]}, "more": None}, body)

    def info_map(self) -> dict[str, Any]:
        return super().info_map() | {"colour": "green", "quant": None}


_generates(102, "PT-MSG-044 PT-MSG-043", "Unknown keys in replies are ignored", _Unknown)


class _Refuses(Server):
    """Refuses open for good."""

    def do_open(self, conn: Conn, request: Request) -> None:
        raise Refusal("resources", "no room for so many tokens", retry=False, cache_left=1)


@case("client/103", "PT-SES-012", side="client")
def open_refused_here(stage: Stage) -> None:
    """A server that refuses open: another is used"""
    stage.generated(stage.generate(_Refuses(stage), Server(stage)))


@case("client/104", "PT-SES-012", side="client", slow=True)
def open_refused_everywhere(stage: Stage) -> None:
    """Where every server refuses open, the client fails cleanly and does not ask without pause"""
    outcome = stage.generate(_Refuses(stage), seconds=6)
    stage.failed(outcome, within=12)
    asked = sum(1 for conn in stage.conns for request in conn.requests if request.method == "open")
    require(asked <= 60, f"open was asked {asked} times in {outcome.seconds:.0f} s")


@case("client/105", "PT-TEN-041 PT-TEN-042 PT-TEN-043", side="client")
def int8_bytes(stage: Stage) -> None:
    """The client encodes i8b64 by the chapter's steps"""
    stage.succeeded(stage.generate(Server(stage), wire="int8", count=2))
    _prompt_matches(stage, "i8b64")


@case("client/106", "PT-TEN-011 PT-TEN-010", side="client")
def f16_bytes(stage: Stage) -> None:
    """The client rounds to f16 to nearest"""
    stage.succeeded(stage.generate(Server(stage), wire="f16", count=2))
    _prompt_matches(stage, "raw")


def _prompt_matches(stage: Stage, codec: str) -> None:
    """The first steps carry the prompt's embeddings, encoded as they should be."""
    sent = b""
    wanted = tensors.embed(PROMPT).astype(np.float32)
    for _, head, body in stage.steps:
        tensor = head["t"][0]
        require(tensor["c"] == codec, f"expected: codec {codec}; observed: {tensor}")
        require(list(tensor["s"]) == [1, 5, 64], "the prompt of 5 tokens came in pieces")
        sent = body
        break
    expected = tensors.encode(wanted, stage.steps[0][1]["t"][0]["d"], codec)
    kind = np.dtype("<i1") if codec == "i8b64" else np.dtype("<u2")
    skip = 4 * 5 if codec == "i8b64" else 0
    same = float((np.frombuffer(sent, kind, offset=skip) == np.frombuffer(expected, kind, offset=skip)).mean())
    require(same >= 0.97, f"expected: the embeddings encoded by the spec; observed: {same:.1%} of the values")


@case("client/107", "PT-SES-010 PT-SES-014 PT-SES-042", side="client")
def tidy_session(stage: Stage) -> None:
    """One open, steps that carry each token once, and close at the end"""
    server = Server(stage)
    stage.generated(stage.generate(server, count=6), 6)
    tokens = sum(head["t"][0]["s"][1] for _, head, _ in stage.steps)
    stage.should(len(stage.opens) == 1, f"one open, not {len(stage.opens)}")
    stage.should(tokens <= len(PROMPT) + 6, f"each token sent once, not {tokens} tokens for {len(PROMPT) + 6}")
    stage.should(not server.sessions, "the session closed at the end")
    sids = [head["sid"] for _, head in stage.opens]
    require(all(len(set(sid)) > 4 for sid in sids), f"sids are not random: {sids}")


class _Slow(Server):
    """The first server that is asked takes its time without PROGRESS, but answers PING."""

    def do_step(self, conn: Conn, request: Request) -> None:
        if self.stage.is_first(self) and self.steps == 1:
            self.steps += 1
            time.sleep(1.0)  # shorter than what makes a peer dead
        super().do_step(conn, request)


_generates(108, "PT-STR-053", "A reply that takes a second is waited for", _Slow)


class _Vanishes(Server):
    """Closes its doors in the middle: no connection is accepted any more."""

    def do_step(self, conn: Conn, request: Request) -> None:
        if self.stage.is_first(self) and self.steps == 2:
            conn.link.close(reset=True)
            raise Closed("gone")
        super().do_step(conn, request)

    def handshake(self, conn: Conn) -> None:
        if self.stage.first is self and self.steps == 2:
            raise Closed("gone")
        super().handshake(conn)


_generates(
    109, "PT-SES-010", "A server that vanishes in mid-generation is replaced, the text stays", _Vanishes, _Vanishes
)


class _Inline(Server):
    inline = True

    def reply_step(self, conn: Conn, request: Request, head: dict[str, Any], body: bytes) -> None:
        listed = "inline" in ((conn.hello or {}).get("caps") or {})
        if listed:
            conn.send([RES, request.stream, END, {"size": len(body), **head}, body])
        else:
            super().reply_step(conn, request, head, body)


_generates(111, "PT-FRM-014", "Small bodies travel in the frames of their heads where both sides list inline", _Inline)


class _Whole(Server):
    """Does not know `last`."""

    def answered(self, head: dict[str, Any]) -> int:
        return int(head["t"][0]["s"][1])


_generates(112, "PT-SES-109", "A server that answers with all tokens, whatever was asked for", _Whole)
