"""RemoteBlocks against transformers on the embedded model, float32 there and f32 on the wire unless it says otherwise.

Tolerance 1e-5, norm-wise: both sum the same float32 products, in another order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor, nn
from transformers import BloomModel

from petalite.client.api import BlockingModel, RemoteModel, connect
from petalite.client.blocking import open_portal
from petalite.client.given import Given
from petalite.client.passes import Loss
from petalite.client.session import SessionError
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.identity import Identity
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
from petalite.swarm.snapshot import Span
from tools.simulate_sessions import faults
from tools.simulate_sessions.world import Place, Tap, load_parts, no_tap, open_world

C, LAYERS, CLOSE = 256, 8, 1e-5
TARGETS = {
    "self_attention.query_key_value": (C, 3 * C),
    "self_attention.dense": (C, C),
    "mlp.dense_h_to_4h": (C, 4 * C),
    "mlp.dense_4h_to_h": (4 * C, C),
}


@cache
def oracle() -> Any:
    """The blocks alone: what comes in goes to block 0 as it is, what comes out is block 7's."""
    model: Any = BloomModel.from_pretrained(find_model(FAIRYTALE), dtype=torch.float32, attn_implementation="eager")
    model.train(False)
    model.word_embeddings_layernorm = model.ln_f = nn.Identity()
    return model.requires_grad_(False)


