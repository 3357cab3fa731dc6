"""A served span: its sessions, its executor and what it tells of itself. Loading and listening are the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import trio

from petalite import __version__, limits
from petalite.bloom.cache import CachePool
from petalite.bloom.fast import accelerate
from petalite.bloom.manifest import Manifest
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId
from petalite.net.connection import Handler
from petalite.server.additions import Adapters, with_adapter
from petalite.server.executor import Executor, Here, ThreadRunner, run_in_thread
from petalite.server.handlers import Handlers
from petalite.server.push import Pusher
from petalite.server.table import SessionTable
from petalite.server.training import Training
from petalite.wire import messages
from petalite.wire.tensors import CODECS


class BlockServer:
    """Answers `methods` while `run` is running.

    `cache_tokens` is the room for all sessions together: the sum over sessions of rows x longest length. `runner`
    runs the model off the event loop (`run_inline` under a mock clock), `here` what is brief in it. `adapters`:
    low-rank adapters that clients may name instead of sending their own.
    """

    CODECS: ClassVar = CODECS
    VERSION: ClassVar = __version__

    def __init__(
        self,
        span: Span,
        manifest: Manifest,
        name: str,
        *,
        cache_tokens: int,
        quantize: str | None = None,
        idle_seconds: float = limits.SESSION_IDLE_SECONDS,
        runner: ThreadRunner = run_in_thread,
        here: Here | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.span = span
        self.manifest = manifest
        self.name = name
        self.state = "online"
        self.executor = Executor(runner, here)
        self.pool = CachePool(span.config, span.end - span.start, cache_tokens, dtype=span.dtype, device=span.device)
        self.table = SessionTable(
            self.pool, (span.start, span.end), self._subspan, manifest.model_id, idle_seconds=idle_seconds
        )
        self._quantize = quantize
        self._scope = trio.CancelScope()
        self._subspans: dict[tuple[int, int, str | None], Span] = {(span.start, span.end, None): span}
        self.pusher = Pusher()
        self.adapters = adapters or {}
        handlers = Handlers(
            self.table,
            self.executor,
            manifest,
            self.describe,
            lambda: self.state == "online",
            self.pusher,
            self._served,
        )
        self.training = Training(self.executor, self._served, span.start, self.adapters, lambda: self.state == "online")
        self.methods: Mapping[str, Handler] = {
            **handlers.methods,
            "forward": self.training.forward,
            "backward": self.training.backward,
        }

    def _served(self, model: bytes, blocks: tuple[int, int], adapter: str | None = None) -> Span:
        self.table.check_served(model, blocks)
        if adapter is not None and adapter not in self.adapters:
            raise RequestError(ErrorCode.NOT_SERVED, f"no adapter {adapter!a} is held here")
        return self._subspan(*blocks, adapter)

    def _subspan(self, start: int, end: int, adapter: str | None = None) -> Span:
        """Some of the blocks as a span of its own, with one of our adapters or without; the weights are shared."""
        known = self._subspans.get((start, end, adapter))
        if known is None:
            own = slice(start - self.span.start, end - self.span.start)
            if adapter is None:
                known = Span(self.span.config, start, end, self.span.layers[own])
            else:
                weights = {name: tensor[own].to(self.span.dtype) for name, tensor in self.adapters[adapter].items()}
                known = with_adapter(self._subspan(start, end), weights)
            self._subspans[start, end, adapter] = known
        return known

    def describe(self) -> messages.InfoReply:
        """What `info` answers."""
        config = self.span.config
        return messages.InfoReply(
            model=self.manifest.model_id,
            name=self.name,
            blocks=(self.span.start, self.span.end),
            layers=config.n_layer,
            hidden=config.hidden_size,
            dtype=str(self.span.dtype).removeprefix("torch."),
            quant=self._quantize,
            codecs=CODECS,
            max_len=min(self.pool.capacity, limits.MAX_SESSION_LENGTH),
            max_batch=limits.MAX_BATCH,
            cache_left=self.table.room_left(trio.current_time()),
            state=self.state,
            version=__version__,
            push=self.pusher.enabled or None,
            train=limits.MAX_TRAINING_TOKENS,
            adapters=tuple(self.adapters) or None,
        )

    def accelerate(self, progress: Callable[[int, int], None] | None = None) -> str:
        """Take the fast way where there is one (CUDA); "" or why not. Blocking, and before `run`."""
        fast, reason = accelerate(self.span, self.pool, progress)
        self.span = self._subspans[fast.start, fast.end, None] = fast
        return reason

    def holds(self, owner: PeerId, sid: bytes) -> bool:
        """Whether a session is here."""
        try:
            self.table.find(owner, sid, trio.current_time())
        except RequestError:
            return False
        return True

    def stop(self) -> None:
        """End `run`; whatever is held is given up."""
        self._scope.cancel()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the executor and let sessions lapse, until cancelled."""
        with self._scope:
            await self._run(task_status)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.executor.run)
            await nursery.start(self.pusher.run)
            task_status.started()
            while True:
                await trio.sleep(limits.EXPIRY_SECONDS)
                self.table.expire(trio.current_time())

    async def drain(self) -> None:
        """Take no new sessions, and return once nobody has used one for DRAIN_QUIET_SECONDS (the caller's deadline
        ends it sooner).
        """
        self.state = "draining"
        # Quiet is an absence, which no event announces: look again and again.
        while self.training.busy or not self._quiet():  # noqa: ASYNC110
            await trio.sleep(limits.TICK_SECONDS)

    def _quiet(self) -> bool:
        return self.table.quiet_since(trio.current_time() - limits.DRAIN_QUIET_SECONDS)
