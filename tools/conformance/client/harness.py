"""Starts the client under test once a case, between servers that the case chooses, and reads what it says."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tools.conformance import tensors
from tools.conformance.client.responder import Conn, Server
from tools.conformance.crypto import SwarmKey, peer_text
from tools.conformance.link import Link, Transcript
from tools.conformance.registry import Case
from tools.conformance.runner import Result, judge
from tools.conformance.verdicts import Skipped, require

PROMPT = [80, 101, 116, 97, 108]
GRACE = 10.0  # seconds that a process may take to start and to end


@dataclass(frozen=True)
class Outcome:
    """What the client process did."""

    code: int | None  # None: it had to be killed
    said: dict[str, Any] | None  # its JSON object
    output: str
    seconds: float

    def __str__(self) -> str:
        ended = "did not end" if self.code is None else f"exit code {self.code}"
        return f"{ended} after {self.seconds:.1f} s, said {str(self.said)[:300]}, output ends {self.output[-300:]!a}"


@dataclass
class Stage:
    """One case: its servers, and what they saw."""

    harness: Harness
    rng: random.Random
    case_id: str
    transcript: Transcript = field(default_factory=Transcript)
    servers: list[Server] = field(default_factory=list)
    conns: list[Conn] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    opens: list[tuple[Server, dict[str, Any]]] = field(default_factory=list)
    steps: list[tuple[Server, dict[str, Any], bytes]] = field(default_factory=list)
    keys_seen: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    agent: str = ""
    first: Server | None = None
    _listeners: list[socket.socket] = field(default_factory=list)

    @property
    def network(self) -> bytes:
        return self.harness.network

    @property
    def swarm_key(self) -> SwarmKey | None:
        return self.harness.swarm_key

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def is_first(self, server: Server) -> bool:
        """Whether this server is the one that was asked first: the one that misbehaves, where two are offered."""
        if self.first is None:
            self.first = server
        return self.first is server

    # playing

    def listen(self, server: Server, peer: bytes | None = None) -> tuple[str, str]:
        """Serve in the background; returns HOST:PORT and the peer id to dial."""
        listener = socket.create_server((self.harness.host, self.harness.port))
        listener.settimeout(0.2)
        self._listeners.append(listener)
        self.servers.append(server)
        threading.Thread(target=self._accept, args=(listener, server), daemon=True).start()
        host, port = listener.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return place, peer_text(peer or server.identity.peer)

    def _accept(self, listener: socket.socket, server: Server) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            conn = Conn(server, Link(sock, self.transcript))
            self.conns.append(conn)
            threading.Thread(target=server.serve, args=(conn,), daemon=True).start()

    def ping(self, server: Server, seconds: float = 8, peer: bytes | None = None) -> Outcome:
        """Let the client connect to one server, and PING."""
        return self.run("ping", [self.listen(server, peer)], seconds)

    def generate(self, *servers: Server, count: int = 4, wire: str = "f32", seconds: float = 15) -> Outcome:
        """Let the client generate from PROMPT over these servers."""
        return self.run("generate", [self.listen(server) for server in servers], seconds, count, wire)

    def run(
        self, task: str, places: Sequence[tuple[str, str]], seconds: float, count: int = 0, wire: str = "f32"
    ) -> Outcome:
        environment = os.environ | {
            "PETALITE_ADDR": places[0][0],
            "PETALITE_PEER_ID": places[0][1],
            "PETALITE_PEERS": ",".join(f"petalite://{peer}@{place}" for place, peer in places),
            "PETALITE_CASE": self.case_id,
            "PETALITE_TASK": task,
            "PETALITE_NETWORK": self.network.decode(),
            "PETALITE_SECONDS": f"{seconds:g}",
            "PETALITE_MODEL": str(self.harness.model),
            "PETALITE_TOKENS": ",".join(map(str, PROMPT)),
            "PETALITE_NEW_TOKENS": str(count),
            "PETALITE_WIRE": wire,
        }
        if self.harness.key_path:
            environment["PETALITE_SWARM_KEY"] = str(self.harness.key_path.resolve())
        started = time.monotonic()
        with subprocess.Popen(
            self.harness.command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace",
        ) as process:  # fmt: skip
            try:
                output, errors = process.communicate(timeout=seconds + GRACE)
                code: int | None = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                output, errors = process.communicate()
                code = None
        time.sleep(0.05)  # the servers' threads hear of the end
        return Outcome(code, _last_object(output), errors + output, time.monotonic() - started)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        for conn in self.conns:
            conn.link.close()

    # judgement

    def should(self, condition: object, text: str) -> None:
        if not condition:
            self.misses.append(text)

    def clean(self) -> None:
        """No server saw the client break the protocol."""
        require(not self.faults, f"expected: a client within the spec; observed: {'; '.join(self.faults[:3])}")

    def well_ended(self, outcome: Outcome) -> None:
        require(outcome.code is not None, f"expected: the client ends; observed: {outcome}")
        require(outcome.code in (0, 1), f"expected: exit code 0 or 1; observed: {outcome}")
        require(outcome.said is not None, f"expected: one JSON object on stdout; observed: {outcome}")
        require("\x1b" not in outcome.output, "a control character of the server reached the terminal")

    def succeeded(self, outcome: Outcome) -> None:
        self.well_ended(outcome)
        self.clean()
        done = outcome.code == 0 and (outcome.said or {}).get("ok") is True
        require(done, f"expected: the task is done; observed: {outcome}")

    def generated(self, outcome: Outcome, count: int = 4) -> None:
        """Done, with the ids that exact arithmetic gives."""
        self.succeeded(outcome)
        wanted = tensors.greedy(PROMPT, count)
        require((outcome.said or {}).get("tokens") == wanted, f"expected: tokens {wanted}; observed: {outcome}")

    def failed(self, outcome: Outcome, within: float = 6.0) -> None:
        """Ended with an error, cleanly, and not only by its deadline; it may not break the protocol either."""
        self.well_ended(outcome)
        self.clean()
        said_so = outcome.code == 1 and (outcome.said or {}).get("ok") is False
        require(said_so, f"expected: a clean failure; observed: {outcome}")
        error = (outcome.said or {}).get("error")
        self.should(type(error) is str and error, "an error in words")
        require(outcome.seconds <= within + 2, f"expected: at once; observed: {outcome}")

    def silent(self) -> None:
        """After the handshake's fault the client sent no record and no message 3."""
        for conn in self.conns:
            require(conn.hello is None and not conn.requests, "the client went on after a failed handshake")

    def goodbye(self, *codes: str) -> None:
        """The client should have ended a connection with one of these codes."""
        seen = {conn.goaway for conn in self.conns}
        self.should(seen & set(codes), f"GOAWAY({'/'.join(codes)}), not {seen}")


