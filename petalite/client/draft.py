"""A small model of the same vocabulary that runs here and guesses what the large one in the swarm will say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from petalite.bloom.cache import CachePool
from petalite.bloom.loading import load_span
from petalite.bloom.span import Span
from petalite.client.parts import LocalParts, load_local_parts
from petalite.client.sampling import Sampler
from petalite.client.speculation import Draft, Rate
from petalite.errors import CheckpointError
from petalite.models import find_model

# Guesses are of one kind where the small model gave them about the same probability.
KINDS = 8
# What is believed of a guess before the first; while none is made, the rate goes back there by such a share.
UNKNOWN = 0.5
DOUBT = 0.02
SOURCE = "model"


class DraftModel:
    """A whole BLOOM on this machine. Its guesses only ever save time: what is right the model in the swarm says."""

    def __init__(self, parts: LocalParts, blocks: Span) -> None:
        self.parts = parts
        self.blocks = blocks


def load_draft(model: str, large: LocalParts) -> DraftModel:
    """Load all of `model` beside our share of the large one. Raises CheckpointError, also for another vocabulary."""
    device = large.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    parts = load_local_parts(model, str(device), dtype)
    same = parts.tokenizer.get_vocab() == large.tokenizer.get_vocab()
    if not same or parts.config.vocab_size != large.config.vocab_size:
        raise CheckpointError(f"{parts.name}: its vocabulary is not that of {large.name}, so it cannot draft for it")
    blocks = load_span(
        find_model(model), 0, parts.config.n_layer, dtype=dtype, device=device, pack=True, manifest=parts.manifest
    )
    return DraftModel(parts, blocks)


class DraftRow:
    """The small model beside one generation of up to `length` tokens; for a worker thread."""

    def __init__(self, model: DraftModel, length: int) -> None:
        self._model = model
        blocks = model.blocks
        pool = CachePool(model.parts.config, blocks.end, length, dtype=blocks.dtype, device=blocks.device)
        self._rows = pool.reserve(1, length)
        self._read: list[int] = []  # what the cache holds
        self._known = 0  # tokens of it that are no guesses
        self._rates = [Rate((1 + kind / KINDS) / 2) for kind in range(KINDS)]
        self._all = Rate(UNKNOWN)
        self._made: list[tuple[int, int]] = []  # the last guesses, and of which kind they are

    def usual(self, most: int) -> Draft:
        """So many guesses as good as they have been lately; their tokens are not made."""
        return Draft((0,) * most, (self._all.value,) * most, SOURCE)

    def rest(self) -> None:
        """No guess is wanted now: what is known of them ages."""
        self._all.value += DOUBT * (UNKNOWN - self._all.value)

    def guess(self, text: Sequence[int], sampler: Sampler, most: int, pays: Callable[[Draft], bool]) -> Draft:
        """Up to `most` tokens behind `text`, ending with one that does not `pays`.

        `sampler` is one `ahead` of that which the guesses are for.
        """
        draft = Draft(source=SOURCE)
        self._made.clear()
        self._forget_wrong(text)
        while len(draft.tokens) < most and (not draft.tokens or pays(draft)):
            token, sure = self._next([*text, *draft.tokens], sampler)
            kind = min(int(sure * KINDS), KINDS - 1)
            self._made.append((token, kind))
            chances = (*draft.chances, self._rates[kind].value)
            draft = Draft((*draft.tokens, token), chances, SOURCE)
        return draft

    def learn(self, chosen: Sequence[int]) -> None:
        """What really followed the text that the last guesses were for; also those that were not sent can be judged."""
        for (token, kind), right in zip(self._made, chosen, strict=False):
            self._rates[kind].learn(token == right)
            self._all.learn(token == right)
            if token != right:
                break
        self._made.clear()

    def _forget_wrong(self, text: Sequence[int]) -> None:
        most = min(len(self._read), len(text) - 1)  # the last token is always read anew: what follows it is asked for
        while self._known < most and self._read[self._known] == text[self._known]:
            self._known += 1
        del self._read[self._known :]

    def _next(self, text: Sequence[int], sampler: Sampler) -> tuple[int, float]:
        """The token that follows `text` by this model's lights, and the probability that it gives it."""
        parts, new = self._model.parts, list(text[len(self._read) :])
        with torch.inference_mode():
            hidden = parts.embeddings(torch.tensor([new], device=parts.device))
            hidden = self._model.blocks.step(hidden, self._rows, position=len(self._read))
            self._read += new
            logits = parts.head(hidden[:, -1]).float()
            (token,) = sampler.choose(logits, [list(text)])
            return token, float(logits.softmax(dim=-1)[0, token])
