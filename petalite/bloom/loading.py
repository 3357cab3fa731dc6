"""From a checkpoint to modules: a span of blocks, the embeddings, the head (spec: model).

At most two tensors exist twice at any moment: the one that is being converted, quantized or moved to the device, and
the one read before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from petalite.bloom.blocks import Block, Embeddings, Head
from petalite.bloom.checkpoint import DTYPES, HASHING_THREADS, Checkpoint, TensorInfo, block_prefix, sha256_of
from petalite.bloom.manifest import Manifest
from petalite.bloom.packed import packed, products, why_not_packed
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
    which is what takes the time. With `manifest` every tensor's bytes are checked on their way. `progress` is called
    first and after each block.

    Raises `CheckpointError` when the checkpoint or the range is wrong.
    """
    blocks: list[Block] = []
    report = progress or (lambda done, total: None)
    with _Reader(directory, dtype, device, manifest, pack) as reader:
        config = reader.checkpoint.config
        if not 0 <= start < end <= config.n_layer:
            raise CheckpointError(f"{directory}: has blocks 0:{config.n_layer}, cannot serve {start}:{end}")
        report(0, end - start)
        for index in range(start, end):
            with torch.device("meta"):
                block = Block(config)
            if quantize == "int8":
                use_int8(block)
            blocks.append(reader.fill(block, block_prefix(index)))
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
    with _Reader(directory, dtype, device, manifest) as reader:
        with torch.device("meta"):
            embeddings = Embeddings(reader.checkpoint.config)
        return reader.fill(embeddings, "")


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
    with _Reader(directory, dtype, device, manifest) as reader:
        config = reader.checkpoint.config
        with torch.device("meta"):
            head = Head(config)
        tied = config.tie_word_embeddings
        if tied and embeddings is not None:
            head.lm_head.weight = embeddings.word_embeddings.weight
            reader.fill(head.ln_f, "ln_f.")
            return head
        return reader.fill(head, "", {"lm_head.weight": "word_embeddings.weight"} if tied else {})


class _Reader:
    """Fills modules on the meta device from one checkpoint. A context manager: what was filled counts once it is left.

    Tensors are hashed beside the reading, several at once: one core hashes no faster than a good disk reads.
    """

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
        # Two buffers: one is hashed while the other is read.
        empty = torch.empty(0, dtype=torch.uint8)
        self._scratch: deque[tuple[Tensor, Future[None] | None]] = deque([(empty, None), (empty, None)])
        self._wide = torch.empty(0, dtype=dtype)
        self._hashing = ThreadPoolExecutor(HASHING_THREADS)
        self._checks: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Raises `CheckpointError` for the first tensor that is not the manifest's."""
        self._hashing.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for check in self._checks:
                check.result()

    def fill(self, module: M, prefix: str, aliases: dict[str, str] | None = None) -> M:
        """Give every parameter of `module` its tensor: `prefix` + its own name, or what `aliases` says."""
        tensors: dict[str, Tensor] = {}
        packing = products(module) if self.packs else []
        later = {f"{name}.weight" for name, linear in packing if isinstance(linear, nn.Linear)}
        for name, _ in module.named_parameters():
            if name not in later:
                tensors[name] = self._tensor((aliases or {}).get(name, prefix + name))
        for name, child in module.named_modules():
            if isinstance(child, Int8Linear):
                full = f"{prefix}{name}.weight"
                try:
                    codes, scale = quantize_rows(self._raw(full))
                except ValueError as error:
                    raise CheckpointError(f"{self.checkpoint.directory}: tensor {full}: {error}") from error
                tensors[f"{name}.weight"] = codes.to(self.device)
                tensors[f"{name}.scale"] = scale.to(self.device)
        module.load_state_dict(tensors, assign=True, strict=not later)
        for name, linear in packing:
            if isinstance(linear, nn.Linear):
                weight = self._converted(self._raw(f"{prefix}{name}.weight"))
                linear.weight = nn.Parameter(weight, requires_grad=False)
            module.set_submodule(name, packed(linear))
        module.requires_grad_(False)
        return module.eval()

    def _tensor(self, name: str) -> Tensor:
        """In our dtype, on our device. Read straight into its final place where file and target agree."""
        info = self.checkpoint.find(name)
        if DTYPES[info.dtype] == self.dtype and self.device.type == "cpu":
            tensor = torch.empty(info.shape, dtype=self.dtype)
            self._read(name, tensor)
            return tensor
        return self._raw(name).to(device=self.device, dtype=self.dtype, copy=True)

    def _raw(self, name: str) -> Tensor:
        """In the file's dtype, in a scratch buffer that the next call leaves alone and the one after it overwrites."""
        info = self.checkpoint.find(name)
        scratch, hashed = self._scratch.popleft()
        if hashed is not None:
            hashed.result()
        if scratch.numel() < info.nbytes:
            scratch = torch.empty(info.nbytes, dtype=torch.uint8)
        tensor = scratch[: info.nbytes].view(DTYPES[info.dtype]).view(info.shape)
        self._scratch.append((scratch, self._read(name, tensor)))
        return tensor

    def _converted(self, raw: Tensor) -> Tensor:
        """`raw`, or the same in our dtype in a buffer that the next call overwrites."""
        if raw.dtype == self.dtype:
            return raw
        if self._wide.numel() < raw.numel():
            self._wide = torch.empty(raw.numel(), dtype=self.dtype)
        return self._wide[: raw.numel()].view(raw.shape).copy_(raw)

    def _read(self, name: str, into: Tensor) -> Future[None] | None:
        """Read a tensor; what is returned is done when its hash has been compared."""
        info = self.checkpoint.find(name)
        self.checkpoint.read(info, into)
        if self.manifest is None:
            return None
        self._checks = [check for check in self._checks if not check.done() or check.result()]
        self._checks.append(self._hashing.submit(self._check, self.manifest, name, info, into))
        return self._checks[-1]

    def _check(self, manifest: Manifest, name: str, info: TensorInfo, tensor: Tensor) -> None:
        manifest.check_tensor(name, info, sha256_of(tensor))


def use_int8(block: nn.Module) -> None:
    """Put Int8Linear in every Linear's place."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                with torch.device("meta"):
                    setattr(parent, name, Int8Linear(child.in_features, child.out_features))
