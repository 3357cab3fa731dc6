"""Steps: admitted, run by the executor, answered, and pushed on (spec 07). The requests `step`, `push` and `await`.

A step belongs to its session, not to the request that brought it: whoever wants its outcome waits for it, and it is
dropped when nobody does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import trio

from petalite import bridge, limits
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.identity import PeerId
from petalite.net.call import Call, Reply
from petalite.server.executor import Executor, StepWork
from petalite.server.push import Pusher
from petalite.server.scheduler import SHORT_TOKENS, Job
from petalite.server.sessions import Answer, Running, Session, Watcher, step_digest
from petalite.server.table import SessionTable
from petalite.wire import messages
from petalite.wire.tensors import Descriptor, total_size
from petalite.wire.writer import Priority


class Steps:
    """Answers the requests that carry or await steps. `draining`: replies say that the server is about to leave."""

    def __init__(self, table: SessionTable, executor: Executor, pusher: Pusher, draining: Callable[[], bool]) -> None:
        self._table = table
        self._executor = executor
        self._pusher = pusher
        self._draining = draining

    # The requests

    async def step(self, call: Call) -> Reply:
        """Run a step, or answer it again. A retry that comes while the first still runs waits for that one."""
        message = messages.Step.from_wire(call.head)
        _check_body(message.tensors, call.body)
        session = self._table.find(call.peer, message.sid, trio.current_time())
        self._pusher.check_route(call.peer, message.next)
        return self._reply(await self._perform(session, message, call))

    async def push(self, call: Call) -> Reply:
        """A step brought by the hop before us; its owner awaits the output, or will."""
        message = messages.Push.from_wire(call.head)
        _check_body(message.tensors, call.body)
        owner = PeerId(message.owner)
        session = self._table.find_pushed(call.peer, owner, message.sid, trio.current_time())
        self._pusher.check_route(call.peer, message.next)
        step = messages.Step(
            sid=message.sid,
            n=message.n,
            pos=message.pos,
            hypo=message.hypo,
            pad=message.pad,
            next=message.next,
            tensors=message.tensors,
        )
        try:
            await self._perform(session, step, call, push=object())
        except RequestError as error:
            self._table.refuse_awaits(session, message.n, _as_pushed(error))
            raise
        return Reply()

    async def await_step(self, call: Call) -> Reply:
        """The output of a step that another peer brings."""
        message = messages.Await.from_wire(call.head)
        session = self._table.find(call.peer, message.sid, trio.current_time())
        call.progress("queued")
        entry = None
        with _Changes(session, message.n) as changes:
            while entry is None:
                if changes.watcher.error is not None:
                    raise _copied(changes.watcher.error)
                entry = self._table.awaited(session, message.n, trio.current_time())
                if entry is None:
                    await changes.wait()
        return self._reply(entry if isinstance(entry, Answer) else await self._join(session, entry, call))

    def _reply(self, answer: Answer) -> Reply:
        batch, tokens, _ = answer.tensors[0].shape
        priority = Priority.STEP if batch * tokens <= SHORT_TOKENS else Priority.BULK
        return Reply(answer.head | {"drain": True} if self._draining() else answer.head, answer.body, priority)

    # What they share

    async def _perform(self, session: Session, step: messages.Step, call: Call, push: object | None = None) -> Answer:
        """The step's answer, whoever runs it."""
        try:
            entry = self._admit(session, step, call, push)
            if entry is None:
                call.progress("queued")
                with _Changes(session) as changes:
                    while entry is None:
                        await changes.wait()
                        entry = self._admit(session, step, call, push)
        finally:
            if session.early is push:
                session.early = None
        if isinstance(entry, Answer):
            return entry
        return await self._join(session, entry, call)

    def _admit(self, session: Session, step: messages.Step, call: Call, push: object | None) -> Answer | Running | None:
        """As `SessionTable.admit`; a fresh step is started."""
        load = self._executor.load(session.owner)
        entry = self._table.admit(session, step, call.body, trio.current_time(), load=load, push=push)
        if isinstance(entry, Running) and entry.cancel is None:
            self._start(session, entry)
        return entry

    async def _join(self, session: Session, running: Running, call: Call) -> Answer:
        """Wait for the outcome of a step. When all who wait for it are gone, it is dropped."""
        running.waiters += 1
        running.progress.append(call.progress)
        call.progress("running" if running.begun else "queued")
        try:
            with _Changes(session) as changes:
                while running.outcome is None:
                    await changes.wait()
        finally:
            running.waiters -= 1
            if running.outcome is None:
                self._table.abandon(session)
        if isinstance(running.outcome, RequestError):
            raise _copied(running.outcome)
        return running.outcome

    def _start(self, session: Session, running: Running) -> None:
        """Hand the step to the executor; when it comes back, commit it and push its output on."""
        deadline = trio.current_effective_deadline()

        def started() -> None:
            if not running.begun:
                running.begun = True
                for progress in running.progress:
                    progress("running")

        def settled() -> None:
            outcome: Answer | RequestError = RequestError(ErrorCode.CANCELLED, "cancelled")
            if isinstance(job.error, RequestError):
                outcome = _as_pushed(job.error) if running.pushed else job.error
            elif isinstance(job.result, Answer) and not job.abandoned:
                outcome = job.result
            self._table.settle(session, outcome, trio.current_time(), broken=work.reordered)
            if isinstance(running.outcome, Answer):
                self._push_on(session, running.step, running.outcome, deadline)

        step = running.step
        batch, tokens, _ = step.tensors[0].shape
        span = session.span
        work = StepWork(span, session.rows, step.pos, step.pad, step.hypo)
        job = Job(
            owner=session.owner,
            group=(span.start, span.end),
            batch=batch,
            tokens=tokens,
            blocks=span.end - span.start,
            prepare=lambda: bridge.from_wire(step.tensors[0], running.body, span.device, span.dtype),
            finish=lambda output: _answer(session, running, output),
            started=started,
            settled=settled,
            work=work,
        )
        running.cancel = lambda: self._executor.cancel(job)
        self._executor.add(job)

    def _push_on(self, session: Session, step: messages.Step, answer: Answer, deadline: float) -> None:
        """The next hop gets the output at once: before the client's copy is written."""
        if not step.next or not self._pusher.enabled:
            return
        first, *rest = step.next
        push = messages.Push(
            owner=bytes(session.owner),
            sid=first.sid,
            n=step.n if first.n is None else first.n,
            pos=step.pos,
            hypo=step.hypo,
            pad=step.pad,
            next=tuple(rest) or None,
            tensors=answer.tensors,
        )
        self._pusher.start(PeerId(first.peer), push, answer.body, self._reply(answer).priority, deadline)


