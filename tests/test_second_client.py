"""The JavaScript client: its own tests, its codecs against numpy's, its tokens against transformers'."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fuzz import seeds
from fuzz.decoders import NOW, STATIC
from petalite.errors import HandshakeError, RemoteProtocolError, RequestError
from petalite.identity import SwarmKey
from petalite.limits import MAX_FRAME
from petalite.wire import certificate, frames, packing, tensors
from petalite.wire.hello import Hello
from tools.clients import compare

JS = compare.CLIENT
SOURCES = sorted([*JS.glob("lib/*.mjs"), *JS.glob("node_modules/@noble/*/**/*.js")])
IMPORT = re.compile(r"""^(?:import|export)\b[^;]*?from\s+["']([^"']+)["']|\bimport\(\s*["']([^"']+)["']""", re.M)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(JS).as_posix())
def test_nothing_but_the_shell_needs_node(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    targets = {one or other for one, other in IMPORT.findall(source)}
    assert all(target.startswith(("./", "../", "@noble/")) for target in targets), targets
    if path.parent.name == "lib":
        assert not re.search(r"\b(process|Buffer|require|__dirname)\b[.(]", source)


def test_vendored_files_are_those_published_and_locked() -> None:
    listed = dict(reversed(line.split()) for line in (JS / "vendored.sha256").read_text().splitlines())
    assert listed == {name: hashlib.sha256((JS / "node_modules" / name).read_bytes()).hexdigest() for name in listed}
    lock = json.loads((JS / "package-lock.json").read_text())["packages"]
    wanted = json.loads((JS / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        entry = lock[f"node_modules/{name}"]
        assert (
            entry["version"]
            == version
            == json.loads((JS / "node_modules" / name / "package.json").read_text())["version"]
        )
        assert entry["integrity"].startswith("sha512-")
        assert "resolved" not in entry, "a lock names no registry"
        assert f"{name}/LICENSE" in listed


def codec_cases() -> list[dict[str, object]]:
    """Float32 values, the body that numpy's codecs make of them, and what these decode it to."""
    draw = np.random.default_rng(5)
    made: list[dict[str, object]] = []
    for dtype in ("f32", "f16", "bf16"):
        for codec in tensors.CODECS:
            for shape in ((1, 1, 64), (1, 3, 100), (2, 2, 130), (5,)):
                # many magnitudes, subnormals of the narrow types and of the scale among them
                power = (
                    2.0 ** draw.integers(-30, 14, shape) if dtype == "f16" else 2.0 ** draw.integers(-140, 60, shape)
                )
                values = (draw.standard_normal(shape) * power).astype(np.float32)
                narrow = tensors._narrow(values, dtype)
                body = b"".join(tensors.encode(narrow, codec))
                descriptor = tensors.describe("h", narrow, codec)
                output = tensors._widen(tensors.decode(descriptor, body), dtype)
                fields = {"input": values.tobytes(), "body": body, "output": np.ascontiguousarray(output).tobytes()}
                made.append(
                    {"dtype": dtype, "codec": codec, "shape": shape} | {key: data.hex() for key, data in fields.items()}
                )
    return made


def test_its_own_tests_pass(tmp_path: Path) -> None:
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps(codec_cases()))
    files = sorted(map(str, JS.glob("test/*.test.mjs")))
    done = subprocess.run(
        [compare.node(), "--test", "--test-reporter=tap", "--test-timeout=20000", *files],
        env={"PETALITE_CODEC_CASES": str(cases)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-8_000:]
    counts = dict(re.findall(r"^# (pass|fail|skipped) (\d+)$", done.stdout, re.M))
    assert int(counts["pass"]) >= 61 and counts["fail"] == counts["skipped"] == "0", counts


def test_its_tokens_are_the_reference_s(tmp_path: Path) -> None:
    key = tmp_path / "swarm.key"
    SwarmKey.generate().save(key)
    prompt = [5, 100, 200, 7]
    [reference] = compare.by_transformers([prompt], 24)
    with compare.servers(swarm_key=key) as addresses:
        for wire, close in compare.CLOSE.items():

            def go_on(ids: list[int], count: int, wire: str = wire) -> compare.Continuation:
                return compare.by_javascript(addresses, prompt + ids, count, wire, key)

            assert compare.follow(go_on, reference, close), wire
        with pytest.raises(RuntimeError, match="other network or other key"):
            compare.by_javascript(addresses, prompt, 1, "f32")  # without the key nobody gets in


def test_all_steps_are_compared_behind_close_choices_too() -> None:
    theirs = compare.Continuation([1, 2, 3, 4], [1.0, 0.01, 1.0, 1.0])

    def client(*tokens: int) -> Callable[[list[int], int], compare.Continuation]:
        """Says these tokens, in the place of those that it is not given."""
        return lambda ids, count: compare.Continuation(list(tokens[len(ids) :]), [])

    assert compare.follow(client(1, 2, 3, 4), theirs, 0.02) == compare.Comparison(1, 0)
    assert compare.follow(client(1, 9, 3, 4), theirs, 0.02) == compare.Comparison(1, 1)
    assert compare.follow(client(1, 9, 3, 9), theirs, 0.02) is None
    assert compare.follow(client(1, 9, 3, 4), theirs, 0.0) is None


def judged_here(count: int) -> list[tuple[str, str]]:
    """Inputs, valid and nearly valid, with what this implementation makes of them: see test/verdicts.mjs."""
    made = []
    for data in [*seeds.near_misses("frames", count), *seeds.near_misses("packing", count)]:
        try:
            value = packing.decode(data, max_size=MAX_FRAME, max_str=MAX_FRAME)
            frame = frames.decode(memoryview(data))
            verdict = (
                "ignored" if isinstance(frame, frames.Ignorable) else f"frame {value[0]} {packing.encode(value).hex()}"
            )
            if isinstance(frame, (frames.Req, frames.Res)) and frame.body is not None:
                verdict = "refused"  # it does not offer `inline` (PT-FRM-014)
        except RemoteProtocolError:
            verdict = "refused"
        made.append((f"frame {data.hex()}", verdict))
    for data in seeds.near_misses("certificate", count):
        try:
            certificate.verify(data, STATIC, b"petalite", NOW)
            made.append((f"certificate {data.hex()}", "certificate"))
        except HandshakeError:
            made.append((f"certificate {data.hex()}", "refused"))
    for data in seeds.near_misses("hello", count):
        plain = b"\x92\x00" + data
        try:
            frame = frames.decode(memoryview(plain))
            hello = Hello.from_wire(frame.head) if isinstance(frame, frames.Hello) else Hello()
            made.append((f"hello {plain.hex()}", f"hello {hello.max_body} {hello.max_streams}"))
        except (RemoteProtocolError, RequestError):
            made.append((f"hello {plain.hex()}", "refused"))
    return [*made, *judged_bodies(count)]


def judged_bodies(count: int) -> list[tuple[str, str]]:
    draw = random.Random(3)
    scales = [
        np.float32(x).tobytes() for x in (0, 1, 2.0**-118, 2.0**-149, 515.875, 515.8749, 2.0**120, 2.0**121, -0.0, -1)
    ]
    made = []
    for _ in range(count):
        dtype, codec, shape = (
            draw.choice(("f32", "f16", "bf16")),
            draw.choice(tensors.CODECS),
            draw.choice(((1, 3), (1, 66))),
        )
        descriptor = tensors.Descriptor("h", dtype, shape, codec)
        body = bytearray(draw.randbytes(descriptor.nbytes))
        if codec == tensors.INT8:
            body = body.replace(b"\x80", b"\x7f")
            for at in range(0, 4 * -(-shape[1] // 64), 4):
                body[at : at + 4] = draw.choice(scales)
        try:
            array = tensors.decode(descriptor, bytes(body))
            fine = tensors.is_finite(dtype, array)
            verdict = (
                f"values {np.ascontiguousarray(tensors._widen(array, dtype)).tobytes().hex()}" if fine else "refused"
            )
        except RequestError:
            verdict = "refused"
        made.append((f"body {dtype} {codec} {shape[0]}x{shape[1]} {body.hex()}", verdict))
    return made


def test_it_takes_and_refuses_what_the_reference_does() -> None:
    cases = judged_here(1_500)
    lines = "".join(f"{line}\n" for line, _ in cases)
    program = str(JS / "test" / "verdicts.mjs")
    done = subprocess.run([compare.node(), program], input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # where several rules are broken at once, either code may be given
    answers = [re.sub(r"^refused \d+$", "refused", answer) for answer in done.stdout.splitlines()]
    different = [(line, want, got) for (line, want), got in zip(cases, answers, strict=True) if want != got]
    assert not different, different[:5]
    assert sum(want == "refused" for _, want in cases) > 1_000 < sum(want != "refused" for _, want in cases)
