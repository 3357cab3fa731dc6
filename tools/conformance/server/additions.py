"""Adapters and deep prompts that a session brings: numbers, limits, memory (spec/07, additions)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tools.conformance import tensors, training
from tools.conformance.bench import Bench
from tools.conformance.registry import case
from tools.conformance.tensors import Array
from tools.conformance.verdicts import Skipped, require


def _made(bench: Bench, tokens: int = 3, rank: int = 2) -> dict[str, Array]:
    """Deep prompts and an adapter of every product, for all blocks of the target. Raises Skipped if it takes none."""
    if type(bench.model.get("train")) is not int:
        raise Skipped("the target does not train, so it takes no additions")
    start, end = bench.model["blocks"]
    n, C = end - start, bench.width
    random = np.random.default_rng(bench.rng.randrange(2**32))
    shapes: dict[str, tuple[int, ...]] = {"prompts": (n, tokens, C)}
    for target, (wide_in, wide_out) in training.WIDTHS.items():
        shapes[f"{target}.lora_A"], shapes[f"{target}.lora_B"] = (n, rank, wide_in * C), (n, wide_out * C, rank)
    return {
        name: ((1.0 if name == "prompts" else 0.1) * random.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def _formula(bench: Bench, row: Array, additions: Mapping[str, Array]) -> Array:
    """One whole row (T, C) through the target's blocks with additions."""
    if bench.model["model"] != tensors.FORMULA_ID:
        raise Skipped("the target does not serve the formula model, so its numbers are unknown here")
    start, end = bench.model["blocks"]
    made: Array = training.run({"h": row[None], **additions}, start, end)[-1][0]
    return made


@case("additions/001", "PT-SES-080 PT-SES-083 PT-SES-084")
def numbers(bench: Bench) -> None:
    """A session with prompts and an adapter gives the formula's numbers, in steps of 2, 1 and 5 tokens"""
    given, hidden = _made(bench), bench.hidden(8)
    session = bench.session(additions=given)
    found = np.concatenate([session.step(hidden[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 8))], axis=1)
    bench.close_to(found[0], _formula(bench, hidden[0], given), "the row with additions")


@case("additions/002", "PT-SES-084 PT-SES-083")
def padding_and_rollback(bench: Bench) -> None:
    """Prompts begin behind each row's padding, and come again where a rollback ends amid them"""
    given, hidden = _made(bench, 4), bench.hidden(7, 2)
    session = bench.session(batch=2, additions=given)
    session.step(hidden, pad=[2, 0])
    found = session.step(hidden[:, 1:], pad=[2, 0], pos=1)
    for row, pad in enumerate((2, 0)):
        wanted = _formula(bench, hidden[row, pad:], given)
        skipped = max(1 - pad, 0)
        bench.close_to(found[row, pad - 1 + skipped :], wanted[skipped:], f"row {row}")


@case("additions/003", "PT-SES-085")
def others(bench: Bench) -> None:
    """Sessions of the same peer and of another, with other additions or none, keep their own numbers side by side"""
    hidden = bench.hidden(4)
    mine, theirs = _made(bench), _made(bench)
    first, second = bench.peer(), bench.peer()
    pairs = [
        (bench.session(first, additions=mine), mine),
        (bench.session(first), {}),
        (bench.session(second, additions=theirs), theirs),
        (bench.session(second), {}),
    ]
    sent = [session.send(hidden) for session, _ in pairs]
    for (session, given), answer in zip(pairs, sent, strict=True):
        found = session.accept(session.peer.wait(answer, 30), hidden)
        bench.close_to(found[0], _formula(bench, hidden[0], given), "one of four sessions")
    first.ask("close", {"sid": pairs[0][0].sid})
    plain = bench.session(first).step(hidden)
    bench.close_to(plain[0], bench.formula(hidden[0]), "a session after one with additions was closed")


@case("additions/004", "PT-SES-081")
def refused(bench: Bench) -> None:
    """Additions that do not fit: one error each, and the connection goes on"""
    made, peer = _made(bench), bench.peer()
    n, C = made["prompts"].shape[0], bench.width
    half = {"dense.lora_A": made["dense.lora_A"]}
    both = {name: made[name] for name in ("dense.lora_A", "dense.lora_B")}
    spoilt = made["prompts"].copy()
    spoilt[0, 0, 0] = np.nan
    wide = np.zeros((n, 257, C), np.float32)
    wrong: list[tuple[set[str], Mapping[str, Array], dict[str, object]]] = [
        ({"bad_request"}, half, {}),
        ({"bad_request"}, both, {"adapter": "any"}),
        ({"bad_request"}, {"h": bench.hidden(1)}, {}),
        ({"bad_request"}, {}, {"adapter": 7}),
        ({"not_served"}, {}, {"adapter": "conformance: an adapter that nobody holds"}),
        ({"tensor"}, {"prompts": spoilt}, {}),
        ({"tensor"}, {"prompts": made["prompts"][:, :, :-1]}, {}),
        ({"tensor"}, {"prompts": np.concatenate([made["prompts"]] * 2)}, {}),
        ({"tensor"}, {"prompts": made["prompts"]}, {"max_len": made["prompts"].shape[1] - 1}),
        ({"tensor"}, half | {"dense.lora_B": np.zeros((n, C, 3), np.float32)}, {}),
        ({"resources"}, {"dense.lora_A": wide, "dense.lora_B": np.zeros((n, C, 257), np.float32)}, {}),
    ]
    for codes, given, changes in wrong:
        described, body = tensors.pack(given)
        head = bench.open_head(bench.rng.randbytes(16), **({"t": described} if given else {}) | changes)
        peer.refused(codes, "open", head, body)
    bench.session(peer, additions=made).step(bench.hidden(2))


@case("additions/005", "PT-SES-086")
def opened_again(bench: Bench) -> None:
    """The same open with the same bytes is answered like the first, with other bytes: ERR conflict"""
    session = bench.session(additions=_made(bench))
    peer, head, body = session.peer, session.open_head, session.open_body
    require(peer.ask("open", head, body).head == session.opened.head, "the second answer differs from the first")
    other = bytearray(body)
    other[0] ^= 1  # of a number's last bits
    peer.refused({"conflict"}, "open", head, bytes(other))
    peer.refused({"conflict"}, "open", {key: value for key, value in head.items() if key != "t"})


@case("additions/006", "PT-SES-082")
def memory(bench: Bench) -> None:
    """cache_left falls by more than the session's tokens, and rises again when it is closed"""
    made, peer = _made(bench), bench.peer()
    left = (peer.ask("info").head or {})["cache_left"]
    session = bench.session(peer, additions=made)
    held = left - (peer.ask("info").head or {})["cache_left"]
    require(held > 64, f"expected: more than the 64 tokens of the session held; observed: {held}")
    peer.ask("close", {"sid": session.sid})
    after = (peer.ask("info").head or {})["cache_left"]
    require(after == left, f"cache_left {left} before and {after} after")
