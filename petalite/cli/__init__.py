"""The command `petalite`: one module a command, imported only when that command runs.

What every command shares is here: which commands there are, and how an error becomes one line and an exit code.
Each module in COMMANDS exports a click command named `command`.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click

from petalite import __version__
from petalite.cli.output import line_of
from petalite.errors import PetaliteError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Entry(NamedTuple):
    """Where a command lives, and its line in `petalite --help` (which imports no command)."""

    module: str
    help: str


COMMANDS: Mapping[str, Entry] = {
    "demo": Entry("petalite.cli.demo", "Tell a story with several server processes on this machine."),
    "serve": Entry("petalite.cli.serve", "Serve some blocks of a model to other peers."),
    "generate": Entry("petalite.cli.generate", "Continue a text with a model that servers hold."),
    "chat": Entry("petalite.cli.chat", "Talk with a model that servers hold."),
    "status": Entry("petalite.cli.status", "Show who serves what, and what is missing."),
    "bootstrap": Entry("petalite.cli.bootstrap", "Run a node without a model, for others to begin with."),
    "doctor": Entry("petalite.cli.doctor", "Say why a swarm is not found or not usable, and what to do."),
    "key": Entry("petalite.cli.key", "Make and show key files: identities and private swarms."),
}
LEVELS = ("error", "warning", "info", "debug")


@dataclass
class Settings:
    """What the common options said; `ctx.find_object(Settings)` in a command."""

    debug: bool = False
    level: str = "warning"


def _settings(ctx: click.Context) -> Settings:
    return ctx.ensure_object(Settings)


def _on_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        _settings(ctx).debug = True


def _on_level(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value:
        _set_level(ctx, value)


def _on_verbose(ctx: click.Context, param: click.Parameter, value: int) -> None:
    if value:
        _set_level(ctx, "info" if value == 1 else "debug")


def _set_level(ctx: click.Context, level: str) -> None:
    import logging  # here and below: what `petalite --help` does without is imported where it is used

    _settings(ctx).level = level
    logging.getLogger().setLevel(level.upper())


def common_options() -> list[click.Parameter]:
    """Options that stand before the command or after it, whichever comes to mind."""
    return [
        click.Option(
            ["--log-level"],
            type=click.Choice(LEVELS),
            expose_value=False,
            callback=_on_level,
            help="Which log lines reach stderr.  [default: warning]",
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            callback=_on_verbose,
            help="More log lines: -v is info, -vv is debug.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=_on_debug,
            help="Show the whole traceback of an error.",
        ),
    ]


def add_common_options(command: click.Command) -> None:
    """Give `command`, and the commands under it, the common options that it does not define itself."""
    taken = {name for param in command.params for name in param.opts}
    command.params += [option for option in common_options() if not taken & set(option.opts)]
    if isinstance(command, click.Group):
        for below in command.commands.values():
            add_common_options(below)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; its help needs only the table."""

    def __init__(self, table: Mapping[str, Entry]) -> None:
        super().__init__(
            name="petalite",
            help="Run one large language model together: each server holds some blocks, a client gets text.",
            params=[
                click.Option(
                    ["--version"],
                    is_flag=True,
                    is_eager=True,
                    expose_value=False,
                    callback=_show_version,
                    help="Show the version and exit.",
                ),
                *common_options(),
            ],
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        )
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        entry = self.table.get(name)
        if entry is None:
            return None
        if name not in self.commands:
            command: click.Command = import_module(entry.module).command
            add_common_options(command)
            self.commands[name] = command
        return self.commands[name]

    def invoke(self, ctx: click.Context) -> Any:
        from petalite.cli import logs

        logs.start(_settings(ctx))
        return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.table.items()])


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"petalite {__version__}")
        ctx.exit()


# --- errors ----------------------------------------------------------------------------------------------------------


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in `error`, which nurseries may have put into groups of groups."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error


def report(error: BaseException, settings: Settings) -> int:
    """Say on stderr in one line what went wrong; the exit code."""
    parts = list(leaves(error))
    if settings.debug:
        import traceback

        traceback.print_exception(error)
    if any(isinstance(part, KeyboardInterrupt | click.Abort) for part in parts):
        return INTERRUPTED
    if all(isinstance(part, click.exceptions.Exit) for part in parts):
        return next(part.exit_code for part in parts if isinstance(part, click.exceptions.Exit))
    usage = [part for part in parts if isinstance(part, click.UsageError)]
    if usage:
        usage[0].show(sys.stderr)
        return USAGE
    if _stdout_is_gone(parts):
        return FAILED
    # A bug of ours beside an expected error explains more than that error does
    first = next((part for part in parts if not _is_expected(part)), parts[0])
    more = f" (and {len(parts) - 1} more, --debug shows them)" if len(parts) > 1 else ""
    print(f"petalite: {describe(first)}{more}", file=sys.stderr)
    return FAILED


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, PetaliteError | OSError | click.ClickException)


def describe(error: BaseException) -> str:
    """One line for a user about one error that is not a group."""
    if isinstance(error, click.ClickException):
        return line_of(error.format_message())
    if isinstance(error, PetaliteError):
        return line_of(str(error))
    if isinstance(error, OSError) and error.strerror:
        return line_of(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, OSError):
        return line_of(str(error) or type(error).__name__)
    if isinstance(error, EOFError):
        return "the input ended"
    return line_of(f"internal error: {type(error).__name__}: {error} (--debug shows where)")


def _stdout_is_gone(parts: Sequence[BaseException]) -> bool:
    """Whether the cause is that nobody reads our stdout any more (`petalite generate ... | head -1`): no news."""
    if not all(isinstance(part, OSError) and part.errno in (errno.EPIPE, errno.ESHUTDOWN) for part in parts):
        return False
    if not hasattr(select, "poll"):
        return True
    watch = select.poll()
    try:
        watch.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # stdout is closed, or no file at all
        return True
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in watch.poll(0))


# --- the entry -------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str], table: Mapping[str, Entry] = COMMANDS) -> int:
    """Run one command line to its end; the exit code (0 done, 1 failed, 2 usage, 130 interrupted)."""
    settings = Settings()
    group = LazyGroup(table)
    try:
        with group.make_context("petalite", list(arguments), obj=settings) as ctx:
            group.invoke(ctx)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the last stop: it becomes a line and an exit code
        return report(error, settings)
    return DONE


def _silence_stdout() -> None:
    """Where nobody reads stdout any more, let the interpreter's own last flush go nowhere instead of failing loudly."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> NoReturn:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure:  # a terminal that cannot show a character gets its escape, not a traceback
            reconfigure(errors="backslashreplace")
    _complete_shell()
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing left to tidy up: a second Ctrl-C ends at once
    _silence_stdout()
    if "torch" in sys.modules or "trio" in sys.modules:
        from petalite.cli.running import leave_now

        leave_now(code)  # torch would take a second to be taken apart, and a thread may still be deep in it
    sys.exit(code)


def _complete_shell() -> None:
    """Answer the shell when it asks for completions (click's protocol), and end."""
    instruction = os.environ.get("_PETALITE_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(LazyGroup(COMMANDS), {}, "petalite", "_PETALITE_COMPLETE", instruction))
