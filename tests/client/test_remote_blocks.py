"""RemoteBlocks against transformers on the embedded model, float32 there and f32 on the wire unless it says otherwise.

Tolerance 1e-5, norm-wise: both sum the same float32 products, in another order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import trio
from torch import Tensor, nn
from transformers import BloomModel

from petalite.client.api import BlockingModel, RemoteModel, connect
from petalite.client.blocking import open_portal
from petalite.identity import Identity
from petalite.models import FAIRYTALE, find_model
from petalite.net.call import Call, Handler, Reply
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
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
