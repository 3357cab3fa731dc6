"""Training requests at one server: its numbers, what it refuses, and that the rest goes on (spec/15)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from petalite import bridge, limits
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import load_or_make
from petalite.bloom.synthetic import write_formula_checkpoint
from petalite.errors import ErrorCode, RequestError
from petalite.server import scheduler
from petalite.server.blockserver import BlockServer
from petalite.server.executor import run_inline
from petalite.wire import messages, packing
from petalite.wire.training import Backward, BackwardReply, Forward, ForwardReply

VECTORS = json.loads((Path(__file__).parents[2] / "spec" / "vectors" / "training.json").read_text())["numbers"]
C = 32


def encode(tensors: dict[str, Tensor], dtype: str = "f32") -> tuple[tuple[Any, ...], bytearray]:
    descriptors, body = [], bytearray()
    for name, tensor in tensors.items():
        kind = "u8" if tensor.dtype == torch.uint8 else "f32" if ".lora_" in name or name == "prompts" else dtype
        made, pieces = bridge.to_wire(tensor, kind, name=name)
        descriptors.append(made)
        body += b"".join(pieces)
    return tuple(descriptors), body


def decode(reply: Any, kind: Any) -> dict[str, Tensor]:
    made, at = {}, 0
    body = bytearray(b"".join(reply.body))
    for tensor in kind.from_wire(dict(reply.head)).tensors:
        size = tensor.nbytes
        made[tensor.name] = bridge.from_wire(tensor, body[at : at + size])
        at += size
    assert at == len(body)
    return made


async def forward(client: Any, model: bytes, given: dict[str, Tensor], dtype: str = "f32", **fields: Any) -> Any:
    tensors, body = encode(given, dtype)
    request = Forward(model=model, blocks=fields.pop("blocks", (0, 4)), tensors=tensors, **fields)
    return decode(await client.request("forward", request, body), ForwardReply)


async def backward(client: Any, model: bytes, given: dict[str, Tensor], dtype: str = "f32", **fields: Any) -> Any:
    tensors, body = encode(given, dtype)
    request = Backward(model=model, blocks=fields.pop("blocks", (0, 4)), tensors=tensors, **fields)
    return decode(await client.request("backward", request, body), BackwardReply)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
async def test_the_numbers_are_those_of_the_formulas(vector: Any, tools: Any, tmp_path: Any, nursery: Any) -> None:
    write_formula_checkpoint(tmp_path)
    server = BlockServer(load_span(tmp_path, 0, 2), load_or_make(tmp_path), "f", cache_tokens=8, runner=run_inline)
    await nursery.start(server.run)
    head = packing.decode(bytes.fromhex(vector["head"]))
    reply = await tools.Client(server).request(vector["method"], head, bytearray.fromhex(vector["body"]))
    found = decode(reply, ForwardReply if vector["method"] == "forward" else BackwardReply)
    assert list(found) == [due["n"] for due in vector["reply"]]
    for due in vector["reply"]:
        wanted = torch.frombuffer(bytearray.fromhex(due["hex"]), dtype=torch.float32).view(due["s"])
        got = found[due["n"]]
        if "mask" in vector["name"]:
            got, wanted = got[..., [0, 2], :], wanted[..., [0, 2], :]
        assert distance(got, wanted) < 1e-5, due["n"]


@pytest.mark.parametrize(("dtype", "far"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
async def test_half_precision_servers_stay_near_float32(dtype: Any, far: float, tools: Any, nursery: Any) -> None:
    """Tolerances: those for a server's output of that dtype (spec/12), which gradients keep too."""
    given = {"h": tools.hidden(7, 3), "grad": tools.hidden(7, 3, seed=1)}
    found = []
    for kind in (torch.float32, dtype):
        server = BlockServer(tools.make_span().to(kind), tools.MANIFEST, "r", cache_tokens=8, runner=run_inline)
        await nursery.start(server.run)
        found.append((await backward(tools.Client(server), tools.MODEL, given, wanted=("h",)))["h"])
    assert distance(found[1], found[0]) < far


