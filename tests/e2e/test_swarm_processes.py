"""A swarm of real processes that know one bootstrap address: servers choose blocks, status shows them, text comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PETALITE = [sys.executable, "-m", "petalite"]


class Process:
    """`petalite ...` that says one JSON line when it is ready."""

    def __init__(self, state: Path, *words: str) -> None:
        environment = {**os.environ, "XDG_STATE_HOME": str(state)}
        self.process = subprocess.Popen(
            [*PETALITE, *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def ready(self) -> dict[str, object]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        said: dict[str, object] = json.loads(line)
        return said

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[dict[str, object]], list[Process]]]:
    state = tmp_path_factory.mktemp("state")
    processes = [Process(state, "bootstrap", "--listen", "127.0.0.1:0")]
    try:
        address = str(processes[0].ready()["addresses"][0])  # type: ignore[index]
        said = []
        for _ in range(2):
            words = ("serve", "fairytale", "--num-blocks", "4", "--listen", "127.0.0.1:0", "--cache", "64M")
            processes.append(Process(state, *words, "--peer", address))
            said.append(processes[-1].ready())
        yield address, said, processes
    finally:
        codes = [process.end() for process in reversed(processes)]
    assert codes == [0, 0, 0]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PETALITE, *words], capture_output=True, text=True, timeout=100)


def test_servers_took_the_blocks_that_were_missing(swarm: tuple[str, list[dict[str, object]], list[Process]]) -> None:
    assert sorted(server["blocks"] for server in swarm[1]) == [[0, 4], [4, 8]]


def test_status_shows_servers_found_through_the_bootstrap(
    swarm: tuple[str, list[dict[str, object]], list[Process]],
) -> None:
    done = run("status", "--json", "--peer", swarm[0])
    (model,) = json.loads(done.stdout)["models"]
    assert (model["name"], model["replicas"], model["missing"]) == ("fairytale", [1] * 8, [])
    assert {server["peer_id"] for server in model["servers"]} == {server["peer_id"] for server in swarm[1]}
    table = run("status", "fairytale", "--peer", swarm[0]).stdout
    assert all(str(server["peer_id"])[:8] in table for server in swarm[1])


def test_text_comes_through_servers_found_by_one_address(
    swarm: tuple[str, list[dict[str, object]], list[Process]],
) -> None:
    words = ("generate", "fairytale", "Once upon a time", "--greedy", "--max-new-tokens", "12", "--wire", "f32")
    done = run(*words, "--json", "--peer", swarm[0])
    story = json.loads(done.stdout.splitlines()[-1])
    assert story["text"] == " there lived a king who had a daughter who was so beautiful"
    assert [server["blocks"] for server in story["servers"]] == [[0, 4], [4, 8]]


def test_status_of_nobody_says_so() -> None:
    done = run("status", "--json", "--peer", f"petalite://{'a' * 52}@127.0.0.1:9")
    assert done.returncode == 0 and json.loads(done.stdout)["models"] == []
