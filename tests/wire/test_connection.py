"""The sans-I/O connection (spec 02, 03): every pair of state and event, quotas on every path, and the clocks."""

from __future__ import annotations

from typing import Any

import pytest

from petalite import limits
from petalite.errors import (
    ErrorCode,
    GoAwayCode,
    LocalProtocolError,
    PeerLost,
    PeerUnreachable,
    RemoteProtocolError,
    RequestError,
)
from petalite.wire import events, frames
from petalite.wire.connection import Connection
from petalite.wire.frames import Cancel, Data, Err, GoAway, Ping, Pong, Progress, Req, Res
from petalite.wire.hello import Hello
from petalite.wire.liveness import Liveness, Verdict
from petalite.wire.quota import Quota
from petalite.wire.state import (
    DIRECTION_TRANSITIONS,
    IGNORES_LATE_FRAMES,
    STREAM_TRANSITIONS,
    DirectionEvent,
    DirectionState,
    StreamEvent,
    StreamState,
)

HELLO = frames.Hello(Hello().to_wire())


class Side:
    """One core, fed with frames and read as frames."""

    def __init__(
        self,
        *,
        initiator: bool = False,
        hello: bool = True,
        quota: int = 10**6,
        inline: tuple[bool, bool] = (False, False),
        **options: Any,
    ) -> None:
        self.quota = Quota(quota)
        ours, theirs = (Hello(capabilities={"inline": {}} if listed else {}) for listed in inline)
        self.core = Connection(initiator=initiator, hello=ours, quota=self.quota, now=0.0, **options)
        assert isinstance(self.sent()[0], frames.Hello)
        if hello:
            self.feed(frames.Hello(theirs.to_wire()))
            assert isinstance(self.events()[0], events.HelloReceived)

    def feed(self, *given: frames.Frame, now: float = 0.0) -> None:
        for frame in given:
            self.core.receive_frame(memoryview(frames.encode(frame)), now)

    def sent(self) -> list[frames.Frame]:
        plain = [prefix + bytes(body or b"") for prefix, body in self.core.writer.take(10**9)]
        return [frames.decode(memoryview(one)) for one in plain]

    def events(self) -> list[events.Event]:
        found = []
        while (event := self.core.next_event()) is not None:
            found.append(event)
        return found

    def served(self) -> Any:
        """The one request that is to be served now."""
        (event,) = self.events()
        assert isinstance(event, events.RequestReceived)
        return event.request


def fails(side: Side, *given: frames.Frame) -> GoAwayCode:
    with pytest.raises(RemoteProtocolError) as caught:
        side.feed(*given)
    return caught.value.code


# Every (state, event) pair of a stream, from the side that serves it and from the side that asked

BODY = bytes(4)
REQUEST_FRAMES: dict[StreamEvent, frames.Frame] = {
    StreamEvent.REQUEST_DATA: Data(1, False, BODY),
    StreamEvent.REQUEST_DATA_END: Data(1, True, BODY),
    StreamEvent.CANCEL: Cancel(1),
}
REPLY_FRAMES: dict[StreamEvent, frames.Frame] = {
    StreamEvent.RES: Res(1, False, {"size": 8}),
    StreamEvent.RES_END: Res(1, True, {}),
    StreamEvent.REPLY_DATA: Data(1, False, BODY),
    StreamEvent.REPLY_DATA_END: Data(1, True, BODY),
    StreamEvent.PROGRESS: Progress(1, {"s": "running"}),
    StreamEvent.ERR: Err(1, 15, "no", {}),
    StreamEvent.CANCEL: Cancel(1),
}


def server_in(state: StreamState) -> tuple[Side, Any]:
    """A side whose stream 1, the peer's, is in `state`; in REPLYING half of the reply is written."""
    side = Side()
    if state is StreamState.IDLE:
        return side, None
    size = 8 if state is StreamState.REQUESTING else 0
    side.feed(Req(1, not size, "m", {"size": size, "max": 10**5}))
    if state is StreamState.REQUESTING:
        side.feed(Data(1, False, BODY))
        return side, None
    request = side.served()
    if state is StreamState.REPLYING:
        side.core.send_reply(request, {}, (bytes(10**5),))
        side.core.writer.take(1)
        side.core.writer.take(1)
    if state is StreamState.CLOSED:
        side.core.send_reply(request, {})
        side.sent()
        side.core.finish(request)
    assert request.state is state
    return side, request


