"""Requests over two endpoints in memory, under a clock that jumps: replies, errors, deadlines, cancelling, liveness."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petalite import limits
from petalite.errors import (
    ErrorCode,
    GoAwayCode,
    LocalProtocolError,
    PeerLost,
    PeerUnreachable,
    ReplyLate,
    RequestError,
)
from petalite.net.call import Call, Reply
from petalite.net.connection import PeerConnection
from petalite.testing import MemoryTransport, Pair, endpoint_pair
from petalite.wire.streams import OwnRequest
from petalite.wire.writer import Priority


async def echo(call: Call) -> Reply:
    return Reply({"method": call.method, "head": dict(call.head)}, (call.body,))


async def forever(call: Call) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


def transport_of(connection: PeerConnection) -> MemoryTransport:
    assert isinstance(connection._transport, MemoryTransport)
    return connection._transport


def is_clean(pair: Pair) -> bool:
    """No request is open and no byte reserved at either end."""
    return not (pair.ab.open_requests or pair.ba.open_requests or pair.a.quota.used or pair.b.quota.used)


@pytest.mark.parametrize("size", [0, 1, 2_048, 65_000, 65_001, 300_000, 3_000_000])
async def test_a_reply_brings_head_and_body_back(autojump_clock: MockClock, size: int) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        body = bytes(range(256)) * (size // 256 + 1)
        pieces = (body[: size // 3], bytearray(body[size // 3 : size // 2]), memoryview(body)[size // 2 : size])
        reply = await pair.ab.request("echo", {"n": 7}, pieces, max_reply=size)
        assert reply.head["head"] == {"n": 7, "size": size, "max": size}
        (received,) = reply.body
        assert type(received) is bytearray and received == body[:size]
        await wait_all_tasks_blocked()
        assert is_clean(pair)


async def test_many_requests_both_ways_at_once(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}, a={"handlers": {"echo": echo}}) as pair:
        done = []

        async def ask(connection: PeerConnection, number: int) -> None:
            body = number.to_bytes(4, "big") * (1 + number * 500)
            reply = await connection.request("echo", {"n": number}, (body,), max_reply=len(body), priority=number % 3)
            assert reply.body[0] == body and reply.head["head"]["n"] == number
            done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(ask, (pair.ab, pair.ba)[number % 2], number)
        await wait_all_tasks_blocked()
        assert sorted(done) == list(range(60)) and is_clean(pair)


async def test_errors_carry_code_text_detail_and_peer(autojump_clock: MockClock) -> None:
    async def busy(call: Call) -> Reply:
        raise RequestError(ErrorCode.BUSY, "later, please", {"retry": True, "after": 200})

    async with endpoint_pair({"busy": busy}) as pair:
        with pytest.raises(RequestError) as caught:
            await pair.ab.request("busy")
        error = caught.value
        assert (error.code, error.text, error.detail) == (
            ErrorCode.BUSY, "later, please", {"retry": True, "after": 200}
        )  # fmt: skip
        assert error.peer == pair.b.peer_id.text
        with pytest.raises(RequestError) as caught:
            await pair.ab.request("no such method")
        assert caught.value.code is ErrorCode.UNSUPPORTED


async def test_a_bug_in_a_handler_costs_its_request_only(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def bug(call: Call) -> Reply:
        raise ZeroDivisionError("secret words")

    async def nothing(call: Call) -> Reply:
        return None  # type: ignore[return-value]

    async def huge_head(call: Call) -> Reply:
        return Reply({"x": bytes(limits.MAX_HEAD_FRAME)})

    async def float_head(call: Call) -> Reply:
        return Reply({"x": 1.5})

    async def group(call: Call) -> Reply:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bug, call)
        raise AssertionError

    handlers = {"bug": bug, "nothing": nothing, "huge": huge_head, "float": float_head, "group": group, "echo": echo}
    async with endpoint_pair(handlers) as pair:
        with caplog.at_level(logging.CRITICAL + 1):
            for method in ("bug", "nothing", "huge", "float", "group"):
                with pytest.raises(RequestError) as caught:
                    await pair.ab.request(method, {}, (b"body",), max_reply=10)
                assert caught.value.code is ErrorCode.INTERNAL and "secret" not in caught.value.text
        assert (await pair.ab.request("echo", {}, (b"x",), max_reply=1)).body[0] == b"x"
        assert is_clean(pair)


async def test_what_is_too_large_is_not_sent(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        with pytest.raises(LocalProtocolError):
            await pair.ab.request("echo", {}, (bytes(limits.MAX_BODY + 1),))
        with pytest.raises(LocalProtocolError):
            await pair.ab.request("echo", {"x": bytes(limits.MAX_HEAD_FRAME)})
        with pytest.raises(LocalProtocolError):
            await pair.ab.request("m" * 65)
        with pytest.raises(RequestError) as caught:
            await pair.ab.request("echo", {}, (b"1234",), max_reply=3)
        assert caught.value.code is ErrorCode.RESOURCES and is_clean(pair)


async def test_a_deadline_travels_and_ends_the_handler(autojump_clock: MockClock) -> None:
    ended = []

    async def slow(call: Call) -> Reply:
        try:
            await trio.sleep(60)
        finally:
            ended.append(trio.current_time())
        return Reply()

    async with endpoint_pair({"slow": slow, "echo": echo}) as pair:
        begin = trio.current_time()
        with trio.fail_after(5):
            reply = await pair.ab.request("echo")
        assert reply.head["head"]["dl"] == 5_000
        with trio.move_on_after(3) as scope:
            await pair.ab.request("slow")
        assert scope.cancelled_caught
        await wait_all_tasks_blocked()
        assert ended == [pytest.approx(begin + 3, abs=0.01)] and is_clean(pair)


@pytest.mark.parametrize("told", [True, False])
async def test_patience_ends_a_request_and_nothing_else(
    told: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the peer ends it, since `dl` says how long we wait (PT-STR-040), or we must."""
    deadlines = []

    async def noted(call: Call) -> Reply:
        deadlines.append(call.deadline)
        return await forever(call)

    async with endpoint_pair({"forever": noted, "echo": echo}) as pair:
        if not told:
            monkeypatch.setattr("petalite.net.serving._deadline", lambda request: math.inf)
        begin = trio.current_time()
        with pytest.raises(ReplyLate):
            await pair.ab.request("forever", patience=2)
        assert trio.current_time() - begin == pytest.approx(2, abs=2 * limits.TICK_SECONDS)
        assert deadlines == [pytest.approx(begin + 2, abs=0.01) if told else math.inf]
        reply = await pair.ab.request("echo", {"n": 1}, patience=2)
        assert reply.head["head"]["n"] == 1
        await wait_all_tasks_blocked()
        assert is_clean(pair)


