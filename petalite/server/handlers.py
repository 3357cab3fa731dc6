"""One function a method: what a server answers to the requests of spec 07."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import trio

from petalite import bridge, limits
from petalite.bloom.manifest import Manifest
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.net.connection import Call, Handler, Reply
from petalite.server.executor import Executor, StepWork
from petalite.server.scheduler import SHORT_TOKENS, Job
from petalite.server.sessions import Answer, Running, Session, SessionTable
from petalite.wire import messages, packing
from petalite.wire.tensors import Descriptor, total_size
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
    ) -> None:
        self._table = table
        self._executor = executor
        self._manifest = manifest
        self._describe = describe
        self._admitting = admitting
        self.methods: dict[str, Handler] = {
            "info": self.info,
            "manifest": self.manifest,
            "open": self.open,
            "step": self.step,
            "extend": self.extend,
            "status": self.status,
            "close": self.close,
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
        if not self._admitting():
            raise RequestError(ErrorCode.UNAVAILABLE, "draining: no new sessions", {"retry": True, "elsewhere": True})
        session = self._table.open(call.peer, message, trio.current_time())
        return Reply(messages.OpenReply(pos=session.position, ttl=int(self._table.idle_seconds)).to_wire())

    async def extend(self, call: Call) -> Reply:
        message = messages.Extend.from_wire(call.head)
        session = self._table.find(call.peer, message.sid)
        self._table.extend(session, message.max_len, trio.current_time())
        return Reply(messages.ExtendReply(max_len=session.rows.length).to_wire())

    async def status(self, call: Call) -> Reply:
        session = self._table.find(call.peer, messages.Status.from_wire(call.head).sid)
        reply = messages.StatusReply(n=session.n, pos=session.position, max_len=session.rows.length)
        return Reply(reply.to_wire())

    async def close(self, call: Call) -> Reply:
        self._table.close(call.peer, messages.Close.from_wire(call.head).sid)
        return Reply()

    async def step(self, call: Call) -> Reply:
        """Run a step, or answer it again. A retry that comes while the first still runs waits for that one."""
        message = messages.Step.from_wire(call.head)
        self._check_body(message.tensors, call.body)
        digest = step_digest(message, call.body)
        while True:
            session = self._table.find(call.peer, message.sid)
            entry = self._table.begin(session, message, digest, trio.current_time())
            if isinstance(entry, Answer):
                break
            if not entry.started:
                entry = await self._run(session, message, entry, call)
                break
            ended = trio.Event()
            entry.watchers.append(ended.set)
            await ended.wait()
        batch, tokens, _ = message.tensors[0].shape
        priority = Priority.STEP if batch * tokens <= SHORT_TOKENS else Priority.BULK
        return Reply(entry.head, entry.body, priority)

    def _check_body(self, tensors: tuple[Descriptor, ...], body: bytearray) -> None:
        size = total_size(tensors)
        if size > limits.MAX_STEP_BYTES:
            text = f"step of {size} bytes, limit {limits.MAX_STEP_BYTES}: send it in pieces"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": False})
        if size != len(body):
            raise RequestError(ErrorCode.TENSOR, f"body of {len(body)} bytes, the tensors have {size}")

    async def _run(self, session: Session, message: messages.Step, running: Running, call: Call) -> Answer:
        answer: Answer | None = None
        job = self._job(session, message, call)

        def settled() -> None:
            nonlocal answer
            if job.error is None and job.result is not None and not job.abandoned:
                answer = job.result
                self._table.commit(session, message, job.result, trio.current_time())
            self._table.settle(session, message)

        job.settled = settled
        running.started = True
        with trio.CancelScope() as scope:
            running.stop = scope.cancel
            await self._executor.submit(job)
        if answer is None:
            raise RequestError(ErrorCode.NO_SESSION, "no such session")  # closed while the step ran
        return answer

    def _job(self, session: Session, message: messages.Step, call: Call) -> Job:
        descriptor, opened, span = message.tensors[0], session.open, session.span
        batch, tokens, _ = descriptor.shape

        def prepare() -> torch.Tensor:
            return bridge.from_wire(descriptor, call.body, span.device, span.dtype)

        def finish(output: torch.Tensor) -> Answer:
            try:
                tensor, body = bridge.to_wire(output, opened.dtype, opened.codec)
            except LocalProtocolError as error:
                raise RequestError(ErrorCode.TENSOR, f"the result cannot be sent: {error}", {"retry": False}) from error
            position = message.pos + tokens
            return Answer(messages.StepReply(n=message.n, pos=position, tensors=(tensor,)).to_wire(), body)

        return Job(
            owner=call.peer,
            group=(span.start, span.end),
            batch=batch,
            tokens=tokens,
            prepare=prepare,
            finish=finish,
            settled=lambda: None,
            work=StepWork(span, session.rows, message.pos, message.pad, message.hypo),
        )


def step_digest(message: messages.Step, body: bytearray) -> bytes:
    """What makes two requests the same step: every field but the route, and the body."""
    fields: dict[str, Any] = message.to_wire()
    fields.pop("next", None)
    sha = hashlib.sha256(packing.encode(fields))
    sha.update(body)
    return sha.digest()
