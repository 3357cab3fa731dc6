"""The session table: which caches are held for whom, at which step, and when they lapse (spec 07).

Pure but for the cache memory that it reserves: time is an argument, nothing waits. A session belongs to the pair
(owner peer id, session id), never to a connection. `state.py` says what may follow what.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from petalite import limits
from petalite.bloom.cache import CachePool, Growth
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.identity import PeerId
from petalite.server.additions import Additions
from petalite.server.room import plan_eviction
from petalite.server.sessions import Answer, Running, Session, no_session, out_of_order, step_digest
from petalite.server.state import SessionEvent, SessionState
from petalite.wire.messages import Open, Step


@dataclass(slots=True, eq=False)
class Opening:
    """An open that waits for room. `done` is called once `session` or `error` is there."""

    owner: PeerId
    message: Open
    additions: Additions | None
    done: Callable[[], None]
    session: Session | None = None
    error: RequestError | None = None


class SessionTable:
    """All sessions of one server over one pool of cache rows.

    `subspan(start, end)` gives the blocks a session uses, as something to run. Raises RequestError from every verb
    that a peer can press on; the codes are those of spec 07.
    """

    def __init__(
        self,
        pool: CachePool,
        served: tuple[int, int],
        subspan: Callable[[int, int], Span],
        model: bytes,
        *,
        idle_seconds: float = limits.SESSION_IDLE_SECONDS,
        peer_share: float = limits.PEER_CACHE_SHARE,
    ) -> None:
        self.pool = pool
        self.served = served
        self.idle_seconds = idle_seconds
        self._share = int(pool.capacity * peer_share)
        self._subspan = subspan
        self._model = model
        self._sessions: dict[tuple[PeerId, bytes], Session] = {}
        self._by_owner: Counter[PeerId] = Counter()
        self._held: Counter[PeerId] = Counter()
        self._openings: list[Opening] = []
        self._kept: OrderedDict[Session, int] = OrderedDict()  # answers kept, in bytes, oldest first
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def room_left(self, now: float) -> int:
        """Cache tokens that an open can have: free, or in parked sessions."""
        return self.pool.free + sum(session.tokens for session in self._parked(now))

    # Opening

    def open(self, owner: PeerId, message: Open, now: float, additions: Additions | None = None) -> Session:
        """Reserve a session's cache. Opening again with equal fields is harmless while no step was done.

        `additions`: what it runs with, if that is not the model alone. Their memory counts as cache (PT-SES-082).
        """
        message = replace(message, wait=None)
        known = self._lookup(owner, message.sid, now)
        if known is not None:
            known.advance(SessionEvent.OPEN)
            if known.open != message or (additions and known.additions.digest != additions.digest):
                raise RequestError(ErrorCode.CONFLICT, "the session exists already, with other fields")
            return known
        self.check_served(message.model, message.blocks)
        self._check_places(owner, now)
        start, end = message.blocks
        additions = additions or Additions(self._subspan(start, end))
        beside = -(-additions.nbytes // self.pool.bytes_per_token)
        self._make_room(owner, message.batch, message.max_len, now, beside=beside)
        if len(self._sessions) >= limits.MAX_SESSIONS:
            self._drop(min(self._parked(now), key=lambda session: session.used_at), SessionEvent.LAPSE)
        blocks = slice(start - self.served[0], end - self.served[0])
        rows = self.pool.reserve(message.batch, message.max_len, blocks, beside)
        session = Session(owner, message, additions, rows, now, now)
        self._sessions[session.key] = session
        self._by_owner[owner] += 1
        self._held[owner] += session.tokens
        return session

    def check_served(self, model: bytes, blocks: tuple[int, int]) -> None:
        """Raises NOT_SERVED for another model, or blocks that are not all here."""
        detail = {"blocks": list(self.served), "model": self._model}
        if model != self._model:
            raise RequestError(ErrorCode.NOT_SERVED, "another model, or other weights, are served here", detail)
        start, end = blocks
        if not self.served[0] <= start < end <= self.served[1]:
            text = f"blocks {start}:{end} are asked, {self.served[0]}:{self.served[1]} are served"
            raise RequestError(ErrorCode.NOT_SERVED, text, detail)

    def _check_places(self, owner: PeerId, now: float) -> None:
        """One more session of `owner` may have a place, if need be a parked one's. Raises RESOURCES."""
        held, full = self._by_owner[owner], len(self._sessions) >= limits.MAX_SESSIONS
        if held >= limits.MAX_SESSIONS_PER_PEER or (full and not any(self._parked(now))):
            text = f"too many sessions: {held} of yours, {len(self._sessions)} in all"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": True, "after": 1000})

    def _parked(self, now: float) -> Iterator[Session]:
        return (session for session in self._sessions.values() if session.parked(now))

    def _make_room(
        self, owner: PeerId, batch: int, length: int, now: float, *, beside: int = 0, spare: Session | None = None
    ) -> None:
        """See to it that `pool.reserve` succeeds, by eviction if need be. Raises RESOURCES."""
        wanted = batch * length + beside
        if wanted > self.pool.capacity:
            text = f"{batch} x {length} tokens of cache are asked, {self.pool.capacity} exist"
            if beside:
                text = f"{text}; what the session adds takes {beside} more"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": False, "cache_left": self.pool.free})
        if self.pool.would_fit(batch, length, beside=beside):
            return
        victims = plan_eviction(
            (session for session in self._sessions.values() if session is not spare),
            self._held,
            owner=owner,
            wanted=wanted,
            share=self._share,
            fits=lambda released: self.pool.would_fit(batch, length, released, beside),
            now=now,
        )
        if victims is None:
            text = f"no room for {wanted} tokens of cache: {self.pool.free} free, you hold {self._held[owner]}"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": True, "after": 1000, "cache_left": self.pool.free})
        for session in victims:
            self._drop(session, SessionEvent.LAPSE)

    def open_later(self, opening: Opening) -> None:
        """Queue an open that `open` refused for lack of room. Raises RESOURCES when too many wait already."""
        of_owner = sum(other.owner == opening.owner for other in self._openings)
        if of_owner >= limits.MAX_OPENINGS_PER_PEER or len(self._openings) >= limits.MAX_OPENINGS:
            text = f"too many opens wait for room: {of_owner} of yours, {len(self._openings)} in all"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": True, "after": 1000})
        self._openings.append(opening)

    def stop_opening(self, opening: Opening) -> None:
        if opening in self._openings:
            self._openings.remove(opening)

    def _serve_openings(self, now: float) -> None:
        """Room may have come free: it goes to those who wait in the order in which they came.

        One that still does not fit stops nobody behind it: otherwise a huge request would hold up all the others.
        """
        for opening in list(self._openings):
            try:
                opening.session = self.open(opening.owner, opening.message, now, opening.additions)
            except RequestError as error:
                if error.detail.get("retry"):
                    continue
                opening.error = error
            self._openings.remove(opening)
            opening.done()

    # Steps

    def find(self, owner: PeerId, sid: bytes, now: float) -> Session:
        """Raises RequestError(NO_SESSION), the same for one that never was and one of somebody else."""
        session = self._lookup(owner, sid, now)
        if session is None:
            raise no_session()
        return session

    def find_pushed(self, sender: PeerId, owner: PeerId, sid: bytes, now: float) -> Session:
        """The session that `sender` may push into. Raises NO_SESSION; FORBIDDEN for one that `open` did not name."""
        session = self.find(owner, sid, now)
        if session.open.from_ != sender:
            raise RequestError(ErrorCode.FORBIDDEN, "the session's owner did not name you as the peer that pushes")
        return session

    def _lookup(self, owner: PeerId, sid: bytes, now: float) -> Session | None:
        session = self._sessions.get((owner, sid))
        if session is not None and session.lapsed(now, self.idle_seconds):
            self._drop(session, SessionEvent.LAPSE)
            return None
        return session

    def admit(
        self, session: Session, step: Step, body: bytearray, now: float, *, load: int = 0, push: object | None = None
    ) -> Answer | Running | None:
        """Admit a step: its kept Answer if it was done before, else the Running that stands for it.

        A Running without `cancel` is fresh: the caller's to run and to `settle`. None: wait until something happens to
        the session, then ask again: a step that nobody wants is on its way out; or the cache is copied to a longer
        place; or this is a push, `push` stands for it, and the step before it runs. `load`: tokens of this peer that
        wait or run already.
        """
        session.used_at = now
        running = session.running
        if running is not None and running.step.n == step.n:
            session.advance(SessionEvent.REPEAT)
            if running.abandoned:
                return None
            if not running.matches(step, body):
                raise RequestError(ErrorCode.CONFLICT, f"step {step.n} runs with other content")
            return running
        if step.n == session.n - 1:
            session.advance(SessionEvent.REPEAT)
            if session.last_answer is None or session.last_digest != step_digest(step, body):
                raise RequestError(ErrorCode.CONFLICT, f"step {step.n} was done with other content, or long ago")
            if session.last_answered < step.answered:
                text = f"step {step.n} was asked for its last {session.last_answered} tokens, not {step.answered}"
                raise RequestError(ErrorCode.CONFLICT, text)
            return session.last_answer
        if push is not None and running is not None and step.n == session.n + 1 and session.early in (None, push):
            session.early = push
            return None
        if session.growth is not None:
            return None
        following = session.allow(SessionEvent.STEP)
        if step.n != session.n:
            raise out_of_order(session)
        self._check_fits(session, step)
        if load:
            _check_load(step, load)
        session.state = following
        session.running = Running(step, body, pushed=push is not None)
        if session.watchers:
            session.notify()
        return session.running

    def _check_fits(self, session: Session, step: Step) -> None:
        rows, tokens, hidden = step.tensors[0].shape
        opened = session.open
        if rows != opened.batch or hidden != session.span.config.hidden_size:
            text = f"tensor 'h' is {rows} x {tokens} x {hidden}, due is {opened.batch} x T x"
            raise RequestError(ErrorCode.TENSOR, f"{text} {session.span.config.hidden_size}")
        position = session.position
        if step.pos > position:
            text = f"step begins at {step.pos}, the session holds {position} tokens"
            raise RequestError(ErrorCode.POSITION, text, {"pos": position})
        if step.pos + tokens > session.rows.length:
            text = f"{step.pos} + {tokens} tokens exceed the session's {session.rows.length}"
            raise RequestError(ErrorCode.LENGTH, text, {"max_len": session.rows.length, "pos": position})

    def awaited(self, session: Session, n: int, now: float) -> Answer | Running | None:
        """Step `n`, which another peer will bring: its Answer, the Running it is, or None while it has not come."""
        session.used_at = now
        if session.state in (SessionState.ABSENT, SessionState.ENDING):
            raise no_session()
        if n == session.n - 1:
            if session.last_answer is None:
                raise RequestError(ErrorCode.CONFLICT, f"the answer to step {n} is no longer kept")
            return session.last_answer
        if not session.n <= n <= session.n + limits.MAX_AWAIT_AHEAD:
            raise out_of_order(session)
        running = session.running
        return running if running is not None and running.step.n == n and not running.abandoned else None

    def settle(self, session: Session, outcome: Answer | RequestError, now: float, *, broken: bool = False) -> None:
        """The step has left the executor, with its Answer or without. Complete, it moves the position. `broken`: the
        rows were reordered for nothing, which cannot be undone: the session ends, and its owner replays.
        """
        running, session.running = session.running, None
        if running is None:
            return
        session.used_at = now
        if session.state is SessionState.ENDING:
            session.advance(SessionEvent.FAIL)
            self.pool.release(session.rows)
            outcome = no_session()
        elif isinstance(outcome, Answer):
            session.advance(SessionEvent.COMMIT)
            session.rows.commit(running.step.pos + running.step.tensors[0].shape[1])
            session.n += 1
            session.last_digest = running.digest or step_digest(running.step, running.body)
            session.last_answered = running.step.answered
            self._keep(session, outcome)
        elif broken:
            self._drop(session, SessionEvent.BREAK)
        else:
            session.advance(SessionEvent.FAIL)
        running.outcome = outcome
        if isinstance(outcome, RequestError):
            self.refuse_awaits(session, running.step.n, outcome)
        session.notify()
        self._serve_openings(now)

    def abandon(self, session: Session) -> None:
        """A request that wanted the running step is gone; the step goes too if it was the last."""
        running = session.running
        if running is None or running.waiters or running.abandoned or running.cancel is None:
            return
        if not any(watcher.n == running.step.n for watcher in session.watchers):
            running.abandoned = True
            running.cancel()

    def refuse_awaits(self, session: Session, n: int, error: RequestError) -> None:
        """Step `n` will not come this way: end what awaits it."""
        for watcher in session.watchers:
            if watcher.n == n and n >= session.n:
                watcher.error = error
                watcher.wake()

    def _keep(self, session: Session, answer: Answer) -> None:
        """Keep the answer for a retry; the oldest answers of others make room."""
        self._unkeep(session)
        size = answer.size
        if size > limits.KEPT_REPLY_BYTES:
            return
        session.last_answer = answer
        self._kept[session] = size
        self._kept_bytes += size
        while self._kept_bytes > limits.KEPT_REPLY_BYTES:
            self._unkeep(next(iter(self._kept)))

    def _unkeep(self, session: Session) -> None:
        self._kept_bytes -= self._kept.pop(session, 0)
        session.last_answer = None

    # Length and end

    def extend(self, session: Session, length: int, now: float) -> Growth | None:
        """Reserve room for `length` tokens a row: have the Growth copied, then call `extended`. None: there is room."""
        session.used_at = now
        session.advance(SessionEvent.EXTEND)
        if session.growth is not None:
            raise RequestError(ErrorCode.BUSY, "the session is being extended", {"retry": True, "after": 100})
        rows = session.rows
        if length <= rows.length:
            return None
        self._make_room(session.owner, rows.batch, length, now, beside=rows.beside, spare=session)
        growth = session.growth = self.pool.grow(rows, length)
        self._held[session.owner] += growth.new.slots
        return growth

    def extended(self, session: Session, growth: Growth, now: float, *, copied: bool = True) -> None:
        """No thread copies any more. Where all went well the session goes on in its new place, which otherwise is free
        again, as the old one is where the session has been closed meanwhile.
        """
        went_well = copied and session.growth is growth
        freed = session.tokens if went_well else growth.new.slots
        if went_well:
            self.pool.grown(growth)
        else:
            self.pool.release(growth.new)
        self._held -= Counter({session.owner: freed})
        if session.growth is growth:
            session.used_at, session.growth = now, None
            session.notify()
        self._serve_openings(now)

    def close(self, owner: PeerId, sid: bytes, now: float) -> None:
        """Forget a session; closing one that is not there is fine."""
        session = self._sessions.get((owner, sid))
        if session is not None:
            self._drop(session, SessionEvent.CLOSE)
            self._serve_openings(now)

    def expire(self, now: float) -> None:
        """Drop what has lapsed, and see whether those who wait for room can have it now."""
        for session in list(self._sessions.values()):
            if session.lapsed(now, self.idle_seconds):
                self._drop(session, SessionEvent.LAPSE)
        self._serve_openings(now)

    def quiet_since(self, moment: float) -> bool:
        """Whether no session runs a step now, nor was used after `moment`."""
        return all(not session.in_progress and session.used_at <= moment for session in self._sessions.values())

    def _drop(self, session: Session, event: SessionEvent) -> None:
        """Take a session out. Its rows go back at once, or when its step has left the worker thread."""
        session.advance(event)
        del self._sessions[session.key]
        self._by_owner -= Counter({session.owner: 1})
        self._held -= Counter({session.owner: session.tokens})
        self._unkeep(session)
        session.growth = None
        if session.state is SessionState.ABSENT:
            self.pool.release(session.rows)
        elif session.running is not None and session.running.cancel is not None:
            session.running.cancel()
        session.notify()


def _check_load(step: Step, load: int) -> None:
    rows, tokens, _ = step.tensors[0].shape
    if load + rows * tokens > limits.PEER_QUEUED_TOKENS:
        text = f"{load} tokens of yours wait, with these {rows * tokens} more than {limits.PEER_QUEUED_TOKENS}"
        raise RequestError(ErrorCode.BUSY, text, {"retry": True, "after": 1000})
