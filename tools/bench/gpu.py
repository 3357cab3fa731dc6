"""BLOOM geometries on CUDA through real server processes: steps/s, batches, prefill, against transformers.

Weights are random and made on the device; one server process a GPU. Transformers' rate is that of the host, which
changes within minutes, so its process stays there with its model and takes turns with ours, round by round; whoever has
not its turn waits for a line of text. Without CUDA the same script runs a tiny geometry on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trio

from petalite.bloom.blocks import Embeddings, Head
from petalite.bloom.cache import CachePool
from petalite.bloom.config import BloomConfig
from petalite.bloom.fast import accelerate
from petalite.bloom.fast_ends import accelerate_ends
from petalite.bloom.manifest import Manifest
from petalite.bloom.span import Part, Span
from petalite.bloom.synthetic import random_span
from petalite.client.runner import finished
from petalite.client.session import InferenceSession
from petalite.identity import Address, Identity
from petalite.net.awake import Awake
from petalite.net.endpoint import open_endpoint
from petalite.server.blockserver import BlockServer
from petalite.swarm.node import Node, open_node
from tools.bench._result import Result, machine

GEOMETRIES = {
    "tiny": BloomConfig(hidden_size=256, n_head=4, n_layer=4, vocab_size=1024),
    "7b1": BloomConfig(hidden_size=4096, n_head=32, n_layer=30, vocab_size=250_880),
    "176b": BloomConfig(hidden_size=14_336, n_head=112, n_layer=70, vocab_size=250_880),
}
STEPS = 40
TOGETHER_STEPS = 100
# After a turn of ours: its processes stay awake for a while.
REST_SECONDS = 0.1
CACHE_TOKENS = 4096  # for 8 sessions, or one with a prefix of 2,048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=GEOMETRIES, default="7b1" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--quantize", action="store_true", help="int8 weights")
    parser.add_argument("--layers", type=int, help="only so many blocks, where one GPU must do for more")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5, help="turns of ours and of transformers'")
    parser.add_argument("--sessions", type=int, nargs="+", default=[8])
    parser.add_argument("--check", action="store_true", help="compare the fast block with the plain one, and time both")
    parser.add_argument("--no-transformers", action="store_true", help="leave out the comparison")
    parser.add_argument("--serve", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", type=int, help="servers, if not one a GPU")
    parser.add_argument("--first", type=int, help="blocks on the first GPU, which has the client's share too")
    parser.add_argument("--cache", type=int, default=CACHE_TOKENS, help="tokens of cache a server takes")
    parser.add_argument("--transformers", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--decode", metavar="ADDRESS", nargs="+", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Result | None:
    config = _config(arguments)
    if arguments.serve:
        trio.run(_serve, config, arguments, json.loads(arguments.serve))
        return None
    if arguments.transformers:
        _transformers(config)
        return None
    if arguments.decode:
        trio.run(_decode, config, [Address.parse(text) for text in arguments.decode])
        return None
    gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0) if gpus else "no GPU"
    result = Result(
        "gpu", {**machine(), "GPUs": f"{gpus} x {name}", "torch": torch.__version__, "blocks": config.n_layer}
    )
    if arguments.check:
        _check(config, result)
        return result
    compared = not arguments.no_transformers and arguments.model != "176b"  # theirs, in bfloat16, would fit nowhere
    with _servers(config, arguments) as addresses:
        with _their_process(arguments) if compared else nullcontext() as theirs:
            trio.run(_measure, config, arguments, addresses, theirs, result)
        _measure_sessions(arguments, addresses, result)
    return result


def _config(arguments: argparse.Namespace) -> BloomConfig:
    config = GEOMETRIES[arguments.model]
    layers = arguments.layers or config.n_layer
    return BloomConfig(
        hidden_size=config.hidden_size, n_head=config.n_head, n_layer=layers, vocab_size=config.vocab_size
    )


def _this_script(arguments: argparse.Namespace, *words: str) -> list[str]:
    command = [sys.executable, str(Path(__file__).parent), "gpu", "--model", arguments.model, *words]
    command += ["--cache", str(arguments.cache)]
    if arguments.layers:
        command += ["--layers", str(arguments.layers)]
    return command + (["--quantize"] if arguments.quantize else [])


def _device(index: int = 0) -> torch.device:
    return torch.device("cuda", index % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def _servers(config: BloomConfig, arguments: argparse.Namespace) -> Iterator[list[Address]]:
    """One server process a GPU, the blocks shared evenly; ended with the block."""
    count = arguments.gpus or max(1, torch.cuda.device_count())
    first = arguments.first or config.n_layer // count
    others = max(1, count - 1)
    borders = [0, *(first + (config.n_layer - first) * i // others for i in range(others)), config.n_layer]
    borders = [*borders[:count], config.n_layer]
    processes = []
    try:
        for index in range(count):
            told = json.dumps({"start": borders[index], "end": borders[index + 1], "gpu": index})
            command = _this_script(arguments, "--serve", told)
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        yield [Address.parse(_line(process)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"a process of the benchmark ended with {process.wait()}")
    return line.strip()


async def _serve(config: BloomConfig, arguments: argparse.Namespace, told: dict[str, int]) -> None:
    device = _device(told["gpu"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    span = random_span(
        config, told["start"], told["end"],
        dtype=_dtype(), device=device, quantize=arguments.quantize, progress=_progress("blocks"),
    )  # fmt: skip
    server = BlockServer(
        span,
        Manifest(config, {}),
        "bench",
        cache_tokens=arguments.cache,
        here=lambda function: function(),
    )
    reason = server.accelerate(_progress("graphs"))
    print(reason or "fast", file=sys.stderr, flush=True)
    async with open_endpoint(Identity.generate(), handlers=server.methods) as endpoint, trio.open_nursery() as nursery:
        await nursery.start(server.run)
        (address,) = await endpoint.listen("127.0.0.1", 0)
        print(address, flush=True)
        await trio.sleep_forever()


def _progress(what: str) -> Callable[[int, int], None]:
    """One line in ten, on stderr: large models take a while."""

    def report(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0:
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return report


# --- client ----------------------------------------------------------------------------------------------------------


class _Ends:
    """Embeddings and head with random weights, tied, on the first device."""

    def __init__(self, config: BloomConfig) -> None:
        device = _device()
        with torch.device("meta"):
            self.embeddings = Embeddings(config).to(dtype=_dtype()).to_empty(device=device)
            self.head = Head(config)
        self.embeddings.word_embeddings.weight.data.normal_(0.0, 0.02)
        self.embeddings.word_embeddings_layernorm.reset_parameters()
        self.head.ln_f = self.embeddings.word_embeddings_layernorm
        self.head.lm_head.weight = self.embeddings.word_embeddings.weight
        self.device = device
        self._awake = Awake()

        self._fast, reason = accelerate_ends(self.embeddings, self.head)
        print(f"client: {reason or 'fast'}", file=sys.stderr, flush=True)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            hidden: torch.Tensor = self.embeddings(tokens.to(self.device))
            return hidden.cpu()

    async def next(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (1, T, C) -> the embedding (1, 1, C) of the token that follows."""
        underway = self._fast.begin(hidden[:, -1]) if self._fast else None
        if underway is not None:
            embedding = (await finished(underway))[1]
            self._awake.came()
            return embedding
        with torch.inference_mode():
            logits = self.head(hidden[:, -1:].to(self.device))
            embedded: torch.Tensor = self.embeddings(logits.argmax(dim=-1))
            return embedded.cpu()


