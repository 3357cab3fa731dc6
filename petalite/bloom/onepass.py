"""A decode step of up to 8 rows through all blocks of a span as one kernel (`onepass.cu`), and how it is compiled.

CUDA C++, since Triton has no copies that stay on their way while a kernel does something else. NVRTC, which comes with
torch, compiles it where it runs. Its plain twin is `Span.step_batch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petalite.bloom.blocks import Block, alibi_slopes
from petalite.bloom.cache import CachePool
from petalite.bloom.quantize import Int8Linear
from petalite.bloom.span import Span

MAX_ROWS = 8
_THREADS = 256
_HEAD = 128  # numbers of a head
_PIECE = 1024  # inputs that the warps of a multiprocessor copy at a time
_MOST_HIDDEN = 4096  # what a product sees stays in registers
_SLOT_BYTES = 16 * 1024 * 2  # a piece of every warp
_BESIDE_BYTES = 13_312  # shared memory beside the rings, without the pointers
_POINTER_BYTES = 8 * 14  # a block
_DEPTH = 4  # slots of a ring
_LEAST_DEPTH = 2
_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


def why_not(span: Span) -> str:
    """Why `OnePass` cannot run `span`, or ""."""
    config = span.config
    if config.head_dim != _HEAD or config.hidden_size % _PIECE or config.hidden_size > _MOST_HIDDEN:
        return f"no kernel for {config.n_head} heads of {config.head_dim}"
    if config.apply_residual_connection_post_layernorm:
        return "residuals are taken behind norms"
    if any(isinstance(module, Int8Linear) for module in span.modules()):
        return "weights are int8"
    properties = torch.cuda.get_device_properties(span.device)
    if properties.major < 8:
        return f"compute capability {properties.major}.{properties.minor}"
    if _depth(span) < _LEAST_DEPTH:
        return "too little shared memory"
    return ""


class OnePass:
    """`rows` (up to MAX_ROWS) decode steps through `span` over `pool`. Compiles: takes seconds, raises RuntimeError."""

    def __init__(self, span: Span, pool: CachePool, rows: int) -> None:
        self._grid = torch.cuda.get_device_properties(span.device).multi_processor_count
        depth = _depth(span)
        self._shared = shared_bytes(span, depth)
        self._kernel = _compile(defines(span, rows, self._grid, depth), span.device, self._shared)
        self._output, self._fixed = buffers(span, pool, rows, self._grid)

    def __call__(self, hidden: Tensor, meta: Tensor) -> Tensor:
        """hidden (rows, C), meta (4, rows) as `kernels.decode_attention` wants it -> (rows, C), until the next call."""
        tensors = (hidden, self._output, meta, *self._fixed)
        _launch(self._kernel, self._grid, self._shared, tensors)
        return self._output


def defines(span: Span, rows: int, grid: int, depth: int) -> dict[str, object]:
    """What the kernel is compiled with, for a chip of `grid` multiprocessors and rings of `depth` slots."""
    config = span.config
    made: dict[str, object] = {
        "C": config.hidden_size, "HEADS": config.n_head, "LAYERS": len(span.layers), "ROWS": rows, "GRID": grid,
        "DEPTH": depth, "EPS": f"{config.layer_norm_epsilon!r}f",
    }  # fmt: skip
    return made | {"HALF": 1} if span.dtype == torch.float16 else made


def shared_bytes(span: Span, depth: int) -> int:
    """Shared memory that it takes."""
    return depth * _SLOT_BYTES + _BESIDE_BYTES + len(span.layers) * _POINTER_BYTES


def buffers(span: Span, pool: CachePool, rows: int, grid: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Where its result goes, and what it gets behind hidden states, result and meta: see `decode`."""
    C, H = span.config.hidden_size, span.config.n_head

    def made(*shape: int, dtype: torch.dtype = span.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=span.device)

    pairs = zip(span.layers, pool.arenas, strict=True)
    pointers = [[tensor.data_ptr() for tensor in _tensors(block, arena)] for block, arena in pairs]
    splits = max(1, grid // (rows * H))
    return made(rows, C), (
        torch.tensor(pointers, dtype=torch.int64, device=span.device),
        torch.tensor(alibi_slopes(H), dtype=torch.float32, device=span.device),
        made(rows, 3 * C),
        made(rows, C),
        made(rows, 4 * C),
        made(rows, H, splits, _HEAD + 2, dtype=torch.float32),
        made(rows, H, dtype=torch.int32),
        made(1, dtype=torch.int32),
    )


def _depth(span: Span) -> int:
    properties: Any = torch.cuda.get_device_properties(span.device)
    room: int = properties.shared_memory_per_block_optin
    return min(_DEPTH, (room - shared_bytes(span, 0)) // _SLOT_BYTES)


def _tensors(block: Block, arena: Tensor) -> list[Tensor]:
    """In the order of the kernel's enumeration."""
    attention, mlp = block.self_attention, block.mlp
    products = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
    norms = (block.input_layernorm, block.post_attention_layernorm)
    return [tensor for module in (*products, *norms) for tensor in (module.weight, module.bias)] + [arena[0], arena[1]]


# CUDA's own interface


def _check(result: int, what: str) -> None:
    if result:
        raise RuntimeError(f"CUDA: {what} failed with {result}")


def _compile(defines: dict[str, object], device: torch.device, shared: int) -> ctypes.c_void_p:
    """The kernel, loaded on `device`. Its module stays loaded as long as the process."""
    major, minor = torch.cuda.get_device_capability(device)
    source = files("petalite.bloom").joinpath("onepass.cu").read_bytes()
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    binary = _binary(source, tuple(option.encode() for option in options))
    driver = ctypes.CDLL("libcuda.so.1")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # there is a context now
        _check(driver.cuModuleLoadData(ctypes.byref(module), binary), "loading a kernel")
        _check(driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"decode"), "finding a kernel")
        _check(driver.cuFuncSetAttribute(kernel, _SHARED_MEMORY, shared), "taking shared memory")
    return kernel


@cache
def _binary(source: bytes, options: tuple[bytes, ...]) -> bytes:
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"onepass.cu", 0, None, None), "starting NVRTC")
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if result:
            _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "compiling a kernel")
            log = ctypes.create_string_buffer(size.value)
            _check(nvrtc.nvrtcGetProgramLog(program, log), "compiling a kernel")
            raise RuntimeError(f"NVRTC: {log.value.decode(errors='replace')}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "compiling a kernel")
        binary = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, binary), "compiling a kernel")
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc() -> ctypes.CDLL:
    """Raises RuntimeError where there is none."""
    name = f"libnvrtc.so.{(torch.version.cuda or '0').split('.')[0]}"
    try:
        try:
            return ctypes.CDLL(name)
        except OSError:  # not where the system looks: torch knows where its own is, and this brings it in
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"))
            return ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"NVRTC is missing: {error}") from error


def _launch(kernel: ctypes.c_void_p, grid: int, shared: int, tensors: Sequence[Tensor]) -> None:
    """On the current stream, one program a multiprocessor."""
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
    stream = ctypes.c_void_p(torch.cuda.current_stream(tensors[0].device).cuda_stream)
    driver = ctypes.CDLL("libcuda.so.1")
    # Cooperative: refused where they would not all run at once.
    launched = driver.cuLaunchCooperativeKernel(kernel, grid, 1, 1, _THREADS, 1, 1, shared, stream, arguments)
    _check(launched, "a launch")
