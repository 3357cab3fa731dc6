"""How many threads a server takes, from what each number of them was measured to bring."""

from __future__ import annotations

import pytest
import torch

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import random_span
from petalite.server import threads
from petalite.server.threads import best_threads

SPAN = random_span(
    BloomConfig(hidden_size=8, n_head=1, n_layer=1, vocab_size=8), 0, 1, dtype=torch.float32, device="cpu"
)


@pytest.mark.parametrize(
    ("measured", "most", "expected"),
    [
        ({1: (100, 1000), 2: (180, 1900)}, 2, 2),
        ({1: (100, 1000), 2: (180, 1900)}, 1, 1),
        ({1: (100, 1000), 2: (104, 1050)}, 2, 1),  # brings next to nothing
        ({1: (100, 1000), 2: (101, 1900)}, 2, 2),  # prompts are read faster, and steps are no slower
        ({1: (100, 1000), 2: (60, 1900)}, 2, 1),  # a busy machine: steps would wait
        ({1: (100, 1000), 2: (150, 1500), 4: (140, 1600)}, 4, 2),
        ({1: (100, 1000), 2: (99, 1050), 4: (200, 3000)}, 7, 4),
    ],
)
def test_more_threads_must_pay_for_themselves(measured, most, expected, monkeypatch):
    monkeypatch.setattr(threads, "_rates_with", lambda span, count: measured[count])
    assert best_threads(SPAN, most) == (expected, measured[expected])
