"""`Lan` on this machine's loopback: what needs no machines apart."""

from __future__ import annotations

import trio

from petalite.identity import Identity
from petalite.lan.discovery import Hint, Lan
from petalite.lan.interfaces import usable_addresses
from petalite.lan.mdns import Mdns, Resolved

ONE, TWO = (Identity(bytes([seed]) * 32).peer_id for seed in (1, 2))
# A network of this test alone: other tests may be on loopback at the same time
NETWORK = f"lan test {trio.__name__} {id(object()):x}"
LOOPBACK = ["127.0.0.1"]


def nobody(hint: Hint) -> None:
    raise AssertionError(f"not expected: {hint}")


async def test_started_at_once_seen_soon_and_gone_with_a_goodbye() -> None:
    send, receive = trio.open_memory_channel[Hint](16)
    server = Lan(ONE, 4001, network=NETWORK, interfaces=LOOPBACK, on_hint=nobody)
    client = Lan(TWO, network=NETWORK, interfaces=LOOPBACK, on_hint=send.send_nowait)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            async with trio.open_nursery() as serving:
                before = trio.current_time()
                await serving.start(server.run)
                assert trio.current_time() - before < 0.1
                hint = await receive.receive()
                assert (hint.peer, hint.addresses) == (ONE, (("127.0.0.1", 4001),))
                await server.registered.wait()
                serving.cancel_scope.cancel()
            assert (await receive.receive()).addresses == ()
            assert client.problem == server.problem == ""
            nursery.cancel_scope.cancel()


async def test_an_address_that_is_not_there_is_said_and_waited_for() -> None:
    lan = Lan(ONE, 4001, network=NETWORK, interfaces=["192.0.2.1"], on_hint=nobody)
    with trio.move_on_after(0.5) as scope:
        await lan.run()
    assert scope.cancelled_caught
    assert "no usable address" in lan.problem


async def test_a_label_that_cannot_be_asked_for_is_silence() -> None:
    labels = ["", ".", "a.b", "\x00", "\x7f", "ü" * 60, "x" * 64, "\ud800", "a" * 300, "-", "_x"]
    mdns = await trio.to_thread.run_sync(Mdns.open, usable_addresses(LOOPBACK))
    answers: list[Resolved | None] = []

    async def ask(label: str) -> None:
        answers.append(await mdns.resolve(label, fresh=True))

    try:
        async with trio.open_nursery() as nursery:
            for label in labels:
                nursery.start_soon(ask, label)
    finally:
        await trio.to_thread.run_sync(mdns.close)
    assert answers == [None] * len(labels)
