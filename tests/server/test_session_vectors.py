"""spec/vectors/sessions.json: the published lists of events, run through a session table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from petalite.bloom.cache import CachePool
from petalite.errors import ErrorCode, RequestError
from petalite.server.sessions import Answer
from petalite.server.table import SessionTable

VECTORS = json.loads((Path(__file__).resolve().parents[2] / "spec/vectors/sessions.json").read_text())["lists"]


class Player:
    def __init__(self, tools) -> None:
        self.tools = tools
        span = tools.make_span(0, 1)
        self.table = SessionTable(CachePool(tools.CONFIG, 1, 64), (0, 1), lambda start, end: span, tools.MODEL)

    def play(self, event: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, event["do"])(event, self.tools.PeerId(event["peer"].encode() * 32), event["at"])
        except RequestError as error:
            code = {"error": ErrorCode(error.code).name.lower()}
            return code | ({"detail": error.detail} if "detail" in event["expect"] else {})

    def found(self, event, owner, now):
        return self.table.find(owner, self.tools.sid(event["sid"]), now)

    def open(self, event, owner, now):
        message = self.tools.open_message(event["sid"], blocks=(0, 1), max_len=event["max_len"])
        return {"pos": self.table.open(owner, message, now).position}

    def step(self, event, owner, now):
        x = self.tools.hidden(event["tokens"], seed=ord(event["content"]))
        told = {"hypo": tuple(event["hypo"]) if "hypo" in event else None, "last": event.get("last")}
        message, body = self.tools.step_message(x, event["n"], event["pos"], event["sid"], **told)
        entry = self.table.admit(self.found(event, owner, now), message, body, now)
        if isinstance(entry, Answer):
            return {key: entry.head.get(key) for key in event["expect"]}
        if entry.cancel is None:
            entry.cancel = lambda: None
            return {"starts": True}
        return {"joins": True}

    def done(self, event, owner, now):
        session = self.table._sessions[owner, self.tools.sid(event["sid"])]
        step = session.running.step
        session.rows.truncate(step.pos)
        head = {"n": step.n, "pos": step.pos + step.tensors[0].shape[1], "tokens": step.answered}
        self.table.settle(session, Answer(head, []), now)
        return {}

    def failed(self, event, owner, now, broken=False):
        session = self.table._sessions[owner, self.tools.sid(event["sid"])]
        if event.get("begun", broken):
            session.rows.truncate(session.running.step.pos)
        self.table.settle(session, RequestError(ErrorCode.INTERNAL, "failed"), now, broken=broken)
        return {}

    def broken(self, event, owner, now):
        return self.failed(event, owner, now, broken=True)

    def status(self, event, owner, now):
        session = self.found(event, owner, now)
        return {"n": session.n, "pos": session.position, "max_len": session.rows.length}

    def extend(self, event, owner, now):
        session = self.found(event, owner, now)
        growth = self.table.extend(session, event["max_len"], now)
        if growth is not None:
            growth.copy()
            self.table.extended(session, growth, now)
        return {"max_len": session.rows.length}

    def close(self, event, owner, now):
        self.table.close(owner, self.tools.sid(event["sid"]), now)
        return {}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_event_list(vector, tools) -> None:
    player = Player(tools)
    for number, event in enumerate(vector["events"]):
        assert player.play(event) == event["expect"], (number, event)
