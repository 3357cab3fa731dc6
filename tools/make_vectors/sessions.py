"""Sessions (chapter 07): lists of events at one server with what each must lead to. Written by hand, run by the tests.

"at" is in seconds, "content" stands for the tensors (equal content, equal bytes), sessions have one row and the server
has 64 tokens of cache. "starts": the step is handed to the model; "joins": it waits for the one that runs; otherwise
the fields of the reply ("tokens" are those of a row in its tensor), or the error. done, failed (before the model began
or, "begun", after) and broken (after the reorder) are what becomes of the running step.
"""

from __future__ import annotations

from typing import Any

STARTS, JOINS, GONE = {"starts": True}, {"joins": True}, {"error": "no_session"}


def event(at: float, do: str, expect: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"at": at, "peer": "a", "sid": 1, "do": do, **fields, "expect": expect or {}}


def opened(at: float = 0, **fields: Any) -> dict[str, Any]:
    return event(at, "open", {"pos": 0}, **({"max_len": 16} | fields))


def step(n: int, pos: int, tokens: int, expect: dict[str, Any], at: float = 0, **fields: Any) -> dict[str, Any]:
    return event(at, "step", expect, n=n, pos=pos, tokens=tokens, **({"content": "x"} | fields))


def done(at: float = 0, **fields: Any) -> dict[str, Any]:
    return event(at, "done", **fields)


def status(n: int, pos: int, max_len: int = 16, at: float = 0, **fields: Any) -> dict[str, Any]:
    return event(at, "status", {"n": n, "pos": pos, "max_len": max_len}, **fields)


def error(name: str, **detail: Any) -> dict[str, Any]:
    return {"error": name, "detail": detail} if detail else {"error": name}


FIRST = [opened(), step(0, 0, 5, STARTS), done()]

LISTS: dict[str, list[dict[str, Any]]] = {
    "prefill, decode, rollback": [
        *FIRST,
        step(1, 5, 1, STARTS),
        done(),
        status(2, 6),
        step(2, 3, 2, STARTS),
        done(),
        status(3, 5),
    ],
    "a retry gets the same answer, other content a conflict": [
        *FIRST,
        step(0, 0, 5, {"n": 0, "pos": 5}),
        step(0, 0, 5, error("conflict"), content="y"),
        step(0, 0, 4, error("conflict")),
        status(1, 5),
    ],
    "a retry joins the step that runs": [
        opened(),
        step(0, 0, 5, STARTS),
        step(0, 0, 5, JOINS),
        step(0, 0, 5, error("conflict"), content="y"),
        step(1, 5, 1, error("out_of_order", n=0)),
        done(),
        step(0, 0, 5, {"n": 0, "pos": 5}),
    ],
    "a retry gets as many tokens as were asked for first, and a conflict if it wants more": [
        opened(),
        step(0, 0, 5, STARTS, last=2),
        step(0, 0, 5, JOINS, last=1),
        step(0, 0, 5, error("conflict"), last=3),
        step(0, 0, 5, error("conflict")),
        done(),
        step(0, 0, 5, {"n": 0, "pos": 5, "tokens": 2}, last=2),
        step(0, 0, 5, {"n": 0, "pos": 5, "tokens": 2}, last=1),
        step(0, 0, 5, error("conflict")),
        status(1, 5),
        step(1, 5, 3, STARTS),
        done(),
        step(1, 5, 3, {"n": 1, "pos": 8, "tokens": 3}, last=1),
    ],
    "gaps, positions and lengths": [
        *FIRST,
        step(2, 5, 1, error("out_of_order", n=1)),
        step(1, 6, 1, error("position", pos=5)),
        step(1, 5, 12, error("length", max_len=16, pos=5)),
        status(1, 5),
        step(1, 5, 11, STARTS),
        done(),
        step(0, 0, 5, error("out_of_order", n=2)),
        event(0, "extend", {"max_len": 20}, max_len=20),
        event(0, "extend", {"max_len": 20}, max_len=18),
        event(0, "extend", error("resources"), max_len=65),
        step(2, 16, 4, STARTS),
        event(0, "extend", error("busy"), max_len=24),
        done(),
        status(3, 20, 20),
    ],
    "a step that fails leaves the session before it": [
        *FIRST,
        step(1, 2, 1, STARTS),
        event(0, "failed", begun=False),
        status(1, 5),
        step(1, 2, 1, STARTS),
        event(0, "failed", begun=True),
        status(1, 2),
        step(1, 2, 1, STARTS, content="y"),
        done(),
        status(2, 3),
    ],
    "a step that fails after its reorder ends the session": [
        *FIRST,
        step(1, 5, 1, STARTS, hypo=[0]),
        event(0, "broken"),
        event(0, "status", GONE),
        opened(),
    ],
    "opening again": [
        opened(),
        opened(),
        event(0, "open", error("conflict"), max_len=15),
        step(0, 0, 5, STARTS),
        opened(),
        done(),
        event(0, "open", error("conflict"), max_len=16),
        opened(peer="b"),
        event(0, "close"),
        event(0, "close"),
        opened(),
        status(0, 0),
    ],
    "close while a step runs": [
        opened(),
        step(0, 0, 5, STARTS),
        event(0, "close"),
        event(0, "status", GONE),
        step(0, 0, 5, GONE),
    ],
    "another peer's session is no session": [
        *FIRST,
        step(1, 5, 1, GONE, peer="b"),
        event(0, "status", GONE, peer="b"),
        event(0, "close", peer="b"),
        status(1, 5),
    ],
    "no step within 10 s of open": [
        opened(),
        opened(9.9),
        event(10, "status", GONE),
    ],
    "idle for 600 s": [
        *FIRST,
        status(1, 5, at=599),
        step(1, 5, 1, STARTS, at=599),
        done(620),
        status(2, 6, at=1219),
        event(1220, "status", GONE),
    ],
    "no room, then room": [
        opened(max_len=32),
        opened(max_len=32, peer="b"),
        event(1, "open", error("resources"), max_len=16, peer="c"),
        event(2, "open", error("resources"), max_len=65, peer="c"),
        event(3, "close", peer="b"),
        opened(4, max_len=16, peer="c"),
    ],
    "the least recently used parked session makes room": [
        opened(max_len=32),
        step(0, 0, 1, STARTS),
        done(),
        opened(1, sid=2, max_len=32),
        step(0, 0, 1, STARTS, at=1, sid=2),
        done(1, sid=2),
        step(1, 1, 1, STARTS, at=8),
        done(8),
        opened(12, peer="b", max_len=32),
        event(12, "status", GONE, sid=2),
        status(2, 2, 32, at=12),
    ],
    "a peer beyond its share makes room for another": [
        opened(max_len=32),
        opened(1, sid=2, max_len=32),
        opened(2, peer="b", max_len=32),
        event(2, "status", GONE),
        status(0, 0, 32, at=2, sid=2),
        event(3, "open", error("resources"), peer="c", max_len=16),
    ],
}


def make() -> dict[str, Any]:
    return {"lists": [{"name": name, "events": events} for name, events in LISTS.items()]}
