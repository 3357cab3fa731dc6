"""The frame around every command: exit codes, the one line on stderr, logs, shared options, output helpers."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from petalite import __version__
from petalite.cli import COMMANDS, Entry, Settings, run
from petalite.cli.logs import OneLine
from petalite.cli.options import (
    ANNOUNCE,
    LISTEN,
    SIZE,
    GenerationOptions,
    SwarmOptions,
    generation_options,
    swarm_options,
)
from petalite.cli.output import TextStream, emit_json, escape, line_of, notice, progress
from petalite.errors import PeerLost, PetaliteError
from petalite.identity import Identity, SwarmKey

ROOT = Path(__file__).resolve().parents[2]
PEER = Identity.from_seed(bytes(32)).peer_id


def petalite(*arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petalite", *arguments], cwd=ROOT, capture_output=True, text=True, **keywords
    )


Runner = Callable[..., int]


@pytest.fixture
def run_body(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Run `petalite [ARGUMENTS] try [ARGUMENTS]` where `try` calls the body given."""

    def runner(body: Callable[..., Any], *arguments: str, before: tuple[str, ...] = ()) -> int:
        module = types.ModuleType("petalite_try")
        module.command = body if isinstance(body, click.Command) else click.command("try")(body)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "petalite_try", module)
        return run([*before, "try", *arguments], {"try": Entry("petalite_try", "Try.")})

    return runner


