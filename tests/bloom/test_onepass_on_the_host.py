"""The kernel for all blocks against the plain blocks where there is no GPU: every thread of it in turn, on the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from petalite.bloom import onepass
from petalite.bloom.cache import CachePool
from petalite.bloom.config import BloomConfig
from petalite.bloom.span import Part, Span
from petalite.bloom.synthetic import random_span

HERE = Path(__file__).parent
SOURCE = Path(onepass.__file__).with_name("onepass.cu")
COMPILER = shutil.which("g++")
MAIN = """
#include "cuda_on_host.h"
#include "onepass.cu"
static void** given;
static void body() {
    decode((u16*)given[0], (u16*)given[1], (long long*)given[2], (u64*)given[3], (float*)given[4], (u16*)given[5],
           (u16*)given[6], (u16*)given[7], (float*)given[8], (int*)given[9], (u32*)given[10]);
}
extern "C" void step(void** pointers) { given = pointers; launch(GRID, SHARED, body); }
"""


def compiled(directory: Path, defines: dict[str, object]) -> ctypes.CDLL:
    (directory / "main.cpp").write_text(MAIN)
    includes = [f"-I{HERE}", f"-I{SOURCE.parent}"]
    flags = ["-O2", "-w", "-shared", "-fPIC", "-std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    library = directory / "kernel.so"
    subprocess.run([COMPILER, *flags, *includes, "-o", library, directory / "main.cpp"], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("blocks", "grid", "depth", "positions"),
    [
        (2, 4, 2, [5, 130]),  # more rows than one, and a block behind the first
        (1, 20, 4, [200]),  # keys shared by two multiprocessors
        (1, 3, 3, [0, 63, 64]),
    ],
)
def test_a_step_is_that_of_the_plain_blocks(
    tmp_path: Path, blocks: int, grid: int, depth: int, positions: list[int]
) -> None:
    config = BloomConfig(hidden_size=1024, n_head=8, n_layer=blocks, vocab_size=100)
    span = random_span(config, 0, blocks, dtype=torch.bfloat16, device="cpu")
    for parameter in span.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) / 4)
    pool = CachePool(config, blocks, 1024, dtype=torch.bfloat16)
    for arena in pool.arenas:
        arena.normal_()
    parts = [Part(pool.reserve(1, p + 3 + i), 1, p, [i]) for i, p in enumerate(positions)]
    meta = torch.tensor([[part.rows.offset * 1024, part.rows.length, part.position, part.pad[0]] for part in parts]).T
    hidden = torch.randn(len(parts), 1024).to(torch.bfloat16)
    defines = onepass.defines(span, len(parts), grid, depth)
    kernel = compiled(tmp_path, {**defines, "SHARED": onepass.shared_bytes(span, depth)})
    output, fixed = onepass.buffers(span, pool, len(parts), grid)
    tensors = (hidden, output, meta.contiguous(), *fixed)
    pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    kernel.step(pointers)
    first = output.clone()
    kernel.step(pointers)
    assert torch.equal(output, first)  # nothing is left behind that the next step would trip over
    written = [[view[..., p.position, :].clone() for view in p.rows.views] for p in parts]
    wanted = Span.step_batch(span, hidden, parts)
    apart = ((first - hidden).float() - (wanted - hidden).float()).norm(dim=1) / (wanted - hidden).float().norm(dim=1)
    assert apart.max() < 0.02
    for part, views in zip(parts, written, strict=True):
        for view, mine in zip(part.rows.views, views, strict=True):
            plain = view[..., part.position, :].float()
            assert (mine.float() - plain).norm() < 0.01 * plain.norm()