async def test_the_repliers_clock_ends_a_request_too(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"forever": forever}) as pair:
        request = pair.ab._core.send_request("forever", {}, now=trio.current_time(), deadline_ms=1_500)
        settled = trio.Event()

        class Waiter:
            outcome: Any = None
            on_progress = None

            def settle(self, outcome: Any) -> None:
                self.outcome = outcome
                settled.set()

        waiter = request.waiter = Waiter()
        begin = trio.current_time()
        pair.ab._flush()
        await settled.wait()
        assert isinstance(waiter.outcome, RequestError) and waiter.outcome.code is ErrorCode.DEADLINE
        assert trio.current_time() - begin == pytest.approx(1.5, abs=0.01)


async def test_a_request_in_a_cancelled_scope_is_not_sent(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        before = pair.ab.bytes_sent
        with trio.CancelScope() as scope:
            scope.cancel()
            await pair.ab.request("echo")
        assert scope.cancelled_caught and pair.ab.bytes_sent == before


@pytest.mark.parametrize("size", [0, 2_048, 3_000_000])
@pytest.mark.parametrize("after", [0.0, 0.25, 1.0])
async def test_cancelling_at_any_moment_leaves_nothing_behind(
    autojump_clock: MockClock, size: int, after: float
) -> None:
    started, stopped = [], []

    async def work(call: Call) -> Reply:
        started.append(call)
        try:
            await trio.sleep(0.5)
        except trio.Cancelled:
            stopped.append(call)
            raise
        return Reply({}, (call.body,), Priority.BULK)

    async with endpoint_pair({"work": work, "echo": echo}) as pair:
        with trio.move_on_after(after or 1e-6):
            await pair.ab.request("work", {}, (bytes(size),), max_reply=size)
        await wait_all_tasks_blocked()
        assert is_clean(pair) and len(stopped) == len(started) * (after < 0.5)
        await pair.ab.request("echo")
        assert not pair.ab.leaving


async def test_a_request_cancelled_before_its_handler_began_is_never_handled(autojump_clock: MockClock) -> None:
    called = []

    async def note(call: Call) -> Reply:
        called.append(call)
        return Reply()

    async with endpoint_pair({"note": note}) as pair:
        now = trio.current_time()
        request = pair.ab._core.send_request("note", {}, now=now)
        frames = pair.ab._core.writer.take(10**6)
        pair.ab._core.cancel(request)
        frames += pair.ab._core.writer.take(10**6)
        data = pair.ab._writer.pack(frames)  # REQ and CANCEL in one segment
        assert pair.ab._transport.send_now(data) == len(data)
        await wait_all_tasks_blocked()
        assert not called and is_clean(pair)


async def test_a_peer_that_is_busy_is_not_dead(autojump_clock: MockClock) -> None:
    async def slow(call: Call) -> Reply:
        call.progress("queued")
        await trio.sleep(5)
        call.progress("running")
        await trio.sleep(5)
        return Reply({"done": 1})

    seen: list[str] = []
    async with endpoint_pair({"slow": slow}) as pair:
        begin = trio.current_time()
        reply = await pair.ab.request("slow", on_progress=lambda head: seen.append(head["s"]))
        assert reply.head["done"] == 1 and trio.current_time() - begin == pytest.approx(10, abs=0.01)
        assert 15 <= len(seen) <= 20 and seen[0] == "queued" and seen[-1] == "running"
        assert pair.ab.round_trip is None or pair.ab.round_trip < 0.1


async def test_the_task_that_reads_a_reply_can_ask_on_before_whoever_waits_wakes_up(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        order: list[str] = []
        following: list[OwnRequest] = []

        def ask_on(reply: Reply) -> None:
            order.append("read")
            following.append(pair.ab.begin("echo", {"after": reply.head["head"]["n"]}, (), math.inf))

        first = pair.ab.begin("echo", {"n": 7}, (), math.inf, on_reply=ask_on)
        await pair.ab.finish(first)
        order.append("woken")
        assert order == ["read", "woken"]
        assert (await pair.ab.finish(following[0])).head["head"]["after"] == 7
        await wait_all_tasks_blocked()
        assert is_clean(pair)


async def test_a_bug_in_on_reply_is_its_callers(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:

        def bug(reply: Reply) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await pair.ab.finish(pair.ab.begin("echo", {}, (), math.inf, on_reply=bug))
        assert (await pair.ab.request("echo", {"n": 1})).head["head"]["n"] == 1
        await wait_all_tasks_blocked()
        assert is_clean(pair)


async def test_of_a_dropped_request_nothing_is_heard(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        heard: list[Reply] = []
        pair.ab.drop(pair.ab.begin("echo", {}, (b"abc",), math.inf, max_reply=3, on_reply=heard.append))
        assert (await pair.ab.request("echo", {"n": 1})).head["head"]["n"] == 1
        await wait_all_tasks_blocked()
        assert not heard
        assert is_clean(pair)


async def test_a_bug_in_on_progress_is_its_callers(autojump_clock: MockClock) -> None:
    def bug(head: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    async with endpoint_pair({"forever": forever, "echo": echo}) as pair:
        with pytest.raises(ZeroDivisionError):
            await pair.ab.request("forever", on_progress=bug)
        await pair.ab.request("echo")
        assert is_clean(pair)


async def test_a_stopped_peer_is_dead_in_two_seconds(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"forever": forever}) as pair:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(PeerLost, match="no sign of life"):
                    await pair.ab.request("forever")

            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            await trio.sleep(3)  # it works and says so
            transport_of(pair.ba).freeze()
            # A stopped process keeps its sockets but writes nothing: its PROGRESS stays unsent.
            transport_of(pair.ba)._out.capacity = 0
            begin = trio.current_time()
            await pair.ab.closed.wait()
            assert 1.4 <= trio.current_time() - begin <= 2.2  # its last PROGRESS is up to 0.6 s ago
        transport_of(pair.ba).thaw()


async def test_a_ping_that_our_own_kernel_took_is_no_sign_of_the_peers_life(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        await pair.ab.request("echo", {}, (b"x",), max_reply=1)
        transport_of(pair.ba).freeze()  # it was stopped between two requests
        begin = trio.current_time()
        with pytest.raises(PeerLost, match="no sign of life"):
            await pair.ab.request("echo", {}, (b"x",), max_reply=1)
        assert 2.0 <= trio.current_time() - begin <= 2.2
        transport_of(pair.ba).thaw()


async def test_a_reset_is_noticed_at_once_and_requests_know_what_they_lost(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"forever": forever}) as pair:
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(PeerLost) as caught:
                    await pair.ab.request("forever")
                assert type(caught.value) is PeerLost

            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            transport_of(pair.ab).reset()
        assert trio.current_time() == begin
        with pytest.raises(PeerUnreachable):
            await pair.ab.request("echo")
        with pytest.raises(PeerLost):
            await pair.ab.ping()
        await pair.ba.closed.wait()
        await wait_all_tasks_blocked()
        assert is_clean(pair) and not pair.a.connections and not pair.b.connections


async def test_a_connection_lost_in_mid_body_gives_its_memory_back(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"echo": echo}) as pair:
        pipe = transport_of(pair.ab)._out
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(PeerLost):
                    await pair.ab.request("echo", {}, (bytes(10**7),), max_reply=10**7)

            pipe.capacity = 2_000_000
            nursery.start_soon(ask)
            pipe.frozen = True
            await wait_all_tasks_blocked()
            transport_of(pair.ab).reset()
        await pair.ba.closed.wait()
        await wait_all_tasks_blocked()
        assert is_clean(pair)


async def test_ping_measures_a_round_trip(autojump_clock: MockClock) -> None:
    async with endpoint_pair() as pair:
        assert pair.ab.round_trip is None
        assert await pair.ab.ping() == pair.ab.round_trip is not None


async def test_idle_connections_say_goodbye_and_busy_ones_stay(autojump_clock: MockClock) -> None:
    async with endpoint_pair({"forever": forever}, a={"idle_seconds": 1.5}, b={"idle_seconds": 30.0}) as pair:
        begin = trio.current_time()
        with trio.move_on_after(20):
            await pair.ab.request("forever")
        assert trio.current_time() - begin == pytest.approx(20)
        await pair.ba.closed.wait()
        assert 1.4 <= trio.current_time() - begin - 20 <= 1.8
        assert "idle" in pair.ba.close_reason and pair.ab.close_reason == "closed after goodbye"
        with pytest.raises(PeerUnreachable):
            await pair.ab.request("echo")
        assert await pair.a.connect(*pair.b.addresses) is not pair.ab


async def test_goodbye_lets_open_requests_finish(autojump_clock: MockClock) -> None:
    async def slow(call: Call) -> Reply:
        await trio.sleep(4)
        return Reply({}, (bytes(100_000),))

    async with endpoint_pair({"slow": slow, "echo": echo}) as pair:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                assert len((await pair.ab.request("slow", max_reply=100_000)).body[0]) == 100_000

            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            pair.ba.go_away(GoAwayCode.SHUTTING_DOWN, "update")
            with pytest.raises(PeerUnreachable):  # it crosses with the goodbye, and has not been taken
                await pair.ab.request("echo")
            with pytest.raises(PeerUnreachable, match="closing"):
                await pair.ab.request("echo")
        begin = trio.current_time()
        await pair.ab.closed.wait()
        await pair.ba.closed.wait()
        assert trio.current_time() - begin < 0.01
        assert pair.ab.close_reason == "the peer said goodbye: update"


async def test_a_step_overtakes_a_prefill(autojump_clock: MockClock) -> None:
    order = []

    async def note(call: Call) -> Reply:
        order.append(call.head["name"])
        return Reply()

    async with endpoint_pair({"note": note}) as pair:
        pipe = transport_of(pair.ab)._out
        pipe.frozen = True
        async with trio.open_nursery() as nursery:

            async def ask(name: str, size: int, priority: Priority) -> None:
                await pair.ab.request("note", {"name": name}, (bytes(size),), priority=priority)

            nursery.start_soon(ask, "prefill", 3_000_000, Priority.BULK)
            await wait_all_tasks_blocked()
            nursery.start_soon(ask, "step", 2_048, Priority.STEP)
            await wait_all_tasks_blocked()
            transport_of(pair.ba).thaw()
        assert order == ["step", "prefill"]


async def test_a_handler_that_cleans_up_slowly_does_not_hold_the_socket(autojump_clock: MockClock) -> None:
    async def stubborn(call: Call) -> Reply:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(30)
        raise AssertionError

    async with endpoint_pair({"stubborn": stubborn}) as pair:
        with trio.move_on_after(1):
            await pair.ab.request("stubborn")
        await wait_all_tasks_blocked()
        assert pair.ba.open_requests == 1  # it counts until its work has ended
        transport_of(pair.ab).reset()
        begin = trio.current_time()
        await pair.ba.closed.wait()
        assert trio.current_time() == begin
        await trio.sleep(31)
        assert is_clean(pair)
