"""A door from ordinary synchronous code into a Trio loop that runs in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

import trio

# What is cancelled says goodbye to servers first; a second interrupt does not wait for that.
INTERRUPT_SECONDS = 3.0

T = TypeVar("T")
R = TypeVar("R")


class _Ready(Generic[T]):
    """How the loop's thread tells that it is up, or that it will never be."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[trio.lowlevel.TrioToken, T, trio.Event] | BaseException] = SimpleQueue()


class Portal:
    """Calls into the loop; each blocks the calling thread until it has its result or its error."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token

    def call(self, function: Callable[[], Awaitable[R]]) -> R:
        """Run `function` in the loop. An interrupt (Ctrl-C) cancels it there, and is raised once it has ended."""
        scope = trio.CancelScope()
        ended = threading.Event()

        async def run() -> R:
            try:
                with scope:
                    return await function()
                raise KeyboardInterrupt  # nobody hears it: the caller was interrupted
            finally:
                ended.set()

        try:
            return trio.from_thread.run(run, trio_token=self._token)
        except KeyboardInterrupt:
            if not ended.is_set():
                trio.from_thread.run_sync(scope.cancel, trio_token=self._token)
                ended.wait(INTERRUPT_SECONDS)
            raise

    def call_now(self, function: Callable[[], R]) -> R:
        """Run a function that does not wait in the loop's thread, between its tasks."""
        return trio.from_thread.run_sync(function, trio_token=self._token)

    def iterate(self, make: Callable[[], AsyncGenerator[R]]) -> Iterator[R]:
        """Go through an async generator; leaving the loop early closes it."""
        generator = make()

        async def following() -> tuple[bool, R | None]:
            async for item in generator:
                return True, item
            return False, None

        try:
            while True:
                more, item = self.call(following)
                if not more:
                    return
                yield item  # type: ignore[misc]  # an R whenever `more` is true
        finally:
            self.call(generator.aclose)


@contextmanager
def open_portal(make: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[tuple[Portal, T]]:
    """Enter `make()` in a fresh loop and keep it open for the block; errors of entering it are raised here."""
    ready: _Ready[T] = _Ready()
    thread = threading.Thread(target=_run_loop, args=(make, ready), name="petalite", daemon=True)
    thread.start()
    first = ready.queue.get()
    if isinstance(first, BaseException):
        thread.join()
        raise first
    token, value, stop = first
    try:
        yield Portal(token), value
    finally:
        try:
            trio.from_thread.run_sync(stop.set, trio_token=token)
        except trio.RunFinishedError:
            pass  # the loop has ended by an error of its own
        thread.join()


def _run_loop(make: Callable[[], AbstractAsyncContextManager[T]], ready: _Ready[T]) -> None:
    async def main() -> None:
        stop = trio.Event()
        async with make() as value:
            ready.queue.put((trio.lowlevel.current_trio_token(), value, stop))
            await stop.wait()

    try:
        trio.run(main)
    except BaseException as error:  # noqa: BLE001  handed to the thread that waits, which raises it
        ready.queue.put(error)
