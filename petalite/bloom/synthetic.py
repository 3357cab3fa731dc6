"""Made-up checkpoints: random ones of any shape for tests and benchmarks, and the formula model of the spec."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from petalite.bloom.blocks import Block
from petalite.bloom.checkpoint import INDEX_FILE, PREFIX, SINGLE_FILE, tensor_shapes
from petalite.bloom.config import CONFIG_FILE, BloomConfig
from petalite.bloom.loading import use_int8
from petalite.bloom.span import Span

# The spec's tiny model (spec: model, "The formula model").
FORMULA_CONFIG = BloomConfig(
    hidden_size=64, n_head=8, n_layer=2, vocab_size=256, bos_token_id=1, eos_token_ids=(2,), pad_token_id=3
)


def write_checkpoint(
    directory: Path | str,
    config: BloomConfig,
    seed: int = 0,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    prefix: bool = True,
) -> None:
    """Write a random BLOOM in Hugging Face layout: `shards` files of consecutive tensors, with `transformer.` or not.

    Weights are small enough to keep hidden states near unit size; norms and biases are not trivial. One shard is held
    in memory at a time. The same seed gives the same weights for any number of shards.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(tensor_shapes(config).items())
    held: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for i, (name, shape) in enumerate(names):
        spelled = PREFIX + name if prefix and not name.startswith("lm_head.") else name
        held[spelled] = _random_tensor(name, shape, generator).to(dtype)
        shard = i * shards // len(names)
        if i + 1 == len(names) or (i + 1) * shards // len(names) > shard:
            file = SINGLE_FILE if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file(held, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
            held = {}
    if shards > 1:
        (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(directory, config, dtype)


def write_formula_checkpoint(directory: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the spec's formula model; its weights are exact in float32, float16 and bfloat16 alike."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        (name if name.startswith("lm_head.") else PREFIX + name): formula_tensor(name, shape).to(dtype)
        for name, shape in tensor_shapes(FORMULA_CONFIG).items()
    }
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    write_config(directory, FORMULA_CONFIG, dtype)


def write_config(directory: Path, config: BloomConfig, dtype: torch.dtype) -> None:
    """Write config.json as transformers spells it."""
    eos = config.eos_token_ids
    raw = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": config.hidden_size,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "apply_residual_connection_post_layernorm": config.apply_residual_connection_post_layernorm,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": config.pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")


def formula_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor of the formula model, float32: element i, row by row, is a hash of name and i (spec: model)."""
    seed = 2166136261  # FNV-1a of the name, 32 bits
    for byte in name.encode("ascii"):
        seed = (seed ^ byte) * 16777619 % 2**32
    count = torch.Size(shape).numel()
    x = (seed + torch.arange(count, dtype=torch.int64) * 2654435761) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    u = (x >> 24) - 128  # -128 .. 127
    if name.endswith("layernorm.weight") or name == "ln_f.weight":
        value = 1 + (u >> 2).to(torch.float32) / 128  # 0.75 .. 1.2421875
    else:
        value = u.to(torch.float32) / 256
    return value.view(shape)


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise.mul_(0.1).add_(1.0 if name.endswith(("layernorm.weight", "ln_f.weight")) else 0.0)
    if name == "word_embeddings.weight":
        return noise.mul_(0.1)
    return noise.mul_(1 / shape[1] ** 0.5)


def random_span(
    config: BloomConfig,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Span:
    """Blocks [start, end) with random weights made on `device`, of about the scale that trained ones have.

    For benchmarks of models that no disk holds: nothing is read, and nothing but the blocks is allocated. `progress` by
    blocks.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    blocks: list[Block] = []
    for _ in range(start, end):
        if progress is not None:
            progress(len(blocks), end - start)
        with torch.device("meta"):
            block = Block(config)
            if quantize:
                use_int8(block)
        block = block.to_empty(device=device)
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            _fill(name, tensor.data, generator, config.hidden_size)
        blocks.append(_in_dtype(block, dtype))
    return Span(config, start, end, blocks)


def _fill(name: str, tensor: Tensor, generator: torch.Generator, width: int) -> None:
    if tensor.dtype == torch.int8:
        tensor.random_(-127, 128, generator=generator)
    elif name.endswith("scale"):
        tensor.fill_(1 / (73 * width**0.5))  # the codes' spread is 73
    elif "layernorm" in name and name.endswith("weight"):
        tensor.fill_(1.0)
    elif name.endswith("bias"):
        tensor.zero_()
    else:
        tensor.normal_(0.0, width**-0.5, generator=generator)


def _in_dtype(block: Block, dtype: torch.dtype) -> Block:
    """All but codes and scales in `dtype`."""
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
    return block.requires_grad_(False).eval()