@pytest.mark.parametrize("state", StreamState)
@pytest.mark.parametrize("event", REQUEST_FRAMES)
def test_each_request_frame_in_each_state(state: StreamState, event: StreamEvent) -> None:
    side, request = server_in(state)
    frame = REQUEST_FRAMES[event]
    if state is StreamState.REQUESTING and event is StreamEvent.REQUEST_DATA:
        frame = Data(1, False, bytes(2))
    following = STREAM_TRANSITIONS[state].get(event)
    if following is None and state not in IGNORES_LATE_FRAMES:
        assert fails(side, frame) is GoAwayCode.PROTOCOL
        return
    side.feed(frame)
    if request is not None and following is not None:
        assert request.state is following
    if state is StreamState.CLOSED:
        assert not side.events() and not side.sent()


@pytest.mark.parametrize("event", [StreamEvent.REQ, StreamEvent.REQ_END])
def test_a_stream_is_opened_once(event: StreamEvent) -> None:
    for state in StreamState:
        side, _ = server_in(state)
        frame = Req(1, event is StreamEvent.REQ_END, "m", {"size": 0 if event is StreamEvent.REQ_END else 8})
        if event in STREAM_TRANSITIONS[state]:
            side.feed(frame)
        else:
            assert fails(side, frame) is GoAwayCode.PROTOCOL


def client_in(state: StreamState) -> tuple[Side, Any]:
    """A side whose stream 1, its own, is in `state`."""
    side = Side(initiator=True)
    if state is StreamState.IDLE:
        return side, None
    body = (bytes(10**5),) if state is StreamState.REQUESTING else ()
    request = side.core.send_request("m", {}, body, now=0.0, max_reply=8)
    side.core.writer.take(1)
    if state is StreamState.REPLYING:
        side.feed(Res(1, False, {"size": 8}), Data(1, False, bytes(2)))
    if state is StreamState.CLOSED:
        side.feed(Err(1, 15, "no", {}))
        side.events()
    assert request.state is state
    return side, request


@pytest.mark.parametrize("state", StreamState)
@pytest.mark.parametrize("event", REPLY_FRAMES)
def test_each_reply_frame_in_each_state(state: StreamState, event: StreamEvent) -> None:
    side, request = client_in(state)
    frame = REPLY_FRAMES[event]
    if state is StreamState.REPLYING and event is StreamEvent.REPLY_DATA_END:
        frame = Data(1, True, bytes(6))
    following = STREAM_TRANSITIONS[state].get(event)
    if following is None and state not in IGNORES_LATE_FRAMES:
        assert fails(side, frame) is GoAwayCode.PROTOCOL
        return
    side.feed(frame)
    found = side.events()
    if following is StreamState.CLOSED:
        assert request.state is StreamState.CLOSED
        assert [type(one) for one in found] in ([events.ReplyReceived], [events.RequestFailed])
        assert side.quota.used == 0 and side.core.open_requests == 0
    elif following is not None:
        assert request.state is following
    else:
        assert not found


@pytest.mark.parametrize("state", DirectionState)
@pytest.mark.parametrize("event", DirectionEvent)
def test_each_frame_in_each_state_of_a_direction(state: DirectionState, event: DirectionEvent) -> None:
    side = Side(hello=state is not DirectionState.SILENT)
    if state is DirectionState.LEAVING:
        side.feed(GoAway(0, 0, ""))
    frame = {
        DirectionEvent.HELLO: HELLO,
        DirectionEvent.REQ: Req(1, True, "m", {}),
        DirectionEvent.OTHER: Ping(bytes(8)),
        DirectionEvent.GOAWAY: GoAway(0, 0, ""),
    }[event]
    if event in DIRECTION_TRANSITIONS[state]:
        side.feed(frame)
    else:
        assert fails(side, frame) is GoAwayCode.PROTOCOL


# HELLO


def test_hello_says_limits_and_unknown_capabilities_are_ignored() -> None:
    side = Side(hello=False, initiator=True)
    head = Hello(max_body=100, max_streams=2).to_wire() | {"caps": {"warp": {}, "x-9": 1}, "later": 5}
    side.feed(frames.Hello(head))
    with pytest.raises(LocalProtocolError):
        side.core.send_request("m", {}, (bytes(101),), now=0.0)
    side.core.send_request("m", {}, (bytes(100),), now=0.0)
    side.core.send_request("m", {}, now=0.0)
    with pytest.raises(RequestError) as caught:
        side.core.send_request("m", {}, now=0.0)
    assert caught.value.code is ErrorCode.REFUSED and caught.value.detail["retry"] is True


