"""A session left alone, over real sockets: parked it goes on by dialling again, forgotten by a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

import petalite
from petalite.client.generation import prefill
from petalite.client.session import InferenceSession
from petalite.errors import GoAwayCode
from petalite.net.connection import PeerConnection
from petalite.swarm.node import Node
from petalite.wire.messages import Close

PROMPT = "Once upon a time there was a"
TOKENS = 16


async def part(node: Node) -> list[PeerConnection]:
    """End all connections, as both sides do when they have been idle; gives those that were."""
    connections = list(node.endpoint.connections.values())
    for connection in connections:
        connection.go_away(GoAwayCode.IDLE)
    for connection in connections:
        await connection.closed.wait()
    while node.endpoint.connections:  # they leave the table a turn of the loop later
        await trio.lowlevel.checkpoint()
    return connections


async def forget(node: Node, session: InferenceSession) -> None:
    """Have the servers drop the session, as if they had needed the room."""
    for hop in session._pipeline.hops:
        await node.endpoint.connections[hop.peer].request("close", Close(sid=hop.sid).to_wire())


async def scene(peers: Sequence[str], told: list[int]) -> None:
    async with petalite.join(peers=peers, lan=False) as swarm:
        model = await swarm.load("fairytale", wire="f32")
        prompt = model.encode(PROMPT)
        async with model.session(max_len=len(prompt) + TOKENS) as session:
            fresh, parted = prompt, list[PeerConnection]()
            while len(told) < TOKENS:
                if len(told) in (4, 5, 9):
                    parted += await part(swarm.node)
                elif len(told) == 12:
                    await forget(swarm.node, session)
                logits = await prefill(model, session, [fresh])
                told.append(int(logits[0].argmax()))
                fresh = told[-1:]
                if len(told) <= 12:
                    assert session.replayed_tokens == 0
            assert len(parted) == 3 * 2
            connections = swarm.node.endpoint.connections
            assert set(connections) == {peer for peer, _ in session.route}
            assert not set(connections.values()) & set(parted)
            assert session.replayed_tokens == 2 * (len(prompt) + 11)  # both hops got all they had held
            assert session.failovers == 0


def test_a_parked_session_redials_a_forgotten_one_replays_and_the_text_is_the_same(
    commands: Any, fairytale_oracle: Any
) -> None:
    told: list[int] = []
    with commands.serving(["fairytale", "--blocks", "0:4"], ["fairytale", "--blocks", "4:8"]) as ready:
        trio.run(scene, [server["addresses"][0] for server in ready], told)
    fairytale_oracle.check(fairytale_oracle.encode(PROMPT), told, TOKENS, least_margin=0.0)
