"""Handlers whose reply comes later, without a task that waits for it."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petalite import limits
from petalite.errors import ErrorCode, RequestError
from petalite.net.call import Call, Later, Ready, Reply
from petalite.testing import Pair, endpoint_pair


class Desk:
    """A handler that leaves each call open until the test settles it."""

    def __init__(self) -> None:
        self.open: list[Later] = []
        self.abandoned = 0

    def __call__(self, call: Call) -> Later:
        def abandoned() -> None:
            self.abandoned += 1

        later = Later(abandoned)
        self.open.append(later)
        return later


def is_clean(pair: Pair) -> bool:
    return not (pair.ab.open_requests or pair.ba.open_requests or pair.a.quota.used or pair.b.quota.used)


async def test_replies_settle_at_once_or_later_in_any_order(autojump_clock: MockClock) -> None:
    def at_once(call: Call) -> Later:
        later = Later()
        later.settle(Reply({"x": 1}, (call.body,)))
        later.settle(RequestError(ErrorCode.BUSY, "too late to count"))
        return later

    desk, got = Desk(), {}
    async with endpoint_pair({"desk": desk, "at once": at_once}) as pair:
        reply = await pair.ab.request("at once", {}, (b"body",), max_reply=4)
        assert (reply.head["x"], reply.body[0]) == (1, b"body")

        async def ask(number: int) -> None:
            got[number] = (await pair.ab.request("desk", {}, max_reply=9)).head["x"]

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, number)
                await wait_all_tasks_blocked()
            for number in (2, 0, 1):
                desk.open[number].settle(Reply({"x": number}, (b"123",)))
        assert got == {0: 0, 1: 1, 2: 2}
        await wait_all_tasks_blocked()
        assert is_clean(pair) and desk.abandoned == 0


async def test_errors_and_replies_that_cannot_be_sent_end_their_request_only(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(call: Call) -> Later:
        raise ZeroDivisionError("secret words")

    def refuse(call: Call) -> Later:
        raise RequestError(ErrorCode.BUSY, "later, please")

    desk = Desk()
    async with endpoint_pair({"desk": desk, "bug": bug, "refuse": refuse}) as pair:
        with caplog.at_level(logging.CRITICAL + 1):
            for method, code in (("bug", ErrorCode.INTERNAL), ("refuse", ErrorCode.BUSY)):
                with pytest.raises(RequestError) as caught:
                    await pair.ab.request(method)
                assert caught.value.code is code and "secret" not in str(caught.value)
            for outcome, code in (
                (RequestError(ErrorCode.LENGTH, "too long"), ErrorCode.LENGTH),
                (Reply({"x": 1.5}), ErrorCode.INTERNAL),
            ):
                async with trio.open_nursery() as nursery:

                    async def ask(code: ErrorCode = code) -> None:
                        with pytest.raises(RequestError) as caught:
                            await pair.ab.request("desk")
                        assert caught.value.code is code

                    nursery.start_soon(ask)
                    await wait_all_tasks_blocked()
                    desk.open.pop().settle(outcome)
        await wait_all_tasks_blocked()
        assert is_clean(pair)


async def test_what_nobody_wants_any_more_is_abandoned_once(autojump_clock: MockClock) -> None:
    desk = Desk()
    async with endpoint_pair({"desk": desk}) as pair:
        with trio.move_on_after(1):
            await pair.ab.request("desk", {}, (b"body",), max_reply=4)
        await wait_all_tasks_blocked()
        assert desk.abandoned == 1 and is_clean(pair)
        desk.open[0].settle(Reply({}, (b"late",)))  # nobody hears it
        await wait_all_tasks_blocked()
        assert is_clean(pair)
        with trio.move_on_after(0.5):
            await pair.ab.request("desk")
        pair.ab._pumps.cancel()  # the connection ends
        await pair.ba.closed.wait()
        await wait_all_tasks_blocked()
        assert desk.abandoned == 2


async def test_the_deadline_of_a_request_holds_without_a_task(autojump_clock: MockClock) -> None:
    desk = Desk()
    async with endpoint_pair({"desk": desk}) as pair:
        await pair.ab.peer_hello()
        request = pair.ab._core.send_request("desk", {}, now=trio.current_time(), deadline_ms=1_500)
        started = trio.current_time()
        heard = trio.Event()

        class Waiter:
            on_progress = outcome = None

            def settle(self, outcome: object) -> None:
                self.outcome = outcome
                heard.set()

        request.waiter = Waiter()
        pair.ab._flush()
        await heard.wait()
        assert request.waiter.outcome.code is ErrorCode.DEADLINE
        assert 1.5 <= trio.current_time() - started <= 1.5 + 2 * limits.TICK_SECONDS
        await wait_all_tasks_blocked()
        assert desk.abandoned == 1 and is_clean(pair)


async def test_a_later_can_be_awaited_where_there_is_a_task(autojump_clock: MockClock) -> None:
    abandoned = []
    later = Later(lambda: abandoned.append(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect, later)
        await wait_all_tasks_blocked()
        later.settle(Reply({"x": 5}))
    refused = Later()
    refused.settle(RequestError(ErrorCode.BUSY, "no"))
    with pytest.raises(RequestError):
        await refused
    unwanted = Later(lambda: abandoned.append(2))
    with trio.move_on_after(1):
        await unwanted
    assert abandoned == [2]


async def test_what_is_left_to_do_is_done_once_the_reply_was_handed_on() -> None:
    order = []
    ready = Ready(Reply({"x": 5}), lambda: order.append("left"))
    ready.tell(lambda outcome: order.append(outcome))
    assert order == [Reply({"x": 5}), "left"]
    await _expect(Ready(Reply({"x": 5}), lambda: order.append("left")))
    assert order.count("left") == 2

    def breaks(outcome: object) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        Ready(Reply(), lambda: order.append("left")).tell(breaks)
    assert order.count("left") == 3


async def _expect(later: Later) -> None:
    assert (await later).head == {"x": 5}
