"""Ctrl-C in every phase: soon over, exit code 130, no process left, no traceback. SIGTERM to the demo: no child."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The promise is a second; a machine that runs other tests beside this one gets some more.
SOON = 5.0


@pytest.fixture(scope="module")
def swarm(make_commands: Any, with_peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    commands = make_commands(tmp_path_factory.mktemp("state"))
    with commands.serving(["fairytale"]) as ready:
        yield with_peers(ready)


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if holds():
            return
        assert process.poll() is None, f"it ended by itself: {process.communicate()}"
        time.sleep(0.01)  # real processes have a real clock
    pytest.fail("what the test waits for does not come")


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Send a signal; exit code and stderr. Fails if it takes long."""
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still there {SOON:.0f} s after the signal: {process.communicate()}")
    assert "Traceback" not in err and "Error" not in err
    return process.returncode, err


def has_server(commands: Any) -> bool:
    return any(" serve " in line for line in commands.left())


def imports(process: subprocess.Popen[str], library: str) -> bool:
    """Whether the process has mapped a file of `library`."""
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


def gone(commands: Any) -> None:
    """Children end with the command; the system may need a moment to see them off."""
    for _ in range(100):
        if not commands.left():
            return
        time.sleep(0.05)
    pytest.fail(f"left behind: {commands.left()}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_demo_while_its_servers_start(number: int, code: int, commands: Any) -> None:
    process = commands.start("demo")
    wait_until(lambda: has_server(commands), process)
    assert end(process, number) == (code, "")
    gone(commands)


def test_demo_in_the_middle_of_the_story(commands: Any) -> None:
    process = commands.start("demo", "--servers", "1", "--max-new-tokens", "10000")
    assert process.stdout.read(40)
    assert end(process, signal.SIGINT) == (130, "")
    gone(commands)


def test_demo_that_is_killed_takes_its_servers_with_it(commands: Any) -> None:
    process = commands.start("demo", "--servers", "2")
    wait_until(lambda: has_server(commands), process)
    assert end(process, signal.SIGKILL)[0] == -signal.SIGKILL
    gone(commands)


def test_generate_while_torch_is_imported(swarm: list[str], commands: Any) -> None:
    process = commands.start("generate", "fairytale", "hello", *swarm)
    wait_until(lambda: imports(process, "libtorch"), process)
    assert end(process, signal.SIGINT) == (130, "")


def test_generate_while_a_long_prompt_is_read(swarm: list[str], commands: Any) -> None:
    process = commands.start("generate", "fairytale", "hello " * 900, *swarm)
    assert process.stdout.read(5) == "hello"  # the prompt is shown when its session opens
    assert end(process, signal.SIGINT) == (130, "")


def test_generate_while_tokens_come(swarm: list[str], commands: Any) -> None:
    words = ["--max-new-tokens", "3000", *swarm]
    process = commands.start("generate", "fairytale", "hello", *words)
    assert process.stdout.read(30)
    assert end(process, signal.SIGINT) == (130, "")


def test_chat_while_it_waits_for_a_line(swarm: list[str], commands: Any) -> None:
    terminal, other_end = os.openpty()
    process = commands.start("chat", "fairytale", *swarm, stdin=other_end, stdout=other_end)
    try:
        assert os.read(terminal, 2) == b"> "
        assert end(process, signal.SIGINT) == (130, "")
    finally:
        os.close(other_end)
        os.close(terminal)


def test_chat_ends_with_the_input(swarm: list[str], commands: Any) -> None:
    terminal, other_end = os.openpty()
    process = commands.start("chat", "fairytale", *swarm, stdin=other_end, stdout=other_end)
    try:
        assert os.read(terminal, 2) == b"> "
        os.write(terminal, b"\x04")  # Ctrl-D
        _, err = process.communicate(timeout=SOON)
        assert (process.returncode, err) == (0, "")
    finally:
        os.close(other_end)
        os.close(terminal)


@pytest.mark.parametrize("library", ["libtorch", "ready"])
def test_serve_while_it_starts_and_while_it_serves(library: str, commands: Any) -> None:
    process = commands.start("serve", "fairytale", "--listen", "127.0.0.1:0", "--no-lan", "--json")
    if library == "ready":
        assert '"ready": true' in process.stdout.readline()
    else:
        wait_until(lambda: imports(process, library), process)
    assert end(process, signal.SIGINT) == (130, "")


def test_a_server_that_stands_still_does_not_hold_an_interrupt(commands: Any, with_peers: Any) -> None:
    with commands.serving(["fairytale"]) as ready:
        process = commands.start("generate", "fairytale", "hello", "--max-new-tokens", "3000", *with_peers(ready))
        assert process.stdout.read(30)
        server = server_pid(commands)
        os.kill(server, signal.SIGSTOP)
        try:
            assert end(process, signal.SIGINT)[0] == 130
        finally:
            os.kill(server, signal.SIGCONT)


def server_pid(commands: Any) -> int:
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            words = (entry / "cmdline").read_bytes().split(b"\0") if environment else []
        except OSError:
            continue
        if commands.mark.encode() in environment and b"serve" in words:
            return int(entry.name)
    raise AssertionError("no such server")
