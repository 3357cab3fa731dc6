"""Checkpoints that are not the embedded model: shards, heads that are no power of two, odd depth and vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint

CONFIG = BloomConfig(hidden_size=80, n_head=10, n_layer=5, vocab_size=397, eos_token_ids=(2,), pad_token_id=3)
PROMPT = "a tale of shards"
COUNT = 16


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """Bytes as tokens, and enough names behind them that every id of the model has a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    words |= {letter: number for number, letter in enumerate(letters, len(words))}
    words |= {f"w{number}": number for number in range(len(words), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "odd"
    write_checkpoint(directory, CONFIG, seed=3, shards=3, dtype=torch.float32, prefix=False)
    write_tokenizer(directory, CONFIG.vocab_size)
    return directory


@pytest.fixture(scope="module")
def served(
    checkpoint: Path, make_commands: Any, with_peers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, list[str]]]:
    commands = make_commands(tmp_path_factory.mktemp("state"))
    with commands.serving([str(checkpoint), "--blocks", "0:2"], [str(checkpoint), "--blocks", "2:5"]) as ready:
        assert {server["model"] for server in ready} == {"odd"}  # its name, not where it lies here
        yield commands, with_peers(ready)


@pytest.mark.parametrize(("wire", "margin"), [("f32", 1e-4), ("f16", 0.02)])
def test_generate_gives_the_oracles_tokens(
    wire: str, margin: float, served: Any, checkpoint: Path, make_oracle: Any
) -> None:
    commands, peers = served
    words = ["--greedy", "--json", "--wire", wire, "--max-new-tokens", str(COUNT), *peers]
    done = commands.run("generate", str(checkpoint), PROMPT, *words)
    assert done.code == 0, done.err
    oracle = make_oracle(checkpoint)
    oracle.check(oracle.encode(PROMPT), done.json["token_ids"], COUNT, least_margin=margin)


def test_a_server_reads_only_the_shards_of_its_blocks_and_says_what_is_missing(
    served: Any, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from petalite.cli import run

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    part = tmp_path / "part"
    part.mkdir()
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    gone = index["h.4.input_layernorm.weight"]
    for file in checkpoint.iterdir():
        if file.name != gone:
            (part / file.name).symlink_to(file)
    assert run(["serve", str(part), "--blocks", "4:5", "--listen", "127.0.0.1:0", "--no-lan"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and gone in err


def test_a_client_of_another_checkpoint_finds_no_server(
    served: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from petalite.cli import run

    other = tmp_path / "odd"
    write_checkpoint(other, CONFIG, seed=4)
    write_tokenizer(other, CONFIG.vocab_size)
    assert run(["generate", str(other), PROMPT, *served[1]]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "no server of odd (" in err and "served here: odd (" in err
