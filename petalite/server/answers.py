"""What a step is answered with, and what is pushed of it (spec 07)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from petalite import bridge
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.server.scheduler import SHORT_TOKENS
from petalite.server.sessions import Answer, Session
from petalite.wire import messages
from petalite.wire.heads import RepeatedHead
from petalite.wire.tensors import RAW, Descriptor
from petalite.wire.writer import Priority


def answer_of(session: Session, step: messages.Step, output: torch.Tensor) -> Answer:
    """The output (B * T, C) as it goes on the wire. Raises RequestError(TENSOR) for values that cannot."""
    opened = session.open
    batch, tokens, hidden = step.tensors[0].shape
    if step.answered < tokens:  # cut while it is on its device: what nobody wants is not worth the way
        output = output.reshape(batch, tokens, hidden)[:, -step.answered :]
    try:
        shape = (batch, step.answered, hidden)
        tensor, body = bridge.to_wire(output, opened.dtype, opened.codec, shape=shape)
    except LocalProtocolError as error:
        raise RequestError(ErrorCode.TENSOR, f"the result cannot be sent: {error}", {"retry": False}) from error
    return answer_with(session, step, tensor, body)


def answer_with(session: Session, step: messages.Step, tensor: Descriptor, body: Sequence[memoryview]) -> Answer:
    """The answer to `step` that holds `tensor`, whose bytes are `body`."""
    batch, tokens, _ = tensor.shape
    if session.answered is None or session.answered[0] is not tensor:
        session.answered = (tensor, messages.StepReply(n=0, pos=0, tensors=(tensor,)).template("n", "pos"))
    head = RepeatedHead(session.answered[1], n=step.n, pos=step.pos + step.tensors[0].shape[1])
    return Answer(head, body, (tensor,), Priority.STEP if batch * tokens <= SHORT_TOKENS else Priority.BULK)


def push_head(
    session: Session, step: messages.Step, route: Sequence[messages.Hop], tensors: tuple[Descriptor, ...]
) -> Mapping[str, Any]:
    """The pushes of a decoding differ in two numbers only."""
    first, *rest = route
    n = step.n if first.n is None else first.n
    like = (route, step.hypo, step.pad, step.last, tensors)
    if session.pushed is not None and session.pushed[0] == like:
        return RepeatedHead(session.pushed[1], n=n, pos=step.pos)
    push = messages.Push(
        owner=bytes(session.owner),
        sid=first.sid,
        n=n,
        pos=step.pos,
        hypo=step.hypo,
        pad=step.pad,
        last=step.last,
        next=tuple(rest) or None,
        tensors=tensors,
    )
    if all(hop.n is None for hop in route):  # else numbers of the route differ too
        session.pushed = (like, push.template("n", "pos"))
    return push.to_wire()


def stays_raw(tensor: Descriptor, session: Session) -> bool:
    """Whether hidden states come and go as the very bytes that the blocks work with."""
    opened = session.open
    raw = tensor.codec == opened.codec == RAW
    return raw and tensor.dtype == opened.dtype and bridge.torch_dtype(tensor.dtype) == session.span.dtype
