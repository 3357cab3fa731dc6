"""The script behind the README's two commands: what it decides, without installing anything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("petalite_bootstrap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Commands:
    """Stands in for running commands: remembers them, makes what venv would make, fails where told to."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.ran: list[str] = []
        self.failing: tuple[str, ...] = ()
        self.interrupting = ""

    def run(self, command: Sequence[str | Path], env: object = None, *, quiet: bool = False) -> int:
        text = " ".join(map(str, command))
        self.ran.append(text)
        if self.interrupting and self.interrupting in text:
            raise KeyboardInterrupt
        if "-m venv" in text:
            (self.venv / "bin").mkdir()
            (self.venv / "bin" / "python").touch()
        return int(any(part in text for part in self.failing))

    def count(self, part: str) -> int:
        return sum(part in text for text in self.ran)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / "constraints.txt").write_text("# pins\nsetuptools==1\ntorch==2.0.0\n")
    return tmp_path


@pytest.fixture
def commands(bootstrap: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands(root / ".venv")
    monkeypatch.setattr(bootstrap, "run", commands.run)
    return commands


def test_first_run_installs_torch_first_and_a_second_installs_nothing(
    bootstrap: ModuleType, commands: Commands, root: Path
) -> None:
    bootstrap.ready(root / ".venv", "demo", root)
    installs = [text.split(" install ")[1] for text in commands.ran if " install " in text]
    assert [text.split()[-1] for text in installs] == ["torch==2.0.0", "setuptools==1", "."]
    assert all(f"-c {root / 'constraints.txt'}" in text for text in installs)
    commands.ran.clear()
    bootstrap.ready(root / ".venv", "demo", root)
    assert len(commands.ran) == 1 and bootstrap.PROBE in commands.ran[0]


def test_test_adds_the_developers_tools_and_demo_keeps_them(
    bootstrap: ModuleType, commands: Commands, root: Path
) -> None:
    for level in ("demo", "test", "demo"):
        bootstrap.ready(root / ".venv", level, root)
    assert (commands.count("-m venv"), commands.count("-e .[dev]")) == (1, 1)
    (root / "pyproject.toml").write_text("[project] # changed")
    bootstrap.ready(root / ".venv", "demo", root)
    assert (commands.count("-m venv"), commands.count("-e .[dev]")) == (1, 2)


@pytest.mark.parametrize("place", ["-m venv", "torch==", "-e ."])
def test_a_run_that_was_killed_is_begun_afresh(
    place: str, bootstrap: ModuleType, commands: Commands, root: Path
) -> None:
    commands.interrupting = place
    with pytest.raises(KeyboardInterrupt):
        bootstrap.ready(root / ".venv", "demo", root)
    (root / ".venv" / "half").mkdir()
    commands.interrupting = ""
    bootstrap.ready(root / ".venv", "demo", root)
    assert not (root / ".venv" / "half").exists()
    assert (root / ".venv" / bootstrap.STATE_FILE).read_text() == f"demo {bootstrap.fingerprint(root)}"


def test_a_failed_download_goes_on_with_what_is_there(bootstrap: ModuleType, commands: Commands, root: Path) -> None:
    commands.failing = ("-e .",)
    with pytest.raises(bootstrap.SetupError, match="pip failed"):
        bootstrap.ready(root / ".venv", "demo", root)
    commands.failing = ()
    bootstrap.ready(root / ".venv", "demo", root)
    assert commands.count("-m venv") == 1


def test_a_python_that_has_gone_is_noticed(bootstrap: ModuleType, commands: Commands, root: Path) -> None:
    bootstrap.ready(root / ".venv", "demo", root)
    commands.failing = (bootstrap.PROBE,)
    bootstrap.ready(root / ".venv", "demo", root)
    assert commands.count("-m venv") == 2


def test_without_ensurepip_the_pip_at_hand_installs(bootstrap: ModuleType, commands: Commands, root: Path) -> None:
    python = root / ".venv" / "bin" / "python"
    commands.failing = (f"-m venv {root / '.venv'}", f"{python} -m pip --version")
    bootstrap.ready(root / ".venv", "demo", root)
    assert commands.count(f"{sys.executable} -m pip --python {python} install") == 3


def test_without_any_pip_the_remedy_is_named(bootstrap: ModuleType, commands: Commands, root: Path) -> None:
    commands.failing = ("pip --version", "--python")
    with pytest.raises(bootstrap.SetupError, match="apt install python3-venv python3-pip"):
        bootstrap.ready(root / ".venv", "demo", root)


def test_a_directory_of_somebody_else_is_left_alone(bootstrap: ModuleType, commands: Commands, root: Path) -> None:
    (root / ".venv").mkdir()
    (root / ".venv" / "mine").write_text("precious")
    with pytest.raises(bootstrap.SetupError, match="was not made by this script"):
        bootstrap.ready(root / ".venv", "demo", root)
    assert (root / ".venv" / "mine").read_text() == "precious" and commands.ran == []


def test_an_old_python_gets_a_clear_line(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert bootstrap.main(["demo"]) == 1
    assert "petalite needs Python 3.11 or newer, and this is Python 3.10.4" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["nonsense"], 2), (["--help"], 0)])
def test_usage(arguments: list[str], code: int, bootstrap: ModuleType) -> None:
    assert bootstrap.main(arguments) == code


def test_every_check_runs_and_the_first_failure_is_the_exit_code(tmp_path: Path, bootstrap: ModuleType) -> None:
    log = tmp_path / "log"
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\necho "$OMP_NUM_THREADS $*" >> {log}\ncase "$*" in *mypy*) exit 3;; *pytest*) exit 5;; esac\n'
    )
    python.chmod(0o755)
    assert bootstrap.test(tmp_path, ["-k", "two words"]) == 3
    lines = log.read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["ruff", "ruff", "mypy", "pytest"]
    assert lines[-1].endswith("-m pytest -n 2 --dist worksteal -k two words") and lines[-1].startswith(
        os.environ["OMP_NUM_THREADS"]
    )


def test_demo_becomes_the_command_and_keeps_stdout_for_it(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$*"\nexit 7\n')
    python.chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import bootstrap; from pathlib import Path\n"
    code += f"bootstrap.demo(Path({str(tmp_path)!r}), ['--json', '--prompt', 'Once upon'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "-m petalite demo --json --prompt Once upon\n")


def test_constraints_pin_every_dependency_exactly() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert all(line.count("==") == 1 and "+" not in line for line in lines)
    assert {line.partition(">=")[0].lower() for line in asked} <= pins
