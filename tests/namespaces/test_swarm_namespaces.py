"""The whole of it between machines apart: two servers and a client with no address given, or one bootstrap address."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.namespaces.network import Network, lan, routed
from tests.namespaces.processes import ENVIRONMENT, Lines

PROMPT = "Once upon a time"
TOKENS = 20
FIRST_TOKEN_SECONDS = 10.0
READY_SECONDS = 90.0


@pytest.fixture(scope="module")
def expected() -> str:
    """What one process without any network says: transformers, float32."""
    import torch
    import transformers

    from petalite.models import find_model

    directory = str(find_model("fairytale"))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    model: Any = transformers.BloomForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0, prompt.shape[1] :]))


def busy() -> float:
    """How many times longer everything takes now because others keep the cores busy, at least 1."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def environment(state: Path, machine: str) -> dict[str, str]:
    """Each machine has a state directory, and so identities, of its own."""
    return {**ENVIRONMENT, "XDG_STATE_HOME": str(state / machine), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def serve(net: Network, machine: str, state: Path, *words: str) -> Lines:
    command = ("-m", "petalite", "serve", "fairytale", "--num-blocks", "4", "--cache", "64M", "--json", *words)
    return Lines(net.popen(machine, sys.executable, *command, env=environment(state, machine)))


def ready(server: Lines) -> dict[str, Any]:
    return server.wait_for(lambda line: bool(line.get("ready")), READY_SECONDS)


def generate(net: Network, machine: str, state: Path, *words: str) -> tuple[str, float]:
    """The continuation, and the seconds from the command to its first token."""
    command = ("-m", "petalite", "generate", "fairytale", PROMPT, "--greedy", "--max-new-tokens", str(TOKENS), *words)
    started = time.monotonic()
    process = net.popen(machine, sys.executable, *command, env=environment(state, machine))
    assert process.stdout is not None
    text = process.stdout.read(len(PROMPT))
    text += process.stdout.read(1)  # the first piece after the prompt
    first = time.monotonic() - started
    text += process.stdout.read()
    process.wait(timeout=30.0)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read()
    assert text.startswith(PROMPT), process.stderr.read()
    return text[len(PROMPT) :].rstrip("\n"), first


@pytest.mark.parametrize("versions", ["both", "ipv6"])
def test_a_lan_finds_itself_without_any_address(versions: str, tmp_path: Path, expected: str) -> None:
    with lan("a", "b", "c", ipv4=versions == "both") as net:
        servers = [ready(server) for server in [serve(net, machine, tmp_path) for machine in "ab"]]
        text, seconds = generate(net, "c", tmp_path)
        assert text == expected
        assert sorted(server["blocks"] for server in servers) == [[0, 4], [4, 8]]
        assert seconds <= FIRST_TOKEN_SECONDS * busy()
        done = net.run("c", sys.executable, "-m", "petalite", "status", "--json", env=environment(tmp_path, "c"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
        assert all(server["peer_id"] in done.stdout for server in servers)


def test_networks_apart_find_each_other_through_one_bootstrap_address(tmp_path: Path, expected: str) -> None:
    with routed("a", "b", "c", "d") as net:
        command = ("-m", "petalite", "bootstrap", "--json")
        first = Lines(net.popen("d", sys.executable, *command, env=environment(tmp_path, "d")))
        address = next(text for text in ready(first)["addresses"] if "@10." in text)
        servers = []
        for machine in "ab":  # one after the other: the second sees in the DHT which blocks the first holds
            servers.append(serve(net, machine, tmp_path, "--peer", address))
            ready(servers[-1])
        text, seconds = generate(net, "c", tmp_path, "--peer", address)
        assert text == expected
        assert seconds <= 2 * FIRST_TOKEN_SECONDS * busy()
