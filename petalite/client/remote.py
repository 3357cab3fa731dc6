"""The blocks of a model in the swarm as a torch module, differentiable through autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import trio
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from petalite.bloom.config import BloomConfig
from petalite.bloom.lora import stack_adapter
from petalite.client.blocking import Portal
from petalite.client.given import Given
from petalite.client.passes import Loss, Pass, Passes
from petalite.errors import LocalProtocolError
from petalite.swarm.snapshot import Span

Adapter = Mapping[str, Tensor] | str | None


class RemoteBlocks(nn.Module):
    """Blocks [start, end) of a model whose servers are in the swarm: `blocks[3:7](hidden)`.

    Call it from ordinary synchronous code in any thread; the loop runs elsewhere. Under Trio, await `forward_async`
    instead; its result is differentiable too, by `await trio.to_thread.run_sync(loss.backward)`. It has no parameters:
    what is trained belongs to the caller.

    Errors of a call, and of a later backward: SessionError where no server can be found within the time for it,
    RequestError where servers agree that a request is our fault, ValueError for arguments that do not fit together.
    """

    def __init__(self, passes: Passes, portal: Portal, start: int, end: int) -> None:
        super().__init__()
        self.start = start
        self.end = end
        self._passes = passes
        self._portal = portal

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int | slice) -> RemoteBlocks:
        """One block, or neighbouring ones, counted from our first."""
        found = range(self.start, self.end)[index]
        if isinstance(found, int):
            found = range(found, found + 1)
        if not found or found.step != 1:
            raise IndexError(f"blocks {index} of {len(self)}: must be one or more neighbours, in order")
        return RemoteBlocks(self._passes, self._portal, found.start, found.stop)

    def __iter__(self) -> Iterator[RemoteBlocks]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        return f"{self.start}:{self.end}"

    def forward(self, hidden: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        """hidden (B, T, C) -> (B, T, C), the last block's output. Options, all None or False by default:

        - `mask` (B, T): nonzero where there is a token. Padding may lie anywhere; ALiBi counts real tokens only, and
          what comes out at the others means nothing.
        - `prompts` (blocks, P, C) or (blocks, B, P, C): added to positions 0..P-1 of each block's input.
        - `adapter`: tensors in PEFT's names without "base_model.model." (`stack_adapter`), those of other blocks are
          left aside; `scaling`: alpha / r, 1 by default. Or the name of an adapter that servers hold.
        - `output_hidden_states`: return what enters each block, before its prompts are added, and the output.

        Differentiable in hidden, prompts and adapter. Results are on hidden's device and in its dtype.
        """
        if trio.lowlevel.in_trio_run():
            raise LocalProtocolError("this would block the event loop: await forward_async, or call it from a thread")
        call = _Arguments(self, hidden, **options)
        return call.results(self._portal.call(call.run))

    async def forward_async(self, hidden: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        """`forward` for Trio code; its deadline is the caller's cancel scope."""
        call = _Arguments(self, hidden, **options)
        return call.results(await call.run())

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)

    def run_backward(self, done: Pass, given: Given, loss: Loss) -> dict[str, Tensor]:
        """For autograd, in whatever thread it runs."""
        if trio.lowlevel.in_trio_run():
            raise LocalProtocolError("backward would block the event loop: call it in a thread (trio.to_thread)")
        return self._portal.call(lambda: self._passes.backward(done, given, loss))

    def start_forward(self, hidden: Tensor, given: Given, taps: bool) -> Any:
        return self._passes.forward(self.span, hidden, given, taps=taps)

    @property
    def config(self) -> BloomConfig:
        return self._passes.config


class _Arguments:
    """One call's arguments, checked; and how its result joins autograd's graph."""

    def __init__(
        self,
        blocks: RemoteBlocks,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        prompts: Tensor | None = None,
        adapter: Adapter = None,
        scaling: float = 1.0,
        output_hidden_states: bool = False,
    ) -> None:
        self.blocks = blocks
        self.hidden = hidden
        self.taps = output_hidden_states
        self.mask = mask
        self.name = adapter if isinstance(adapter, str) else None
        self.inputs = {"h": hidden}
        if prompts is not None:
            self.inputs["prompts"] = prompts
        if isinstance(adapter, Mapping):
            self.inputs |= stack_adapter(adapter, blocks.config, blocks.start, blocks.end, scaling)
        self._check(mask, prompts)

    def _check(self, mask: Tensor | None, prompts: Tensor | None) -> None:
        hidden, C = self.hidden, self.blocks.config.hidden_size
        if hidden.dim() != 3 or hidden.shape[2] != C or not hidden.numel() or not hidden.is_floating_point():
            raise ValueError(f"hidden states are {hidden.dtype} of {tuple(hidden.shape)}, must be floats (B, T, {C})")
        B, T, _ = hidden.shape
        if mask is not None and tuple(mask.shape) != (B, T):
            raise ValueError(f"mask of shape {tuple(mask.shape)}, must be {(B, T)}")
        if prompts is None:
            return
        P = prompts.shape[-2] if prompts.dim() in (3, 4) else 0
        if not 1 <= P <= T or tuple(prompts.shape) not in ((n := len(self.blocks), P, C), (n, B, P, C)):
            raise ValueError(
                f"prompts of shape {tuple(prompts.shape)}, must be (blocks, P, C) or (blocks, B, P, C) with "
                f"{len(self.blocks)} blocks, B = {B}, C = {C} and P at most {T}"
            )

    def given(self, inputs: Mapping[str, Tensor]) -> Given:
        adapter = {name: _local(tensor) for name, tensor in inputs.items() if ".lora_" in name}
        prompts = inputs.get("prompts")
        return Given(
            mask=None if self.mask is None else self.mask.detach().cpu() != 0,
            prompts=None if prompts is None else _local(prompts),
            adapter=adapter,
            adapter_name=self.name,
        )

    async def run(self) -> Pass:
        done: Pass = await self.blocks.start_forward(_local(self.hidden), self.given(self.inputs), self.taps)
        return done

    def results(self, done: Pass) -> Tensor | tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _Attach.apply(self, done, *self.inputs.values())  # type: ignore[no-untyped-call]
        return (self.hidden, *found) if self.taps else found[0]


def _local(tensor: Tensor) -> Tensor:
    """The values, here: what travels is made of these."""
    return tensor.detach().to("cpu")


class _Attach(torch.autograd.Function):
    """Makes the outputs of a pass that is through the children of its inputs."""

    @staticmethod
    def forward(ctx: Any, call: _Arguments, done: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.done = call, done
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        like = call.hidden
        return tuple(tensor.to(device=like.device, dtype=like.dtype) for tensor in (*done.taps, done.output))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, done = ctx.call, ctx.done
        inputs = dict(zip(call.inputs, ctx.saved_tensors, strict=True))
        wanted = frozenset(name for name, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed)
        *taps, output = (None if grad is None else _local(grad).float() for grad in grads)
        loss = Loss(
            torch.zeros(done.output.shape) if output is None else output,
            {block: grad for block, grad in enumerate(taps, start=done.blocks.start + 1) if grad is not None},
            wanted,
        )
        found = call.blocks.run_backward(done, call.given(inputs), loss)
        return (
            None,
            None,
            *(
                found[name].to(device=tensor.device, dtype=tensor.dtype) if name in found else None
                for name, tensor in inputs.items()
            ),
        )
