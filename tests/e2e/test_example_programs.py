"""The programs in examples/, as a user runs them, over two server processes; and the notebook, cell by cell."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import petalite
from petalite.bloom.config import BloomConfig
from petalite.models import FAIRYTALE, find_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIG = BloomConfig.load(find_model(FAIRYTALE))

Program = Callable[..., str]


@pytest.fixture(scope="module")
def addresses(make_commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    commands = make_commands(tmp_path_factory.mktemp("state"))
    with commands.serving(["fairytale", "--blocks", "0:4"], ["fairytale", "--blocks", "4:8"]) as ready:
        yield [server["addresses"][0] for server in ready]


@pytest.fixture
def program(addresses: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Run one of them in this process and return what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *words: str) -> str:
        peers = [word for address in addresses for word in ("--peer", address)]
        monkeypatch.setattr(sys, "argv", [name, *peers, *words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step +\d+  loss +([0-9.]+)", printed, re.MULTILINE)]


def test_the_logit_lens_shows_what_one_machine_would(program: Program, fairytale_oracle: Any) -> None:
    lines = program("logit_lens", "The king and the queen").splitlines()
    rows = {line[:9].strip(): re.findall(r"[ .:=+*#%@-](\S+) *", line[9:]) for line in lines[3:]}
    ids = torch.tensor([fairytale_oracle.encode("The king and the queen")])
    with torch.no_grad():
        output = fairytale_oracle.model(ids, output_hidden_states=True)
    assert list(rows)[1:] == [f"{number} blocks" for number in range(9)]
    transformer, head = fairytale_oracle.model.transformer, fairytale_oracle.model.lm_head
    for number, last in ((0, transformer.ln_f(output.hidden_states[0])), (8, output.hidden_states[8])):
        best = head(last)[0].argmax(dim=-1).tolist()
        assert rows[f"{number} blocks"] == [fairytale_oracle.tokenizer.decode([token]).strip()[:9] for token in best]


def test_a_prompt_learns_to_be_sad(program: Program, tmp_path: Path) -> None:
    printed = program("prompt_tuning", "--steps", "12", "--save", str(tmp_path))
    curve = losses(printed)
    assert curve == sorted(curve, reverse=True) and curve[-1] < curve[0] - 0.6
    before, after = re.findall(r"^(?:before|after): +(.*)$", printed, re.MULTILINE)
    assert (
        before != after and before.startswith("The king and the queen") and after.startswith("The king and the queen")
    )
    assert petalite.PromptTuning.load(tmp_path, CONFIG).tokens == 8


def test_an_adapter_learns_a_rhyme(program: Program, tmp_path: Path) -> None:
    printed = program("lora", "--steps", "16", "--save", str(tmp_path))
    curve = losses(printed)
    assert curve[-1] < 0.3 * curve[0]
    before, after = re.findall(r"^(?:before|after): +(.*)$", printed, re.MULTILINE)
    assert "wet as wet could be" in after and "wet as wet could be" not in before
    assert petalite.LoraAdapter.load(tmp_path, CONFIG).rank == 4


def test_a_classifier_learns(program: Program) -> None:
    printed = program("classify", "--steps", "12")
    curve = losses(printed)
    assert curve[-1] < 0.5 * curve[0]
    found = re.search(r"(\d) of 6 sentences", printed)
    assert found is not None and int(found[1]) >= 4


def test_the_notebook_runs_from_the_first_cell_to_the_last() -> None:
    """Its code cells one after the other, with servers that it starts itself."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(cells)], cwd=EXAMPLES, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("The little bird") == 2
