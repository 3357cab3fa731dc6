"""Training requests: numbers of forward and backward, and what is refused (spec/15)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.conformance import tensors, training
from tools.conformance.bench import Bench
from tools.conformance.codec import unpack
from tools.conformance.peer import Answer, Peer, expect_error
from tools.conformance.registry import case
from tools.conformance.tensors import Array
from tools.conformance.verdicts import Skipped, require

VECTORS = Path(__file__).resolve().parents[3] / "spec" / "vectors" / "training.json"
ADAPTER = [f"{target}.lora_{side}" for target in training.WIDTHS for side in "AB"]


class Trainer:
    """Asks the target for passes through all of its blocks. Raises Skipped if it does not train."""

    def __init__(self, bench: Bench, peer: Peer | None = None) -> None:
        if type(bench.model.get("train")) is not int:
            raise Skipped("the target does not train")
        self.bench = bench
        self.peer = peer or bench.peer()
        self.start, self.end = bench.model["blocks"]
        self.blocks = self.end - self.start

    def given(self, tokens: int, batch: int = 1, *more: str) -> dict[str, Array]:
        """Hidden states and other tensors by name, all random."""
        C, n = self.bench.width, self.blocks
        shapes: dict[str, tuple[int, ...]] = {"grad": (batch, tokens, C), "prompts": (n, 1, C)}
        for target, (wide_in, wide_out) in training.WIDTHS.items():
            shapes[f"{target}.lora_A"] = (n, 2, wide_in * C)
            shapes[f"{target}.lora_B"] = (n, wide_out * C, 2)
        random = np.random.default_rng(self.bench.rng.randrange(2**32))
        made = {"h": self.bench.hidden(tokens, batch)}
        for name in more:
            size = 0.1 if ".lora_" in name else 1.0
            made[name] = (size * random.standard_normal(shapes[name])).astype(np.float32)
        return made

    def send(
        self, method: str, given: Mapping[str, Array], dtype: str = "f32", codec: str = "raw", **fields: Any
    ) -> Answer:
        described, body = [], b""
        for name, array in given.items():
            kind = "u8" if array.dtype == np.uint8 else "f32" if ".lora_" in name or name == "prompts" else dtype
            how = codec if name in ("h", "grad", "tap_grads") else "raw"
            described.append(tensors.descriptor(array, kind, how, name))
            body += array.tobytes() if kind == "u8" else tensors.encode(array, kind, how)
        head = {"model": self.bench.model["model"], "blocks": [self.start, self.end], "t": described} | fields
        return self.peer.send_request(method, head, body)

    def call(self, method: str, given: Mapping[str, Array], **fields: Any) -> Answer:
        return self.peer.wait(self.send(method, given, **fields), 60)

    def run(self, method: str, given: Mapping[str, Array], **fields: Any) -> dict[str, Array]:
        """A pass that must work; the reply's tensors, float32."""
        return take(self.call(method, given, **fields))

    def refused(self, codes: set[str], method: str, given: Mapping[str, Array], **fields: Any) -> None:
        expect_error(self.call(method, given, **fields), codes)

    def goes_on(self) -> None:
        """The connection lives, and what is right is answered."""
        self.run("forward", self.given(2))


def take(answer: Answer) -> dict[str, Array]:
    require(not answer.code, f"expected: the pass answered; observed: {answer}")
    made, at = {}, 0
    for tensor in (answer.head or {}).get("t", ()):
        size = tensors.encoded_size(tuple(tensor["s"]), tensor["d"], tensor["c"])
        body = bytes(answer.body[at : at + size])
        made[tensor["n"]] = tensors.decode(body, tensor["d"], tuple(tensor["s"]), tensor["c"])
        at += size
    require(at == len(answer.body), f"expected: a body of {at} bytes; observed: {len(answer.body)}")
    return made


def _formula(bench: Bench) -> None:
    if bench.model["model"] != tensors.FORMULA_ID or bench.model["blocks"] != [0, 2]:
        raise Skipped("the target does not serve all of the formula model, so its numbers are unknown here")


def _near(bench: Bench, found: Array, wanted: Array, what: str) -> None:
    """Norm-wise: single gradients may be as small as rounding."""
    rough = bench.model["dtype"] != "float32" or bench.model.get("quant")
    require(found.shape == wanted.shape, f"{what}: shape {found.shape}, expected {wanted.shape}")
    distance = np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-9)
    require(distance <= (0.1 if rough else 2e-4), f"{what}: differs by {distance:.2g}")