@pytest.mark.parametrize("head", [{}, {"v": -1}, {"v": "0"}, {"v": 0, "caps": []}, {"v": 0, "!must": 1}])
def test_a_bad_hello_costs_the_connection(head: dict[str, Any]) -> None:
    assert fails(Side(hello=False), frames.Hello(head)) is GoAwayCode.PROTOCOL


def test_a_long_frame_before_hello_costs_the_connection() -> None:
    head = Hello().to_wire() | {"padding": bytes(limits.MAX_FRAME_BEFORE_HELLO)}
    assert fails(Side(hello=False), frames.Hello(head)) is GoAwayCode.FRAME


# Bodies in the frame of their head (PT-FRM-014)


@pytest.mark.parametrize("inline", [(False, False), (True, False), (False, True), (True, True)])
def test_small_bodies_travel_with_their_head_where_both_say_so(inline: tuple[bool, bool]) -> None:
    side = Side(initiator=True, inline=inline)
    side.core.send_request("m", {}, (b"ab", b"", b"c"), now=0.0, max_reply=2)
    head = {"size": 3, "max": 2}
    if inline == (True, True):
        assert side.sent() == [Req(1, True, "m", head, b"abc")]
    else:
        assert side.sent() == [Req(1, False, "m", head), Data(1, False, b"ab"), Data(1, True, b"c")]
    side.feed(Req(2, True, "m", {"max": 5}))
    side.core.send_reply(side.served(), {}, (b"reply",))
    if inline == (True, True):
        assert side.sent() == [Res(2, True, {"size": 5}, b"reply")]
    else:
        assert side.sent() == [Res(2, False, {"size": 5}), Data(2, True, b"reply")]
    assert side.quota.used == 0


def test_nothing_is_inline_before_the_peers_hello_or_above_the_limit() -> None:
    side = Side(initiator=True, hello=False, inline=(True, True))
    side.core.send_request("m", {}, (b"x",), now=0.0)
    assert len(side.sent()) == 2
    side.feed(frames.Hello(Hello(capabilities={"inline": {}}).to_wire()))
    for size, count in ((limits.MAX_INLINE_BODY, 1), (limits.MAX_INLINE_BODY + 1, 2)):
        side.core.send_request("m", {}, (bytes(size),), now=0.0)
        assert len(side.sent()) == count


def test_an_inline_request_and_reply_are_taken_and_accounted() -> None:
    side = Side(inline=(True, True))
    side.feed(Req(1, True, "m", {"size": 3}, b"abc"))
    request = side.served()
    assert request.data == b"abc" and side.quota.used == 3
    side.core.send_reply(request, {})
    side.core.finish(request)
    assert side.quota.used == 0
    asking = Side(initiator=True, inline=(True, True))
    asking.core.send_request("m", {}, now=0.0, max_reply=3)
    asking.sent()
    asking.feed(Res(1, True, {"size": 3}, b"xyz"))
    (event,) = asking.events()
    assert isinstance(event, events.ReplyReceived) and event.body == b"xyz" and asking.quota.used == 0


def test_an_inline_reply_that_the_budget_has_no_room_for_is_refused() -> None:
    asking = Side(initiator=True, inline=(True, True), quota=5)
    for _ in range(2):
        asking.core.send_request("m", {}, now=0.0, max_reply=3)
    asking.sent()
    asking.feed(Res(1, False, {"size": 3}), Res(3, True, {"size": 3}, b"xyz"))
    (event,) = asking.events()
    assert isinstance(event, events.RequestFailed) and isinstance(event.error, RequestError)
    assert event.error.code is ErrorCode.RESOURCES and "no room for a body of 3 bytes, 2 left" in event.error.text
    asking.feed(Data(1, True, b"abc"))
    assert asking.quota.used == 0


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (Req(1, True, "m", {"size": 4}, b"abc"), ErrorCode.BAD_REQUEST),
        (Req(1, False, "m", {"size": 3}, b"abc"), ErrorCode.BAD_REQUEST),
        (Req(1, True, "m", {}, b"abc"), ErrorCode.BAD_REQUEST),
    ],
)
def test_an_inline_body_that_contradicts_its_head_costs_its_stream(frame: Req, code: ErrorCode) -> None:
    side = Side(inline=(True, True))
    side.feed(frame)
    (answer,) = side.sent()
    assert isinstance(answer, Err) and answer.code == code
    assert side.quota.used == 0 and side.core.open_requests == 0


