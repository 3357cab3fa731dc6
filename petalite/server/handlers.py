"""One function a method: what a server answers to the requests of spec 07 that are not steps."""

from __future__ import annotations

from collections.abc import Callable

import trio

from petalite import limits
from petalite.bloom.cache import Growth
from petalite.bloom.manifest import Manifest
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.net.call import Call, Handler, Reply
from petalite.server.additions import Additions, check_additions, decode_additions
from petalite.server.executor import Executor
from petalite.server.push import Pusher
from petalite.server.sessions import Session, no_session
from petalite.server.steps import Steps
from petalite.server.table import Opening, SessionTable
from petalite.wire import messages
from petalite.wire.tensors import Descriptor
from petalite.wire.writer import Priority


class Handlers:
    """The methods of one served span. `describe` gives the InfoReply, `admitting` whether new sessions are taken.

    `served(model, blocks, adapter)` gives some of the blocks, with the adapter of that name, or raises RequestError.
    """

    def __init__(
        self,
        table: SessionTable,
        executor: Executor,
        manifest: Manifest,
        describe: Callable[[], messages.InfoReply],
        admitting: Callable[[], bool],
        pusher: Pusher,
        served: Callable[[bytes, tuple[int, int], str | None], Span],
    ) -> None:
        self._table = table
        self._manifest = manifest
        self._describe = describe
        self._admitting = admitting
        self._executor = executor
        self._served = served
        steps = Steps(table, executor, pusher, admitting)
        self.methods: dict[str, Handler] = {
            "info": self.info,
            "manifest": self.manifest,
            "open": self.open,
            "step": steps.step,
            "extend": self.extend,
            "status": self.status,
            "close": self.close,
            "await": steps.await_step,
            "push": steps.push,
        }

    async def info(self, call: Call) -> Reply:
        messages.Empty.from_wire(call.head)
        return Reply(self._describe().to_wire())

    async def manifest(self, call: Call) -> Reply:
        asked = messages.Manifest.from_wire(call.head)
        if asked.model != self._manifest.model_id:
            raise RequestError(ErrorCode.NOT_SERVED, "another model is served here", {"model": self._manifest.model_id})
        data = self._manifest.encoded
        tensor = Descriptor("manifest", "u8", (len(data),))
        return Reply(messages.ManifestReply(tensors=(tensor,)).to_wire(), (data,), Priority.BULK)

    async def open(self, call: Call) -> Reply:
        message = messages.Open.from_wire(call.head)
        self._check_admitting()
        additions = await self._additions(message, call.body)
        try:
            session = self._table.open(call.peer, message, trio.current_time(), additions)
        except RequestError as error:
            if not message.wait or not error.detail.get("retry"):
                raise
            session = await self._wait_for_room(call, message, additions, error)
        return Reply(messages.OpenReply(pos=session.position, ttl=int(self._table.idle_seconds)).to_wire())

    async def _additions(self, message: messages.Open, body: bytearray) -> Additions | None:
        """What the session is to run with besides the model; checked before it is decoded."""
        if not (message.adapter or message.tensors or body):
            return None
        span = self._served(message.model, message.blocks, message.adapter)
        check_additions(message, body, span)
        if not body:
            return Additions(span)
        return await self._executor.aside(lambda: decode_additions(message, body, span))

    def _check_admitting(self) -> None:
        if not self._admitting():
            raise RequestError(ErrorCode.UNAVAILABLE, "draining: no new sessions", {"retry": True, "elsewhere": True})

    async def _wait_for_room(
        self, call: Call, message: messages.Open, additions: Additions | None, refusal: RequestError
    ) -> Session:
        """Until the caller's deadline, or OPEN_WAIT_SECONDS; then the refusal stands."""
        event = trio.Event()
        opening = Opening(call.peer, message, additions, event.set)
        self._table.open_later(opening)
        call.progress("queued")
        try:
            with trio.move_on_after(limits.OPEN_WAIT_SECONDS):
                await event.wait()
        finally:
            self._table.stop_opening(opening)
        self._check_admitting()
        if opening.session is None:
            raise opening.error or refusal
        return opening.session

    async def extend(self, call: Call) -> Reply:
        message = messages.Extend.from_wire(call.head)
        now = trio.current_time()
        session = self._table.find(call.peer, message.sid, now)
        growth = self._table.extend(session, message.max_len, now)
        if growth is not None:
            await self._copy(session, growth)
            if self._table.find(call.peer, message.sid, trio.current_time()) is not session:
                raise no_session()
        return Reply(messages.ExtendReply(max_len=session.rows.length).to_wire())

    async def _copy(self, session: Session, growth: Growth) -> None:
        """Off the event loop; to the end in any case: others may have a place only once nobody writes to it."""
        copied = False
        with trio.CancelScope(shield=True):
            try:
                await self._executor.aside(growth.copy)
                copied = True
            finally:
                self._table.extended(session, growth, trio.current_time(), copied=copied)

    async def status(self, call: Call) -> Reply:
        session = self._table.find(call.peer, messages.Status.from_wire(call.head).sid, trio.current_time())
        reply = messages.StatusReply(n=session.n, pos=session.position, max_len=session.rows.length)
        return Reply(reply.to_wire())

    async def close(self, call: Call) -> Reply:
        self._table.close(call.peer, messages.Close.from_wire(call.head).sid, trio.current_time())
        return Reply()
