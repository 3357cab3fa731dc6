"""From a checkpoint to modules: a span of blocks, the embeddings, the head (spec: model).

A tensor is read, hashed and converted piece by piece, and nothing exists twice but what is being quantized, packed or
moved to the device: a matrix for each of two threads, less than a block's copy.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from petalite.bloom.blocks import Block, Embeddings, Head
from petalite.bloom.checkpoint import Checkpoint, block_prefix
from petalite.bloom.config import BloomConfig
from petalite.bloom.manifest import Manifest
from petalite.bloom.packed import packed, products, why_not_packed
from petalite.bloom.parallel import in_order
from petalite.bloom.quantize import Int8Linear, quantize_rows
from petalite.bloom.span import Span
from petalite.errors import CheckpointError

Quantize = Literal["int8"] | None
Progress = Callable[[int, int], None]  # blocks loaded, blocks to load
M = TypeVar("M", bound=nn.Module)


def load_span(
    directory: Path | str,
    start: int,
    end: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Quantize = None,
    pack: bool = False,
    progress: Progress | None = None,
    manifest: Manifest | None = None,
) -> Span:
    """Load blocks [start, end) and nothing else, in `dtype` or with int8 weights, on `device`.

    `pack`: with the weights packed for this processor, where that can be. So they are written to fresh memory once,
    which may take as long as hashing them. With `manifest` every tensor's bytes are checked on their way. `progress` is
    called first and after each block.

    Raises `CheckpointError` when the checkpoint or the range is wrong.
    """
    blocks: list[Block] = []
    report = progress or (lambda done, total: None)
    reader = _Reader(directory, dtype, device, manifest, pack)
    config = reader.checkpoint.config
    if not 0 <= start < end <= config.n_layer:
        raise CheckpointError(f"{directory}: has blocks 0:{config.n_layer}, cannot serve {start}:{end}")
    report(0, end - start)
    empty = [(_empty(config, quantize), block_prefix(index)) for index in range(start, end)]
    with closing(reader.fill(empty)) as filled:
        for block in filled:
            blocks.append(block)
            report(len(blocks), end - start)
    return Span(config, start, end, blocks)


def load_embeddings(
    directory: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    manifest: Manifest | None = None,
) -> Embeddings:
    """Load the word embeddings and their norm. Raises `CheckpointError`."""
    reader = _Reader(directory, dtype, device, manifest)
    with torch.device("meta"):
        embeddings = Embeddings(reader.checkpoint.config)
    (filled,) = reader.fill([(embeddings, "")])
    return filled


def load_head(
    directory: Path | str,
    *,
    embeddings: Embeddings | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    manifest: Manifest | None = None,
) -> Head:
    """Load the final norm and the output matrix. A tied one is taken from `embeddings`, if given: one tensor, not two.

    Raises `CheckpointError`.
    """
    reader = _Reader(directory, dtype, device, manifest)
    config = reader.checkpoint.config
    with torch.device("meta"):
        head = Head(config)
    tied = config.tie_word_embeddings
    if tied and embeddings is not None:
        head.lm_head.weight = embeddings.word_embeddings.weight
        (head.ln_f,) = reader.fill([(head.ln_f, "ln_f.")])
        return head
    (filled,) = reader.fill([(head, "")], {"lm_head.weight": "word_embeddings.weight"} if tied else None)
    return filled


class _Reader:
    """Fills modules on the meta device from one checkpoint, several tensors at once, each in a thread."""

    def __init__(
        self,
        directory: Path | str,
        dtype: torch.dtype,
        device: torch.device | str,
        manifest: Manifest | None,
        pack: bool = False,
    ) -> None:
        self.checkpoint = Checkpoint(directory)
        self.dtype = dtype
        self.device = torch.device(device)
        self.manifest = manifest
        self.packs = pack and not why_not_packed(self.device, dtype)
        if manifest is not None:
            manifest.check_config(self.checkpoint.config, self.checkpoint.directory)
        self._scratch = _Scratch()

    def fill(
        self, modules: Iterable[tuple[M, str]], aliases: Mapping[str, str] | None = None
    ) -> Generator[M, None, None]:
        """Give every parameter of each module its tensor: the module's prefix + its own name, or what `aliases` says.

        A module comes when it is filled; meanwhile the next ones are being read.
        """
        work = [(module, list(self._jobs(module, prefix, aliases or {}))) for module, prefix in modules]
        with closing(in_order(chain.from_iterable(jobs for _, jobs in work))) as done:
            for module, jobs in work:
                deque(islice(done, len(jobs)), maxlen=0)
                yield module.eval()

    def _jobs(self, module: nn.Module, prefix: str, aliases: Mapping[str, str]) -> Iterator[Callable[[], None]]:
        changed = {name: part for name, part in products(module) if self.packs or isinstance(part, Int8Linear)}
        for name, linear in changed.items():
            yield partial(self._change, module, name, linear, prefix + name)
        for name, _ in module.named_parameters():
            if name.rpartition(".")[0] not in changed:
                yield partial(self._set, module, name, aliases.get(name, prefix + name))

    def _set(self, module: nn.Module, name: str, source: str) -> None:
        """One parameter, as it is in the checkpoint."""
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, nn.Parameter(self._tensor(source), requires_grad=False))

    def _change(self, module: nn.Module, name: str, linear: nn.Linear | Int8Linear, source: str) -> None:
        """A linear layer whose weight is quantized or packed, or both."""
        self._set(linear, "bias", f"{source}.bias")
        if isinstance(linear, Int8Linear):
            try:
                codes, scale = quantize_rows(self._copy(f"{source}.weight", torch.float32))
            except ValueError as error:
                raise CheckpointError(f"{self.checkpoint.directory}: tensor {source}.weight: {error}") from error
            linear.weight, linear.scale = codes.to(self.device), scale.to(self.device)
        else:
            linear.weight = nn.Parameter(self._copy(f"{source}.weight", self.dtype), requires_grad=False)
        if self.packs:
            module.set_submodule(name, packed(linear))

    def _tensor(self, name: str) -> Tensor:
        """In our dtype, on our device. Read straight into its final place on a CPU."""
        if self.device.type != "cpu":
            return self._copy(name, self.dtype).to(self.device, copy=True)
        return self._read(name, torch.empty(self.checkpoint.find(name).shape, dtype=self.dtype))

    def _copy(self, name: str, dtype: torch.dtype) -> Tensor:
        """In memory that this thread's next call overwrites."""
        return self._read(name, self._scratch.tensor(self.checkpoint.find(name).shape, dtype))

    def _read(self, name: str, into: Tensor) -> Tensor:
        info, sha = self.checkpoint.find(name), hashlib.sha256()
        self.checkpoint.read(info, into, sha if self.manifest else None)
        if self.manifest:
            self.manifest.check_tensor(name, info, sha.hexdigest())
        return into


class _Scratch(threading.local):
    """Memory for a tensor that is soon something else, one for each thread: fresh pages cost more than their use.

    Straight from the system, where it goes as soon as the thread ends; what torch frees may stay with the process.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if self._bytes.numel() < nbytes:
            self._bytes = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        return self._bytes[:nbytes].view(dtype).view(shape)


def _empty(config: BloomConfig, quantize: Quantize) -> Block:
    with torch.device("meta"):
        block = Block(config)
    if quantize == "int8":
        use_int8(block)
    return block


def use_int8(block: nn.Module) -> None:
    """Put Int8Linear in every Linear's place."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                with torch.device("meta"):
                    setattr(parent, name, Int8Linear(child.in_features, child.out_features))
