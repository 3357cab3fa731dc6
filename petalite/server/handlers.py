"""One function a method: what a server answers to the requests of spec 07 that are not steps."""

from __future__ import annotations

from collections.abc import Callable

import trio

from petalite import limits
from petalite.bloom.manifest import Manifest
from petalite.errors import ErrorCode, RequestError
from petalite.net.call import Call, Handler, Reply
from petalite.server.executor import Executor
from petalite.server.push import Pusher
from petalite.server.sessions import Session
from petalite.server.steps import Steps
from petalite.server.table import Opening, SessionTable
from petalite.wire import messages
from petalite.wire.tensors import Descriptor
from petalite.wire.writer import Priority


class Handlers:
    """The methods of one served span. `describe` gives the InfoReply, `admitting` whether new sessions are taken."""

    def __init__(
        self,
        table: SessionTable,
        executor: Executor,
        manifest: Manifest,
        describe: Callable[[], messages.InfoReply],
        admitting: Callable[[], bool],
        pusher: Pusher | None = None,
    ) -> None:
        self._table = table
        self._manifest = manifest
        self._describe = describe
        self._admitting = admitting
        steps = Steps(table, executor, pusher or Pusher(), lambda: not admitting())
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
        try:
            session = self._table.open(call.peer, message, trio.current_time())
        except RequestError as error:
            if not message.wait or not error.detail.get("retry"):
                raise
            session = await self._wait_for_room(call, message, error)
        return Reply(messages.OpenReply(pos=session.position, ttl=int(self._table.idle_seconds)).to_wire())

    def _check_admitting(self) -> None:
        if not self._admitting():
            raise RequestError(ErrorCode.UNAVAILABLE, "draining: no new sessions", {"retry": True, "elsewhere": True})

    async def _wait_for_room(self, call: Call, message: messages.Open, refusal: RequestError) -> Session:
        """Until the caller's deadline, or OPEN_WAIT_SECONDS; then the refusal stands."""
        event = trio.Event()
        opening = Opening(call.peer, message, event.set)
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
        self._table.extend(session, message.max_len, now)
        return Reply(messages.ExtendReply(max_len=session.rows.length).to_wire())

    async def status(self, call: Call) -> Reply:
        session = self._table.find(call.peer, messages.Status.from_wire(call.head).sid, trio.current_time())
        reply = messages.StatusReply(n=session.n, pos=session.position, max_len=session.rows.length)
        return Reply(reply.to_wire())

    async def close(self, call: Call) -> Reply:
        self._table.close(call.peer, messages.Close.from_wire(call.head).sid, trio.current_time())
        return Reply()
