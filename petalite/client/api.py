"""The library: `petalite.join` for Trio, `petalite.connect` for everybody else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import trio
from torch import Tensor

from petalite import __version__
from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.config import BloomConfig
from petalite.client.beams import Beams
from petalite.client.blocking import Portal, open_portal
from petalite.client.draft import load_draft
from petalite.client.generation import (
    Generation,
    Rows,
    TokenRow,
    check_prompts,
    generate_rows,
    list_rows,
    open_session,
    real_tokens,
    step_in_time,
)
from petalite.client.model import Model
from petalite.client.parts import LocalParts, accelerated, load_local_parts
from petalite.client.remote import RemoteBlocks
from petalite.client.sampling import Sampling
from petalite.client.searching import pieces_of, search_rows
from petalite.client.session import InferenceSession, Intervention
from petalite.client.tuning import LoraAdapter, PromptTuning, hidden_states
from petalite.errors import PetaliteError
from petalite.identity import Address, Identity
from petalite.swarm.node import Node, open_node

# How long to look for servers of a model before saying that there are none.
DISCOVERY_SECONDS = 8.0


class RemoteModel(Model):
    """A model in the swarm. Options of the calls are those of `generation_of`."""

    async def generate(self, prompt: str, **options: Any) -> AsyncGenerator[str]:
        """Yield the continuation of `prompt` in pieces as it comes; close the generator to stop early.

        Raises SessionError when the swarm cannot go on, PetaliteError for an empty prompt, ValueError for an option
        out of its range.
        """
        generation = generation_of(**options)
        tokens = self.encode(prompt)
        check_prompts([tokens])
        max_len, beams = len(tokens) + generation.max_new_tokens, generation.beams.count
        async with open_session(self, generation, max_len=max_len, batch=beams) as session:
            row = TokenRow(self, generation)
            async with aclosing(pieces_of(self, session, tokens, [], generation, row)) as pieces:
                async for piece in pieces:
                    if piece:
                        yield piece

    async def generate_text(self, prompt: str, **options: Any) -> str:
        """`prompt`'s continuation, whole."""
        return "".join([piece async for piece in self.generate(prompt, **options)])

    async def generate_batch(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """The continuations of several prompts, computed as one batch; with `num_return_sequences` so many of each."""
        return [row.text for row in await self._rows([self.encode(prompt) for prompt in prompts], options)]

    async def generate_ids(self, prompts: Rows, attention_mask: Rows | None = None, **options: Any) -> list[list[int]]:
        """As `generate_batch`, from token ids to the new token ids, an end token included.

        Rows may differ in length. `attention_mask`, of the prompts' shape, is 0 at tokens that are not there: padding
        on either side, and holes (`real_tokens`). What comes next follows the last real token, where transformers takes
        the last one of the row, padding or not.
        """
        rows = list_rows(prompts) if attention_mask is None else real_tokens(prompts, attention_mask)
        return [row.tokens for row in await self._rows(rows, options)]

    async def _rows(self, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> list[TokenRow]:
        generation = generation_of(**options)
        how = generate_rows if generation.beams.count == 1 else search_rows
        return await how(self, prompts, generation)


def generation_of(
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    speculate: bool = True,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    interventions: Mapping[int, Intervention] | None = None,
    adapter: LoraAdapter | Mapping[str, Tensor] | str | None = None,
    scaling: float = 1.0,
    soft_prompt: PromptTuning | None = None,
    deep_prompts: Tensor | None = None,
    prompt_embeddings: Tensor | None = None,
) -> Generation:
    """Options of a generation; temperature 0 is greedy, `num_beams` above 1 a beam search.

    `speculate`: send guesses of the next tokens along where that saves time; the text is the same.
    `interventions`: functions of the hidden states between blocks, see `InferenceSession`. `adapter`: ours, or the name
    of one that servers hold. `soft_prompt`: trained inputs before the words. Whoever has bare tensors instead gives the
    adapter's with `scaling`, and `prompt_embeddings` (P, C) and `deep_prompts` (layers, P, C): see `Model.session`.

    Raises ValueError for a number out of its range.
    """
    if isinstance(adapter, LoraAdapter):
        scaling, adapter = adapter.scaling, adapter.tensors
    if soft_prompt is not None:
        prompt_embeddings, deep_prompts = soft_prompt.prompt_embeddings, soft_prompt.deep_prompts
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    beams = Beams(
        count=num_beams, length_penalty=length_penalty, early_stopping=early_stopping, returned=num_return_sequences
    )
    return Generation(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=tuple(stop),
        speculate=speculate,
        beams=beams,
        interventions=interventions or {},
        adapter=adapter,
        scaling=scaling,
        deep_prompts=deep_prompts,
        prompt_embeddings=prompt_embeddings,
    )


class Swarm:
    """What `join` gives: this peer among the others."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def load(
        self,
        model: str,
        *,
        wire: str = "auto",
        device: str = "cpu",
        notice: Callable[[str], None] | None = None,
        push: bool = True,
        draft: str | None = None,
    ) -> RemoteModel:
        """Load the client's share of `model` and find its servers.

        `model` is "fairytale", a directory in Hugging Face layout, or a hub name; `push`: servers may pass activations
        on among themselves; `draft`: a small BLOOM of the same vocabulary that runs here whole and guesses ahead, named
        like `model`. Raises CheckpointError, and PetaliteError when no server of these very weights is found.
        """
        if wire not in ("auto", "f32", "f16", "bf16", "int8"):
            raise ValueError(f"wire must be auto, f32, f16, bf16 or int8, not {wire!r}")

        def load() -> LocalParts:
            return accelerated(load_local_parts(model, device))

        parts = await trio.to_thread.run_sync(load, abandon_on_cancel=True)  # others are found meanwhile
        config = parts.config
        self.node.directory.watch(parts.manifest.model_id, config.n_layer, config.hidden_size)
        small = None
        if draft is not None:
            small = await trio.to_thread.run_sync(load_draft, draft, parts, abandon_on_cancel=True)
        await self._find_servers(parts)
        return RemoteModel(self.node, parts, wire=wire, notice=notice, push=push, draft=small)

    async def _find_servers(self, parts: LocalParts) -> None:
        """Wait until every block has a server; raises PetaliteError that says what is missing and why."""
        directory, model = self.node.directory, parts.manifest.model_id
        with trio.move_on_after(DISCOVERY_SECONDS):
            while True:
                await directory.refresh()
                snapshot = directory.snapshot(model)
                if snapshot is not None and not snapshot.gaps():
                    return
                if not self.node.may_find_more:
                    break
                changed = directory.changed
                with trio.move_on_after(0.5):
                    await changed.wait()
        raise PetaliteError(_what_is_missing(self.node, parts))


def _what_is_missing(node: Node, parts: LocalParts) -> str:
    directory, model = node.directory, parts.manifest.model_id
    snapshot = directory.snapshot(model)
    name = f"{parts.name} ({model.hex()[:8]}..)"
    if snapshot is not None:
        text = f"blocks {', '.join(map(str, snapshot.gaps()))} of {name} are held by nobody"
    else:
        text = f"no server of {name} was found"
    others = [f"{info.name} ({key.hex()[:8]}..)" for key, info in directory.models().items() if key != model]
    if others:
        text += f"; served here: {', '.join(others)}"
    if not directory.entries:
        return f"{text}; no peer is known: give one with --peer"
    return "; ".join([text, *directory.problems()])


@asynccontextmanager
async def join(
    peers: Sequence[str | Address] = (),
    *,
    lan: bool | None = None,
    lan_interface: str | None = None,
    **options: Any,
) -> AsyncIterator[Swarm]:
    """Join a swarm under a fresh identity: `async with petalite.join() as swarm` finds it on the LAN.

    `peers` are addresses (petalite://PEER_ID@HOST:PORT) to begin with. The LAN is searched if `lan` says so, or by
    default where no peer is given; `lan_interface` is the address of the only interface to search. Other options as
    for `Endpoint`. Raises ValueError for a malformed address.
    """
    addresses = [Address.parse(peer) if isinstance(peer, str) else peer for peer in peers]
    options.setdefault("agent", f"petalite/{__version__}")
    identity = options.pop("identity", None) or Identity.generate()
    async with open_node(identity, peers=addresses, **options) as node:
        await node.start(lan=not addresses if lan is None else lan, lan_interface=lan_interface)
        yield Swarm(node)


class BlockingModel:
    """`RemoteModel` for code without an event loop."""

    def __init__(self, portal: Portal, model: RemoteModel) -> None:
        self._portal = portal
        self.remote = model

    def generate(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yield the continuation of `prompt` in pieces as it comes."""
        return self._portal.iterate(lambda: self.remote.generate(prompt, **options))

    def generate_text(self, prompt: str, **options: Any) -> str:
        """`prompt`'s continuation, whole."""
        return self._portal.call(lambda: self.remote.generate_text(prompt, **options))

    def generate_batch(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """The continuations of several prompts, computed as one batch."""
        return self._portal.call(lambda: self.remote.generate_batch(prompts, **options))

    def generate_ids(self, prompts: Rows, attention_mask: Rows | None = None, **options: Any) -> list[list[int]]:
        """As `generate_batch`, for token ids; see `RemoteModel.generate_ids`."""
        return self._portal.call(lambda: self.remote.generate_ids(prompts, attention_mask, **options))

    @property
    def config(self) -> BloomConfig:
        return self.remote.config

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""
        return self.remote.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids to text, special tokens left out."""
        return self.remote.decode(tokens)

    @property
    def embeddings(self) -> Embeddings:
        """Token ids to the first block's input; its weights are frozen."""
        return self.remote.parts.embeddings

    @property
    def head(self) -> Head:
        """The last block's output to logits; its weights are frozen."""
        return self.remote.parts.head

    @cached_property
    def blocks(self) -> RemoteBlocks:
        """All blocks as a differentiable torch module."""
        return RemoteBlocks(self.remote.passes, self._portal, 0, self.remote.config.n_layer)

    def logits(self, ids: Tensor, **tuning: Any) -> Tensor:
        """Token ids (B, T) -> logits (B, T, vocabulary), differentiable; the options are those of `hidden_states`."""
        logits: Tensor = self.head(hidden_states(self, ids, **tuning))
        return logits

    def session(self, *, max_len: int, **options: Any) -> BlockingSession:
        """A KV cache in the swarm; see `Model.session`."""
        session = self._portal.call_now(lambda: self.remote.session(max_len=max_len, **options))
        return BlockingSession(self._portal, session)


class BlockingSession:
    """`InferenceSession` for code without an event loop; leaving it as a context manager closes it."""

    def __init__(self, portal: Portal, session: InferenceSession) -> None:
        self._portal = portal
        self.remote = session

    @property
    def position(self) -> int:
        """Tokens cached so far."""
        return self.remote.position

    def step(self, hidden: Tensor, *, last: int | None = None) -> Tensor:
        """Hidden states (B, T, C) behind what is cached -> (B, T, C), survived losses of servers included; of the
        `last` tokens only where that is given.

        Raises SessionError when the swarm does not answer in time.
        """
        return self._portal.call(lambda: step_in_time(self.remote, hidden, last=last))

    def truncate(self, position: int) -> None:
        """Forget the tokens at and behind `position`."""
        self._portal.call_now(lambda: self.remote.truncate(position))

    def reorder(self, sources: Sequence[int]) -> None:
        """Row i becomes what row sources[i] was (beam search)."""
        self._portal.call_now(lambda: self.remote.reorder(sources))

    def close(self) -> None:
        """Tell the servers that they may forget."""
        self._portal.call(self.remote.close)

    def __enter__(self) -> BlockingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BlockingSwarm:
    """`Swarm` for code without an event loop."""

    def __init__(self, portal: Portal, swarm: Swarm) -> None:
        self._portal = portal
        self.remote = swarm

    def load(self, model: str, **options: Any) -> BlockingModel:
        """Load the client's share of `model` and find its servers; see `Swarm.load`."""
        return BlockingModel(self._portal, self._portal.call(lambda: self.remote.load(model, **options)))


@contextmanager
def connect(peers: Sequence[str | Address] = (), **options: Any) -> Iterator[BlockingSwarm]:
    """`join` for notebooks and scripts: the event loop runs in a thread of its own while the block lasts."""
    with open_portal(lambda: join(peers, **options)) as (portal, swarm):
        yield BlockingSwarm(portal, swarm)