async def _measure(
    config: BloomConfig,
    arguments: argparse.Namespace,
    addresses: list[Address],
    theirs: Turn | None,
    result: Result,
) -> None:
    ends = await trio.to_thread.run_sync(_Ends, config)
    async with open_node(Identity.generate(), peers=addresses) as node:
        await node.start(lan=False)
        node.directory.watch(Manifest(config, {}).model_id, config.n_layer, config.hidden_size)
        await node.directory.refresh()
        for prefix in arguments.prefixes:
            rounds = []
            for number in range(-1, arguments.rounds):
                found: dict[str, Any] = {"prefix": prefix, "round": number}
                if theirs is not None:
                    found["transformers"] = await trio.to_thread.run_sync(theirs, prefix)
                found["ours"] = await _generate(node, config, ends, prefix)
                await trio.sleep(REST_SECONDS)
                if number >= 0:  # the one before is for warming up
                    rounds.append(found)
            result.rounds += rounds
            _add(result, _summary(prefix, rounds))


def _summary(prefix: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, the quickest prefills, and medians of the rounds' ratios."""
    row: dict[str, Any] = {"prefix": prefix}
    for kind in ("steps/s", "prefill/s"):
        ours = [each["ours"][kind] for each in rounds]
        theirs = [each["transformers"][kind] for each in rounds if "transformers" in each]
        row[kind] = median(ours)
        row[f"transformers {kind}"] = median(theirs) if theirs else "-"
        row[f"{kind} ratio"] = median(map(truediv, ours, theirs)) if theirs else "-"
        if kind == "prefill/s":
            row["best"] = max(ours)
            row["transformers best"] = max(theirs, default="-")
    return row


def _add(result: Result, row: dict[str, Any]) -> None:
    """Shown at once too: what was measured is not lost where the rest fails."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    result.rows.append(row)


def _measure_sessions(arguments: argparse.Namespace, addresses: list[Address], result: Result) -> None:
    """Sessions that decode at once, each a client process of its own, hidden states only (no head)."""
    alone = _together(arguments, addresses, 1)[0]
    for sessions in arguments.sessions:
        rates = _together(arguments, addresses, sessions)
        row = {
            "sessions": sessions,
            "steps/s in all": sum(rates),
            "times one session": sum(rates) / alone,
            "least share": min(rates) / (sum(rates) / sessions),
        }
        _add(result, row)


def _together(arguments: argparse.Namespace, addresses: list[Address], sessions: int) -> list[float]:
    """Steps/s of each."""
    command = _this_script(arguments, "--decode", *map(str, addresses))
    clients = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(sessions)
    ]
    try:
        for client in clients:
            _line(client)  # it has read its prefix
        for client in clients:
            if client.stdin:
                print("go", file=client.stdin, flush=True)
        return [float(_line(client)) for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.wait()


async def _decode(config: BloomConfig, addresses: list[Address]) -> None:
    """A client of `_together`: decodes until all have had time to measure, but measures the first steps only."""
    torch.set_num_threads(1)
    hidden = torch.randn(1, 128, config.hidden_size).to(_dtype())
    async with open_node(Identity.generate(), peers=addresses) as node:
        await node.start(lan=False)
        node.directory.watch(Manifest(config, {}).model_id, config.n_layer, config.hidden_size)
        await node.directory.refresh()
        async with _session(node, config, 128 + 3 * TOGETHER_STEPS) as session:
            await session.step(hidden)
            print("ready", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            for _ in range(TOGETHER_STEPS // 4):
                await session.step(hidden[:, :1])
            started = time.perf_counter()
            for _ in range(TOGETHER_STEPS):
                await session.step(hidden[:, :1])
            print(TOGETHER_STEPS / (time.perf_counter() - started), flush=True)
            for _ in range(TOGETHER_STEPS):
                await session.step(hidden[:, :1])
            await trio.sleep_forever()


def _session(node: Node, config: BloomConfig, max_len: int) -> InferenceSession:
    dtype = "bf16" if torch.cuda.is_available() else "f32"
    return InferenceSession(
        node, Manifest(config, {}).model_id, layers=config.n_layer, hidden=config.hidden_size, batch=1,
        max_len=max_len, dtype=dtype, codec="raw",
    )  # fmt: skip


async def _generate(node: Node, config: BloomConfig, ends: _Ends, prefix: int) -> Rates:
    """One turn of ours: greedy decoding behind `prefix` tokens, head and embeddings included."""
    tokens = torch.arange(prefix)[None] % config.vocab_size
    hidden = await trio.to_thread.run_sync(ends.embed, tokens)
    async with _session(node, config, prefix + STEPS + 8) as session:
        started = time.perf_counter()
        output = await session.step(hidden, last=1)
        prefill = time.perf_counter() - started
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            token = await ends.next(output)
            output = await session.step(token)
            times.append(time.perf_counter() - started)
    return {"steps/s": 1 / median(times), "prefill/s": prefix / prefill}


# --- transformers ----------------------------------------------------------------------------------------------------

Rates = dict[str, float]
"""Of one turn: "steps/s", the median's, and "prefill/s", tokens/s."""
Turn = Callable[[int], Rates]
"""Has transformers take its turn behind so many tokens. Blocking."""


@contextmanager
def _their_process(arguments: argparse.Namespace) -> Iterator[Turn]:
    """Transformers' model in a process of its own, which sleeps between its turns."""
    command = _this_script(arguments, "--transformers")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(prefix: int) -> Rates:
        print(prefix, file=process.stdin, flush=True)
        rates: Rates = json.loads(_line(process))
        return rates

    try:
        _line(process)  # its model is there
        yield turn
    finally:
        process.kill()
        process.wait()


def _transformers(config: BloomConfig) -> None:
    """Take a turn, and print its rates, for each prefix on stdin."""
    from transformers import BloomConfig as TheirConfig
    from transformers import BloomForCausalLM

    torch.set_default_dtype(_dtype())
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # as our server
    with _device():
        model = BloomForCausalLM(
            TheirConfig(
                hidden_size=config.hidden_size, n_head=config.n_head, n_layer=config.n_layer,
                vocab_size=config.vocab_size,
            )
        ).eval()  # fmt: skip
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(_their_turn(model, int(line), config.vocab_size)), flush=True)


