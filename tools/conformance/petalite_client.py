"""petalite's library as a client under test: what `tools/conformance client` starts, told by its environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trio

from petalite.errors import PetaliteError
from petalite.identity import Address, Identity, SwarmKey


def main() -> int:
    """Do PETALITE_TASK; print one JSON object; 0 if it was done, 1 if it failed cleanly."""
    try:
        result = trio.run(_run, dict(os.environ))
    except* (PetaliteError, trio.TooSlowError, ValueError) as group:
        print(json.dumps({"ok": False, "error": _words(group)}))
        code = 1
    else:
        print(json.dumps({"ok": True, **result}))
        code = 0
    return code


def _words(error: BaseException) -> str:
    """The first error of a group, as a line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


async def _run(environment: dict[str, str]) -> dict[str, Any]:
    key = environment.get("PETALITE_SWARM_KEY")
    options: dict[str, Any] = {"network": environment["PETALITE_NETWORK"], "agent": "petalite"}
    if key:
        options["swarm_key"] = SwarmKey.load(key)
    task = {"ping": _ping, "generate": _generate}[environment["PETALITE_TASK"]]
    with trio.fail_after(float(environment["PETALITE_SECONDS"])):
        return await task(environment, options)


async def _ping(environment: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    from petalite.net.endpoint import open_endpoint

    address = Address.parse(f"petalite://{environment['PETALITE_PEER_ID']}@{environment['PETALITE_ADDR']}")
    async with open_endpoint(Identity.generate(), **options) as endpoint:
        connection = await endpoint.connect(address)
        await connection.peer_hello()
        await connection.ping()
    return {}


async def _generate(environment: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    import petalite

    prompt = [int(text) for text in environment["PETALITE_TOKENS"].split(",")]
    count = int(environment["PETALITE_NEW_TOKENS"])
    async with petalite.join(environment["PETALITE_PEERS"].split(","), lan=False, **options) as swarm:
        model = await swarm.load(environment["PETALITE_MODEL"], wire=environment["PETALITE_WIRE"])
        return {"tokens": await _greedy(model, prompt, count)}


async def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    made = list(prompt)
    async with model.session(max_len=len(prompt) + count) as session:
        hidden = await model.embed([prompt])
        while True:
            output = await session.step(hidden, last=1)
            made.append(int(model.logits_here(output[:, -1])[0].argmax()))
            if len(made) == len(prompt) + count:
                return made[len(prompt) :]
            hidden = await model.embed([[made[-1]]])


if __name__ == "__main__":
    sys.exit(main())
