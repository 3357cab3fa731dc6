"""The library's examples as README.md prints them, and its commands as far as their options go."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from petalite.cli import COMMANDS, LazyGroup

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SHELL = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def address(make_commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    commands = make_commands(tmp_path_factory.mktemp("state"))
    with commands.serving(["fairytale"]) as ready:
        yield ready[0]["addresses"][0]


@pytest.mark.parametrize("entry", ["join", "connect"])
def test_an_example_tells_the_story(entry: str, address: str, fairytale_oracle: Any) -> None:
    (example,) = (text for text in EXAMPLES if f"petalite.{entry}()" in text)
    # the one change: a test does not search the local network, where others' servers may be
    script = example.replace(f"petalite.{entry}()", f"petalite.{entry}(peers=[{address!r}])")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")
    prompt = fairytale_oracle.encode(PROMPT)
    tokens = fairytale_oracle.encode(PROMPT + done.stdout.rstrip("\n"))[len(prompt) :]
    fairytale_oracle.check(prompt, tokens[:60], 60, least_margin=0.02)
    assert len(tokens) > 60


def test_what_follows_works_with_that_model(address: str, tmp_path: Path) -> None:
    """The other examples one after the other, as they stand, behind the second."""
    begun = f"""import petalite
with petalite.connect(peers=[{address!r}]) as swarm:
    model = swarm.load("fairytale")
"""
    others = [text for text in EXAMPLES if "petalite.join" not in text and "petalite.connect" not in text]
    script = begun + textwrap.indent("".join(others), "    ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, len(others)) == (0, 2), done.stderr[-2000:]
    assert "The king and the queen wept." in done.stdout
    assert (tmp_path / "my-prompt" / "adapter_model.safetensors").is_file()


def commands_in_readme() -> list[str]:
    lines = "".join(SHELL).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.startswith("petalite ")]


@pytest.mark.parametrize("line", commands_in_readme())
def test_a_command_of_the_readme_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are parsed by the very command, whose body is left out."""
    peer = "a" * 52
    words = shlex.split(line.replace("PEER_ID", peer))[1:]
    monkeypatch.chdir(tmp_path)
    group = LazyGroup(COMMANDS)
    command = group.get_command(click.Context(group), words[0])
    assert command is not None
    while isinstance(command, click.Group):
        words = words[1:]
        command = command.get_command(click.Context(command), words[0])
        assert command is not None
    with command.make_context(words[0], words[1:]):
        pass


def test_the_readme_opens_with_its_two_commands() -> None:
    first = SHELL[0].splitlines()
    assert [line.partition("#")[0].split() for line in first] == [
        ["python3", "tools/bootstrap.py", "demo"],
        ["python3", "tools/bootstrap.py", "test"],
    ]
    assert README.index("```sh") < README.index("## What it is")


def test_limits_and_licence_are_there() -> None:
    assert "## Limits" in README and (ROOT / "LICENSE").is_file()