def _last_object(output: str) -> dict[str, Any] | None:
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


class Harness:
    """Runs client cases. A context manager: it holds the formula model's files for the client."""

    def __init__(
        self, command: Sequence[str], host: str, port: int, network: bytes, swarm_key: SwarmKey | None,
        key_path: Path | None, seed: int,
    ) -> None:  # fmt: skip
        self.command, self.host, self.port = list(command), host, port
        self.network, self.swarm_key, self.key_path, self.seed = network, swarm_key, key_path, seed
        self.agent = ""
        self._directory = tempfile.TemporaryDirectory(prefix="conformance-")
        self.model = Path(self._directory.name)

    def __enter__(self) -> Harness:
        write_formula_model(self.model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()

    def run_case(self, case: Case) -> Result:
        stage = Stage(self, random.Random(f"{self.seed} {case.id}"), case.id)

        def run() -> list[str]:
            wanted = "private" if self.swarm_key else "public"
            if case.network not in ("any", wanted):
                raise Skipped(f"for {case.network} networks only")
            try:
                case.run(stage)
            finally:
                stage.close()
                self.agent = self.agent or stage.agent
            return stage.misses

        result = judge(case, run)
        if result.verdict != "pass":
            result.transcript = stage.transcript.entries
        return result


def write_formula_model(directory: Path) -> None:
    """The formula model as a checkpoint of one safetensors file, with its config."""
    config = {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": tensors.HIDDEN,
        "n_head": tensors.HEADS, "n_layer": tensors.LAYERS, "vocab_size": tensors.VOCAB,
        "layer_norm_epsilon": tensors.EPSILON, "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "type": "WordLevel",
        "vocab": {f"<{token}>": token for token in range(tensors.VOCAB)},
        "unk_token": "<0>",
    }
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": tokenizer}))
    header: dict[str, Any] = {}
    body = b""
    for name, shape in _shapes():
        data = tensors.weight(name, *shape).astype("<f4").tobytes()
        header[f"transformer.{name}"] = {
            "dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]
        }  # fmt: skip
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


def _shapes() -> list[tuple[str, tuple[int, ...]]]:
    c = tensors.HIDDEN
    found: list[tuple[str, tuple[int, ...]]] = [("word_embeddings.weight", (tensors.VOCAB, c))]
    norms = ["word_embeddings_layernorm", "ln_f"]
    for index in range(tensors.LAYERS):
        block = f"h.{index}"
        norms += [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
        for name, rows, columns in (
            ("self_attention.query_key_value", 3 * c, c), ("self_attention.dense", c, c),
            ("mlp.dense_h_to_4h", 4 * c, c), ("mlp.dense_4h_to_h", c, 4 * c),
        ):  # fmt: skip
            found += [(f"{block}.{name}.weight", (rows, columns)), (f"{block}.{name}.bias", (rows,))]
    return found + [(f"{name}.{part}", (c,)) for name in norms for part in ("weight", "bias")]
