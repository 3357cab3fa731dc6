"""Set petalite up in a virtual environment of its own beside this checkout, then run it: standard library only.

    python3 tools/bootstrap.py demo [ARGUMENTS OF petalite demo]
    python3 tools/bootstrap.py test [ARGUMENTS OF pytest]

The first run creates `.venv` and installs the versions of constraints.txt. A state file in it says what is installed,
so a second run starts at once, a changed pyproject.toml installs again, and a run that was killed half way is
noticed and begun afresh. Everything printed here goes to stderr: stdout belongs to what is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
STATE_FILE = "petalite-bootstrap"  # its presence says that the directory is ours to clear
INSTALLING, PAUSED = "installing", "paused"  # other contents: "demo HASH" or "test HASH", what is installed
PROBE = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('petalite', 'torch', 'trio', 'click'))))"
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy", "--strict"),
    ("pytest", "-n", "2", "--dist", "worksteal"),
)


class SetupError(Exception):
    """Setting up failed; the text is one line for the user."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], env: dict[str, str] | None = None, *, quiet: bool = False) -> int:
    """Run to the end in the checkout. Its stdout becomes our stderr: ours belongs to what is started at last."""
    sink = subprocess.DEVNULL if quiet else sys.stderr
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=env, stdout=sink, stderr=sink).returncode


def venv_python(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def fingerprint(root: Path) -> str:
    """Hash of all that decides what gets installed; with the path, as an editable install names it."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update(b"\0" + (root / name).read_bytes())
    return digest.hexdigest()[:32]


def pinned(root: Path, name: str) -> str:
    """The line `name==version` of constraints.txt."""
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SetupError(f"constraints.txt does not pin {name}")


def is_ready(state: str, level: str, wanted: str) -> bool:
    """Whether `state` says that `level` ("demo" or "test", which holds all of "demo") is installed."""
    have, _, digest = state.partition(" ")
    return digest == wanted and have in (level, "test")


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[Path]:
    """The state file, held by one process at a time; the directory is made if it is missing."""
    state_file = venv / STATE_FILE
    if venv.exists() and not state_file.exists() and (not venv.is_dir() or any(venv.iterdir())):
        raise SetupError(f"{venv} exists and was not made by this script: move it away, or install as README.md says")
    venv.mkdir(exist_ok=True)
    with state_file.open("a", encoding="ascii") as file:
        if os.name != "nt":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another run that is setting up")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield state_file


def clear(venv: Path) -> None:
    """Delete all but the state file, so that a run killed while clearing still finds the directory its own."""
    for child in venv.iterdir():
        if child.name == STATE_FILE:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def create(venv: Path) -> None:
    """A fresh virtual environment, with pip of its own where this Python can give it one."""
    clear(venv)
    if run([sys.executable, "-m", "venv", venv], quiet=True) == 0:
        return
    clear(venv)  # ensurepip is a package of its own on Debian and Ubuntu; the pip at hand can install from outside
    if run([sys.executable, "-m", "venv", "--without-pip", venv]) != 0:
        raise SetupError("python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)")


def pip_command(venv: Path) -> list[str | Path]:
    """How to run pip on the environment: its own, else the one of the Python that runs this script."""
    python = venv_python(venv)
    if run([python, "-m", "pip", "--version"], quiet=True) == 0:
        return [python, "-m", "pip"]
    outside: list[str | Path] = [sys.executable, "-m", "pip", "--python", python]
    if run([*outside, "--version"], quiet=True) == 0:
        return outside
    raise SetupError(
        "no pip at all, or one older than 22.3 (on Debian and Ubuntu: apt install python3-venv python3-pip)"
    )


def install(venv: Path, level: str, root: Path) -> None:
    """Install libraries at their pinned versions and the checkout itself, editable."""
    constraints = root / "constraints.txt"
    pip = [*pip_command(venv), "install", "--disable-pip-version-check", "--no-input"]
    # torch alone and first: it is most of the download, and nothing else can then choose another build of it
    steps: list[list[str | Path]] = [
        [*pip, "-c", constraints, pinned(root, "torch")],
        [*pip, "-c", constraints, pinned(root, "setuptools")],  # builds the checkout without fetching a second copy
        [*pip, "-c", constraints, "--no-build-isolation", "-e", ".[dev]" if level == "test" else "."],
    ]
    for step in steps:
        if run(step, {**os.environ, "PIP_USER": "0"}) != 0:  # a user-wide "install for me alone" would refuse here
            raise SetupError("pip failed, its lines above say why; the same command goes on from here")


def ready(venv: Path, level: str, root: Path = ROOT) -> None:
    """Make `venv` hold what `level` needs, by doing what is missing and no more."""
    wanted = fingerprint(root)
    python = venv_python(venv)
    state_file = venv / STATE_FILE
    if state_file.is_file() and is_ready(state_file.read_text(encoding="ascii"), level, wanted):
        if python.exists() and run([python, "-I", "-c", PROBE], quiet=True) == 0:
            return
        state_file.write_text(INSTALLING, encoding="ascii")  # the Python it was made with has gone
    with locked(venv) as state_file:
        state = state_file.read_text(encoding="ascii")
        if is_ready(state, level, wanted):  # the run that we waited for did it
            return
        if state.startswith("test"):
            level = "test"  # do not take the developer's tools away
        fresh = state in ("", INSTALLING) or not python.exists()
        state_file.write_text(INSTALLING, encoding="ascii")
        if fresh:
            say(f"making a virtual environment in {venv}")
            create(venv)
        say("installing the libraries that constraints.txt pins (the first time takes minutes)")
        try:
            install(venv, level, root)
        except SetupError:
            state_file.write_text(PAUSED, encoding="ascii")  # pip ended by itself: what it did is whole, keep it
            raise
        state_file.write_text(f"{level} {wanted}", encoding="ascii")


def demo(venv: Path, arguments: Sequence[str]) -> int:
    """Become `petalite demo`, so that signals and the exit code are its own."""
    command = [str(venv_python(venv)), "-m", "petalite", "demo", *arguments]
    if os.name != "nt":
        sys.stderr.flush()
        os.execv(command[0], command)
    return subprocess.run(command).returncode


def test(venv: Path, arguments: Sequence[str]) -> int:
    """Run every check, all of them even when one fails; the exit code is that of the first that failed."""
    env = dict(os.environ)
    # torch's threads and the server processes of the tests would fight over the same few cores
    env.setdefault("OMP_NUM_THREADS", "1")
    failed: list[tuple[str, int]] = []
    for check in CHECKS:
        words = [*check, *(arguments if check[0] == "pytest" else ())]
        say(shlex.join(words))
        command = [str(venv_python(venv)), "-m", *words]
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
        if code:
            failed.append((shlex.join(check), code))
    say("failed: " + ", ".join(name for name, _ in failed) if failed else "all checks passed")
    return failed[0][1] if failed else 0


USAGE = "usage: python3 tools/bootstrap.py demo [ARGUMENTS OF petalite demo] | test [ARGUMENTS OF pytest]"


def main(arguments: Sequence[str]) -> int:
    if sys.version_info[:2] < MINIMUM:
        have = ".".join(map(str, sys.version_info[:3]))
        say(f"petalite needs Python {MINIMUM[0]}.{MINIMUM[1]} or newer, and this is Python {have} ({sys.executable})")
        return 1
    if not arguments or arguments[0] not in ("demo", "test"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    venv = ROOT / ".venv"
    try:
        ready(venv, arguments[0])
        return (demo if arguments[0] == "demo" else test)(venv, arguments[1:])
    except (SetupError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command starts again")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
