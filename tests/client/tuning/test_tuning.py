"""Training through servers against the same on one machine; and through servers that are killed meanwhile."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petalite
from petalite.bloom.adapters import TARGETS
from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint
from petalite.client.api import BlockingModel
from petalite.client.blocking import open_portal
from petalite.net.call import Call, Handler, Reply
from tests.client.tuning.local import deep_prompts, relative_error, transformers_model
from tools.simulate_sessions.world import Place, World, load_tiny, open_world

# peft asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(4, 6000, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])


def randomized(module: Any) -> Any:
    """As if trained for a while."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def language_loss(logits: Tensor) -> Tensor:
    """Of each real token that follows a real one."""
    due = IDS[:, 1:].masked_fill((MASK[:, 1:] & MASK[:, :-1]) == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), due.flatten())


def gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, list(parameters))
    return torch.cat([gradient.flatten() for gradient in found])


def test_a_shallow_and_deep_prompts_gradients_are_those_of_one_machine(model: BlockingModel) -> None:
    """Relative error in norm at most 1e-5, in a batch with padding on both sides."""
    prompt = randomized(petalite.PromptTuning(model.config, 3, deep=True))
    local = transformers_model()
    inputs = prompt.prepend(local.transformer.word_embeddings(IDS))
    with deep_prompts(prompt.deep_prompts):
        logits = local(inputs_embeds=inputs, attention_mask=F.pad(MASK, (3, 0), value=1)).logits[:, 3:]
    ours = model.logits(IDS, mask=MASK, soft_prompt=prompt)
    due = gradients(language_loss(logits), prompt.parameters())
    assert relative_error(gradients(language_loss(ours), prompt.parameters()), due) <= 1e-5
    assert relative_error(ours[MASK == 1], logits[MASK == 1]) <= 1e-5


def test_an_adapters_gradients_are_pefts(model: BlockingModel, tmp_path: Path) -> None:
    adapter = randomized(petalite.LoraAdapter(model.config, rank=3, alpha=5.0, targets=list(TARGETS), blocks=[0, 2, 5]))
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(transformers_model()), tmp_path, is_trainable=True).eval()
    named = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    due = gradients(
        language_loss(theirs(IDS, attention_mask=MASK).logits),
        [named[f"base_model.model.{name}"] for name in adapter.tensors],
    )
    ours = model.logits(IDS, mask=MASK, adapter=adapter)
    assert relative_error(gradients(language_loss(ours), adapter.parameters()), due) <= 1e-5


# --- servers that die -------------------------------------------------------------------------------------------------

SMALL = BloomConfig(hidden_size=32, n_head=4, n_layer=4, vocab_size=64)
STEPS = 50


class Killer:
    """Ends a server's machine while it works on the n-th request of a kind."""

    def __init__(self, *kills: tuple[str, int, tuple[int, int]]) -> None:
        self.kills = kills
        self.heard: dict[tuple[str, tuple[int, int]], int] = {}
        self.killed: list[Place] = []

    async def __call__(self, place: Place, call: Call, handler: Handler) -> Reply:
        key = (call.method, (place.server.span.start, place.server.span.end))
        self.heard[key] = self.heard.get(key, 0) + 1
        for method, number, span in self.kills:
            if key == (method, span) and self.heard[key] == number:
                self.killed.append(place)
                place.host.die()
        return await handler(call)


def loss_curve(directory: Path, killer: Killer) -> tuple[list[float], World]:
    """50 steps of prompt tuning, shallow and deep, towards some random text."""

    @asynccontextmanager
    async def swarm() -> AsyncIterator[tuple[World, Any]]:
        spans = [(0, 2), (2, 4)]
        async with open_world(load_tiny(directory), spans, spans, tap=killer) as world, world.client() as model:
            yield world, model

    ids = torch.randint(4, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    with open_portal(swarm) as (portal, (world, remote)):
        model = BlockingModel(portal, remote)
        torch.manual_seed(3)
        prompt = petalite.PromptTuning(SMALL, 4, deep=True)
        optimizer = torch.optim.Adam(prompt.parameters(), lr=0.03)
        curve = []
        for _ in range(STEPS):
            logits = model.logits(ids, soft_prompt=prompt)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            curve.append(float(loss.detach()))
        return curve, world


def test_a_loss_curve_with_two_servers_killed_is_the_undisturbed_one(tmp_path: Path) -> None:
    """One in the middle of a backward pass, one in the middle of a forward pass; within 1e-4 at every step."""
    write_checkpoint(tmp_path, SMALL, seed=5)
    undisturbed, _ = loss_curve(tmp_path, Killer())
    killer = Killer(("backward", 15, (2, 4)), ("forward", 35, (0, 2)))
    curve, world = loss_curve(tmp_path, killer)
    assert [place.server.span.start for place in killer.killed] == [2, 0]
    assert len(world.places) == 4 and sum(place.up for place in world.places) == 2
    assert curve == pytest.approx(undisturbed, abs=1e-4)
    assert undisturbed[-1] < undisturbed[0] - 0.3


# --- telling stories with what was trained ----------------------------------------------------------------------------

PROMPTS = ["Once upon a time", "The little bear went into the dark wood and saw", "A king"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_texts_follow_a_soft_prompt(model: BlockingModel, num_beams: int) -> None:
    """A batch of prompts of several lengths: the same tokens as transformers gives after the same inputs."""
    prompt = randomized(petalite.PromptTuning(model.config, 3))
    local = transformers_model()
    told, due = [], []
    for text in PROMPTS:
        ids = torch.tensor([model.encode(text)])
        inputs = prompt.prepend(local.transformer.word_embeddings(ids))
        made = local.generate(
            inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long), max_new_tokens=10,
            do_sample=False, num_beams=num_beams,
        )  # fmt: skip
        due.append(made[0].tolist())
        told.append(model.generate_text(text, max_new_tokens=10, num_beams=num_beams, soft_prompt=prompt))
    ids = [model.encode(text) for text in PROMPTS]
    assert model.generate_ids(ids, max_new_tokens=10, num_beams=num_beams, soft_prompt=prompt) == due
    assert told == [model.decode(tokens) for tokens in due]
    assert told[0] != model.generate_text(PROMPTS[0], max_new_tokens=10, num_beams=num_beams)


def test_texts_follow_a_deep_prompt_and_an_adapter(model: BlockingModel) -> None:
    """Token by token what whole passes give, which are compared with one machine above."""
    prompt = randomized(petalite.PromptTuning(model.config, 3, deep=True))
    adapter = randomized(petalite.LoraAdapter(model.config, rank=2, alpha=3.0))
    ids = torch.tensor([model.encode(PROMPTS[0])])
    told = model.generate_ids(ids, max_new_tokens=6, soft_prompt=prompt, adapter=adapter)[0]
    with torch.no_grad():
        for _ in range(6):
            best = model.logits(ids, soft_prompt=prompt, adapter=adapter)[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    assert told == ids[0, -6:].tolist()
    assert told != model.generate_ids(ids[:, :-6], max_new_tokens=6)[0]
