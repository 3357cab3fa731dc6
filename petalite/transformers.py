"""The transformers way: BLOOM models of the transformers library whose blocks are in the swarm.

    from petalite.transformers import RemoteBloomForCausalLM

    with petalite.connect() as swarm:
        model = RemoteBloomForCausalLM(swarm.load("fairytale"))  # instead of BloomForCausalLM.from_pretrained(...)

`generate`, `Trainer`, and PEFT's prompt tuning and P-tuning go on as with a local model. Attention weights and weights
of blocks are not here, so `output_attentions` and PEFT's methods that change layers are not for these models. For LoRA
give them a `petalite.LoraAdapter`, trained like any parameter and saved in PEFT's format, or the name of an adapter
that servers hold.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from petalite.client.api import BlockingModel, BlockingSession
from petalite.client.tuning import LoraAdapter, adapter_options

try:
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        BloomForSequenceClassification,
        BloomModel,
        GenerationConfig,
    )
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
except ImportError as error:
    raise ImportError(
        "petalite.transformers needs transformers 4.56 or newer: pip install 'petalite[transformers]'"
    ) from error

# Tokens of room that a cache begins with behind the first step's; it grows by itself.
ROOM = 128


class RemoteCache(Cache):  # type: ignore[misc]  # transformers has no types
    """Keys and values that servers hold: one inference session behind the interface of transformers' caches.

    `generate` makes one by itself and closes it at the end. Give it one of yours to go on from where it ended:
    `with RemoteCache(remote) as cache: model.generate(..., past_key_values=cache)`.

    The first step may be padded on any side; later ones bring real tokens only. Where hidden states are asked for,
    they must be from the first step on: all tokens so far are then computed again at each step, as no server keeps
    what lies between its blocks.
    """

    def __init__(self, remote: BlockingModel, adapter: LoraAdapter | str | None = None) -> None:
        super().__init__(layers=[])
        self._remote = remote
        self._adapter = adapter
        self._session: BlockingSession | None = None
        self._inputs: Tensor | None = None  # where hidden states are asked for: all so far, and no session
        self._first: Tensor | None = None  # mask (B, T) of the first step, None where all tokens were real

    def __enter__(self) -> RemoteCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reset()

    def step(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden (B, T, C) behind what is cached -> (B, T, C). `mask` (B, cached + T) as transformers gives it.

        Raises ValueError for padding behind the first step, and what an inference session raises.
        """
        if self._inputs is not None:
            raise ValueError("a cache that began with output_hidden_states=True must go on with it")
        B, T, _ = hidden.shape
        if self._session is not None:
            self._check_behind(mask, T)
            return self._session.step(hidden.cpu()).to(hidden)
        self._first = _padded(mask, T)
        pad = None if self._first is None else (T - self._first.sum(dim=1)).tolist()
        adapter = adapter_options(self._adapter)
        self._session = self._remote.session(batch=B, max_len=T + ROOM, pad=pad, **adapter)
        if self._first is None:
            return self._session.step(hidden.cpu()).to(hidden)
        # Servers know padding on the left: a row's masked tokens go there, in whatever order, as nobody looks at them.
        order = self._first.to(torch.int8).argsort(dim=1, stable=True)[:, :, None].expand_as(hidden).to(hidden.device)
        output = self._session.step(hidden.gather(1, order).cpu()).to(hidden)
        return torch.empty_like(output).scatter_(1, order, output)

    def step_hidden_states(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """`step`, giving hidden states (B, T, C) before the first block and after each."""
        if self._session is not None:
            raise ValueError("a cache that began without output_hidden_states=True must go on without it")
        T = hidden.shape[1]
        if self._inputs is None:
            self._inputs, self._first = hidden, _padded(mask, T)
        else:
            self._check_behind(mask, T)
            self._inputs = torch.cat([self._inputs, hidden], dim=1)
        whole = None
        if self._first is not None:
            new = self._inputs.shape[1] - self._first.shape[1]
            whole = nn.functional.pad(self._first, (0, new), value=True)
        adapter = adapter_options(self._adapter)
        states = self._remote.blocks(self._inputs, mask=whole, output_hidden_states=True, **adapter)
        return tuple(state[:, -T:] for state in states)

    def _check_behind(self, mask: Tensor | None, tokens: int) -> None:
        if _padded(None if mask is None else mask[:, -tokens:], tokens) is not None:
            raise ValueError("padding behind the first step: the servers' caches hold it in front of a row only")

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self._inputs is not None:
            return self._inputs.shape[1]
        return 0 if self._session is None else self._session.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit but the servers' memory

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last tokens, a negative number; transformers 4 also says how many are to stay."""
        position = tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
        if self._first is not None and position < self._first.shape[1]:
            raise ValueError("a padded first step cannot be cropped")
        if self._inputs is not None:
            self._inputs = self._inputs[:, :position]
        elif self._session is not None:
            self._session.truncate(position)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self._first is not None:
            self._first = self._first[beam_idx]
        if self._inputs is not None:
            self._inputs = self._inputs[beam_idx.to(self._inputs.device)]
        elif self._session is not None:
            self._session.reorder(beam_idx.tolist())

    def reset(self) -> None:
        """Forget everything, on the servers too."""
        session, self._session = self._session, None
        self._inputs = self._first = None
        if session is not None:
            session.close()


def _padded(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A mask (B, T) as bool; None where every token is real. Raises ValueError for one of another form."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != tokens:
        raise ValueError(f"an attention mask of shape {list(mask.shape)}, due is (batch, {tokens})")
    real = mask.cpu() != 0
    return None if bool(real.all()) else real


class RemoteBloomModel(BloomModel):  # type: ignore[misc]
    """transformers' BloomModel over servers: `h`, the blocks, is `model.blocks` of the swarm's model.

    Embeddings and norms are those of `remote`, shared and frozen. Without `past_key_values` every call is a stateless
    pass that gradients flow back through; only `use_cache=True` or a `RemoteCache` makes servers keep anything.
    """

    def __init__(self, remote: BlockingModel, adapter: LoraAdapter | str | None = None, **config: Any) -> None:
        with torch.device("meta"):  # its own weights are never made
            super().__init__(_config(remote, config))
        self.remote = remote
        self.adapter = adapter
        self.word_embeddings = remote.embeddings.word_embeddings
        self.word_embeddings_layernorm = remote.embeddings.word_embeddings_layernorm
        self.h = remote.blocks
        self.ln_f = remote.head.ln_f

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **rest: Any,
    ) -> Any:
        """As BloomModel.forward. Raises ValueError for what lies only where the blocks are."""
        if output_attentions:
            raise ValueError("attention weights stay on the servers: output_attentions is not possible")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        cache = None if use_cache is False else past_key_values
        last, states = self._through(
            self.word_embeddings_layernorm(inputs_embeds), attention_mask, cache, bool(output_hidden_states)
        )
        last = self.ln_f(last)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=None if states is None else (*states[:-1], last),
        )
        return output if return_dict is not False else output.to_tuple()

    def new_cache(self) -> RemoteCache:
        """An empty one, for this model with its adapter as it is then."""
        return RemoteCache(self.remote, self.adapter)

    def _through(
        self, hidden: Tensor, mask: Tensor | None, cache: Cache | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """hidden (B, T, C) through all blocks: what comes out, and where they are kept the states between."""
        if cache is None:
            mask = _padded(mask, hidden.shape[1])
            output = self.h(hidden, mask=mask, output_hidden_states=keep, **adapter_options(self.adapter))
            return (output[-1], output) if keep else (output, None)
        if not isinstance(cache, RemoteCache):
            raise ValueError(f"keys and values stay on the servers: use a RemoteCache, not a {type(cache).__name__}")
        if hidden.requires_grad and torch.is_grad_enabled():
            raise ValueError("no gradient flows through a cache on servers: call without one, or under no_grad()")
        if keep:
            states = cache.step_hidden_states(hidden, mask)
            return states[-1], states
        return cache.step(hidden, mask), None


class RemoteBloomForCausalLM(BloomForCausalLM):  # type: ignore[misc]
    """transformers' BloomForCausalLM over servers, with an adapter if one is given. `config`: further fields of
    transformers' BloomConfig.
    """

    def __init__(self, remote: BlockingModel, adapter: LoraAdapter | str | None = None, **config: Any) -> None:
        with torch.device("meta"):
            super().__init__(_config(remote, config))
        self.transformer = RemoteBloomModel(remote, adapter, **config)
        self.lm_head = remote.head.lm_head
        ids = {name: getattr(self.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.generation_config = GenerationConfig(use_cache=True, **ids)

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """As transformers' `generate`. The servers forget it afterwards, unless a `RemoteCache` of yours is given."""
        if options.get("past_key_values") is not None:
            return super().generate(*inputs, **options)
        with self.transformer.new_cache() as cache:
            return super().generate(*inputs, past_key_values=cache, **options)


class RemoteBloomForSequenceClassification(BloomForSequenceClassification):  # type: ignore[misc]
    """transformers' BloomForSequenceClassification over servers; `score`, the head, is here and trainable."""

    def __init__(self, remote: BlockingModel, adapter: LoraAdapter | str | None = None, **config: Any) -> None:
        with torch.device("meta"):
            super().__init__(_config(remote, config))
        self.transformer = RemoteBloomModel(remote, adapter, **config)
        self.score = nn.Linear(self.config.hidden_size, self.num_labels, bias=False)
        nn.init.normal_(self.score.weight, std=self.config.initializer_range)


def _config(remote: BlockingModel, further: dict[str, Any]) -> BloomConfig:
    ours = remote.config
    eos = list(ours.eos_token_ids)
    return BloomConfig(
        hidden_size=ours.hidden_size,
        n_head=ours.n_head,
        n_layer=ours.n_layer,
        vocab_size=ours.vocab_size,
        layer_norm_epsilon=ours.layer_norm_epsilon,
        apply_residual_connection_post_layernorm=ours.apply_residual_connection_post_layernorm,
        tie_word_embeddings=ours.tie_word_embeddings,
        bos_token_id=ours.bos_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=ours.pad_token_id,
        use_cache=False,  # a cache is a session on servers: never made in passing
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, **further},
    )