def raises(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


# --- start -----------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_none_of_them() -> None:
    code = (
        "import sys\nfrom petalite.cli import run\ncode = run(['--help'])\n"
        "heavy = {'torch', 'trio', 'rich', 'numpy', 'cryptography', 'asyncio', 'logging'}\n"
        "light = {'petalite.cli', 'petalite.cli.output', 'petalite.errors'}\n"
        "ours = {name for name in sys.modules if name.startswith('petalite.')}\n"
        "print(code, sorted(heavy & set(sys.modules) | ours - light))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 []"
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)


def test_no_commands_own_help_imports_what_it_will_run_on() -> None:
    """Each module that defines a command, all in one interpreter: an interpreter's start is what a test costs."""
    code = (
        "import sys\nfrom importlib import import_module\nfrom petalite.cli import COMMANDS\n"
        "for entry in COMMANDS.values(): import_module(entry.module)\n"
        "print(sorted({'torch', 'trio', 'rich', 'numpy', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_table_points_at_commands_that_exist() -> None:
    for name, entry in COMMANDS.items():
        assert (ROOT / (entry.module.replace(".", "/") + ".py")).is_file(), f"{name}: no {entry.module}"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"petalite {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], ["key", "nonsense"], ["--log-level", "loud"]])
def test_usage_errors_are_2_and_go_to_stderr(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage: petalite" in err


def test_completion_answers_the_shell() -> None:
    done = petalite(
        env={**os.environ, "_PETALITE_COMPLETE": "bash_complete", "COMP_WORDS": "petalite k", "COMP_CWORD": "1"}
    )
    assert (done.returncode, done.stdout) == (0, "plain,key\n")


# --- exit codes ------------------------------------------------------------------------------------------------------


def test_done_is_0(run_body: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_body(lambda: print("text")) == 0
    assert capsys.readouterr() == ("text\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PeerLost("peer gone"), "petalite: peer gone"),
        (PetaliteError("two\nlines \x1b[31m\u202e"), "petalite: two lines \\x1b[31m\\u202e"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "petalite: a.json: No such file or directory"),
        (ConnectionRefusedError(111, "Connection refused"), "petalite: Connection refused"),
        (OSError("could not resolve"), "petalite: could not resolve"),
        (EOFError(), "petalite: the input ended"),
        (click.ClickException("no"), "petalite: no"),
        (ZeroDivisionError("bug"), "petalite: internal error: ZeroDivisionError: bug (--debug shows where)"),
        (ExceptionGroup("a", [ExceptionGroup("b", [PeerLost("deep")])]), "petalite: deep"),
        (ExceptionGroup("a", [PeerLost("x"), KeyError("k")]), "petalite: internal error: KeyError: 'k' (--debug"),
    ],
)
def test_failure_is_1_and_one_line(
    error: Exception, line: str, run_body: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_body(raises(error)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback_wherever_it_stands(
    where: str, run_body: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, before = (("--debug",), ()) if where == "after" else ((), ("--debug",))
    assert run_body(raises(PeerLost("gone")), *arguments, before=before) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("petalite: gone\n")


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        BaseExceptionGroup("nursery", [BaseExceptionGroup("nursery", [KeyboardInterrupt()])]),
        BaseExceptionGroup("nursery", [KeyboardInterrupt(), PeerLost("meanwhile")]),
    ],
)
def test_interrupted_is_130_without_a_word(
    error: BaseException, run_body: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_body(raises(error)) == 130
    assert capsys.readouterr() == ("", "")


def test_nursery_that_fails_once_gives_its_one_line(run_body: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        raise PeerLost("all servers are gone")

    async def body() -> None:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(fail)
            outer.start_soon(trio.sleep_forever)

    assert run_body(lambda: trio.run(body)) == 1
    assert capsys.readouterr().err == "petalite: all servers are gone\n"


def test_exit_code_of_a_command_is_kept(run_body: Runner) -> None:
    assert run_body(lambda: click.get_current_context().exit(1)) == 1
    assert run_body(lambda: click.get_current_context().exit(0)) == 0


def test_a_reader_that_leaves_is_no_news() -> None:
    code = "from petalite.cli import main\nimport sys\nsys.argv = ['petalite', '--help']\nsys.stdin.read()\nmain()"
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(b"")
    assert (process.returncode, err) == (1, b"")


# --- logs ------------------------------------------------------------------------------------------------------------


def log_line(settings: Settings, text: str, error: Exception | None = None) -> str:
    details = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("petalite.net", logging.WARNING, "", 0, "%s", (text,), details)
    return OneLine(settings).format(record)


@given(st.text())
def test_a_log_line_is_one_line_whatever_a_peer_says(text: str) -> None:
    line = log_line(Settings(), text, PeerLost(text))
    assert len(line.splitlines()) == 1 and line == escape(line)


def test_log_tracebacks_come_only_with_debug() -> None:
    assert log_line(Settings(), "lost", PeerLost("gone")).endswith("WARNING petalite.net: lost: PeerLost: gone")
    assert "\n  petalite.errors.PeerLost: gone" in log_line(Settings(debug=True), "lost", PeerLost("gone"))


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [
        ((), ["WARNING"]),
        (("-v",), ["WARNING", "INFO"]),
        (("-vv",), ["WARNING", "INFO", "DEBUG"]),
        (("--log-level", "error"), []),
    ],
)
def test_log_levels(
    arguments: tuple[str, ...], levels: list[str], run_body: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        for level in (logging.WARNING, logging.INFO, logging.DEBUG):
            logging.getLogger("petalite.try").log(level, "here")

    for before, after in ((arguments, ()), ((), arguments)):
        assert run_body(body, *after, before=before) == 0
        out, err = capsys.readouterr()
        assert out == "" and [line.split()[2] for line in err.splitlines()] == levels


# --- shared options --------------------------------------------------------------------------------------------------


@pytest.fixture
def parse(run_body: Runner) -> Callable[..., tuple[int, Any]]:
    def parser(*arguments: str) -> tuple[int, Any]:
        seen: list[Any] = []

        @click.command("try")
        @generation_options
        @swarm_options
        @click.option("--listen", type=LISTEN)
        @click.option("--announce", type=ANNOUNCE)
        @click.option("--cache", type=SIZE)
        def command(generation: GenerationOptions, swarm: SwarmOptions, **others: Any) -> None:
            seen.append(types.SimpleNamespace(generation=generation, swarm=swarm, **others))

        code = run_body(command, *arguments)
        return code, seen[0] if seen else None

    return parser


def test_defaults_of_shared_options(parse: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PETALITE_NO_LAN", raising=False)
    code, got = parse()
    assert (code, got.generation, got.swarm) == (0, GenerationOptions(), SwarmOptions())


def test_shared_options_reach_the_command(parse: Callable[..., tuple[int, Any]], tmp_path: Path) -> None:
    Identity.from_seed(bytes(32)).save(tmp_path / "id")
    SwarmKey(bytes(32)).save(tmp_path / "swarm")
    words = "--max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.9 --repetition-penalty 1.2 --seed 3 --wire f32"
    words += f" --device cuda:1 --network tests --no-lan --allow {PEER} --peer petalite://{PEER}@[::1]:9"
    words += f" --identity {tmp_path}/id --swarm-key {tmp_path}/swarm"
    code, got = parse(*words.split(), "--stop", "The end", "--stop", "\n")
    assert code == 0
    assert got.generation == GenerationOptions(
        max_new_tokens=7,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        repetition_penalty=1.2,
        stop=("The end", "\n"),
        seed=3,
        wire="f32",
        device="cuda:1",
    )
    assert (got.swarm.network, got.swarm.lan, got.swarm.allow) == ("tests", False, (PEER,))
    assert [str(peer) for peer in got.swarm.peers] == [f"petalite://{PEER}@[::1]:9"]
    assert got.swarm.load_identity().peer_id == PEER
    assert got.swarm.load_swarm_key().psk == SwarmKey(bytes(32)).psk


@pytest.mark.parametrize("words", ["--greedy", "--temperature 0", "--greedy --temperature 0"])
def test_greedy_is_temperature_0(words: str, parse: Callable[..., tuple[int, Any]]) -> None:
    code, got = parse(*words.split())
    assert code == 0 and got.generation.greedy


@pytest.mark.parametrize(
    "words",
    [
        "--greedy --temperature 0.5",
        "--max-new-tokens 0",
        "--max-new-tokens 1e3",
        "--temperature nan",
        "--temperature -0.1",
        "--temperature inf",
        "--top-k 0",
        "--top-p 0",
        "--top-p 1.01",
        "--top-p nan",
        "--repetition-penalty 0",
        "--seed -1",
        "--wire int4",
        "--device ../cpu",
        "--stop=",
        "--peer 127.0.0.1:31337",
        "--peer petalite://short@127.0.0.1:31337",
        "--allow abc",
        "--network=",
        "--network " + "n" * 65,
        "--lan-interface eth0",
        "--no-lan --lan-interface 127.0.0.1",
        "--listen 127.0.0.1",
        "--listen 127.0.0.1:65536",
        "--listen ::1:31337",
        "--listen :31337",
        "--listen 1.2.3:4",
        "--announce 127.0.0.1:0",
        "--cache lots",
        "--cache 0",
        "--cache 5000T",
        "--cache -1",
    ],
)
def test_bad_values_are_usage_errors(
    words: str, parse: Callable[..., tuple[int, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(*words.split(" ")) == (2, None)
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:31337", "::1", 31337),
        ("[0:0::1]:1", "::1", 1),
        ("Example.org:65535", "example.org", 65535),
        ("[fe80::1%eth0]:5", "fe80::1%eth0", 5),
    ],
)
def test_host_and_port(text: str, host: str, port: int, parse: Callable[..., tuple[int, Any]]) -> None:
    code, got = parse("--listen", text)
    assert code == 0 and got.listen == (host, port)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512M", 2**29),
        ("2G", 2**31),
        ("1.5g", 3 * 2**29),
        ("10KiB", 10240),
        ("3mb", 3 * 2**20),
        ("1T", 2**40),
    ],
)
def test_sizes(text: str, size: int, parse: Callable[..., tuple[int, Any]]) -> None:
    code, got = parse("--cache", text)
    assert code == 0 and got.cache == size


# --- output ----------------------------------------------------------------------------------------------------------


@given(st.text())
def test_escaped_text_can_move_nothing(text: str) -> None:
    safe = escape(text, keep="\n\t")
    assert all(ord(char) >= 32 or char in "\n\t" for char in safe)
    assert not set(safe) & {chr(code) for code in (*range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))}
    assert len(line_of(text).splitlines()) <= 1


def test_escape_spells_out_what_it_hides() -> None:
    assert escape("a\x00\x1b[2J\r\u202eb é 花") == "a\\x00\\x1b[2J\\r\\u202eb é 花"


def test_text_stream_ends_its_line_before_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    stream = TextStream()
    for piece in ("Once", " upon\n", "a \x1b[0mtime"):
        stream.write(piece)
    stream.end()
    stream.end()
    emit_json({"text": "a\nb\u2028", "n": 1})
    lines = capsys.readouterr().out.split("\n")
    assert lines[:2] == ["Once upon", "a \\x1b[0mtime"]
    assert json.loads(lines[2]) == {"text": "a\nb\u2028", "n": 1} and lines[3:] == [""]


def test_no_colours_and_no_bars_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("loading", 10, "bytes") as advance:
        advance(10)
    notice("hello\x07")
    assert capsys.readouterr() == ("", "hello\\x07\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("unit", ["bytes", "tokens"])
def test_bar_on_a_terminal_goes_to_stderr(unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("loading [bold]x\x1b", 10, unit) as advance:
        advance(10)
    shown = terminal.getvalue()
    assert "loading [bold]x\\x1b" in shown and "10" in shown