async def test_a_first_backward_imports_nothing_large(tools: Any, nursery: Any, monkeypatch: Any) -> None:
    """torch's symbolic shapes bring sympy: 50 MB that stay, and a second in which nobody is answered."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)  # an import of it fails
    server = BlockServer(tools.make_span(), tools.MANIFEST, "r", cache_tokens=8, runner=run_inline)
    await nursery.start(server.run)
    given = {"h": tools.hidden(7, 3), "grad": tools.hidden(7, 3, seed=1)}
    assert (await backward(tools.Client(server), tools.MODEL, given, wanted=("h",)))["h"].isfinite().all()


async def test_gradients_pass_int8_weights_as_the_numbers_that_they_stand_for(
    tmp_path: Any, tools: Any, nursery: Any
) -> None:
    write_formula_checkpoint(tmp_path)
    span = load_span(tmp_path, 0, 2, quantize="int8")
    server = BlockServer(span, load_or_make(tmp_path), "f", cache_tokens=8, quantize="int8", runner=run_inline)
    await nursery.start(server.run)
    hidden, grad = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    found = await backward(
        tools.Client(server), server.manifest.model_id, {"h": hidden, "grad": grad}, blocks=(0, 2), wanted=("h",)
    )
    plain = load_span(tmp_path, 0, 2)
    for block, quantized in zip(plain.layers, span.layers, strict=True):
        for name, module in quantized.named_modules():
            if hasattr(module, "scale") and hasattr(module, "weight"):
                linear: Any = block.get_submodule(name)
                linear.weight.data = module.weight.float() * module.scale[:, None]
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(plain(leaf), leaf, grad)
    assert distance(found["h"], wanted) < 1e-5


async def test_some_of_the_blocks_and_groups_of_rows(tools: Any, make_server: Any) -> None:
    """More rows than go through a block together, through blocks from the middle of the span."""
    client = tools.Client(await make_server())
    hidden, grad = tools.hidden(100, 7), tools.hidden(100, 7, seed=1)
    found = await forward(client, tools.MODEL, {"h": hidden}, blocks=(1, 3), taps=(1, 2))
    span = tools.make_span(1, 3)
    assert distance(found["h"], span(hidden)) < 1e-6
    assert distance(found["taps"][1], tools.make_span(1, 2)(hidden)) < 1e-6
    assert torch.equal(found["taps"][0], hidden)
    prompts = tools.hidden(2, 2, seed=2)  # (blocks, P, C)
    given = {"h": hidden, "prompts": prompts, "grad": grad}
    found = await backward(client, tools.MODEL, given, blocks=(1, 3), wanted=("prompts",))
    with torch.enable_grad():
        leaf, x = prompts.clone().requires_grad_(), hidden
        for index in range(2):
            x = torch.cat([x[:, :2] + leaf[index], x[:, 2:]], dim=1)
            x = tools.make_span(1 + index, 2 + index)(x)
        (wanted,) = torch.autograd.grad(x, leaf, grad)
    assert distance(found["prompts"], wanted) < 1e-5


NAN = torch.full((1, 3, C), float("nan"))
H = torch.zeros(1, 3, C)
A, B = torch.zeros(4, 2, C), torch.zeros(4, C, 2)
MASK = torch.ones(1, 3, dtype=torch.uint8)
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any], ErrorCode]] = {
    "another width": ({"h": torch.zeros(1, 3, 16)}, {}, ErrorCode.TENSOR),
    "a mask of twos": ({"h": H, "mask": MASK * 2}, {}, ErrorCode.TENSOR),
    "too many tokens": ({"h": torch.zeros(64, 129, C)}, {}, ErrorCode.RESOURCES),
    "a row too long for memory": ({"h": torch.zeros(1, 8_192, C)}, {"grad": True}, ErrorCode.RESOURCES),
    "blocks beyond ours": ({"h": H}, {"blocks": (2, 5)}, ErrorCode.NOT_SERVED),
    "another model": ({"h": H}, {"model": bytes(32)}, ErrorCode.NOT_SERVED),
    "an adapter that is not here": ({"h": H}, {"adapter": "nobody"}, ErrorCode.NOT_SERVED),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_is_refused_and_that_the_server_goes_on(name: str, tools: Any, make_server: Any) -> None:
    client = tools.Client(await make_server())
    given, fields, code = BAD[name]
    model = fields.get("model", tools.MODEL)
    options = {key: value for key, value in fields.items() if key not in ("model", "grad")}
    with pytest.raises(RequestError) as caught:
        if fields.get("grad"):
            await backward(client, model, {**given, "grad": given["h"]}, wanted=("h",), **options)
        else:
            await forward(client, model, given, **options)
    assert caught.value.code is code
    assert (await forward(client, tools.MODEL, {"h": H}))["h"].shape == H.shape


@pytest.mark.parametrize("place", ["h", "prompts", "dense.lora_A", "grad"])
async def test_no_number_is_refused_wherever_it_stands(place: str, tools: Any, make_server: Any) -> None:
    client = tools.Client(await make_server())
    given = {"h": H, "prompts": torch.zeros(4, 1, C), "dense.lora_A": A, "dense.lora_B": B, "grad": H}
    tensors, body = encode(given)
    at = 0
    for tensor in tensors:
        if tensor.name == place:
            body[at : at + 4] = b"\xff" * 4
        at += tensor.nbytes
    request = Backward(model=tools.MODEL, blocks=(0, 4), wanted=("h",), tensors=tensors)
    with pytest.raises(RequestError) as caught:
        await client.request("backward", request, body)
    assert caught.value.code is ErrorCode.TENSOR
    assert place in caught.value.text


async def test_a_gradient_that_does_not_fit_into_the_type_asked_for(tools: Any, make_server: Any) -> None:
    client = tools.Client(await make_server())
    given = {"h": tools.hidden(3), "grad": torch.full((1, 3, C), 60_000.0)}
    with pytest.raises(RequestError) as caught:
        await backward(client, tools.MODEL, given, "f16", wanted=("h",))
    assert (caught.value.code, "f16" in caught.value.text) == (ErrorCode.TENSOR, True)


async def test_an_adapter_that_the_server_holds(tools: Any, make_server: Any) -> None:
    """Named, it computes what the same tensors do that travel; info tells its name."""
    adapter = {"dense.lora_A": tools.hidden(2, 4), "dense.lora_B": tools.hidden(2, 4, seed=1).transpose(1, 2)}
    client = tools.Client(await make_server(adapters={"tone": adapter}))
    info = messages.InfoReply.from_wire(dict((await client.request("info", {})).head))
    assert (info.adapters, info.train) == (("tone",), limits.MAX_TRAINING_TOKENS)
    hidden = tools.hidden(5)
    part = {name: tensor[1:3].contiguous() for name, tensor in adapter.items()}
    wanted = await forward(client, tools.MODEL, {"h": hidden, **part}, blocks=(1, 3))
    found = await forward(client, tools.MODEL, {"h": hidden}, blocks=(1, 3), adapter="tone")
    assert torch.equal(found["h"], wanted["h"])
    plain = await forward(client, tools.MODEL, {"h": hidden}, blocks=(1, 3))
    assert distance(plain["h"], wanted["h"]) > 1e-2  # and it is gone with its request


async def test_a_cancelled_pass_stops_at_the_next_block(tools: Any, make_server: Any) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client = tools.Client(server)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forward, client, tools.MODEL, {"h": H})
        await trio.testing.wait_all_tasks_blocked()
        assert (runner.entered, server.training.busy) == (1, True)
        nursery.cancel_scope.cancel()
    assert not server.training.busy
    runner.let_go()
    assert (await forward(client, tools.MODEL, {"h": H}))["h"].shape == H.shape


async def test_a_decode_step_goes_between_two_blocks_of_a_pass(
    tools: Any, make_server: Any, monkeypatch: Any, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(scheduler, "TRAINING_CREDIT_SECONDS", 0.0)  # the clock stands still: nothing to make up for
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    trainer, client = tools.Client(server), tools.Client(server, tools.BOB)
    await client.open()
    done = []

    async def train() -> None:
        await forward(trainer, tools.MODEL, {"h": H})
        done.append("pass")

    async def step() -> None:
        await client.run(tools.hidden(1), 0, 0)
        done.append("step")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(train)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(step)
        await trio.testing.wait_all_tasks_blocked()
        await runner.step()
        assert done == []  # one block of four
        await runner.step()
        assert done == ["step"]
        runner.let_go()
    assert done == ["step", "pass"]


async def test_a_peer_may_have_so_many_tokens_waiting_and_another_its_own(tools: Any, make_server: Any) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client, other = tools.Client(server), tools.Client(server, tools.BOB)
    large = {"h": torch.zeros(64, 128, C)}
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(forward, client, tools.MODEL, large)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(RequestError) as caught:
            await forward(client, tools.MODEL, {"h": H})
        assert caught.value.code is ErrorCode.BUSY
        nursery.start_soon(forward, other, tools.MODEL, {"h": H})
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_a_draining_server_takes_no_new_pass_and_waits_for_the_one_that_runs(
    tools: Any, make_server: Any, autojump_clock: Any
) -> None:
    runner = tools.HeldRunner()
    server = await make_server(runner=runner)
    client = tools.Client(server)
    drained = trio.Event()

    async def drain() -> None:
        await server.drain()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forward, client, tools.MODEL, {"h": H})
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(drain)
        await trio.sleep(5)
        assert not drained.is_set()
        with pytest.raises(RequestError) as caught:
            await forward(client, tools.MODEL, {"h": H})
        assert caught.value.code is ErrorCode.UNAVAILABLE
        runner.let_go()
    assert drained.is_set()
