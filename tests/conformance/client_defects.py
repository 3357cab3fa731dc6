"""Defects of a client; see defects.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from defects import Mutant, patch

from petalite import bridge, identity, limits
from petalite.client import calls
from petalite.errors import HandshakeError, PeerLost, RemoteProtocolError
from petalite.wire import certificate, connection, frames, handshake, messages, noise, packing, state, tensors

CLIENT: dict[str, Mutant] = {}


def defect(*cases: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(apply: Callable[[], None]) -> Callable[[], None]:
        CLIENT[apply.__name__.replace("_", "-")] = Mutant(apply, cases)
        return apply

    return register


@defect("client/002", "client/003")
def believes_any_clock() -> None:
    patch(certificate, "_check_times", lambda not_after, now: None)


@defect("client/012")
def takes_any_peer() -> None:
    before = certificate.verify
    patch(
        certificate,
        "verify",
        lambda payload, static, network, now, expected=None: before(payload, static, network, now),
    )


@defect("client/004", "client/005")
def checks_no_signature() -> None:
    patch(certificate, "verify_signature", lambda key, signature, message: True)


@defect("client/009")
def takes_small_order_identities() -> None:
    patch(identity, "SMALL_ORDER_Y", frozenset())


@defect("client/013", "client/014")
def takes_low_order_points() -> None:
    before = noise.dh

    def dh(pair: Any, public: bytes) -> bytes:
        try:
            return before(pair, public)
        except HandshakeError:
            return bytes(32)

    patch(noise, "dh", dh)


@defect("client/001")
def sends_early_payload() -> None:
    before = handshake.Handshake._write
    patch(handshake.Handshake, "_write", lambda self, payload: before(self, payload or b"early"))


@defect("client/033")
def takes_duplicate_keys() -> None:
    patch(packing, "_unique", dict)


@defect("client/034")
def takes_floats() -> None:
    patch(packing, "_SCALARS", packing._SCALARS | {float})


@defect("client/052")
def answers_ping_with_zeros() -> None:
    before = frames.Pong
    patch(frames, "Pong", lambda payload: before(bytes(8)))


@defect("client/030")
def takes_hello_twice() -> None:
    state.DIRECTION_TRANSITIONS[state.DirectionState.OPEN][state.DirectionEvent.HELLO] = state.DirectionState.OPEN


@defect("client/031")
def ignores_critical_frames() -> None:
    patch(frames, "FIRST_IGNORABLE", 9)


@defect("client/039", "client/040")
def ignores_replies_never_asked_for() -> None:
    for kind in (frames.Res, frames.Err, frames.Data):
        before = connection._HANDLERS[kind]

        def lenient(self: Any, frame: Any, now: float, before: Any = before) -> None:
            try:
                before(self, frame, now)
            except RemoteProtocolError:
                pass

        connection._HANDLERS[kind] = lenient


@defect("client/047")
def takes_replayed_records() -> None:
    before = noise.TransportCipher.decrypt_into

    def decrypt_into(self: Any, ciphertext: Any, out: Any) -> int:
        try:
            return before(self, ciphertext, out)
        except RemoteProtocolError:
            self.n -= 1
            return before(self, ciphertext, out)

    patch(noise.TransportCipher, "decrypt_into", decrypt_into)


@defect("client/060")
def uses_even_stream_ids() -> None:
    before = connection.Connection.__init__

    def init(self: Any, *, initiator: bool, **options: Any) -> None:
        before(self, initiator=not initiator, **options)

    patch(connection.Connection, "__init__", init)


@defect("client/067", "client/068")
def takes_nan_in_replies() -> None:
    patch(bridge, "all_finite", lambda values: True)


@defect("client/065", "client/066")
def checks_no_reply() -> None:
    before = calls.Calls._outcome

    def outcome(self: Any, send: Any, reply: Any) -> Any:
        head = dict(reply.head) | {"n": send.n, "pos": send.end}
        return before(self, send, type(reply)(head, reply.body))

    patch(calls.Calls, "_outcome", outcome)


@defect("client/073")
def ignores_critical_keys() -> None:
    for module in (packing, messages, tensors):
        patch(module, "refuse_critical", lambda fields: None)


@defect("client/112")
def insists_on_what_it_asked_for() -> None:
    before = calls.Calls._outcome

    def outcome(self: Any, send: Any, reply: Any) -> Any:
        if reply.head["t"][0]["s"][1] != send.answered:
            raise PeerLost("answered with more than was asked for")
        return before(self, send, reply)

    patch(calls.Calls, "_outcome", outcome)


@defect("client/105")
def rounds_int8_towards_zero() -> None:
    before = torch.Tensor.round_
    patch(torch.Tensor, "round_", lambda self: self.trunc_() if self.dim() == 3 else before(self))


@defect("client/107")
def uses_one_session_id() -> None:
    from petalite.client import session

    class Fixed:
        def __getattr__(self, name: str) -> Any:
            return (lambda size: bytes(size)) if name == "urandom" else getattr(os, name)

    patch(session, "os", Fixed())


@defect("client/060")
def sends_every_step_as_the_first() -> None:
    before = messages.Step
    patch(calls.messages, "Step", lambda **fields: before(**{**fields, "n": 0}))


@defect("client/092")
def retries_with_other_content() -> None:
    before = calls.Calls._step_request
    asked: list[Any] = []

    def request(self: Any, step: Any) -> Any:
        head, body, options = before(self, step)
        if any(step is other for other in asked):
            body = [memoryview(bytes(bytes(piece)[::-1])) for piece in body]
        asked.append(step)
        return head, body, options

    patch(calls.Calls, "_step_request", request)


@defect("client/079")
def takes_replies_of_any_size() -> None:
    patch(limits, "MAX_BODY", 1 << 40)
    before = connection.Requester.on_res

    def on_res(self: Any, frame: Any, now: float) -> None:
        request = self._find(frame.stream)
        if request is not None:
            request.max_reply = 1 << 40
        before(self, frame, now)

    patch(connection.Requester, "on_res", on_res)


@defect("client/055")
def never_takes_a_peer_for_dead() -> None:
    patch(limits, "DEAD_AFTER_SECONDS", 1e9)


@defect("client/095")
def uses_servers_of_any_model() -> None:
    from petalite.wire.messages import InfoReply

    model = bytes.fromhex("ae66c4bfe0bcb1f4a65d60f486e9d5dbda1ec7b19d99ad92080d05bce9b9dd90")
    before = InfoReply.from_wire.__func__  # type: ignore[attr-defined]
    patch(InfoReply, "from_wire", classmethod(lambda cls, received: before(cls, {**received, "model": model})))


@defect("client/001")
def says_hello_late() -> None:
    before = connection.Connection.__init__

    def init(self: Any, **options: Any) -> None:
        before(self, **options)
        self.writer.take(1 << 16)
        self.ping(0.0)

    patch(connection.Connection, "__init__", init)
