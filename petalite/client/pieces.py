"""The requests `forward` and `backward` of spec/15 to one server: what is asked, and what counts as an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from petalite import bridge
from petalite.client.calls import Terms, ask, parse_reply
from petalite.client.given import own_dtype
from petalite.errors import PeerLost, RequestError
from petalite.net.connection import Reply
from petalite.swarm.node import Node
from petalite.swarm.routing import Hop
from petalite.wire.tensors import RAW, Descriptor, total_size
from petalite.wire.training import Backward, BackwardReply, Forward, ForwardReply
from petalite.wire.writer import Priority

ACTIVATIONS = ("h", "grad", "taps", "tap_grads")


class TrainingCalls:
    """Each raises RequestError (the server said so), PeerLost or HandshakeError (it is gone, or answered what it must
    not); LocalProtocolError is our own mistake. Tensors go by their names in spec/15.
    """

    def __init__(self, node: Node, terms: Terms) -> None:
        self._node = node
        self._terms = terms

    async def forward(
        self, hop: Hop, tensors: Mapping[str, Tensor], taps: Sequence[int], adapter: str | None
    ) -> dict[str, Tensor]:
        """The output "h", and "taps" if there are some to ask for."""
        descriptors, body = self._encode(tensors)
        request = Forward(
            model=self._terms.model,
            blocks=(hop.blocks.start, hop.blocks.end),
            taps=tuple(taps) or None,
            adapter=adapter,
            tensors=descriptors,
        )
        shape = tuple(tensors["h"].shape)
        due = [self._due("h", shape)]
        if taps:
            due.append(self._due("taps", (len(taps), *shape)))
        reply = await self._ask(hop, "forward", request, body, due)
        return _decode(parse_reply(ForwardReply, reply).tensors, due, reply)

    async def backward(
        self,
        hop: Hop,
        tensors: Mapping[str, Tensor],
        grad: Tensor,
        taps: Mapping[int, Tensor],
        wanted: Sequence[str],
        adapter: str | None,
    ) -> dict[str, Tensor]:
        """The gradients `wanted`, in float32. `taps`: block -> gradient by what entered it."""
        scale = _scale([grad, *taps.values()]) if self._terms.dtype != "f32" else 1.0
        sent = {**tensors, "grad": grad * scale}
        if taps:
            sent["tap_grads"] = torch.stack(list(taps.values())) * scale
        descriptors, body = self._encode(sent)
        request = Backward(
            model=self._terms.model,
            blocks=(hop.blocks.start, hop.blocks.end),
            taps=tuple(taps) or None,
            adapter=adapter,
            wanted=tuple(wanted),
            tensors=descriptors,
        )
        due = [
            self._due(name, tuple(tensors[name].shape))
            if name in ACTIVATIONS
            else Descriptor(name, "f32", tuple(tensors[name].shape))
            for name in wanted
        ]
        reply = await self._ask(hop, "backward", request, body, due)
        found = _decode(parse_reply(BackwardReply, reply).tensors, due, reply)
        return {name: gradient.float() / scale for name, gradient in found.items()}

    async def _ask(
        self, hop: Hop, method: str, request: Forward | Backward, body: list[memoryview], due: Sequence[Descriptor]
    ) -> Reply:
        size = total_size(due)
        return await ask(self._node, hop.peer, method, request.to_wire(), body, priority=Priority.BULK, max_reply=size)

    def _due(self, name: str, shape: tuple[int, ...]) -> Descriptor:
        return Descriptor(name, self._terms.dtype, shape, self._terms.codec)

    def _encode(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Descriptor, ...], list[memoryview]]:
        """Activations as the terms say, the rest as it is, or as float32."""
        descriptors, pieces = [], []
        for name, tensor in tensors.items():
            if name in ACTIVATIONS:
                made, body = bridge.to_wire(tensor, self._terms.dtype, self._terms.codec, name)
            else:
                made, body = bridge.to_wire(tensor, own_dtype(tensor), RAW, name)
            descriptors.append(made)
            pieces += body
        return tuple(descriptors), pieces


def _scale(gradients: Sequence[Tensor]) -> float:
    """The power of two that brings the largest value near 1: small gradients would vanish in half precision, and
    backward is linear in them.
    """
    peak = max(float(gradient.abs().max()) for gradient in gradients)
    exponent = int(torch.frexp(torch.tensor(peak)).exponent) if 0 < peak < float("inf") else 0
    return float(2.0 ** -max(-100, min(100, exponent)))


def _decode(given: Sequence[Descriptor], due: Sequence[Descriptor], reply: Reply) -> dict[str, Tensor]:
    """The tensors, if they are those that are `due`, in that order."""
    if tuple(given) != tuple(due):
        raise PeerLost(f"answered with {_names(given)}, not {_names(due)}")
    made, at = {}, 0
    body = memoryview(reply.body[0])
    try:
        for tensor in due:
            size = tensor.nbytes
            made[tensor.name] = bridge.from_wire(tensor, body[at : at + size])
            at += size
    except RequestError as error:
        raise PeerLost(f"answered wrongly: {error.text}") from error
    return made


def _names(tensors: Sequence[Descriptor]) -> str:
    return ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
