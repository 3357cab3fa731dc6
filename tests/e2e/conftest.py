"""Real processes: servers started by hand, commands run to their end, and the oracle on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120  # a hang ends the test; how long things take is a benchmark's business
RUN_SECONDS = 180


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value


@dataclass
class Commands:
    """Runs `petalite ...`; every process below carries a mark in its environment, so that none can hide."""

    state: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "XDG_STATE_HOME": str(self.state),
            "PETALITE_TEST_MARK": self.mark,
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[str]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        command = [sys.executable, "-m", "petalite", *words]
        process = subprocess.Popen(command, cwd=self.state, env=self.environment(), text=True, **streams)
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left, and close what every process was read through."""
        for process in self.started:
            process.kill()
            with process:
                pass

    def run(self, *words: str, stdin: str | None = None) -> Done:
        with self.start(*words, stdin=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(stdin, RUN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                pytest.fail(f"petalite {' '.join(words)[:200]} did not end: {process.communicate()}")
        return Done(process.returncode, out, err)

    @contextmanager
    def serving(self, *servers: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """One `petalite serve` for each list of words, on loopback, all started at once; what each says when ready."""
        places = ("--listen", "127.0.0.1:0", "--no-lan", "--cache", "64M", "--json")
        logs = [self.state / f"server-{number}.log" for number in range(len(servers))]
        running = []
        try:
            for words, log in zip(servers, logs, strict=True):
                with log.open("w") as stderr:
                    running.append(self.start("serve", *words, *places, stderr=stderr))
            yield [self.ready(process, log) for process, log in zip(running, logs, strict=True)]
        finally:
            for process in running:
                process.kill()
                process.communicate()

    def ready(self, process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
        assert process.stdout is not None
        guard = threading.Timer(START_SECONDS, process.kill)
        guard.start()
        line = process.stdout.readline()
        guard.cancel()
        assert line, f"a server did not start: {log.read_text()}"
        value: dict[str, Any] = json.loads(line)
        return value

    def left(self) -> list[str]:
        """Command lines of living processes that carry the mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"PETALITE_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes():
                        found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                except OSError:  # gone meanwhile, or another user's
                    continue
        return [line for line in found if line]


def peers(ready: Sequence[dict[str, Any]]) -> list[str]:
    """The options that name all servers."""
    return [word for server in ready for word in ("--peer", server["addresses"][0])]


@pytest.fixture(scope="session")
def with_peers() -> Callable[[Sequence[dict[str, Any]]], list[str]]:
    return peers


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    yield commands
    left = commands.left()
    commands.close()
    assert left == []


@pytest.fixture(scope="session")
def make_commands() -> type[Commands]:
    """For module fixtures, whose servers several tests share."""
    return Commands


class Oracle:
    """transformers' own BLOOM in float32 on this machine: greedy tokens, and how clear each choice was."""

    def __init__(self, directory: Path) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import BloomForCausalLM

        self.torch = torch
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.model = BloomForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """New tokens, and for each the difference between the two best logits; ends behind an end token."""
        ends = self.model.config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        tokens: list[int] = []
        margins: list[float] = []
        with self.torch.inference_mode():
            given, past = self.torch.tensor([list(prompt)]), None
            while len(tokens) < count and not (tokens and tokens[-1] in ends):
                output = self.model(given, past_key_values=past, use_cache=True)
                best = output.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                given, past = best.indices[:1].view(1, 1), output.past_key_values
        return tokens, margins

    def beams(self, prompt: Sequence[int], count: int, beams: int) -> list[int]:
        """New tokens of the best beam."""
        ids = self.torch.tensor([list(prompt)])
        told = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=count,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
        )
        tokens: list[int] = told[0, len(prompt) :].tolist()
        return tokens

    def check(self, prompt: Sequence[int], got: Sequence[int], count: int, *, least_margin: float) -> None:
        """`got` is the oracle's text, or leaves it first where the two best logits lie closer than `least_margin`."""
        tokens, margins = self.greedy(prompt, count)
        for at, (ours, theirs) in enumerate(zip(got, tokens, strict=False)):
            if ours != theirs:
                assert margins[at] < least_margin, f"token {at}: {ours}, oracle {theirs} by {margins[at]:.4f}"
                return
        assert len(got) == len(tokens)


@pytest.fixture(scope="session")
def make_oracle() -> type[Oracle]:
    return Oracle


@pytest.fixture(scope="session")
def fairytale_oracle() -> Oracle:
    return Oracle(ROOT / "petalite" / "fairytale")