@pytest.mark.parametrize("inline", [(False, False), (False, True)])
def test_an_inline_body_that_was_not_offered_costs_the_connection(inline: tuple[bool, bool]) -> None:
    assert fails(Side(inline=inline), Req(1, True, "m", {"size": 1}, b"x")) is GoAwayCode.FRAME
    side = Side(initiator=True, inline=inline)
    side.core.send_request("m", {}, now=0.0, max_reply=3)
    side.sent()
    assert fails(side, Res(1, True, {"size": 1}, b"x")) is GoAwayCode.FRAME


# Requests and bodies


def test_requests_may_follow_our_own_hello_before_the_peers() -> None:
    side = Side(hello=False, initiator=True)
    side.core.send_request("m", {"a": 1}, (b"xy",), now=0.0, max_reply=5, deadline_ms=70)
    assert side.sent() == [
        Req(1, False, "m", {"a": 1, "size": 2, "max": 5, "dl": 70}),
        Data(1, True, b"xy"),
    ]


def test_ids_rise_in_the_order_of_writing_not_of_asking() -> None:
    side = Side(initiator=True)
    side.core.send_request("bulk", {}, (b"x",), now=0.0, priority=2)
    side.core.send_request("step", {}, now=0.0)
    assert [(one.stream, one.method) for one in side.sent() if isinstance(one, Req)] == [(1, "step"), (3, "bulk")]


def test_an_unsent_request_is_cancelled_without_a_word() -> None:
    side = Side(initiator=True)
    first = side.core.send_request("m", {}, now=0.0)
    second = side.core.send_request("n", {}, now=0.0)
    side.core.cancel(first)
    assert side.sent() == [Req(1, True, "n", {"size": 0, "max": 0})]
    side.core.cancel(second)
    side.core.cancel(second)
    assert side.sent() == [Cancel(1)]
    assert side.core.open_requests == 0


def test_a_half_written_request_is_cancelled_with_one_frame() -> None:
    side = Side(initiator=True)
    request = side.core.send_request("m", {}, (bytes(10**6),), now=0.0)
    side.core.writer.take(1)
    side.core.cancel(request)
    assert side.sent() == [Cancel(1)]
    side.feed(Progress(1, {}), Res(1, False, {"size": 3}), Data(1, True, b"abc"), Err(1, 12, "", {}))
    assert not side.events()


@pytest.mark.parametrize(
    ("head", "end", "code"),
    [
        ({"size": 0}, False, ErrorCode.BAD_REQUEST),
        ({"size": 5}, True, ErrorCode.BAD_REQUEST),
        ({"size": -1}, False, ErrorCode.BAD_REQUEST),
        ({"size": 2**63}, False, ErrorCode.BAD_REQUEST),
        ({"size": "5"}, False, ErrorCode.BAD_REQUEST),
        ({"size": True}, False, ErrorCode.BAD_REQUEST),
        ({"size": limits.MAX_BODY + 1}, False, ErrorCode.BAD_REQUEST),
        ({"size": 10**6 + 1}, False, ErrorCode.RESOURCES),
        ({"max": -1}, True, ErrorCode.BAD_REQUEST),
        ({"dl": "soon"}, True, ErrorCode.BAD_REQUEST),
        ({"!new": 1}, True, ErrorCode.UNSUPPORTED),
    ],
)
def test_a_bad_request_costs_its_stream_only(head: dict[str, Any], end: bool, code: ErrorCode) -> None:
    side = Side()
    side.feed(Req(1, end, "m", head))
    (answer,) = side.sent()
    assert isinstance(answer, Err) and answer.code == code
    side.feed(Data(1, False, b"late"), Data(1, True, b"later"), Cancel(1))
    assert not side.sent() and not side.events() and side.quota.used == 0 and side.core.open_requests == 0
    side.feed(Req(3, True, "m", {}))
    side.served()


@pytest.mark.parametrize("data", [[Data(1, True, b"123")], [Data(1, False, b"12345")], [Data(1, False, b"1234")]])
def test_a_body_of_another_length_than_declared_is_refused(data: list[Data]) -> None:
    side = Side()
    side.feed(Req(1, False, "m", {"size": 4}), *data)
    (answer,) = side.sent()
    assert isinstance(answer, Err) and answer.code == ErrorCode.TENSOR
    assert side.quota.used == 0 and not side.events()


