"""What a session adds to the model: an adapter, sent or held here, and deep prompts (spec/07, additions)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from petalite import bridge
from petalite.bloom.fast import FastSpan
from petalite.bloom.lora import adapted_span
from petalite.bloom.span import Span
from petalite.errors import ErrorCode, RequestError
from petalite.wire.additions import width_of
from petalite.wire.messages import Open
from petalite.wire.tensors import total_size

log = logging.getLogger("petalite.server")

Adapters = Mapping[str, Mapping[str, Tensor]]
"""By name: adapters for all blocks served, stacked: "query_key_value.lora_A" -> (blocks, r, in); see bloom/lora.py."""


@dataclass(frozen=True, slots=True)
class Additions:
    """The blocks that a session runs through, its adapter in them, and deep prompts (blocks, P, C).

    `nbytes`: memory of what is the session's own; `digest` tells it from another's.
    """

    span: Span
    prompts: Tensor | None = None
    nbytes: int = 0
    digest: bytes = b""


def check_additions(message: Open, body: bytearray, span: Span) -> None:
    """Whether what an open brings fits `span`, before any of it is decoded. Raises RequestError."""
    tensors = message.tensors or ()
    size = total_size(tensors)
    if size != len(body):
        raise RequestError(ErrorCode.TENSOR, f"body of {len(body)} bytes, the tensors have {size}")
    if tensors and width_of(tensors) != span.config.hidden_size:
        text = f"tensors for a hidden size of {width_of(tensors)}, the model's is {span.config.hidden_size}"
        raise RequestError(ErrorCode.TENSOR, text)


def decode_additions(message: Open, body: bytearray, span: Span) -> Additions:
    """The tensors of a checked open in the dtype and on the device of `span`. Raises RequestError(TENSOR)."""
    made: dict[str, Tensor] = {}
    view, at = memoryview(body), 0
    for tensor in message.tensors or ():
        size = tensor.nbytes
        made[tensor.name] = bridge.from_wire(tensor, view[at : at + size], span.device, span.dtype)
        at += size
    nbytes = sum(tensor.numel() * tensor.itemsize for tensor in made.values())
    prompts = made.pop("prompts", None)
    return Additions(with_adapter(span, made), prompts, nbytes, hashlib.sha256(body).digest())


def with_adapter(span: Span, adapter: Mapping[str, Tensor]) -> Span:
    """`span`'s blocks with an adapter, for the sessions that have it: they share no batch with others."""
    if not adapter:
        return span
    if isinstance(span, FastSpan):
        log.info("steps with an adapter run without CUDA graphs, which hold the model's own weights")
    return adapted_span(span, adapter)
