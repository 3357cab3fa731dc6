"""Adapters that servers hold: loaded from PEFT's files, announced, and used by their name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

import petalite
from petalite.cli import COMMANDS, run

# peft asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[2982, 720, 262, 534, 36], [40, 50, 60, 70, 80]])


@pytest.fixture(scope="module")
def theirs(fairytale_oracle: Any) -> Any:
    """A local model with an adapter that changes something in blocks of both servers, and nothing in others."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["query_key_value", "dense_4h_to_h"], layers_to_transform=[1, 3, 6]
    )
    model = peft.get_peft_model(copy.deepcopy(fairytale_oracle.model), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def model(make_commands: Any, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The model as a client of two server processes sees it; the adapter `sea` is on both, `lone` on the second."""
    directory = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(directory, save_embedding_layers=False)
    words = ["fairytale", "--adapter", f"sea={directory}"]
    commands = make_commands(tmp_path_factory.mktemp("state"))
    with commands.serving(
        [*words, "--blocks", "0:5"], [*words, "--blocks", "5:8", "--adapter", f"lone={directory}"]
    ) as ready:
        peers = [server["addresses"][0] for server in ready]
        with petalite.connect(peers=peers) as swarm:
            yield swarm.load("fairytale", wire="f32")


def test_by_name_it_computes_what_peft_does(model: Any, theirs: Any) -> None:
    """Forward and backward, relative error in norm at most 1e-5."""
    found = []
    hidden = model.embeddings(IDS)
    for blocks in (lambda x: model.blocks(x, adapter="sea"), lambda x: _blocks_of(theirs, x)):
        x = hidden.detach().requires_grad_()
        output = blocks(x)
        output.square().sum().backward()
        found.append((output.detach(), x.grad))
    plain = model.blocks(hidden)
    for ours, due in zip(*found, strict=True):
        assert float((ours - due).norm() / due.norm()) <= 1e-5
    assert float((found[0][0] - plain).norm() / plain.norm()) > 1e-2


def _blocks_of(theirs: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The local model's blocks alone."""
    transformer = theirs.get_base_model().transformer
    kept = transformer.word_embeddings_layernorm, transformer.ln_f
    transformer.word_embeddings_layernorm = transformer.ln_f = torch.nn.Identity()
    try:
        output: torch.Tensor = transformer(inputs_embeds=hidden).last_hidden_state
    finally:
        transformer.word_embeddings_layernorm, transformer.ln_f = kept
    return output


def test_a_text_is_told_with_it(model: Any, theirs: Any) -> None:
    ids = torch.tensor([model.encode("A king")])
    due = theirs.generate(ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids))
    assert model.generate_ids(ids, max_new_tokens=10, adapter="sea") == due[:, ids.shape[1] :].tolist()
    assert model.generate_ids(ids, max_new_tokens=10) != due[:, ids.shape[1] :].tolist()


def test_servers_say_which_they_hold_and_some_blocks_are_enough(model: Any) -> None:
    remote = model.remote
    snapshot = model._portal.call_now(lambda: remote.node.directory.snapshot(remote.model_id))
    assert sorted(server.adapters for server in snapshot.servers) == [("sea",), ("sea", "lone")]
    assert model.blocks[5:](model.embeddings(IDS), adapter="lone").shape == (2, 5, 256)


def test_a_missing_adapter_is_one_line(commands: Any) -> None:
    done = commands.run("serve", "fairytale", "--blocks", "0:1", "--no-lan", "--adapter", "sea=nowhere")
    assert done.code == 1
    assert "adapter_config.json: no such file" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (["sea"], "is not NAME=DIR"),
        (["a b=here"], "is not NAME=DIR"),
        (["=here"], "is not NAME=DIR"),
        (["sea=here", "sea=there"], "two adapters of the name 'sea'"),
        ([f"a{i}=here" for i in range(9)], "a server holds 8 at most"),
    ],
)
def test_a_bad_name_is_a_usage_error(adapters: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    assert run(["serve", "fairytale", *options], COMMANDS) == 2
    assert words in capsys.readouterr().err
