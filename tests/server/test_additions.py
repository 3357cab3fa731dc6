"""What an open may add to the model: numbers in steps of any size, limits, and memory (spec/07, additions)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from petalite import limits
from petalite.bloom.lora import adapted_span
from petalite.bloom.training import Extras, forward_pass
from petalite.errors import ErrorCode, RequestError
from petalite.wire.tensors import Descriptor

RANK, P, C = 2, 5, 32


def made(seed: int = 0, blocks: int = 4, rank: int = RANK) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "prompts": torch.randn(blocks, P, C, generator=random),
        "dense_4h_to_h.lora_A": torch.randn(blocks, rank, 4 * C, generator=random),
        "dense_4h_to_h.lora_B": torch.randn(blocks, C, rank, generator=random),
    }


def packed(given: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], bytearray]:
    """Descriptors and body."""
    tensors = tuple(Descriptor(name, "f32", tuple(tensor.shape)) for name, tensor in given.items())
    return tensors, bytearray(b"".join(tensor.numpy().tobytes() for tensor in given.values()))


async def open_with(tools: Any, client: Any, given: Mapping[str, Tensor], number: int = 1, **changes: Any) -> Any:
    tensors, body = packed(given)
    return await client.request("open", tools.open_message(number, tensors=tensors, **changes), body)


def whole(tools: Any, x: Tensor, given: Mapping[str, Tensor], start: int = 0, end: int = 4) -> Tensor:
    """The twin: all tokens in one pass without a cache, as training requests have it."""
    adapter = {name: tensor for name, tensor in given.items() if name != "prompts"}
    passing = forward_pass(tools.make_span(start, end), x, Extras(None, given.get("prompts"), adapter))
    while True:
        try:
            next(passing)
        except StopIteration as ended:
            output: Tensor = ended.value[0]
            return output


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (3, 1, 8)])
async def test_steps_of_any_size_are_one_pass(
    tools: Any, make_server: Callable[..., Any], sizes: tuple[int, ...]
) -> None:
    client = tools.Client(await make_server())
    given, x = made(), tools.hidden(12)
    await open_with(tools, client, given)
    outputs, at = [], 0
    for n, size in enumerate(sizes):
        outputs.append(await client.run(x[:, at : at + size], n, at))
        at += size
    assert torch.allclose(torch.cat(outputs, dim=1), whole(tools, x, given), atol=1e-4)
    again = await client.run(x[:, 2:9], len(sizes), 2)  # rolled back to amid the prompts
    assert torch.allclose(again, whole(tools, x, given)[:, 2:9], atol=1e-4)


async def test_a_long_step_in_pieces_is_one_pass(tools: Any, make_server: Callable[..., Any]) -> None:
    client = tools.Client(await make_server(cache_tokens=256))
    given, x = made(), tools.hidden(60)
    await open_with(tools, client, given, max_len=64)
    assert torch.allclose(await client.run(x, 0, 0), whole(tools, x, given), atol=1e-4)


async def test_prompts_begin_behind_the_padding_of_each_row(tools: Any, make_server: Callable[..., Any]) -> None:
    client = tools.Client(await make_server())
    given, x = made(), tools.hidden(12, batch=2)
    await open_with(tools, client, given, batch=2)
    first = await client.run(x[:, :4], 0, 0, pad=(3, 0))
    output = torch.cat([first, await client.run(x[:, 4:], 1, 4, pad=(3, 0))], dim=1)
    for row, pad in enumerate((3, 0)):
        assert torch.allclose(output[row, pad:], whole(tools, x[row : row + 1, pad:], given)[0], atol=1e-4)


async def test_some_of_the_blocks_with_their_share(tools: Any, make_server: Callable[..., Any]) -> None:
    client = tools.Client(await make_server())
    given, x = made(blocks=2), tools.hidden(6)
    await open_with(tools, client, given, blocks=(1, 3))
    assert torch.allclose(await client.run(x, 0, 0), whole(tools, x, given, 1, 3), atol=1e-4)


async def test_steps_that_meet_in_a_batch_keep_their_own(tools: Any, make_server: Callable[..., Any]) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    deep, nothing = {"prompts": made()["prompts"]}, dict[str, Tensor]()
    x, found = tools.hidden(6), {}
    clients = {name: tools.Client(server, peer) for name, peer in (("deep", tools.ALICE), ("plain", tools.BOB))}

    async def run(name: str) -> None:
        found[name] = await clients[name].run(x, 0, 0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_with, tools, clients["deep"], deep)
        nursery.start_soon(clients["plain"].open)
        await trio.testing.wait_all_tasks_blocked()
        await runner.step()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "deep")
        nursery.start_soon(run, "plain")
        await trio.testing.wait_all_tasks_blocked()
        runner.let_go()
    for name, given in (("deep", deep), ("plain", nothing)):
        assert torch.allclose(found[name], whole(tools, x, given), atol=1e-4)


async def test_an_adapter_held_here_is_called_by_its_name(tools: Any, make_server: Callable[..., Any]) -> None:
    adapter = {name: tensor for name, tensor in made().items() if name != "prompts"}
    client = tools.Client(await make_server(adapters={"tone": adapter}))
    x = tools.hidden(4)
    await client.open(1, adapter="tone")
    assert torch.allclose(await client.run(x, 0, 0), whole(tools, x, adapter), atol=1e-4)
    await client.open(2, adapter="tone", blocks=(1, 3))
    part = {name: tensor[1:3] for name, tensor in adapter.items()}
    assert torch.allclose(await client.run(x, 0, 0, 2), whole(tools, x, part, 1, 3), atol=1e-4)
    with pytest.raises(RequestError, match="'mood'") as caught:
        await client.open(3, adapter="mood")
    assert caught.value.code is ErrorCode.NOT_SERVED


async def test_memory_counts_as_cache_and_goes_with_the_session(tools: Any, make_server: Callable[..., Any]) -> None:
    server = await make_server()
    client = tools.Client(server)
    nbytes = sum(tensor.numel() * 4 for tensor in made().values())
    slots = -(-nbytes // server.pool.bytes_per_token)
    assert 0 < slots < 48
    await open_with(tools, client, made())
    assert server.pool.free == 64 - 16 - slots
    await client.request("extend", {"sid": tools.sid(1), "max_len": 20})
    assert server.pool.free == 64 - 20 - slots
    with pytest.raises(RequestError, match="no room") as caught:
        await open_with(tools, client, made(), 2, max_len=64 - 20 - slots)
    assert caught.value.code is ErrorCode.RESOURCES
    with pytest.raises(RequestError, match=f"takes {slots} more") as caught:
        await open_with(tools, client, made(), 3, max_len=64)
    assert caught.value.detail["retry"] is False
    await client.close()
    assert server.pool.free == 64


async def test_opening_again_needs_the_same_bytes(tools: Any, make_server: Callable[..., Any]) -> None:
    client = tools.Client(await make_server())
    await open_with(tools, client, made())
    await open_with(tools, client, made())
    for given in (made(1), {}, {"prompts": made()["prompts"]}):
        with pytest.raises(RequestError) as caught:
            await open_with(tools, client, given)
        assert caught.value.code is ErrorCode.CONFLICT


def spoilt(name: str, value: float) -> dict[str, Tensor]:
    given = made()
    given[name].view(-1)[3] = value
    return given


WRONG: dict[str, tuple[dict[str, Tensor], dict[str, Any], ErrorCode, str]] = {
    "NaN": (spoilt("prompts", float("nan")), {}, ErrorCode.TENSOR, "NaN"),
    "infinity": (spoilt("dense_4h_to_h.lora_B", float("inf")), {}, ErrorCode.TENSOR, "infinity"),
    "of other blocks": (made(), {"blocks": (0, 3)}, ErrorCode.TENSOR, r"must have \[3"),
    "half of an adapter": ({"dense.lora_A": torch.ones(4, 1, C)}, {}, ErrorCode.BAD_REQUEST, "belong together"),
    "two ranks": (
        made() | {"dense_4h_to_h.lora_B": torch.ones(4, C, RANK + 1)},
        {},
        ErrorCode.TENSOR,
        r"must have \[4, 32, 2\]",
    ),
    "too large a rank": (made(rank=limits.MAX_LORA_RANK + 1), {}, ErrorCode.RESOURCES, "rank 257, limit 256"),
    "prompts longer than the session": (made(), {"max_len": P - 1}, ErrorCode.TENSOR, "5 positions"),
    "prompts of rows": ({"prompts": torch.ones(4, 1, P, C)}, {}, ErrorCode.TENSOR, "3-dimensional"),
    "another hidden size": ({"prompts": torch.ones(4, P, C + 1)}, {}, ErrorCode.TENSOR, "hidden size of 33"),
    "by name and as tensors": (made(), {"adapter": "tone"}, ErrorCode.BAD_REQUEST, "not both"),
    "what no open takes": ({"h": torch.ones(1, 1, C)}, {}, ErrorCode.BAD_REQUEST, "'h'"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_refused_and_nothing_is_held(
    tools: Any, make_server: Callable[..., Any], what: str
) -> None:
    given, changes, code, text = WRONG[what]
    server = await make_server(adapters={"tone": {}})
    client = tools.Client(server)
    tensors, body = packed(given)
    head = tools.open_message(**{key: value for key, value in changes.items() if key != "adapter"}).to_wire()
    head |= {"t": [tensor.to_wire() for tensor in tensors]} | {key: changes[key] for key in changes if key == "adapter"}
    with pytest.raises(RequestError, match=text) as caught:
        await client.request("open", head, body)
    assert caught.value.code is code
    assert server.pool.free == server.pool.capacity
    await client.open()


async def test_a_body_of_another_size_is_refused(tools: Any, make_server: Callable[..., Any]) -> None:
    client = tools.Client(await make_server())
    tensors, body = packed(made())
    for message, wrong in ((tools.open_message(tensors=tensors), body[:-1]), (tools.open_message(), bytearray(4))):
        with pytest.raises(RequestError, match="the tensors have") as caught:
            await client.request("open", message, wrong)
        assert caught.value.code is ErrorCode.TENSOR


def test_the_blocks_themselves_stay_as_they_were(tools: Any) -> None:
    span, x = tools.make_span(), tools.hidden(3)
    before = span(x)
    other = adapted_span(span, {name: tensor for name, tensor in made().items() if name != "prompts"})
    assert not torch.allclose(other(x), before, atol=1e-2)
    assert torch.equal(span(x), before)
