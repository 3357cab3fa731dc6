"""Defects of a server in training requests; see defects.py."""

from __future__ import annotations

from typing import Any

import torch
from defects import defect, patch

from petalite.bloom import span, training
from petalite.server import training as requests


@defect("training/002", "training/005")
def counts_padding_as_tokens() -> None:
    before = span.Span.sequence_window
    patch(
        span.Span,
        "sequence_window",
        lambda self, batch, tokens, mask, device: before(self, batch, tokens, None, device),
    )


@defect("training/004")
def loses_the_gradients_of_taps() -> None:
    before = training.backward_pass
    patch(requests, "backward_pass", lambda *given: before(*given[:-2]))


@defect("training/002", "training/004")
def adds_prompts_to_the_first_block_only() -> None:
    before = training.Extras.of_block

    def of_block(self: Any, index: int) -> dict[str, torch.Tensor]:
        found = before(self, index)
        if index:
            found.pop("prompts", None)
        return found

    patch(training.Extras, "of_block", of_block)


@defect("training/006")
def sends_all_gradients_in_the_type_of_h() -> None:
    before = requests._encode
    patch(requests, "_encode", lambda found, like: before(found, dict.fromkeys(found, like["h"])))