def test_a_body_is_reserved_whole_and_given_back_when_the_reply_is_queued() -> None:
    side = Side()
    side.feed(Req(1, False, "m", {"size": 6, "max": 3}))
    assert side.quota.used == 6
    side.feed(Data(1, False, b"abc"), Data(1, True, b"def"))
    request = side.served()
    assert request.data == b"abcdef" and side.quota.used == 6
    side.core.send_reply(request, {"r": 1}, (b"xyz",))
    assert side.quota.used == 3
    assert side.sent() == [Res(1, False, {"r": 1, "size": 3}), Data(1, True, b"xyz")]
    assert side.quota.used == 0
    assert side.core.open_requests == 1  # until the handler has ended
    side.core.finish(request)
    assert side.core.open_requests == 0


def test_a_large_body_grows_by_what_has_come() -> None:
    side = Side(quota=limits.MAX_BODY)
    size = 20 * 2**20
    side.feed(Req(1, False, "m", {"size": size}))
    piece = bytes(range(250)) * 260
    sent = 0
    while sent < size:
        part = piece[: size - sent]
        sent += len(part)
        side.feed(Data(1, sent == size, part))
    data = side.served().data
    assert len(data) == size
    assert bytes(data[:65_000]) == piece and bytes(data[65_000:130_000]) == piece


@pytest.mark.parametrize("cause", ["cancel", "lost", "error", "goaway error"])
def test_every_end_of_a_served_request_gives_its_memory_back(cause: str) -> None:
    side = Side()
    side.feed(Req(1, False, "m", {"size": 6, "max": 100}), Data(1, True, b"abcdef"))
    request = side.served()
    if cause == "cancel":
        side.feed(Cancel(1))
    elif cause == "lost":
        side.core.lost("gone")
    elif cause == "error":
        side.core.send_error(request, RequestError(ErrorCode.BUSY, "busy"))
    else:
        side.core.fail(RemoteProtocolError("bad"))
    if cause != "error":
        assert [type(one) for one in side.events()] == [events.RequestCancelled]
    side.core.send_reply(request, {}, (b"too late",))
    side.core.finish(request)
    assert side.quota.used == 0 and side.core.open_requests == 0
    assert not [one for one in side.sent() if isinstance(one, Res)]


def test_a_cancelled_stream_counts_until_its_handler_has_ended() -> None:
    side = Side()
    requests = []
    for number in range(limits.MAX_STREAMS):
        side.feed(Req(2 * number + 1, True, "m", {}))
        requests.append(side.served())
        side.feed(Cancel(2 * number + 1))
        side.events()
    side.feed(Req(1001, True, "m", {}))
    (answer,) = side.sent()
    assert isinstance(answer, Err) and answer.code == ErrorCode.REFUSED and answer.detail["retry"] is True
    side.core.finish(requests[0])
    side.feed(Req(1003, True, "m", {}))
    side.served()


def test_a_handler_that_answers_nothing_is_answered_for() -> None:
    side, request = server_in(StreamState.WAITING)
    side.core.finish(request)
    (answer,) = side.sent()
    assert isinstance(answer, Err) and answer.code == ErrorCode.INTERNAL
    assert side.core.open_requests == 0


def test_a_reply_larger_than_asked_for_or_than_the_quota_becomes_an_error() -> None:
    for max_reply, quota in ((3, 10**6), (10, 3)):
        side = Side(quota=quota)
        side.feed(Req(1, True, "m", {"max": max_reply}))
        side.core.send_reply(side.served(), {}, (b"1234",))
        (answer,) = side.sent()
        assert isinstance(answer, Err) and answer.code == ErrorCode.RESOURCES and side.quota.used == 0


def test_unread_replies_fill_the_quota_and_then_requests_are_refused() -> None:
    side = Side(quota=10)
    side.feed(Req(1, True, "m", {"max": 10}), Req(3, True, "m", {"max": 10}))
    first, second = (event.request for event in side.events())
    side.core.send_reply(first, {}, (bytes(8),))
    side.core.send_reply(second, {}, (bytes(8),))
    side.feed(Req(5, False, "m", {"size": 8}))
    answers = [one for one in side.sent() if isinstance(one, Err)]
    assert [(one.stream, one.code) for one in answers] == [(3, ErrorCode.RESOURCES), (5, ErrorCode.RESOURCES)]
    assert side.quota.used == 0


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ([Res(1, False, {"size": 9})], ErrorCode.RESOURCES),
        ([Res(1, False, {})], ErrorCode.BAD_REQUEST),
        ([Res(1, True, {"size": 3})], ErrorCode.BAD_REQUEST),
        ([Res(1, True, {"!odd": 3})], ErrorCode.UNSUPPORTED),
        ([Res(1, False, {"size": -3})], ErrorCode.BAD_REQUEST),
        ([Res(1, False, {"size": 3}), Data(1, True, b"ab")], ErrorCode.TENSOR),
        ([Res(1, False, {"size": 3}), Data(1, False, b"abcd")], ErrorCode.TENSOR),
    ],
)
def test_a_bad_reply_costs_its_request_only(reply: list[frames.Frame], code: ErrorCode) -> None:
    side = Side(initiator=True)
    side.core.send_request("m", {}, now=0.0, max_reply=8)
    side.sent()
    side.feed(*reply)
    (event,) = side.events()
    assert isinstance(event, events.RequestFailed)
    assert isinstance(event.error, RequestError) and event.error.code is code
    assert side.sent() == [Cancel(1)]
    side.feed(Data(1, True, b"late"))
    assert side.quota.used == 0 and not side.events()


