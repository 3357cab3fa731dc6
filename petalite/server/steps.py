"""Steps: admitted, run by the executor, answered, and pushed on (spec 07). The requests `step`, `push` and `await`.

A step belongs to its session, not to the request that brought it: whoever wants its outcome waits for it, and it is
dropped when nobody does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import trio

from petalite import bridge, limits
from petalite.bloom.span import Part, Span
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId
from petalite.net.call import Call, Later, Ready, Reply
from petalite.server.answers import answer_of, answer_with, push_head, stays_raw
from petalite.server.compute import StepWork, as_answer
from petalite.server.executor import Executor
from petalite.server.push import Pusher, Pushing
from petalite.server.scheduler import Job
from petalite.server.sessions import Answer, Running, Session, Watcher
from petalite.server.state import SessionState
from petalite.server.table import SessionTable
from petalite.wire import messages
from petalite.wire.tensors import Descriptor, total_size

log = logging.getLogger("petalite.server")


class Steps:
    """Answers the requests that carry or await steps. Where it is not `admitting`, replies say that the server is about
    to leave.
    """

    def __init__(self, table: SessionTable, executor: Executor, pusher: Pusher, admitting: Callable[[], bool]) -> None:
        self._table = table
        self._executor = executor
        self._pusher = pusher
        self._admitting = admitting
        self._inlet: tuple[tuple[Descriptor, torch.dtype], bridge.Inlet] | None = None  # of the last kind of step
        self._inference = torch.inference_mode()  # of the event loop's thread: making one takes as long as entering it

    # The requests

    def step(self, call: Call) -> Later:
        """Run a step, or answer it again. A retry that comes while the first still runs waits for that one."""
        message = messages.Step.from_wire(call.head)
        _check_body(message.tensors, call.body)
        now = trio.current_time()
        session = self._table.find(call.peer, message.sid, now)
        self._pusher.check_route(call.peer, message.next)
        done = self._run_alone(session, message, call, now)
        if done is not None:
            return Ready(self._reply(done.answer), done.settle)
        return _Want(self._table, session, call, lambda: self._admit(session, message, call), self._reply).begin()

    def push(self, call: Call) -> Later:
        """A step brought by the hop before us; its owner awaits the output, or will."""
        message = messages.Push.from_wire(call.head)
        _check_body(message.tensors, call.body)
        owner = PeerId(message.owner)
        now = trio.current_time()
        session = self._table.find_pushed(call.peer, owner, message.sid, now)
        self._pusher.check_route(call.peer, message.next)
        step = messages.Step.from_wire(call.head)  # all that a step has, a push has too
        push = object()

        def ended(error: RequestError | None) -> None:
            if session.early is push:
                session.early = None
            if error is not None:
                self._table.refuse_awaits(session, message.n, _as_pushed(error))

        try:
            done = self._run_alone(session, step, call, now, push)
        except RequestError as error:
            ended(error)
            raise
        if done is not None:
            done.settle()  # first of all: its owner awaits it
            return Ready(Reply(), lambda: None)
        want = _Want(self._table, session, call, lambda: self._admit(session, step, call, push), lambda answer: Reply())
        return want.begin(ended)

    def await_step(self, call: Call) -> Later:
        """The output of a step that another peer brings."""
        message = messages.Await.from_wire(call.head)
        session = self._table.find(call.peer, message.sid, trio.current_time())

        def find() -> Answer | Running | None:
            return self._table.awaited(session, message.n, trio.current_time())

        return _Want(self._table, session, call, find, self._reply, message.n).begin()

    def _reply(self, answer: Answer) -> Reply:
        head = answer.head if self._admitting() else {**answer.head, "drain": True}
        return Reply(head, answer.body, answer.priority)

    # What they share

    def _admit(
        self, session: Session, step: messages.Step, call: Call, push: object | None = None
    ) -> Answer | Running | None:
        """As `SessionTable.admit`; a fresh step is started."""
        load = self._executor.load(session.owner)
        entry = self._table.admit(session, step, call.body, trio.current_time(), load=load, push=push)
        if isinstance(entry, Running) and entry.cancel is None:
            self._queue(session, entry, call.deadline)
        return entry

    # A step that nobody shares the model with

    def _run_alone(
        self, session: Session, step: messages.Step, call: Call, now: float, push: object | None = None
    ) -> _Done | None:
        """A brief step, run; its output is on its way to the next hop already. None for one that is not the session's
        next, or must take its place among others: nothing has happened then.

        Raises RequestError where it fails; it is settled then.
        """
        batch, tokens, _ = step.tensors[0].shape
        span = session.additions.span
        if step.n != session.n or session.in_progress or step.hypo is not None or span.asynchronous:
            return None
        if not self._executor.alone(batch * tokens, session.key, now):
            return None
        running = self._table.admit(session, step, call.body, now, push=push)
        if not isinstance(running, Running):
            return None
        outcome = self._executor.run_alone(partial(self._pass_through, session, running, span))
        seconds = trio.current_time() - now

        def settle() -> None:
            ended = trio.current_time()
            self._table.settle(session, outcome, ended)  # first of all: somebody may await it
            back = session.running is not None  # with the next step, which waited for this one
            self._executor.ran_alone(None if back else session.key, span, seconds, ended)

        if isinstance(outcome, RequestError):
            outcome = outcome if push is None else _as_pushed(outcome)
            settle()
            raise _copied(outcome)
        if step.next is not None:
            self._push_on(session, step, outcome, call.deadline)
        return _Done(outcome, settle)

    def _pass_through(self, session: Session, running: Running, span: Span) -> Answer | RequestError:
        """From bytes to bytes. A step that is malformed leaves the cache as it was."""
        step, rows = running.step, session.rows
        batch, tokens, hidden = step.tensors[0].shape
        cache = rows.views[0]
        try:
            with self._inference:
                entering = self._entering(step.tensors[0], running.body, cache, (batch * tokens, hidden))
                if session.position > step.pos:
                    rows.truncate(step.pos)
                part = Part(rows, tokens, step.pos, step.pad, session.additions.prompts)
                return answer_of(session, step, span.step_batch(entering, (part,)))
        except Exception as error:  # noqa: BLE001  whatever torch raises ends this step alone, see `as_answer`
            return as_answer(error)

    def _entering(
        self, tensor: Descriptor, body: bytearray, cache: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        """What enters the blocks, whose cache is `cache`; it may share memory with what entered them last."""
        kind = (tensor, cache.dtype)
        if self._inlet is None or self._inlet[0] != kind:
            self._inlet = None
            if cache.is_cpu and bridge.Inlet.serves(*kind):
                self._inlet = (kind, bridge.Inlet(*kind, shape))
        few = None if self._inlet is None else self._inlet[1].take(body)
        return bridge.from_wire(tensor, body, cache.device, cache.dtype, shape) if few is None else few

    # Steps in a queue

    def _queue(self, session: Session, running: Running, deadline: float) -> None:
        """Hand the step to the executor; when it comes back, commit it and push its output on before `deadline`."""

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
            if isinstance(outcome, Answer) and session.state is not SessionState.ENDING:
                self._push_on(session, running.step, outcome, deadline)  # on before back: others wait for it
            self._table.settle(session, outcome, trio.current_time(), broken=work.reordered)

        step = running.step
        batch, tokens, hidden = step.tensors[0].shape
        span = session.span
        raw = running.body if span.asynchronous and tokens == 1 and stays_raw(step.tensors[0], session) else None
        work = StepWork(span, session.rows, step.pos, step.pad, step.hypo, session.additions.prompts, raw)
        job = Job(
            owner=session.owner,
            group=span,  # with an adapter, blocks are other blocks
            batch=batch,
            tokens=tokens,
            blocks=span.end - span.start,
            session=session.key,
            came_at=trio.current_time(),
            prepare=lambda: bridge.from_wire(
                step.tensors[0], running.body, span.entry_device(batch * tokens), span.dtype, (batch * tokens, hidden)
            ),
            meanwhile=running.take_digest,
            finish=lambda output: answer_of(session, step, output),
            finish_raw=lambda data: answer_with(session, step, step.tensors[0], (memoryview(data),)),
            started=started,
            settled=settled,
            work=work,
        )
        running.cancel = lambda: self._executor.cancel(job)
        self._executor.add(job)

    def _push_on(self, session: Session, step: messages.Step, answer: Answer, deadline: float) -> None:
        """The next hop gets the output at once, without waiting for the client to take its copy."""
        if not step.next or not self._pusher.enabled:
            return
        pushing = Pushing(
            peer=PeerId(step.next[0].peer),
            owner=session.owner,
            head=push_head(session, step, step.next, answer.tensors),
            body=answer.body,
            priority=answer.priority,
            deadline=deadline,
            sid=session.open.sid,
            n=step.n,
        )
        self._pusher.start(pushing)


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


class _Done(NamedTuple):
    """A step that was run: what it is answered with, and what moves the session on."""

    answer: Answer
    settle: Callable[[], None]


class _Want(Later):
    """One request that wants a step's outcome; it looks again whenever something happens to the session.

    `find` gives the step's Answer, the Running that it is, or None while there is neither; `reply` makes of the Answer
    what the request gets. `n`: the step that another peer is to bring, if that is what is awaited.
    """

    __slots__ = ("_call", "_ended", "_find", "_looking", "_reply", "_running", "_session", "_table", "_watcher")

    def __init__(
        self,
        table: SessionTable,
        session: Session,
        call: Call,
        find: Callable[[], Answer | Running | None],
        reply: Callable[[Answer], Reply],
        n: int | None = None,
    ) -> None:
        super().__init__(self._unwanted)
        self._table = table
        self._session = session
        self._call = call
        self._find = find
        self._reply = reply
        self._running: Running | None = None
        self._looking = False  # admitting a step tells all who watch its session, us too
        self._ended: Callable[[RequestError | None], None] | None = None
        self._watcher = Watcher(self._look, n)

    def begin(self, ended: Callable[[RequestError | None], None] | None = None) -> Later:
        """`ended` hears when it is over, and by which error."""
        self._ended = ended
        self._session.watchers.append(self._watcher)
        self._look()
        if self.outcome is None and self._running is None:
            self._call.progress("queued")
        return self

    def _look(self) -> None:
        if self._looking or self.outcome is not None:
            return
        self._looking = True
        try:
            answer = self._answer()
            outcome = None if answer is None else self._reply(answer)
        except RequestError as error:
            self._leave(error)
            self.settle(error)
        except Exception as error:  # a bug costs this request, not the task that ran the step; it is logged whole
            log.error("a step of peer %s failed", self._call.peer.short, exc_info=error)
            self._leave(None)
            self.settle(RequestError(ErrorCode.INTERNAL, "internal error"))
        else:
            if outcome is not None:
                self._leave(None)
                self.settle(outcome)
        finally:
            self._looking = False

    def _answer(self) -> Answer | None:
        running = self._running
        if running is None:
            if self._watcher.error is not None:
                raise _copied(self._watcher.error)
            entry = self._find()
            if not isinstance(entry, Running):
                return entry
            running = self._running = entry
            running.waiters += 1
            running.progress.append(self._call.progress)
            self._call.progress("running" if running.begun else "queued")
        if isinstance(running.outcome, RequestError):
            raise _copied(running.outcome)
        return running.outcome

    def _unwanted(self) -> None:
        """When all who wait for a step are gone, it is dropped."""
        self._leave(None)
        if self._running is not None and self._running.outcome is None:
            self._table.abandon(self._session)

    def _leave(self, error: RequestError | None) -> None:
        self._session.watchers.remove(self._watcher)
        if self._running is not None:
            self._running.waiters -= 1
        if self._ended is not None:
            self._ended(error)