def _vector(number: int, index: int, requirements: str, title: str) -> None:
    def run(bench: Bench) -> None:
        _formula(bench)
        trainer = Trainer(bench)
        vector = json.loads(VECTORS.read_text())["numbers"][index]
        head = unpack(bytes.fromhex(vector["head"]))
        found = take(trainer.peer.call(vector["method"], head, bytes.fromhex(vector["body"]), 60))
        names = [due["n"] for due in vector["reply"]]
        require(list(found) == names, f"expected: tensors {names}; observed: {list(found)}")
        for due in vector["reply"]:
            wanted = tensors.decode(bytes.fromhex(due["hex"]), "f32", tuple(due["s"]))
            real = slice(None) if "mask" not in vector["name"] else [0, 2]
            _near(bench, found[due["n"]][..., real, :], wanted[..., real, :], due["n"])

    case(f"training/{number:03}", requirements, title=title)(run)


_vector(1, 0, "PT-TRA-001", "forward of one row: the formula model's numbers")
_vector(
    2, 1, "PT-TRA-020 PT-TRA-021 PT-TRA-022 PT-TRA-023", "forward with mask, prompts, adapter and taps: its numbers"
)
_vector(3, 2, "PT-TRA-024", "backward by the hidden states: its numbers")
_vector(4, 3, "PT-TRA-024 PT-TRA-025", "backward by everything that has a gradient: its numbers")


@case("training/005", "PT-TRA-020 PT-TRA-028 PT-TRA-024")
def rows_and_padding(bench: Bench) -> None:
    """Rows of a padded batch give the numbers of the same rows alone, forward and backward"""
    trainer = Trainer(bench)
    given = trainer.given(6, 3, "grad")
    mask = np.ones((3, 6), np.uint8)
    mask[0, :2] = mask[1, 4:] = mask[2, 2:4] = 0
    given["grad"] = given["grad"] * mask[..., None]
    output = trainer.run("forward", {"h": given["h"], "mask": mask})["h"]
    found = trainer.run("backward", {**given, "mask": mask}, wanted=["h"])["h"]
    require(bool(np.isfinite(output).all()), "expected: finite numbers at padded positions too")
    for row in range(3):
        real = mask[row] != 0
        alone = {name: array[row : row + 1, real] for name, array in given.items()}
        _near(bench, output[row, real], trainer.run("forward", {"h": alone["h"]})["h"][0], f"row {row}")
        _near(bench, found[row, real], trainer.run("backward", alone, wanted=["h"])["h"][0], f"gradient of row {row}")


@case("training/006", "PT-TRA-025 PT-TRA-024")
def types_and_codecs(bench: Bench) -> None:
    """f16, bf16 and i8b64: h in the request's type and codec, gradients of prompts and adapter in float32, raw"""
    trainer = Trainer(bench)
    names = ["prompts", *ADAPTER]
    given = trainer.given(3, 2, "grad", *names)
    wanted = trainer.run("backward", given, wanted=["h", *names])
    # About three times, for f16 eight times, the largest of 300 random requests: 0.006, 0.049, 0.121.
    for dtype, codec, tolerance in (("f16", "raw", 0.05), ("bf16", "raw", 0.15), ("f16", "i8b64", 0.4)):
        answer = trainer.call("backward", given, dtype=dtype, codec=codec, wanted=["h", *names])
        found = take(answer)
        described = {tensor["n"]: (tensor["d"], tensor["c"]) for tensor in (answer.head or {})["t"]}
        due = {"h": (dtype, codec), **dict.fromkeys(names, ("f32", "raw"))}
        require(described == due, f"expected: {due}; observed: {described}")
        for name, array in found.items():
            distance = np.linalg.norm(array - wanted[name]) / np.linalg.norm(wanted[name])
            require(distance < tolerance, f"{name} as {dtype} {codec}: differs by {distance:.2g}")


@case("training/007", "PT-TRA-024 PT-TRA-033")
def some_gradients(bench: Bench) -> None:
    """wanted may name any of the tensors, in any order; the same request twice has the same answer"""
    trainer = Trainer(bench)
    given = trainer.given(3, 2, "grad", "prompts", "dense.lora_A", "dense.lora_B")
    for wanted in (["dense.lora_B"], ["prompts", "h"], ["h", "dense.lora_A", "dense.lora_B", "prompts"]):
        first, again = (trainer.run("backward", given, wanted=wanted) for _ in range(2))
        require(list(first) == wanted, f"expected: {wanted}; observed: {list(first)}")
        for name in wanted:
            _near(bench, again[name], first[name], name)