def test_a_reply_without_room_is_refused() -> None:
    side = Side(initiator=True, quota=5)
    side.core.send_request("m", {}, now=0.0, max_reply=8)
    side.sent()
    side.feed(Res(1, False, {"size": 8}))
    (event,) = side.events()
    assert isinstance(event, events.RequestFailed)
    assert isinstance(event.error, RequestError) and event.error.code is ErrorCode.RESOURCES


def test_an_error_reply_is_mapped_cut_and_made_readable() -> None:
    side = Side(initiator=True)
    side.core.send_request("m", {}, now=0.0)
    side.sent()
    side.feed(Err(1, 4711, "red \x1b[31m\n" + "x" * 4000, {"retry": True}))
    (event,) = side.events()
    assert isinstance(event, events.RequestFailed) and isinstance(event.error, RequestError)
    assert event.error.code is ErrorCode.INTERNAL and event.error.detail == {"retry": True}
    assert event.error.text.startswith("red \\x1b[31m\\nx") and len(event.error.text) < 1100


def test_an_error_that_cannot_be_encoded_goes_out_bare() -> None:
    side, request = server_in(StreamState.WAITING)
    side.core.send_error(request, RequestError(ErrorCode.BUSY, "half \ud800", {"huge": bytes(20_000)}))
    assert side.sent() == [Err(1, ErrorCode.BUSY, "busy", {})]


@pytest.mark.parametrize(
    "frame",
    [Data(2, True, b"x"), Res(2, True, {}), Res(1, True, {}), Err(1, 1, "", {}), Cancel(3), Progress(1, {}),
     Data(3, True, b"x"), Req(2, True, "m", {})],
)  # fmt: skip
def test_frames_of_streams_that_never_were_cost_the_connection(frame: frames.Frame) -> None:
    assert fails(Side(), frame) is GoAwayCode.PROTOCOL


def test_stream_ids_only_rise() -> None:
    side = Side()
    side.feed(Req(5, True, "m", {}))
    for stream in (5, 3):
        assert fails(side, Req(stream, True, "m", {})) is GoAwayCode.PROTOCOL


# GOAWAY


def test_goaway_names_the_last_request_taken_and_drops_later_ones() -> None:
    side = Side()
    side.feed(Req(3, False, "m", {"size": 4}))
    side.core.send_goaway(GoAwayCode.SHUTTING_DOWN, "bye")
    side.core.send_goaway(GoAwayCode.NORMAL)
    assert side.sent() == [GoAway(9, 3, "bye")]
    side.feed(Req(5, False, "m", {"size": 2}), Data(5, True, b"ab"), Cancel(5), Data(3, True, b"abcd"))
    request = side.served()
    assert request.stream == 3 and not side.core.finished
    side.core.send_reply(request, {})
    side.core.finish(request)
    assert not side.core.finished  # the reply is still to be written
    side.sent()
    assert side.core.finished and side.quota.used == 0


def test_goaway_received_fails_what_was_not_taken_and_keeps_the_rest() -> None:
    side = Side(initiator=True)
    for method in ("taken", "crossed"):
        side.core.send_request(method, {}, now=0.0)
    side.sent()
    side.core.send_request("unsent", {}, now=0.0)
    side.feed(GoAway(9, 1, ""))
    *failed, goaway = side.events()
    assert goaway == events.GoAwayReceived(9, "shutting down")
    assert [one.request.method for one in failed] == ["unsent", "crossed"]
    assert all(isinstance(one.error, PeerUnreachable) for one in failed)
    assert not side.sent() and side.core.leaving and not side.core.finished
    with pytest.raises(PeerUnreachable):
        side.core.send_request("later", {}, now=0.0)
    side.feed(Res(1, True, {}))
    assert [type(one) for one in side.events()] == [events.ReplyReceived]
    assert side.core.finished