def _answer(session: Session, running: Running, output: torch.Tensor) -> Answer:
    """In the worker thread: the output as it goes on the wire, and the digest that tells a retry."""
    step, opened = running.step, session.open
    try:
        tensor, body = bridge.to_wire(output, opened.dtype, opened.codec)
    except LocalProtocolError as error:
        raise RequestError(ErrorCode.TENSOR, f"the result cannot be sent: {error}", {"retry": False}) from error
    running.digest = step_digest(step, running.body)
    position = step.pos + step.tensors[0].shape[1]
    reply = messages.StepReply(n=step.n, pos=position, tensors=(tensor,))
    return Answer(reply.to_wire(), body, (tensor,))


def _check_body(tensors: tuple[Descriptor, ...], body: bytearray) -> None:
    size = total_size(tensors)
    if size > limits.MAX_STEP_BYTES:
        text = f"step of {size} bytes, limit {limits.MAX_STEP_BYTES}: send it in pieces"
        raise RequestError(ErrorCode.RESOURCES, text, {"retry": False})
    if size != len(body):
        raise RequestError(ErrorCode.TENSOR, f"body of {len(body)} bytes, the tensors have {size}")


def _copied(error: RequestError) -> RequestError:
    """One for each that raises it: a traceback belongs to one task."""
    return RequestError(error.code, error.text, error.detail)


def _as_pushed(error: RequestError) -> RequestError:
    """Tells the owner that the step was not its own copy: it may send that, whatever was wrong with the push."""
    return RequestError(error.code, error.text, error.detail | {"pushed": True})


class _Changes:
    """Within its `with` block: waits for the next thing that happens to a session; what happens between two waits is
    not missed. `n`: the step that is awaited, if one is.
    """

    def __init__(self, session: Session, n: int | None = None) -> None:
        self._session = session
        self._event = trio.Event()
        self.watcher = Watcher(lambda: self._event.set(), n)

    def __enter__(self) -> _Changes:
        self._session.watchers.append(self.watcher)
        return self

    def __exit__(self, *raised: object) -> None:
        self._session.watchers.remove(self.watcher)

    async def wait(self) -> None:
        await self._event.wait()
        self._event = trio.Event()