@case("training/008", "PT-TRA-003 PT-TRA-010")
def not_served(bench: Bench) -> None:
    """Blocks, a model or an adapter that are not here: ERR not_served; a part of the blocks is served"""
    trainer = Trainer(bench)
    given = trainer.given(2)
    start, end = trainer.start, trainer.end
    for fields in ({"blocks": [start, end + 1]}, {"model": bytes(32)}):
        answer = expect_error(trainer.call("forward", given, **fields), {"not_served"})
        detail = (answer.detail.get("blocks"), answer.detail.get("model"))
        require(detail == ([start, end], bench.model["model"]), f"detail {answer.detail}")
    trainer.refused({"not_served"}, "forward", given, blocks=[end, start])
    trainer.refused({"not_served"}, "forward", given, adapter="x-nobody-has-this")
    trainer.run("forward", given, blocks=[end - 1, end])


def _refused(number: int, requirements: str, codes: str, title: str, *wrong: Any) -> None:
    """Each of `wrong`: makes a request (method, tensors, fields) out of a good one."""

    def run(bench: Bench) -> None:
        trainer = Trainer(bench)
        for change in wrong:
            method, given, fields = change(trainer)
            trainer.refused(set(codes.split()), method, given, **fields)
        trainer.goes_on()

    case(f"training/{number:03}", requirements, title=f"{title}: ERR {codes.replace(' ', ' or ')}")(run)


def _with(*names: str, method: str = "forward", drop: Sequence[str] = (), **fields: Any) -> Any:
    """A request with these tensors as they should be, less those in `drop`."""

    def make(trainer: Trainer) -> tuple[str, dict[str, Array], dict[str, Any]]:
        given = trainer.given(3, 1, *names)
        return method, {name: array for name, array in given.items() if name not in drop}, fields

    return make


def _shaped(name: str, cut: tuple[slice, ...], *names: str, method: str = "forward", **fields: Any) -> Any:
    """A request of which one tensor is cut."""

    def make(trainer: Trainer) -> tuple[str, dict[str, Array], dict[str, Any]]:
        given = trainer.given(3, 1, *names)
        given["mask"] = np.ones((1, 3), np.uint8)
        given[name] = np.ascontiguousarray(given[name][cut])
        return method, given, fields

    return make


_ALL, _LESS = slice(None), slice(0, -1)
_refused(9, "PT-TRA-011", "tensor", "A tensor of another shape than the others make due",
         _shaped("mask", (_ALL, _LESS)), _shaped("h", (_ALL, _ALL, _LESS)),
         _shaped("prompts", (_LESS,), "prompts"), _shaped("prompts", (_ALL, _ALL, _LESS), "prompts"),
         _shaped("grad", (_ALL, _LESS), "grad", method="backward", wanted=["h"]),
         _shaped("grad", (_ALL, _ALL, _LESS), "grad", method="backward", wanted=["h"]))  # fmt: skip
_refused(10, "PT-TRA-011 PT-TRA-012", "tensor", "An adapter whose ranks or widths do not fit",
         _shaped("dense.lora_A", (_ALL, _LESS), "dense.lora_A", "dense.lora_B"),
         _shaped("dense.lora_A", (_ALL, _ALL, _LESS), "dense.lora_A", "dense.lora_B"),
         _shaped("dense_4h_to_h.lora_B", (_LESS,), "dense_4h_to_h.lora_A", "dense_4h_to_h.lora_B"))  # fmt: skip
_refused(11, "PT-TRA-012", "bad_request", "A without B, B without A, an adapter by name and as tensors",
         _with("dense.lora_A"), _with("dense.lora_B"),
         _with("dense.lora_A", "dense.lora_B", adapter="x"))  # fmt: skip
_refused(12, "PT-TRA-011 PT-TRA-010", "bad_request", "Without h or grad, with wanted or taps that cannot be",
         _with("prompts", drop=["h"]), _with(method="backward", wanted=["h"]),
         _with("grad", method="backward"), _with("grad", method="backward", wanted=[]),
         _with("grad", method="backward", wanted=["h", "h"]), _with("grad", method="backward", wanted=["prompts"]),
         _with("grad", method="backward", wanted=["grad"]), _with("grad", method="backward", wanted=["h"], taps=[0]),
         _with(taps=[]), _with(taps=[0, 0]), _with(taps=[-1]), _with(taps=[4_095]), _with(taps=["0"]),
         _with(adapter=""), _with(adapter=7))  # fmt: skip


