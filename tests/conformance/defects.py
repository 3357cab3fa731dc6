"""Defects of a server: each patches petalite in its own process, and names the cases of which one must notice."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from petalite import identity, limits
from petalite.errors import ErrorCode, GoAwayCode, HandshakeError, RemoteProtocolError, RequestError
from petalite.net.endpoint import Endpoint
from petalite.wire import certificate, frames, handshake, messages, noise, packing, replier, state, streams, tensors
from petalite.wire import connection as wire_connection
from petalite.wire.quota import Quota


@dataclass(frozen=True)
class Mutant:
    """`apply` breaks petalite in this process. `cases`: at least one of these must fail."""

    apply: Callable[[], None]
    cases: tuple[str, ...]


SERVER: dict[str, Mutant] = {}


def defect(*cases: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a defect of a server under its function's name."""

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        SERVER[apply.__name__.replace("_", "-")] = Mutant(apply, cases)
        return apply

    return register


def patch(owner: Any, name: str, value: Any) -> Any:
    """Replace an attribute; returns what it was."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return before


# --- handshake and records


@defect("handshake/005")
def says_nothing_to_other_versions() -> None:
    patch(handshake.Handshake, "_refusal", lambda self: b"")


@defect("handshake/023", "handshake/024")
def believes_any_clock() -> None:
    patch(certificate, "_check_times", lambda not_after, now: None)


@defect("handshake/026")
def takes_small_order_identities() -> None:
    patch(identity, "SMALL_ORDER_Y", frozenset())


@defect("handshake/020", "handshake/021")
def checks_no_signature() -> None:
    patch(certificate, "verify_signature", lambda key, signature, message: True)


@defect("handshake/015", "handshake/016")
def takes_low_order_points() -> None:
    before = noise.dh

    def dh(pair: Any, public: bytes) -> bytes:
        try:
            return before(pair, public)
        except HandshakeError:
            return bytes(32)

    patch(noise, "dh", dh)


@defect("handshake/013", "handshake/009")
def takes_early_payload() -> None:
    before = handshake.Handshake._take_message

    def take(self: Any, low: int, high: int) -> bytes | None:
        return before(self, low, limits.MAX_HANDSHAKE_MESSAGE)

    patch(handshake.Handshake, "_take_message", take)


@defect("handshake/017")
def forgets_the_network_in_the_prologue() -> None:
    patch(handshake, "prologue", lambda preamble, network: preamble)


@defect("handshake/001")
def uses_a_nonce_twice() -> None:
    before = noise.TransportCipher.encrypt_into

    def encrypt_into(self: Any, plaintext: Any, out: Any) -> int:
        size = before(self, plaintext, out)
        self.n = 0
        return size

    patch(noise.TransportCipher, "encrypt_into", encrypt_into)


@defect("records/006")
def takes_replayed_records() -> None:
    before = noise.TransportCipher.decrypt_into

    def decrypt_into(self: Any, ciphertext: Any, out: Any) -> int:
        try:
            return before(self, ciphertext, out)
        except RemoteProtocolError:
            if not self.n:
                raise
            self.n -= 1
            return before(self, ciphertext, out)

    patch(noise.TransportCipher, "decrypt_into", decrypt_into)


# --- frames


@defect("frames/006")
def takes_hello_twice() -> None:
    state.DIRECTION_TRANSITIONS[state.DirectionState.OPEN][state.DirectionEvent.HELLO] = state.DirectionState.OPEN


@defect("frames/003", "frames/004")
def serves_before_hello() -> None:
    silent = state.DIRECTION_TRANSITIONS[state.DirectionState.SILENT]
    silent[state.DirectionEvent.REQ] = silent[state.DirectionEvent.OTHER] = state.DirectionState.SILENT


@defect("frames/012")
def ignores_critical_frames() -> None:
    patch(frames, "FIRST_IGNORABLE", 9)


@defect("frames/022")
def ignores_reserved_flags() -> None:
    patch(frames, "_check_flags", lambda value: value == 1)


@defect("frames/036")
def answers_ping_with_zeros() -> None:
    before = frames.Pong
    patch(frames, "Pong", lambda payload: before(bytes(8)))


@defect("frames/026")
def takes_heads_of_any_size() -> None:
    patch(limits, "MAX_HEAD_FRAME", limits.MAX_FRAME)


@defect("frames/005")
def takes_a_large_hello() -> None:
    patch(limits, "MAX_FRAME_BEFORE_HELLO", limits.MAX_FRAME)


@defect("frames/033", "frames/034")
def ignores_replies_never_asked_for() -> None:
    for name in ("_on_res", "_on_err", "_on_progress", "_on_data"):
        handlers_ = wire_connection._HANDLERS
        kind = {"_on_res": frames.Res, "_on_err": frames.Err, "_on_progress": frames.Progress, "_on_data": frames.Data}[
            name
        ]
        before = handlers_[kind]

        def lenient(self: Any, frame: Any, now: float, before: Any = before) -> None:
            try:
                before(self, frame, now)
            except RemoteProtocolError:
                pass

        handlers_[kind] = lenient


# --- msgpack


@defect("msgpack/001", "msgpack/002")
def takes_duplicate_keys() -> None:
    patch(packing, "_unique", dict)


@defect("msgpack/004")
def takes_bin_keys() -> None:
    patch(packing, "_check_keys", lambda value: None)


@defect("msgpack/008", "msgpack/009")
def takes_floats() -> None:
    patch(packing, "_SCALARS", packing._SCALARS | {float})


@defect("msgpack/018", "msgpack/019")
def takes_any_nesting() -> None:
    patch(packing, "MAX_NESTING", 900)


@defect("msgpack/021")
def counts_no_elements() -> None:
    patch(packing, "MAX_ELEMENTS", 1 << 17)


@defect("msgpack/028")
def ignores_critical_keys() -> None:
    for module in (packing, messages, tensors):
        patch(module, "refuse_critical", lambda fields: None)


@defect("msgpack/029")
def takes_bools_for_integers() -> None:
    before = packing.Int.check
    patch(
        packing.Int,
        "check",
        lambda self, name, value: before(self, name, int(value) if value in (True, False) else value),
    )


@defect("msgpack/027", "frames/007")
def refuses_unknown_keys() -> None:
    before = packing.refuse_critical

    def refuse(fields: Any) -> None:
        before(fields)
        if "later" in fields:
            raise RequestError(ErrorCode.UNSUPPORTED, "a field that is not known here")

    for module in (packing, messages, tensors):
        patch(module, "refuse_critical", refuse)


# --- streams


def _body_without(check: Callable[[Any, int, bool], bool]) -> None:
    """IncomingBody.add that overlooks what `check(body, filled, end)` names."""
    before = streams.IncomingBody.add

    def add(self: Any, data: Any, end: bool, now: float) -> None:
        if check(self, self.filled + len(data), end):
            data = bytes(data)[: self.size - self.filled]
            end = True
            self.size = self.filled + len(data)
        before(self, data, end, now)

    patch(streams.IncomingBody, "add", add)


@defect("streams/008")
def takes_more_body_than_declared() -> None:
    _body_without(lambda body, filled, end: filled > body.size)


@defect("streams/009")
def takes_less_body_than_declared() -> None:
    _body_without(lambda body, filled, end: end and filled < body.size)


@defect("streams/014")
def has_no_quota() -> None:
    patch(Quota, "reserve", lambda self, size: True)
    patch(Quota, "release", lambda self, size: None)


@defect("streams/015")
def takes_any_number_of_streams() -> None:
    patch(replier.limits, "MAX_STREAMS", 1 << 20)


@defect("streams/020", "streams/021")
def answers_after_cancel() -> None:
    patch(replier.Replier, "on_cancel", lambda self, frame, now: None)


@defect("streams/003")
def takes_stream_ids_again() -> None:
    before = replier.Replier.on_req

    def on_req(self: Any, frame: Any, now: float) -> None:
        self._highest = min(self._highest, frame.stream - 1)
        before(self, frame, now)

    patch(replier.Replier, "on_req", on_req)


@defect("streams/010")
def ignores_end_on_requests() -> None:
    before = replier.Replier._admit

    def admit(self: Any, request: Any, end: bool, now: float) -> None:
        before(self, request, not request.head.get("size"), now)

    patch(replier.Replier, "_admit", admit)


@defect("streams/023")
def ignores_deadlines() -> None:
    before = replier.Replier._admit

    def admit(self: Any, request: Any, end: bool, now: float) -> None:
        before(self, request, end, now)
        request.deadline_ms = None

    patch(replier.Replier, "_admit", admit)


@defect("streams/028", "streams/007")
def shows_tracebacks() -> None:
    before = replier.Replier.error

    def error(self: Any, request: Any, failure: Any) -> None:
        before(self, request, RequestError(failure.code, f'Traceback (most recent call last): File "{__file__}"'))

    patch(replier.Replier, "error", error)


@defect("streams/007")
def answers_unknown_methods_with_another_code() -> None:
    before = replier.Replier.error

    def error(self: Any, request: Any, failure: Any) -> None:
        code = ErrorCode.INTERNAL if failure.code is ErrorCode.UNSUPPORTED else failure.code
        before(self, request, RequestError(code, failure.text, failure.detail))

    patch(replier.Replier, "error", error)


@defect("streams/007")
def dies_of_an_unknown_method() -> None:
    before = replier.Replier.error

    def error(self: Any, request: Any, failure: Any) -> None:
        if failure.code is ErrorCode.UNSUPPORTED:
            os._exit(1)
        before(self, request, failure)

    patch(replier.Replier, "error", error)


@defect("clocks/004")
def sends_no_progress() -> None:
    patch(limits, "PROGRESS_SECONDS", 1e9)


@defect("clocks/005")
def keeps_the_older_connection() -> None:
    before = Endpoint._register

    def register(self: Any, connection: Any) -> None:
        known = self.connections.get(connection.peer)
        if known is not None and not known.leaving:
            self._all.add(connection)
            connection.go_away(GoAwayCode.DUPLICATE)
            return
        before(self, connection)

    patch(Endpoint, "_register", register)


# --- what no single case can see: `tools/conformance soak` does

LEAKS: dict[str, Callable[[], None]] = {}


def leak(apply: Callable[[], None]) -> Callable[[], None]:
    """Register a server that loses something with each connection, under its function's name."""
    LEAKS[apply.__name__.replace("_", "-")] = apply
    return apply


@leak
def remembers_every_connection() -> None:
    kept: list[bytes] = []
    accept = Endpoint.accept

    async def heavier(self: Endpoint, transport: Any) -> None:
        kept.append(os.urandom(1 << 21))
        await accept(self, transport)

    patch(Endpoint, "accept", heavier)


@leak
def leaves_sockets_open() -> None:
    accept = Endpoint.accept

    async def forgetful(self: Endpoint, transport: Any) -> None:
        os.dup(transport._stream.socket.fileno())
        await accept(self, transport)

    patch(Endpoint, "accept", forgetful)
