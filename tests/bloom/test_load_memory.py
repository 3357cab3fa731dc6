"""Loading holds the blocks asked for and little else, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petalite.bloom.config import BloomConfig
from petalite.bloom.synthetic import write_checkpoint

MEASURE = """
import json, re, sys
import torch
from petalite.bloom.cache import CachePool
from petalite.bloom.loading import load_span
from petalite.bloom.manifest import load_or_make

def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
manifest = load_or_make(sys.argv[1])
pack = len(sys.argv) > 3
warm = load_span(sys.argv[1], 0, 1, pack=pack)  # whatever loads lazily is in
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
span = load_span(sys.argv[1], 2, 6, dtype=getattr(torch, sys.argv[2]), pack=pack, manifest=manifest)
pool = CachePool(span.config, 4, 100_000, dtype=span.dtype)
print(json.dumps({"peak": kib("VmHWM") - before, "now": kib("VmRSS") - before, "weights": span.weight_bytes / 1024,
                  "cache": pool.bytes_per_token * 100_000 / 1024}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("pack", [(), ("pack",)])
@pytest.mark.parametrize(("file_dtype", "dtype"), [(torch.float32, "float32"), (torch.float16, "float32")])
def test_resident_memory_of_a_span(tmp_path, file_dtype, dtype, pack):
    config = BloomConfig(hidden_size=512, n_head=8, n_layer=8, vocab_size=64)
    write_checkpoint(tmp_path, config, shards=1, dtype=file_dtype)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, dtype, *pack], capture_output=True, text=True, cwd=root, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["cache"] > 10 * measured["weights"]  # reserved, not resident
    assert 0.95 * measured["weights"] < measured["now"] < 1.1 * measured["weights"] + 4096
    assert measured["peak"] < 1.1 * measured["weights"] + 12_000  # one tensor twice at most
