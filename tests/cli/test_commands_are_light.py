"""Help and usage errors answer without torch; bodies of commands run where Ctrl-C is heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio

from petalite.cli import COMMANDS
from petalite.cli.running import run_async
from petalite.cli.stdin import Lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_usage_errors_do_without_torch(name: str) -> None:
    code = (
        "import sys\nfrom petalite.cli import run\n"
        f"codes = [run([{name!r}, '--help']), run([{name!r}, '--no-such-option'])]\n"
        "print(codes, sorted({'torch', 'zeroconf', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2] []"
    assert f"Usage: petalite {name}" in done.stdout and "No such option" in done.stderr


async def test_lines_come_whole_and_the_last_may_lack_its_end() -> None:
    reading, writing = os.pipe()
    try:
        lines = Lines(reading)
        os.write(writing, b"eins\nzw")
        assert await lines.next() == "eins\n"
        os.write(writing, "ö\ndrei".encode())
        assert await lines.next() == "zwö\n"
        os.close(writing)
        writing = -1
        assert [await lines.next() for _ in range(3)] == ["drei", "", ""]
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


async def test_lines_of_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"one\ntwo\xff\n")
    with path.open("rb") as file:
        lines = Lines(file.fileno())
        assert [await lines.next() for _ in range(3)] == ["one\n", "two\ufffd\n", ""]


async def test_waiting_for_a_line_can_be_cancelled_and_loses_nothing() -> None:
    reading, writing = os.pipe()
    try:
        lines = Lines(reading)
        os.write(writing, b"half ")
        with trio.move_on_after(0) as scope:
            await lines.next()
        assert scope.cancelled_caught
        os.write(writing, b"line\n")
        assert await lines.next() == "half line\n"
    finally:
        os.close(reading)
        os.close(writing)


def test_an_interrupt_reaches_the_body_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[str] = []

    async def body() -> None:
        try:
            threading.Timer(0, signal.raise_signal, [signal.SIGINT]).start()
            await trio.sleep_forever()
        finally:
            seen.append("left in order")

    with pytest.raises(KeyboardInterrupt):
        run_async(body)
    assert seen == ["left in order"] and signal.getsignal(signal.SIGINT) is before


def test_farewells_that_take_too_long_are_cut_off() -> None:
    code = (
        "import signal, trio, trio.testing\nfrom petalite.cli import running\nrunning.INTERRUPT_SECONDS = 0.01\n"
        "async def farewell():\n"
        "    with trio.CancelScope(shield=True):\n"
        "        await trio.sleep_forever()\n"
        "async def body():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        nursery.start_soon(farewell)\n"
        "        await trio.testing.wait_all_tasks_blocked()\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "running.run_async(body)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_child_ends_when_its_stdin_closes() -> None:
    words = [sys.executable, "-m", "petalite.cli.child", "bootstrap", "--listen", "127.0.0.1:0", "--no-lan", "--json"]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert b'"ready": true' in process.stdout.readline()
        process.stdin.close()
        assert process.wait(30) == 1
