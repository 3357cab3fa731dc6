"""Answers `forward` and `backward` (spec/15): whole sequences through any of the blocks served, nothing kept between.

A request is checked against its limits, then waits in the executor behind all inference. What it holds goes with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping

import trio
from torch import Tensor

from petalite import bridge, limits
from petalite.bloom.span import Span
from petalite.bloom.training import Extras, backward_pass, forward_pass, pass_bytes
from petalite.errors import ErrorCode, LocalProtocolError, RequestError
from petalite.identity import PeerId
from petalite.net.call import Call, Reply
from petalite.server.additions import Adapters
from petalite.server.executor import Executor
from petalite.server.scheduler import Job
from petalite.wire.tensors import RAW, Descriptor, total_size
from petalite.wire.training import Backward, BackwardReply, Forward, ForwardReply
from petalite.wire.writer import Priority

Passing = Generator[None, None, Reply]


class Training:
    """The training requests of one served span. `subspan(model, blocks)` gives some of its blocks, or raises
    RequestError for what is not served; `admitting` says whether new requests are taken.
    """

    def __init__(
        self,
        executor: Executor,
        subspan: Callable[[bytes, tuple[int, int]], Span],
        first: int,
        adapters: Adapters,
        admitting: Callable[[], bool],
    ) -> None:
        self._executor = executor
        self._subspan = subspan
        self._first = first
        self._adapters = adapters
        self._admitting = admitting
        self._load: Counter[PeerId] = Counter()

    @property
    def busy(self) -> bool:
        """A request waits or runs."""
        return bool(self._load)

    async def forward(self, call: Call) -> Reply:
        request = Forward.from_wire(call.head)
        return await self._run(call, request, lambda span: self._forward(span, request, call.body))

    async def backward(self, call: Call) -> Reply:
        request = Backward.from_wire(call.head)
        return await self._run(call, request, lambda span: self._backward(span, request, call.body))

    # Admission

    async def _run(self, call: Call, request: Forward | Backward, start: Callable[[Span], Passing]) -> Reply:
        span = self._admit(call, request)
        batch, tokens, _ = request.tensors[0].shape
        ended = trio.Event()
        job = Job(
            owner=call.peer,
            group=None,
            batch=batch,
            tokens=tokens,
            blocks=span.end - span.start,
            started=lambda: call.progress("running"),
            settled=ended.set,
            work=start(span),
            training=True,
        )
        self._load[call.peer] += job.size
        call.progress("queued")
        self._executor.add(job)
        try:
            await ended.wait()
        finally:
            self._load -= Counter({call.peer: job.size})
            if not ended.is_set():
                self._executor.cancel(job)
        if job.error is not None:
            raise job.error
        reply: Reply = job.result
        return reply

    def _admit(self, call: Call, request: Forward | Backward) -> Span:
        """Refuse what is not served, or too much, before any tensor is made."""
        if not self._admitting():
            raise RequestError(ErrorCode.UNAVAILABLE, "draining: no new requests", {"retry": True, "elsewhere": True})
        span = self._subspan(request.model, request.blocks)
        batch, tokens, hidden = _activations(request).shape
        if hidden != span.config.hidden_size:
            text = f"tensor 'h' has {hidden} columns, the model's hidden size is {span.config.hidden_size}"
            raise RequestError(ErrorCode.TENSOR, text)
        if request.adapter is not None and request.adapter not in self._adapters:
            raise RequestError(ErrorCode.NOT_SERVED, f"no adapter {request.adapter!a} is held here")
        size = total_size(request.tensors)
        if size != len(call.body):
            raise RequestError(ErrorCode.TENSOR, f"body of {len(call.body)} bytes, the tensors have {size}")
        self._check_room(span, call.peer, batch, tokens, isinstance(request, Backward))
        return span

    def _check_room(self, span: Span, peer: PeerId, batch: int, tokens: int, backward: bool) -> None:
        if batch * tokens > limits.MAX_TRAINING_TOKENS:
            text = f"{batch} x {tokens} tokens in one request, limit {limits.MAX_TRAINING_TOKENS}"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": False})
        needed = pass_bytes(
            span.config, span.end - span.start, batch, tokens, backward=backward, itemsize=span.dtype.itemsize
        )
        if needed > limits.MAX_TRAINING_BYTES:
            text = f"about {needed >> 20} MiB of memory for rows of {tokens} tokens through {span.end - span.start} "
            text += f"blocks, limit {limits.MAX_TRAINING_BYTES >> 20}: ask for fewer blocks or tokens"
            raise RequestError(ErrorCode.RESOURCES, text, {"retry": False})
        load = self._load[peer]
        if load and load + batch * tokens > limits.PEER_TRAINING_TOKENS:
            text = f"{load} tokens of yours wait, with these {batch * tokens} more than {limits.PEER_TRAINING_TOKENS}"
            raise RequestError(ErrorCode.BUSY, text, {"retry": True, "after": 1000})

    # In the worker thread, a block at a time

    def _forward(self, span: Span, request: Forward, body: bytearray) -> Passing:
        given = _decode(request.tensors, body, span)
        taps = tuple(block - span.start for block in request.taps or ())
        output, tapped = yield from forward_pass(span, given["h"], self._extras(span, request, given), taps)
        like = _activations(request)
        found = {"h": output} if tapped is None else {"h": output, "taps": tapped}
        tensors, pieces = _encode(found, dict.fromkeys(found, like))
        return Reply(ForwardReply(tensors=tensors).to_wire(), pieces, Priority.BULK)

    def _backward(self, span: Span, request: Backward, body: bytearray) -> Passing:
        given = _decode(request.tensors, body, span)
        taps = tuple(block - span.start for block in request.taps or ())
        gradients = yield from backward_pass(
            span,
            given["h"],
            self._extras(span, request, given),
            given["grad"],
            request.wanted,
            taps,
            given.get("tap_grads"),
        )
        found = {name: gradients[name] for name in request.wanted}
        tensors, pieces = _encode(found, {"h": _activations(request)})
        return Reply(BackwardReply(tensors=tensors).to_wire(), pieces, Priority.BULK)

    def _extras(self, span: Span, request: Forward | Backward, given: dict[str, Tensor]) -> Extras:
        mask = given.pop("mask", None)
        adapter = {name: tensor for name, tensor in given.items() if ".lora_" in name}
        if request.adapter is not None:
            blocks = slice(span.start - self._first, span.end - self._first)
            adapter = {name: tensor[blocks] for name, tensor in self._adapters[request.adapter].items()}
        return Extras(None if mask is None else mask.bool(), given.get("prompts"), adapter)


def _activations(request: Forward | Backward) -> Descriptor:
    return next(tensor for tensor in request.tensors if tensor.name == "h")


def _decode(tensors: tuple[Descriptor, ...], body: bytearray, span: Span) -> dict[str, Tensor]:
    """Activations in the span's dtype; prompts and adapters as they came."""
    made = {}
    view, at = memoryview(body), 0
    for tensor, size in ((tensor, total_size((tensor,))) for tensor in tensors):
        dtype = span.dtype if tensor.name in ("h", "grad", "tap_grads") else None
        made[tensor.name] = bridge.from_wire(tensor, view[at : at + size], span.device, dtype)
        at += size
    if "mask" in made and int(made["mask"].max()) > 1:
        raise RequestError(ErrorCode.TENSOR, "tensor 'mask': a value other than 0 and 1")
    return made


def _encode(
    found: Mapping[str, Tensor], like: Mapping[str, Descriptor]
) -> tuple[tuple[Descriptor, ...], list[memoryview]]:
    """Tensors in the type and codec of those they are `like`, others as they are."""
    tensors, pieces = [], []
    try:
        for name, values in found.items():
            as_ = like.get(name)
            dtype, codec = (as_.dtype, as_.codec) if as_ else (bridge.wire_dtype(values.dtype), RAW)
            tensor, body = bridge.to_wire(values, dtype, codec, name)
            tensors.append(tensor)
            pieces += body
    except LocalProtocolError as error:
        raise RequestError(ErrorCode.TENSOR, f"the result cannot be sent: {error}", {"retry": False}) from error
    return tuple(tensors), pieces
