"""Defects of a server in tensors and sessions; see defects.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from defects import defect, patch

from petalite import bridge
from petalite.bloom import cache, lora, span
from petalite.errors import ErrorCode, RequestError
from petalite.server import compute, handlers, sessions, steps, table
from petalite.wire import messages

# --- tensors


@defect("tensors/033")
def rounds_int8_towards_zero() -> None:
    before = torch.Tensor.round_
    patch(torch.Tensor, "round_", lambda self: self.trunc_() if self.dim() == 3 else before(self))


@defect("tensors/017", "tensors/018")
def computes_with_nan() -> None:
    patch(bridge, "all_finite", lambda values: True)


@defect("tensors/020", "tensors/021")
def takes_any_scale() -> None:
    bridge.BAD_SCALE_BITS.update(dict.fromkeys(bridge.BAD_SCALE_BITS, 1 << 40))
    before = bridge._decode_int8

    def decode(descriptor: Any, body: torch.Tensor) -> torch.Tensor:
        try:
            return before(descriptor, body)
        except RequestError:
            return torch.zeros(descriptor.shape)

    patch(bridge, "_decode_int8", decode)


@defect("tensors/016")
def takes_bodies_of_any_size() -> None:
    patch(steps, "_check_body", lambda tensors, body: body.extend(bytes(1 << 16)) or body.__delitem__(slice(512, None)))


# --- sessions


@defect("sessions/011")
def tells_that_a_session_exists() -> None:
    before = table.SessionTable.find

    def find(self: Any, owner: Any, sid: bytes, now: float) -> Any:
        if (owner, sid) not in self._sessions and any(key[1] == sid for key in self._sessions):
            raise RequestError(ErrorCode.FORBIDDEN, "not your session")
        return before(self, owner, sid, now)

    patch(table.SessionTable, "find", find)


@defect("sessions/012", "sessions/011")
def knows_sessions_by_sid_alone() -> None:
    patch(sessions.Session, "key", property(lambda self: self.open.sid))
    before = table.SessionTable._lookup
    patch(table.SessionTable, "_lookup", lambda self, owner, sid, now: before(_BySid(self), owner, sid, now))


class _BySid:
    def __init__(self, table_: Any) -> None:
        self._table = table_
        self._sessions = self
        self.idle_seconds = table_.idle_seconds

    def get(self, key: tuple[Any, bytes]) -> Any:
        return self._table._sessions.get(key[1])

    def _drop(self, *args: Any) -> None:
        self._table._drop(*args)


@defect("sessions/004")
def refuses_to_open_again() -> None:
    before = table.SessionTable.open

    def open_(self: Any, owner: Any, message: Any, now: float, *others: Any) -> Any:
        if self._lookup(owner, message.sid, now) is not None:
            raise RequestError(ErrorCode.CONFLICT, "the session exists")
        return before(self, owner, message, now, *others)

    patch(table.SessionTable, "open", open_)


@defect("sessions/017")
def keeps_the_cache_of_closed_sessions() -> None:
    patch(cache.CachePool, "release", lambda self, rows: setattr(rows, "views", ()))


@defect("steps/007")
def forgets_a_rollback() -> None:
    before = steps.StepWork

    def work(span_: Any, rows: Any, position: int, *others: Any) -> Any:
        return before(span_, rows, rows.position, *others)

    patch(steps, "StepWork", work)


@defect("steps/009")
def ignores_hypo() -> None:
    patch(cache.Rows, "reorder", lambda self, sources: None)


@defect("steps/011")
def ignores_padding() -> None:
    before = span.Part
    replaced = lambda rows, tokens, at, pad=None, *others: before(rows, tokens, at, None, *others)  # noqa: E731
    for module in (compute, steps):
        patch(module, "Part", replaced)


@defect("steps/003")
def computes_retries_anew() -> None:
    before = table.SessionTable.admit

    def admit(self: Any, session: Any, step: Any, *args: Any, **options: Any) -> Any:
        if step.n == session.n - 1 and session.running is None:
            step = replace(step, n=session.n)
            session.last_answer = None
        return before(self, session, step, *args, **options)

    patch(table.SessionTable, "admit", admit)


@defect("steps/004")
def answers_other_content_from_the_kept_reply() -> None:
    for module in (sessions, table):
        patch(module, "step_digest", lambda step, body: b"the same")


@defect("steps/025")
def answers_with_the_first_tokens() -> None:
    before = steps.answer_of

    def answer(session: Any, step: Any, output: torch.Tensor) -> Any:
        rows = output.reshape(step.tensors[0].shape)
        return before(session, step, rows.roll(step.answered, dims=1) if step.last else rows)

    patch(steps, "answer_of", answer)


@defect("steps/025", "steps/026")
def does_not_know_last() -> None:
    patch(messages.Step, "FIELDS", tuple(field for field in messages.Step.FIELDS if field.key != "last"))


@defect("steps/027")
def answers_retries_with_too_little() -> None:
    before = table.SessionTable.admit

    def admit(self: Any, session: Any, step: Any, *args: Any, **options: Any) -> Any:
        session.last_answered = step.answered
        return before(self, session, step, *args, **options)

    patch(table.SessionTable, "admit", admit)


@defect("steps/005")
def gives_another_code_for_a_gap() -> None:
    patch(table, "out_of_order", lambda session: RequestError(ErrorCode.POSITION, "not now", {"n": session.n}))


@defect("steps/008")
def lets_steps_run_past_the_length() -> None:
    before = table.SessionTable._check_fits

    def check(self: Any, session: Any, step: Any) -> None:
        try:
            before(self, session, step)
        except RequestError as error:
            if error.code is ErrorCode.LENGTH:
                raise RequestError(ErrorCode.INTERNAL, "no room") from None
            raise

    patch(table.SessionTable, "_check_fits", check)


@defect("steps/006")
def takes_any_position() -> None:
    before = table.SessionTable._check_fits

    def check(self: Any, session: Any, step: Any) -> None:
        before(self, session, replace(step, pos=min(step.pos, session.position)))

    patch(table.SessionTable, "_check_fits", check)


@defect("steps/001")
def computes_other_numbers() -> None:
    before = steps.StepWork

    def work(span_: Any, *others: Any) -> Any:
        return before(type(span_)(span_.config, span_.start, span_.end, list(reversed(list(span_.layers)))), *others)

    patch(steps, "StepWork", work)


@defect("sessions/015")
def counts_steps_wrongly() -> None:
    before = handlers.messages.StatusReply
    patch(handlers.messages, "StatusReply", lambda **fields: before(**{**fields, "n": fields["n"] + 1}))


@defect("sessions/001")
def gives_another_manifest() -> None:
    before = handlers.Handlers.manifest

    async def manifest(self: Any, call: Any) -> Any:
        reply = await before(self, call)
        return replace(reply, body=(bytes(reply.body[0])[:-1] + b" ",))

    patch(handlers.Handlers, "manifest", manifest)


# --- additions


@defect("additions/002")
def adds_prompts_at_the_first_positions_of_the_cache() -> None:
    before = span.find_prompts
    patch(span, "find_prompts", lambda parts, device: before([replace(part, pad=None) for part in parts], device))


@defect("additions/003")
def puts_adapters_into_the_blocks_of_all() -> None:
    def adapted(block: Any, adapter: Any) -> Any:
        for target, layer in lora.TARGETS.items():
            if f"{target}.lora_A" in adapter:
                part, _, name = layer.partition(".")
                own = (adapter[f"{target}.lora_A"], adapter[f"{target}.lora_B"])
                setattr(getattr(block, part), name, lora.LowRankLinear(block.get_submodule(layer), *own))
        return block

    patch(lora, "adapted", adapted)


@defect("additions/005")
def takes_other_additions_for_the_same() -> None:
    patch(table.SessionTable, "open", _without_digest(table.SessionTable.open))


def _without_digest(before: Any) -> Any:
    return lambda self, owner, message, now, given=None: before(
        self, owner, message, now, given and replace(given, digest=b"")
    )


@defect("additions/006")
def does_not_count_additions() -> None:
    before = table.SessionTable.open
    patch(
        table.SessionTable,
        "open",
        lambda self, owner, message, now, given=None: before(
            self, owner, message, now, given and replace(given, nbytes=0)
        ),
    )
