"""The client's share of a model: tokenizer, embeddings and head here, the blocks in the swarm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
import trio
from torch import Tensor

from petalite.bloom.lora import stack_adapter
from petalite.client.blocking import Portal
from petalite.client.draft import DraftModel
from petalite.client.given import Given
from petalite.client.parts import LocalParts
from petalite.client.passes import Passes
from petalite.client.remote import RemoteBlocks
from petalite.client.runner import Runner, finished, run_in_thread
from petalite.client.session import InferenceSession, Intervention
from petalite.errors import PetaliteError
from petalite.net.awake import Awake
from petalite.swarm.node import Node
from petalite.wire.tensors import INT8, RAW

T = TypeVar("T")


class Model:
    """A model whose blocks are in the swarm. Made by `Swarm.load`.

    `wire` is the activations' form: "auto" (f16, or bf16 where the servers compute in bf16), "f32", "f16", "bf16" or
    "int8". `notice` gets a quiet line when a server is replaced. `push`: servers may pass activations on among
    themselves. `draft`: a small model that guesses ahead. `runner` runs embeddings, head, and the small model.
    """

    def __init__(
        self,
        node: Node,
        parts: LocalParts,
        *,
        wire: str = "auto",
        notice: Callable[[str], None] | None = None,
        push: bool = True,
        draft: DraftModel | None = None,
        runner: Runner = run_in_thread,
    ) -> None:
        self.node = node
        self.parts = parts
        self.config = parts.config
        self.tokenizer = parts.tokenizer
        self.notice = notice
        self.draft = draft
        self._runner = runner
        self._wire = wire
        self._push = push
        self._choosing = False
        self._awake = Awake()

    async def run(self, function: Callable[[], T], /) -> T:
        """Run our share of the model off the event loop."""
        self._awake.rest()
        return await self._runner(function)

    @property
    def model_id(self) -> bytes:
        return self.parts.manifest.model_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    async def embed(
        self, tokens: Sequence[Sequence[int]], front: Tensor | None = None, pad: Sequence[int] | None = None
    ) -> Tensor:
        """Token ids, rows of one length -> (B, T, C), what enters the first block.

        `front` (P, C): a soft prompt in the place of word embeddings, which goes before each row's tokens, behind the
        row's `pad` ones of padding: (B, P + T, C).
        """
        return await self.run(lambda: self.embed_here(tokens, front, pad))

    def embed_here(
        self, tokens: Sequence[Sequence[int]], front: Tensor | None = None, pad: Sequence[int] | None = None
    ) -> Tensor:
        """`embed`, for a worker thread. Raises PetaliteError for an id outside of the vocabulary."""
        highest = max(max(row) for row in tokens)
        if highest >= self.config.vocab_size or min(min(row) for row in tokens) < 0:
            raise PetaliteError(f"token id {highest} is outside of the vocabulary of {self.config.vocab_size}")
        with torch.inference_mode():
            hidden: Tensor = self.parts.embeddings(
                torch.tensor([list(row) for row in tokens], device=self.parts.device)
            )
            if front is not None:
                normed = self.parts.embeddings.word_embeddings_layernorm(front.to(hidden))
                starts = pad or [0] * len(hidden)
                rows = zip(hidden, starts, strict=True)
                hidden = torch.stack([torch.cat([row[:start], normed, row[start:]]) for row, start in rows])
            return hidden.cpu()

    def logits_here(self, hidden: Tensor) -> Tensor:
        """hidden (B, C) of one position -> logits (B, vocabulary), in float32; for a worker thread."""
        if self.parts.ends is not None:
            return self.parts.ends.logits(hidden)
        with torch.inference_mode():
            weight = self.parts.head.ln_f.weight
            logits: Tensor = self.parts.head(hidden.to(device=weight.device, dtype=weight.dtype))
            return logits.float()

    async def choose(self, hidden: Tensor) -> tuple[list[int], Tensor] | None:
        """hidden (N, C) of one position each -> the likeliest tokens and their embeddings (N, 1, C), made without a
        thread; None where there is no device for that, for too many rows, and while another choice is under way.
        """
        underway = None if self.parts.ends is None or self._choosing else self.parts.ends.begin(hidden)
        if underway is None:
            return None
        self._choosing = True
        try:
            chosen = await finished(underway)
        finally:
            self._choosing = False
        self._awake.came()
        return chosen

    def session(
        self,
        *,
        max_len: int,
        batch: int = 1,
        pad: Sequence[int] | None = None,
        interventions: Mapping[int, Intervention] | None = None,
        adapter: Mapping[str, Tensor] | str | None = None,
        scaling: float = 1.0,
        prompts: Tensor | None = None,
    ) -> InferenceSession:
        """A KV cache of `batch` rows x `max_len` tokens in the swarm; use it as an async context manager.

        `pad[i]` tokens at the start of row i are left padding, which nobody looks at. Servers know no other masks, and
        need none: BLOOM's positions count the tokens of a mask, so a row with holes or padding behind is exactly the
        row of its real tokens. `interventions`: see `InferenceSession`.

        `adapter`: low-rank weights by PEFT's names without "base_model.model.", which travel to each server and are
        `scaling`, alpha / r, times B (A x); or the name of an adapter that servers hold. `prompts` (layers, P, C) are
        added to the input of each block at the first P positions that are not padding. Later changes of these tensors
        do not reach the session.

        Raises PetaliteError if nobody serves the model, ValueError for an option that does not fit it.
        """
        dtype, codec = self._activations()
        return InferenceSession(
            self.node,
            self.model_id,
            layers=self.config.n_layer,
            hidden=self.config.hidden_size,
            batch=batch,
            max_len=max_len,
            dtype=dtype,
            codec=codec,
            pad=pad,
            notice=self.notice,
            push=self._push,
            interventions=interventions,
            given=self._given(adapter, scaling, prompts, max_len),
            runner=self.run,
        )

    def _given(
        self, adapter: Mapping[str, Tensor] | str | None, scaling: float, prompts: Tensor | None, max_len: int
    ) -> Given:
        blocks, width = self.config.n_layer, self.config.hidden_size
        if prompts is not None and (
            prompts.dim() != 3 or prompts.shape[::2] != (blocks, width) or not 1 <= prompts.shape[1] <= max_len
        ):
            raise ValueError(
                f"prompts of shape {tuple(prompts.shape)}, must be ({blocks}, P, {width}) with P at most {max_len}"
            )
        with torch.no_grad():
            return Given(
                prompts=None if prompts is None else prompts.detach().to("cpu", copy=True),
                adapter=stack_adapter(adapter, self.config, 0, blocks, scaling) if isinstance(adapter, Mapping) else {},
                adapter_name=adapter if isinstance(adapter, str) else None,
            )

    @cached_property
    def passes(self) -> Passes:
        """Forward and backward passes through the swarm, for `blocks`."""
        return Passes(self.node, self.model_id, self.config, self._activations, self.notice)

    @property
    def blocks(self) -> RemoteBlocks:
        """All blocks as a differentiable torch module; get it in the event loop, call it in other threads."""
        return RemoteBlocks(self.passes, Portal(trio.lowlevel.current_trio_token()), 0, self.config.n_layer)

    def _activations(self) -> tuple[str, str]:
        if self._wire == "int8":
            return self._auto_dtype(), INT8
        return (self._auto_dtype() if self._wire == "auto" else self._wire), RAW

    def _auto_dtype(self) -> str:
        snapshot = self.node.directory.snapshot(self.model_id)
        computes = {server.dtype for server in snapshot.servers} if snapshot else set()
        return "bf16" if computes == {"bfloat16"} else "f16"