def test_goaway_before_hello_is_heard() -> None:
    side = Side(hello=False, initiator=True)
    side.feed(GoAway(7, 0, "not on the allow list"))
    assert side.events() == [events.GoAwayReceived(7, "not on the allow list")]


def test_lost_tells_what_was_asked_from_what_was_not() -> None:
    side = Side(initiator=True)
    side.core.send_request("asked", {}, now=0.0)
    side.sent()
    side.core.send_request("unsent", {}, now=0.0)
    side.core.lost("reset")
    unsent, asked = side.events()
    assert isinstance(unsent, events.RequestFailed) and isinstance(unsent.error, PeerUnreachable)
    assert isinstance(asked, events.RequestFailed) and type(asked.error) is PeerLost


# Pings


def test_a_ping_is_answered_in_kind() -> None:
    side = Side()
    side.feed(Ping(b"12345678"))
    assert side.sent() == [Pong(b"12345678")]


def test_a_ping_flood_costs_the_connection() -> None:
    side = Side()
    for _ in range(limits.PING_BURST):
        side.feed(Ping(bytes(8)))
    assert fails(side, Ping(bytes(8))) is GoAwayCode.RATE
    patient = Side()
    for number in range(500):
        patient.feed(Ping(bytes(8)), now=number / limits.PINGS_PER_SECOND)


def test_only_the_awaited_pong_counts() -> None:
    side = Side()
    side.core.ping(1.0)
    (ping,) = side.sent()
    assert isinstance(ping, Ping)
    side.feed(Pong(b"whatever"), Pong(ping.payload), Pong(ping.payload), now=1.25)
    assert side.events() == [events.PongReceived(0.25)]
    assert side.core.round_trip == 0.25


# Clocks


def ticks(side: Side, start: float, stop: float) -> list[tuple[float, Any]]:
    """Let the side's timers run from `start` to `stop`; what it sent and told, with the time."""
    found: list[tuple[float, Any]] = []
    now = start
    while now <= stop:
        side.core.handle_timer(now)
        found += [(round(now, 2), one) for one in [*side.sent(), *side.events()]]
        now = max(side.core.next_timer(now), now + 0.01)
    return found


def test_a_silent_peer_is_pinged_and_then_dead() -> None:
    side = Side(initiator=True)
    side.core.send_request("m", {}, now=10.0)
    side.sent()
    found = ticks(side, 10.0, 12.2)
    pings = [at for at, one in found if isinstance(one, Ping)]
    dead = [at for at, one in found if isinstance(one, events.PeerSilent)]
    assert len(pings) == 1 and 10.5 <= pings[0] <= 10.7
    assert 12.0 <= dead[0] <= 12.15


def test_any_byte_heard_or_taken_is_life() -> None:
    side = Side(initiator=True)
    side.core.send_request("m", {}, now=0.0)
    side.sent()
    for number in range(20):
        if number % 2:
            side.feed(Progress(1, {}), now=float(number))
        else:
            side.core.moved(float(number))
        found = ticks(side, float(number), number + 1.0)
        assert not [one for _, one in found if isinstance(one, events.PeerSilent)]


def test_a_sleep_of_our_own_is_not_the_peers_silence() -> None:
    life = Liveness(0.0)
    life.asked(0.0)
    assert life.look(0.1) is Verdict.ALIVE
    assert life.look(60.0) is Verdict.ALIVE  # we were stopped; what came meanwhile has not been read yet
    assert life.look(60.5) is Verdict.PING
    life.pinged()
    assert [life.look(60.5 + step / 10) for step in (5, 10, 14)] == [Verdict.ALIVE] * 3
    assert life.look(62.01) is Verdict.DEAD


def test_asking_again_does_not_excuse_silence() -> None:
    life = Liveness(0.0)
    life.asked(0.0)
    assert [life.look(step / 10) for step in range(1, 12)][-1] is Verdict.PING
    life.pinged()
    life.asked(1.1)  # the first request was given up, this one takes its place
    assert [life.look(1.1 + step / 10) for step in range(1, 9)] == [Verdict.ALIVE] * 8
    assert life.look(2.0) is Verdict.DEAD
    later = Liveness(0.0)
    later.asked(0.0)
    assert [later.look(step / 10) for step in range(1, 19)].count(Verdict.DEAD) == 0
    later.asked(60.0)  # nobody wanted anything meanwhile
    assert later.look(60.4) is Verdict.ALIVE and later.look(60.6) is Verdict.PING