@case("training/013", "PT-TRA-011")
def other_tensors(bench: Bench) -> None:
    """Tensors of unknown names, or of types and codecs that are not theirs: ERR, and the connection goes on"""
    trainer = Trainer(bench)
    h = bench.hidden(2)
    good = tensors.descriptor(h)
    adapter = tensors.descriptor(np.zeros((trainer.blocks, 1, bench.width)), name="dense.lora_A", codec="i8b64")
    head = {"model": bench.model["model"], "blocks": [trainer.start, trainer.end]}
    for more, code in (
        (good | {"n": "lora_A"}, "bad_request"),
        (good | {"n": "grad"}, "bad_request"),
        (good, "bad_request"),
        (good | {"n": "mask"}, "tensor"),
        (tensors.descriptor(np.ones((1, 2)), "i64", name="mask"), "tensor"),
        (adapter, "unsupported"),
    ):
        size = tensors.encoded_size(tuple(more["s"]), more["d"], more["c"])
        trainer.peer.refused({code}, "forward", head | {"t": [good, more]}, tensors.encode(h) + bytes(size))
    trainer.goes_on()


@case("training/014", "PT-TRA-014")
def not_finite(bench: Bench) -> None:
    """NaN and infinity anywhere, and a mask of twos: ERR tensor, and the connection goes on"""
    trainer = Trainer(bench)
    names = ["grad", "prompts", "dense.lora_A", "dense.lora_B"]
    for name in ["h", *names]:
        for value in (np.nan, np.inf):
            given = trainer.given(2, 1, *names)
            given[name].flat[-1] = value
            trainer.refused({"tensor"}, "backward", given, wanted=["h"])
    trainer.refused({"tensor"}, "forward", {**trainer.given(2), "mask": np.full((1, 2), 2, np.uint8)})
    trainer.goes_on()


@case("training/015", "PT-TRA-012 PT-TRA-013")
def too_large(bench: Bench) -> None:
    """More tokens than `train`, a rank of 257, an adapter above its bytes: ERR resources from the head alone"""
    trainer = Trainer(bench)
    C, most = bench.width, bench.model["train"]
    head = {"model": bench.model["model"], "blocks": [trainer.start, trainer.end]}
    rows = most // 512 + 1
    if rows <= 1_024 and 2 * rows * 512 * C <= 64 << 20:
        h = np.zeros((rows, 512, C), np.float32)
        answer = trainer.call("forward", {"h": h}, dtype="f16")
        expect_error(answer, {"resources"})
        require(answer.detail.get("retry") is False, f"expected: retry false; observed: {answer}")
    h = bench.hidden(1)
    for rank in (257, 2**20):
        parts = {"A": [trainer.blocks, rank, C], "B": [trainer.blocks, C, rank]}
        described = [{"n": f"dense.lora_{side}", "d": "f32", "s": shape, "c": "raw"} for side, shape in parts.items()]
        request = head | {"t": [tensors.descriptor(h), *described]}
        trainer.peer.refused({"resources", "tensor"}, "forward", request, tensors.encode(h))
    trainer.goes_on()


@case("training/016", "PT-TRA-011 PT-TEN-021")
def other_body(bench: Bench) -> None:
    """A body whose size is not that of the tensors: ERR tensor, and the connection goes on"""
    trainer = Trainer(bench)
    h = bench.hidden(2)
    head = {"model": bench.model["model"], "blocks": [trainer.start, trainer.end], "t": [tensors.descriptor(h)]}
    for body in (b"", tensors.encode(h)[:-1], tensors.encode(h) * 2):
        trainer.peer.refused({"tensor"}, "forward", head, body)
    trainer.goes_on()


@case("training/017", "PT-TRA-032")
def cancelled(bench: Bench) -> None:
    """A pass that is cancelled, and one whose connection breaks, end; others are answered"""
    trainer = Trainer(bench)
    given = trainer.given(64, 8, "grad")
    for _ in range(4):
        trainer.peer.cancel(trainer.send("backward", given, wanted=["h"]))
    trainer.peer.alive()
    broken = Trainer(bench)
    broken.send("backward", given, wanted=["h"])
    broken.peer.close()
    trainer.goes_on()


@case("training/018", "PT-TRA-030")
def steps_go_between(bench: Bench) -> None:
    """Decode steps of another peer are answered while long passes run"""
    trainer = Trainer(bench)
    session = bench.session()
    session.step(bench.hidden(4))
    given = trainer.given(64, 8, "grad")
    answers = [trainer.send("backward", given, wanted=["h"]) for _ in range(3)]
    for _ in range(3):
        session.step(bench.hidden(1))
    for answer in answers:
        take(trainer.peer.wait(answer, 60))
