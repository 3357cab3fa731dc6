"""Running the body of a command: torch comes in through a thread, and Ctrl-C is over within a second."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import trio

INTERRUPTED = 130
# What an interrupted command may take for its farewells; a peer that does not answer them must not hold it longer.
INTERRUPT_SECONDS = 0.7


def run_async(body: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """`trio.run`, but after Ctrl-C the process ends within INTERRUPT_SECONDS, and at a second Ctrl-C at once."""

    async def main() -> None:
        with _interrupts_bounded():
            await body(*arguments)

    trio.run(main)


async def import_beside(module: str) -> None:
    """Import what brings torch with it in a thread: it takes seconds, during which Ctrl-C and others are heard."""
    await trio.to_thread.run_sync(import_module, module, abandon_on_cancel=True)


@contextmanager
def _interrupts_bounded() -> Iterator[None]:
    deliver = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(deliver):
        yield  # somebody else decides what an interrupt means here
        return
    timer = threading.Timer(INTERRUPT_SECONDS, leave_now)
    timer.daemon = True

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if timer.ident is not None:
            leave_now()
        timer.start()
        deliver(number, frame)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, deliver)


def leave_now(code: int = INTERRUPTED) -> None:
    """End the process without waiting for its threads: one may be deep in torch, or in an import, for seconds."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream.isatty():
                stream.write("\x1b[?25h")  # a progress bar hides the cursor
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it, or it is closed
    os._exit(code)
