"""`petalite generate` and `chat` against servers started by hand, and what each mistake of a user says."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from petalite.identity import Identity, SwarmKey

PROMPT = "The king said to his daughter"
COUNT = 24


@dataclass
class Swarm:
    commands: Any
    ready: list[dict[str, Any]]
    peers: list[str]


@pytest.fixture(scope="module")
def swarm(make_commands: Any, with_peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two servers of the embedded model, started by hand in two terminals."""
    commands = make_commands(tmp_path_factory.mktemp("state"))
    with commands.serving(["fairytale", "--blocks", "0:4"], ["fairytale", "--blocks", "4:8"]) as ready:
        yield Swarm(commands, ready, with_peers(ready))
    assert commands.left() == []


def test_a_ready_server_says_who_and_where_it_is(swarm: Swarm) -> None:
    for server, blocks in zip(swarm.ready, ([0, 4], [4, 8]), strict=True):
        assert server["ready"] is True and server["blocks"] == blocks and server["model"] == "fairytale"
        assert server["addresses"][0].startswith(f"petalite://{server['peer_id']}@127.0.0.1:")


@pytest.mark.parametrize(("wire", "margin"), [("f32", 0.0), ("auto", 0.02)])
def test_greedy_tokens_are_the_oracles(wire: str, margin: float, swarm: Swarm, fairytale_oracle: Any) -> None:
    words = ["--greedy", "--json", "--wire", wire, "--max-new-tokens", str(COUNT), *swarm.peers]
    done = swarm.commands.run("generate", "fairytale", PROMPT, *words)
    assert done.code == 0, done.err
    fairytale_oracle.check(fairytale_oracle.encode(PROMPT), done.json["token_ids"], COUNT, least_margin=margin)
    assert done.json["servers"] == [{"peer_id": s["peer_id"], "blocks": s["blocks"]} for s in swarm.ready]


def test_beams_are_the_oracles(swarm: Swarm, fairytale_oracle: Any) -> None:
    words = ["--beams", "3", "--json", "--wire", "f32", "--max-new-tokens", "10", *swarm.peers]
    done = swarm.commands.run("generate", "fairytale", PROMPT, *words)
    assert done.code == 0, done.err
    assert done.json["token_ids"] == fairytale_oracle.beams(fairytale_oracle.encode(PROMPT), 10, 3)
    assert done.json["text"] == fairytale_oracle.tokenizer.decode(done.json["token_ids"])
    done = swarm.commands.run("generate", "fairytale", PROMPT, "--beams", "3", "--temperature", "1", *swarm.peers)
    assert done.code == 2 and "--beams and --temperature exclude each other" in done.err


def test_int8_on_the_wire_and_sampling_with_a_seed(swarm: Swarm, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--wire", "int8", "--seed", "7", "--top-k", "20", "--max-new-tokens", "12", *swarm.peers]
    texts = []
    for _ in range(2):
        done = swarm.commands.run("generate", "fairytale", PROMPT, *words)
        assert done.code == 0, done.err
        texts.append(done.out)
    assert texts[0] == texts[1] and texts[0].startswith(PROMPT) and texts[0].endswith("\n")
    closing = done.err.splitlines()
    assert len(closing) == 1 and closing[0].startswith("12 tokens, ")


def test_chat_keeps_what_was_said(swarm: Swarm, fairytale_oracle: Any) -> None:
    lines = ["Once upon a time", " said the king,"]
    words = ["--greedy", "--wire", "f32", "--max-new-tokens", "10", *swarm.peers]
    done = swarm.commands.run("chat", "fairytale", *words, stdin="\n".join(lines) + "\n\nnot read any more\n")
    assert done.code == 0, done.err
    seen: list[int] = []
    expected = ""
    for line in lines:
        seen += fairytale_oracle.encode(line)
        answer, _ = fairytale_oracle.greedy(seen, 10)
        seen += answer
        expected += fairytale_oracle.tokenizer.decode(answer) + "\n"
    assert done.out == expected
    assert done.err.splitlines()[-1].endswith(f"{len(seen)} remembered")


def refused_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def mistakes(swarm: Swarm, directory: Path) -> dict[str, tuple[list[str], str]]:
    """What goes wrong -> the words after `petalite`, and what the one line says."""
    first = swarm.ready[0]["addresses"][0]
    who, place = first.removeprefix("petalite://").split("@")
    stranger = Identity.from_seed(bytes(32)).peer_id
    SwarmKey(bytes(32)).save(directory / "swarm.key")
    hello = ["generate", "fairytale", "hello"]
    here = ["--max-new-tokens", "4", *swarm.peers]
    return {
        "refused port": ([*hello, "--peer", f"petalite://{who}@127.0.0.1:{refused_port()}"], "connection refused"),
        "another peer there": ([*hello, "--peer", f"petalite://{stranger}@{place}"], "peer id"),
        "no such host": ([*hello, "--peer", f"petalite://{who}@nothing.invalid:1"], "cannot reach nothing.invalid:1"),
        "no peer at all": ([*hello, "--no-lan"], "no peer is known"),
        "another swarm": ([*hello, "--swarm-key", str(directory / "swarm.key"), "--peer", first], "other key"),
        "empty prompt": (["generate", "fairytale", "", *here], "the prompt is empty"),
        "long prompt": (["generate", "fairytale", "hello " * 20_000, *here], "hold sessions of at most"),
        "no such model": (["generate", "./nothing", "hello", *here], "./nothing: no such model"),
        "no such device": ([*hello, "--device", "quantum", *here], "device 'quantum' is not known"),
        "port in use": (["serve", "fairytale", "--listen", place], "is in use"),
        "too many blocks": (["serve", "fairytale", "--blocks", "4:9"], "has blocks 0:8, cannot serve 4:9"),
    }


@pytest.mark.parametrize(
    "mistake",
    [
        "refused port",
        "another peer there",
        "no such host",
        "no peer at all",
        "another swarm",
        "empty prompt",
        "long prompt",
        "no such model",
        "no such device",
        "port in use",
        "too many blocks",
    ],
)
def test_a_mistake_is_one_clear_line(
    mistake: str, swarm: Swarm, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from petalite.cli import run

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    words, said = mistakes(swarm, tmp_path)[mistake]
    assert run(words) == 1  # in this process, where torch is there already
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("petalite: ") and err.count("\n") == 1 and said in err


def test_json_goes_alone_to_stdout_and_strings_come_back_whole(swarm: Swarm) -> None:
    done = swarm.commands.run(
        "generate", "fairytale", PROMPT, "--json", "--seed", "1", "--stop", ",", "--max-new-tokens", "60", *swarm.peers
    )
    assert done.code == 0 and len(done.out.splitlines()) == 1 and done.err == ""
    story = json.loads(done.out)
    assert story["prompt"] == PROMPT and "," not in story["text"]