def _their_turn(model: Any, prefix: int, vocabulary: int) -> Rates:
    """Prefill and steps of transformers' own model with the same geometry, batch 1."""
    ids = torch.arange(prefix, device=_device())[None] % vocabulary
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    _sync()
    prefill = time.perf_counter() - started
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        token = out.logits[:, -1:].argmax(dim=-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        _sync()
        times.append(time.perf_counter() - started)
    return {"steps/s": 1 / median(times), "prefill/s": prefix / prefill}


# --- the fast block --------------------------------------------------------------------------------------------------


def _check(config: BloomConfig, result: Result) -> None:
    """Fast against plain on the same weights, rows of different lengths and paddings, and the times of both."""
    blocks = min(4, config.n_layer)
    for quantize in (False, True):
        span = random_span(config, 0, blocks, dtype=_dtype(), device=_device(), quantize=quantize)
        pool = CachePool(config, blocks, 16_384, dtype=span.dtype, device=span.device)
        fast, reason = accelerate(span, pool)
        for batch in (1, 3, 8, 16):
            error = _difference(span, fast, pool, batch)
            plain_seconds, fast_seconds = (_step_seconds(each, pool, batch) for each in (span, fast))
            result.rows.append(
                {
                    "weights": "int8" if quantize else "bf16",
                    "rows": batch,
                    "relative error": error,
                    "plain ms a block": plain_seconds / blocks * 1e3,
                    "fast ms a block": fast_seconds / blocks * 1e3,
                    "GB/s of weights": span.weight_bytes / fast_seconds / 1e9,
                    "way": reason or "graph",
                }
            )
    result.rows.append({"copy GB/s": _copy_rate()})


def _rows(pool: CachePool, batch: int, hidden: int) -> list[Part]:
    parts = []
    for i in range(batch):
        rows = pool.reserve(1, 64 + 16 * i)
        parts.append(Part(rows, 1, 30 + 7 * i, [i % 5]))
    return parts


def _difference(span: Span, fast: Span, pool: CachePool, batch: int) -> float:
    """Largest relative difference of a row's output, after the same prefill."""
    C = span.config.hidden_size
    parts = _rows(pool, batch, C)
    generator = torch.Generator(device=span.device).manual_seed(batch)
    with torch.inference_mode():
        for part in parts:
            before = torch.randn(part.position, C, generator=generator, device=span.device).to(span.dtype)
            span.step_batch(before, [Part(part.rows, part.position, 0, part.pad)])
        hidden = torch.randn(batch, C, generator=generator, device=span.device).to(span.dtype)
        plain = span.step_batch(hidden, parts).float()
        quick = fast.step_batch(hidden, parts).float()
    for part in parts:
        pool.release(part.rows)
    return float(((plain - quick).norm(dim=1) / (plain - hidden.float()).norm(dim=1)).max())


def _step_seconds(span: Span, pool: CachePool, batch: int) -> float:
    parts = _rows(pool, batch, span.config.hidden_size)
    hidden = torch.randn(batch, span.config.hidden_size, device=span.device).to(span.dtype)
    seconds = _timed(lambda: span.step_batch(hidden, parts))
    for part in parts:
        pool.release(part.rows)
    return seconds


def _timed(action: Callable[[], object], rounds: int = 20) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(rounds):
            _sync()
            started = time.perf_counter()
            action()
            _sync()
            times.append(time.perf_counter() - started)
    return median(times[3:])


def _copy_rate() -> float:
    """GB/s read and written by a plain copy of 1 GiB (64 MiB on a CPU)."""
    source = torch.zeros(2**30 if torch.cuda.is_available() else 2**26, dtype=torch.uint8, device=_device())
    into = torch.empty_like(source)
    return 2 * source.numel() / _timed(lambda: into.copy_(source)) / 1e9
