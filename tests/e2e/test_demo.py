"""`petalite demo`: server processes and a client give the text that transformers gives on one machine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

PROMPT = "Once upon a time"
COUNT = 40


@pytest.mark.parametrize("servers", [1, 2, 3, 8])
def test_greedy_demo_gives_the_oracles_tokens(servers: int, commands: Any, fairytale_oracle: Any) -> None:
    words = ["--greedy", "--json", "--wire", "f32", "--servers", str(servers), "--max-new-tokens", str(COUNT)]
    done = commands.run("demo", *words)
    assert done.code == 0 and not done.err, done.err
    story = done.json
    expected, _ = fairytale_oracle.greedy(fairytale_oracle.encode(PROMPT), COUNT)
    assert story["token_ids"] == expected
    assert story["text"] == fairytale_oracle.tokenizer.decode(expected)
    assert story["prompt"] == PROMPT and story["failovers"] == 0 and story["failover_seconds"] == 0
    spans = [tuple(server["blocks"]) for server in story["servers"]]
    assert len(spans) == servers and [spans[0][0], spans[-1][1]] == [0, 8]
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert len({server["peer_id"] for server in story["servers"]}) == servers
    assert story["tokens_per_second"] > 0 and 0 < story["seconds_to_first_token"] < 60


def test_a_killed_server_costs_a_pause_and_no_word(commands: Any, fairytale_oracle: Any) -> None:
    done = commands.run("demo", "--greedy", "--servers", "2", "--kill-at", "10", "--max-new-tokens", str(COUNT))
    assert done.code == 0
    prompt = fairytale_oracle.encode(PROMPT)
    tokens = fairytale_oracle.encode(done.out.rstrip("\n"))[len(prompt) :]
    fairytale_oracle.check(prompt, tokens, COUNT, least_margin=0.02)
    assert "killing" in done.err and "replaying 13 tokens" in done.err
    closing = done.err.splitlines()[-1]
    assert "tokens/s" in closing and "1 failover" in closing and "bytes on the wire a token" in closing
    assert "Traceback" not in done.err


def test_more_servers_than_blocks_is_a_usage_error(commands: Any) -> None:
    done = commands.run("demo", "--servers", "9")
    assert done.code == 2 and "at most 8 servers" in done.err