@contextmanager
def changed(
    prompts: Tensor | None = None, adapter: Mapping[str, Tensor] | None = None, scaling: float = 1.0
) -> Iterator[None]:
    """The oracle with deep prompts added to its blocks' inputs, and low-rank changes beside its products."""
    hooks = []
    for index, block in enumerate(oracle().h):
        if prompts is not None:
            hooks.append(block.register_forward_pre_hook(_adding(prompts[index])))
        for name in TARGETS:
            a, b = ((adapter or {}).get(f"transformer.h.{index}.{name}.lora_{side}.weight") for side in "AB")
            if a is not None and b is not None:
                hooks.append(block.get_submodule(name).register_forward_hook(_low_rank(a, b, scaling)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(prompts: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        P = prompts.shape[-2]
        return (torch.cat([args[0][:, :P] + prompts, args[0][:, P:]], dim=1), *args[1:])

    return hook


def _low_rank(a: Tensor, b: Tensor, scaling: float) -> Callable[..., Any]:
    return lambda module, args, output: output + args[0] @ a.T @ b.T * scaling


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(batch: int, tokens: int) -> Tensor:
    """A mask with left padding, right padding, and holes."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, tokens - 4 :] = 0
    mask[2, 5:7] = 0
    return mask


def make_adapter(rank: int = 4, blocks: Sequence[int] = range(LAYERS)) -> dict[str, Tensor]:
    made = {}
    for index in blocks:
        for number, (name, (wide_in, wide_out)) in enumerate(TARGETS.items()):
            seed = 10 * index + number
            made[f"transformer.h.{index}.{name}.lora_A.weight"] = random(rank, wide_in, seed=seed, size=0.05)
            made[f"transformer.h.{index}.{name}.lora_B.weight"] = random(wide_out, rank, seed=seed + 99, size=0.05)
    return made


def distance(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    return float(((found - wanted).norm() / wanted.norm()).detach())


class Kill:
    """A tap: the server that is the first to be asked for one of `method` is killed before it answers."""

    def __init__(self, method: str, after: int = 0) -> None:
        self.method, self.left = method, after
        self.killed: Place | None = None

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        if call.method == self.method and self.killed is None:
            if not self.left:
                self.killed = place
                return await faults.death(place, call, handler)
            self.left -= 1
        return await handler(call)


@contextmanager
def swarm(
    *spans: tuple[int, int], spares: Sequence[tuple[int, int]] = (), tap: Tap = no_tap, wire: str = "f32"
) -> Iterator[BlockingModel]:
    """A swarm in memory whose loop runs in a thread of its own, as that of `petalite.connect`."""

    @asynccontextmanager
    async def open_client() -> AsyncIterator[RemoteModel]:
        async with open_world(load_parts(), spans, spares, tap=tap) as world, world.client(wire=wire) as model:
            yield model

    with open_portal(open_client) as (portal, model):
        yield BlockingModel(portal, model)


ONE, TWO, THREE = ((0, 8),), ((0, 4), (4, 8)), ((0, 3), (3, 5), (5, 8))


@pytest.mark.parametrize("spans", [ONE, TWO, THREE], ids=len)
def test_all_gradients_are_those_of_transformers_though_a_server_dies_amid_backward(spans: Any) -> None:
    B, T, P = 6, 40, 5
    mask, weight = padded(B, T), random(B, T, C, seed=1) * padded(B, T)[..., None]
    hidden, prompts = random(B, T, C).requires_grad_(), random(LAYERS, P, C, seed=2, size=0.1).requires_grad_()
    adapter = {name: tensor.requires_grad_() for name, tensor in make_adapter().items()}
    leaves = [hidden, prompts, *adapter.values()]
    with changed(prompts, adapter, scaling=2.0):
        states = oracle()(inputs_embeds=hidden, attention_mask=mask, output_hidden_states=True).hidden_states
    wanted = torch.autograd.grad((states[-1] * weight).sum() + (states[3] * weight).sum(), leaves)
    kill = Kill("backward")
    with swarm(*spans, spares=spans, tap=kill) as model:
        found = model.blocks(
            hidden, mask=mask, prompts=prompts, adapter=adapter, scaling=2.0, output_hidden_states=True
        )
        loss = (found[-1] * weight).sum() + (found[3] * weight).sum()
        gradients = torch.autograd.grad(loss, leaves)
    assert kill.killed is not None
    real = mask.bool()
    assert max(distance(a[real], b[real]) for a, b in zip(found, states, strict=True)) < CLOSE
    assert max(distance(a, b) for a, b in zip(gradients, wanted, strict=True)) < CLOSE


def plain(batch: int = 6, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, the loss's weights, and the oracle's output and gradient."""
    hidden, weight = random(batch, tokens, C).requires_grad_(), random(batch, tokens, C, seed=1)
    output = oracle()(inputs_embeds=hidden).last_hidden_state
    (wanted,) = torch.autograd.grad((output * weight).sum(), hidden)
    return hidden, weight, output.detach(), wanted


def test_a_span_goes_to_several_servers_when_no_one_has_it_whole_any_more() -> None:
    hidden, weight, _, wanted = plain()
    kill = Kill("backward")
    with swarm(*ONE, spares=TWO, tap=kill) as model:
        (model.blocks(hidden) * weight).sum().backward()
    assert distance(hidden.grad, wanted) < CLOSE
    assert kill.killed is not None


def test_a_server_dies_amid_the_forward_pass() -> None:
    hidden, weight, output, wanted = plain()
    kill = Kill("forward", after=1)
    with swarm(*THREE, spares=TWO, tap=kill) as model:
        found = model.blocks(hidden)
        (found * weight).sum().backward()
    assert kill.killed is not None
    assert distance(found, output) < CLOSE
    assert distance(hidden.grad, wanted) < CLOSE


class Count:
    """A tap that counts requests: {(place's number, method)}."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        self.seen.append((place.host.name, call.method, call.head["t"][0]["s"][0]))
        return await handler(call)


def test_a_batch_goes_in_pieces_along_all_routes_and_hidden_states_in_one_round_trip_a_server() -> None:
    hidden, weight, output, wanted = plain(16, 64)
    count = Count()
    with swarm(*TWO, *TWO, tap=count) as model:
        states = model.blocks(hidden, output_hidden_states=True)
        (states[-1] * weight).sum().backward()
    assert distance(states[-1], output) < CLOSE
    assert distance(hidden.grad, wanted) < CLOSE
    for method in ("forward", "backward"):
        rows = {name: sum(batch for place, what, batch in count.seen if (place, what) == (name, method))
                for name, _, _ in count.seen}  # fmt: skip
        assert len(rows) == 4
        assert sum(rows.values()) == 2 * 16
        assert all(4 <= each <= 12 for each in rows.values()), rows
    count.seen.clear()
    with swarm(*TWO, tap=count) as model:
        assert len(model.blocks(hidden[:2], output_hidden_states=True)) == LAYERS + 1
    assert len(count.seen) == 2


@pytest.mark.parametrize(("wire", "near"), [("f16", 1e-3), ("bf16", 1e-2), ("int8", 5e-2)])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_smaller_types_on_the_wire_keep_gradients_of_any_size(wire: str, near: float, size: float) -> None:
    """Tolerances: about three times what each type's rounding of one hop does to a hidden state (spec/05)."""
    hidden, weight, output, wanted = plain()
    with swarm(*TWO, wire=wire) as model:
        found = model.blocks(hidden)
        (found * weight * size).sum().backward()
    assert distance(found, output) < near
    assert distance(hidden.grad, wanted * size) < near


def test_slices_and_single_blocks_put_together_are_the_whole() -> None:
    hidden, _, output, _ = plain(2, 9)
    with swarm(*TWO) as model:
        blocks = model.blocks
        assert (len(blocks), blocks[2:7].start, blocks[2:7][1:3].end, blocks[-1].start) == (8, 2, 5, 7)
        assert list(blocks.parameters()) == []
        x: Any = hidden
        for block in blocks[:3]:
            x = block(x)
        assert distance(blocks[3:](x), output) < CLOSE
        for wrong in (slice(3, 3), slice(0, 8, 2), slice(7, 3), 8):
            with pytest.raises(IndexError):
                blocks[wrong]


def test_an_adapter_of_some_blocks_and_of_several_ranks() -> None:
    hidden, weight = random(2, 12, C), random(2, 12, C, seed=1)
    adapter = make_adapter(4, [1, 4]) | make_adapter(2, [6])
    adapter = {name: tensor.requires_grad_() for name, tensor in adapter.items() if "query" in name or ".6." in name}
    with changed(adapter=adapter):
        loss = (oracle()(inputs_embeds=hidden).last_hidden_state * weight).sum()
    wanted = torch.autograd.grad(loss, list(adapter.values()))
    with swarm(*TWO) as model:
        loss = (model.blocks(hidden, adapter=adapter) * weight).sum()
        found = torch.autograd.grad(loss, list(adapter.values()))
    assert max(distance(a, b) for a, b in zip(found, wanted, strict=True)) < CLOSE


def test_prompts_of_each_row() -> None:
    hidden, weight = random(3, 12, C), random(3, 12, C, seed=1)
    prompts = random(LAYERS, 3, 2, C, seed=2, size=0.1).requires_grad_()
    with changed(prompts):
        (wanted,) = torch.autograd.grad((oracle()(inputs_embeds=hidden).last_hidden_state * weight).sum(), prompts)
    with swarm(*TWO) as model:
        (model.blocks(hidden, prompts=prompts) * weight).sum().backward()
    assert distance(prompts.grad, wanted) < CLOSE


A, B = (f"transformer.h.0.mlp.dense_4h_to_h.lora_{side}.weight" for side in "AB")
WRONG: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "two dimensions": ((5, C), {}),
    "another width": ((1, 5, 64), {}),
    "a mask of another length": ((1, 5, C), {"mask": torch.ones(1, 4)}),
    "prompts for too few blocks": ((1, 5, C), {"prompts": torch.zeros(7, 1, C)}),
    "more prompts than tokens": ((1, 5, C), {"prompts": torch.zeros(8, 6, C)}),
    "an adapter tensor of no layer": (
        (1, 5, C),
        {"adapter": {"transformer.h.0.mlp.dense.lora_A.weight": torch.ones(1, C)}},
    ),
    "A without B": ((1, 5, C), {"adapter": {A: torch.zeros(2, 4 * C)}}),
    "an adapter of two ranks": ((1, 5, C), {"adapter": {A: torch.zeros(2, 4 * C), B: torch.zeros(C, 3)}}),
}


def test_arguments_that_do_not_fit_are_named_before_anything_is_sent() -> None:
    with swarm(*TWO) as model:
        for name, (shape, options) in WRONG.items():
            with pytest.raises(ValueError, match=r"must be|belong together|none of a LoRA"):
                model.blocks(torch.zeros(shape), **options)
                pytest.fail(name)
        with pytest.raises(LocalProtocolError, match="NaN"):
            model.blocks(torch.full((1, 5, C), float("nan")))
        hidden = random(1, 5, C).requires_grad_()
        with pytest.raises(LocalProtocolError, match="NaN"):
            (model.blocks(hidden).sum() * float("nan")).backward()
        assert model.blocks(hidden).shape == hidden.shape


# --- in the loop


def play(scene: Callable[[], Any]) -> None:
    """Run an async scene under a mock clock."""

    async def main() -> None:
        with trio.fail_after(3600):
            await scene()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def gradient(model: RemoteModel, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient by hidden."""
    blocks = Span(0, LAYERS)
    done = await model.passes.forward(blocks, hidden.detach(), Given())
    return done.output, (await model.passes.backward(done, Given(), Loss(weight, {}, frozenset({"h"}))))["h"]


def test_under_trio_await_and_differentiate_in_a_thread() -> None:
    async def scene() -> None:
        hidden, weight, output, wanted = plain(2, 9)
        async with open_world(load_parts(), TWO) as world, world.client(wire="f32") as model:
            with pytest.raises(LocalProtocolError, match="forward_async"):
                model.blocks(hidden)
            found = await model.blocks.forward_async(hidden)
            loss = (found * weight).sum()
            with pytest.raises(LocalProtocolError, match="thread"):
                loss.backward(retain_graph=True)
            await trio.to_thread.run_sync(loss.backward)
        assert distance(found, output) < CLOSE
        assert distance(hidden.grad, wanted) < CLOSE

    trio.run(scene)


LIES = ("garbage", "truncation", "shape", "infinity", "error", "silence", "reset", "noise")


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("kind", LIES)
def test_what_one_server_does_wrong_changes_no_number(kind: str, method: str) -> None:
    async def scene() -> None:
        hidden, weight, output, wanted = plain(2, 9)
        once = faults.Once(kind)
        once.methods = frozenset({method})
        async with open_world(load_parts(), TWO, TWO, tap=once) as world, world.client(wire="f32") as model:
            once.arm(world.places[1])
            found, grad = await gradient(model, hidden, weight)
        assert once.happened
        assert distance(found, output) < CLOSE
        assert distance(grad, wanted) < CLOSE

    play(scene)


def test_servers_that_do_not_train_are_left_alone() -> None:
    async def scene() -> None:
        hidden, weight, _, wanted = plain(2, 9)
        count = Count()
        async with open_world(load_parts(), TWO, TWO, tap=count) as world, world.client(wire="f32") as model:
            for place in world.places[:2]:
                offer = place.server.describe
                place.server.describe = lambda offer=offer: dataclasses.replace(offer(), train=None)  # type: ignore[method-assign]
            _, grad = await gradient(model, hidden, weight)
            assert distance(grad, wanted) < CLOSE
            assert {name for name, _, _ in count.seen} == {place.host.name for place in world.places[2:]}
            for place in world.places[2:]:
                place.server.describe = world.places[0].server.describe  # type: ignore[method-assign]
            with trio.move_on_after(30), pytest.raises(SessionError, match="that trains"):
                await gradient(model, hidden, weight)

    play(scene)


def test_what_all_servers_call_our_fault_is_raised_and_held_against_nobody() -> None:
    async def scene() -> None:
        refusing = True

        async def refuse(place: Place, call: Call, handler: Handler) -> Reply:
            if refusing:
                raise RequestError(ErrorCode.BAD_REQUEST, "field 'blocks' must be a unicorn")
            return await handler(call)

        hidden, weight, _, wanted = plain(2, 9)
        async with open_world(load_parts(), ONE, ONE, tap=refuse) as world, world.client(wire="f32") as model:
            with pytest.raises(RequestError, match="unicorn"):
                await gradient(model, hidden, weight)
            assert not model.node.bans.entries
            refusing = False
            began = trio.current_time()
            assert distance((await gradient(model, hidden, weight))[1], wanted) < CLOSE
            assert trio.current_time() - began < 0.1

    play(scene)


def test_a_pass_gives_up_at_the_callers_deadline_and_the_next_one_may_be_luckier() -> None:
    async def scene() -> None:
        hidden, weight, _, wanted = plain(2, 9)
        async with open_world(load_parts(), TWO) as world, world.client(wire="f32") as model:
            world.places[1].host.die()
            for _ in range(2):
                with pytest.raises(SessionError, match="blocks 4:8"), trio.move_on_after(20):
                    await gradient(model, hidden, weight)
            world.places[1].host.resume()
            assert distance((await gradient(model, hidden, weight))[1], wanted) < CLOSE

    play(scene)


def test_over_real_sockets_through_two_servers() -> None:
    @asynccontextmanager
    async def open_servers() -> AsyncIterator[list[str]]:
        parts = load_parts()
        async with trio.open_nursery() as nursery:
            addresses = []
            for start, end in TWO:
                server = BlockServer(parts.span(start, end), parts.local.manifest, "fairytale", cache_tokens=64)
                await nursery.start(server.run)
                addresses.append(await nursery.start(_listen, server))
            yield addresses
            nursery.cancel_scope.cancel()

    hidden, weight = random(3, 20, C).requires_grad_(), random(3, 20, C, seed=1)
    output = oracle()(inputs_embeds=hidden).last_hidden_state
    (wanted,) = torch.autograd.grad((output * weight).sum(), hidden)
    with open_portal(open_servers) as (_, addresses), connect(addresses, lan=False) as joined:
        found = joined.load(FAIRYTALE, wire="f32").blocks(hidden)
        (found * weight).sum().backward()
    assert distance(found, output) < CLOSE
    assert distance(hidden.grad, wanted) < CLOSE


async def _listen(server: BlockServer, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    async with open_endpoint(Identity.generate(), handlers=server.methods) as endpoint:
        (address,) = await endpoint.listen("127.0.0.1", 0)
        task_status.started(str(address))
        await trio.sleep_forever()
