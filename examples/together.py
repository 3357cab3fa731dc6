"""What the examples share: their options, and two servers of their own where no swarm is named."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

import petalite
from petalite.client.api import BlockingModel

SPANS = ("0:4", "4:8")


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows `--peer`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a server of a swarm that serves fairytale (may be repeated); without it two are started here",
    )
    return parser


@contextmanager
def fairytale(peers: Sequence[str] = ()) -> Iterator[BlockingModel]:
    """The embedded model, its blocks on the servers that `peers` lead to, or on two processes of this machine."""
    with ExitStack() as stack:
        addresses = list(peers) or stack.enter_context(servers_here())
        swarm = stack.enter_context(petalite.connect(peers=addresses))
        yield swarm.load("fairytale")


@contextmanager
def servers_here() -> Iterator[list[str]]:
    """Addresses of two servers on loopback that live as long as the block."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_server(blocks)) for blocks in SPANS]
        yield [_address_of(server) for server in servers]


@contextmanager
def _server(blocks: str) -> Iterator[subprocess.Popen[str]]:
    words = ["serve", "fairytale", "--blocks", blocks, "--listen", "127.0.0.1:0", "--no-lan", "--json"]
    command = [sys.executable, "-m", "petalite.cli.child", *words]  # ends with its stdin, however we end
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def _address_of(server: subprocess.Popen[str]) -> str:
    line = server.stdout.readline() if server.stdout else ""
    if not line:
        sys.exit("a server did not start")
    address: str = json.loads(line)["addresses"][0]
    return address


def batch(model: BlockingModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T) each; shorter texts are padded behind."""
    rows = [model.encode(text) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [3] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def language_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy of each token after those before it, in nats."""
    due = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), due.flatten())


def show_loss(step: int, loss: float, first: float) -> None:
    """One line of a loss curve."""
    print(f"step {step:3}  loss {loss:6.3f}  {'#' * round(40 * loss / first)}", flush=True)