def test_without_a_request_of_ours_nobody_is_pinged() -> None:
    side, _ = server_in(StreamState.WAITING)
    found = ticks(side, 0.0, 9.0)
    assert {type(one) for _, one in found} == {Progress}


def test_progress_is_told_each_half_second_while_a_handler_works() -> None:
    side, request = server_in(StreamState.WAITING)
    request.progress = {"s": "queued"}
    found = ticks(side, 0.0, 3.05)
    assert [one for _, one in found] == [Progress(1, {"s": "queued"})] * len(found)
    assert 5 <= len(found) <= 6
    side.core.send_reply(request, {})
    assert [type(one) for _, one in ticks(side, 3.1, 5.0)] == [Res]


def test_a_stalled_request_body_ends_its_stream() -> None:
    side = Side()
    side.feed(Req(1, False, "m", {"size": 10**5}))
    for number in range(40):  # a dribble is no progress
        side.feed(Data(1, False, b"x"), now=number / 4)
    side.core.handle_timer(9.9)
    assert side.quota.used == 10**5
    side.core.handle_timer(10.0)
    (answer,) = side.sent()
    assert isinstance(answer, Err) and answer.code == ErrorCode.DEADLINE
    assert side.quota.used == 0 and side.core.open_requests == 0


def test_a_slow_body_that_moves_is_taken() -> None:
    side = Side()
    side.feed(Req(1, False, "m", {"size": 5 * limits.BODY_PROGRESS}))
    for number in range(5):
        side.core.handle_timer(number * 9.0)
        side.feed(Data(1, number == 4, bytes(limits.BODY_PROGRESS)), now=number * 9.0)
    side.served()


def test_a_stalled_reply_body_fails_its_request() -> None:
    side = Side(initiator=True)
    side.core.send_request("m", {}, now=0.0, max_reply=100)
    side.sent()
    side.feed(Res(1, False, {"size": 100}), Data(1, False, bytes(50)))
    for number in range(100):
        side.feed(Ping(bytes(8)), now=number / 10)
        side.core.handle_timer(number / 10)
    side.sent()
    side.core.handle_timer(10.0)
    (event,) = side.events()
    assert isinstance(event, events.RequestFailed) and isinstance(event.error, PeerLost)
    assert side.sent() == [Cancel(1)] and side.quota.used == 0


def test_an_idle_connection_says_goodbye_but_never_a_busy_one() -> None:
    side = Side(idle_seconds=1.5)
    side.feed(Req(1, True, "m", {}), now=1.0)
    request = side.served()
    assert not [one for _, one in ticks(side, 1.0, 30.0) if isinstance(one, GoAway)]
    side.core.send_reply(request, {})
    side.core.finish(request)
    found = [(at, one) for at, one in ticks(side, 30.1, 33.0) if isinstance(one, GoAway)]
    assert [one.code for _, one in found] == [GoAwayCode.IDLE]
    assert 31.5 <= found[0][0] <= 31.7
    assert side.core.finished


def test_an_old_connection_says_goodbye() -> None:
    side = Side(idle_seconds=10**9)
    side.core.handle_timer(limits.CONNECTION_AGE_SECONDS - 1)
    assert not side.sent()
    side.core.handle_timer(limits.CONNECTION_AGE_SECONDS)
    assert side.sent() == [GoAway(GoAwayCode.AGE, 0, "")]


def test_ignorable_frames_are_counted() -> None:
    side = Side()
    side.feed(frames.Ignorable(17), frames.Ignorable(31))
    assert side.core.ignored_frames == 2 and not side.sent() and not side.events()


def test_fail_leaves_nothing_but_goodbye_to_write() -> None:
    side = Side(initiator=True)
    side.core.send_request("m", {}, (bytes(10**6),), now=0.0)
    side.core.writer.take(1)
    side.core.fail(RemoteProtocolError("nonsense \ud800", GoAwayCode.FRAME))
    sent = side.sent()
    assert [type(one) for one in sent] == [GoAway]
    assert isinstance(sent[0], GoAway) and sent[0].code == GoAwayCode.FRAME
    (event,) = side.events()
    assert isinstance(event, events.RequestFailed) and isinstance(event.error, PeerLost)


def test_quotas_are_taken_from_all_levels_or_none() -> None:
    total = Quota(10)
    first, second = Quota(8, total), Quota(8, total)
    assert first.reserve(8) and not second.reserve(3) and second.reserve(2)
    assert (total.used, first.used, second.used) == (10, 8, 2) and second.left == 0
    first.release(8)
    assert (total.used, first.left) == (2, 8)
