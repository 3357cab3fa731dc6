"""The word MODEL: directories, the embedded model, and hub names against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from petalite.bloom.config import BloomConfig
from petalite.bloom.manifest import load_or_make
from petalite.bloom.synthetic import write_checkpoint
from petalite.errors import CheckpointError
from petalite.models import FAIRYTALE, find_model, model_name

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {
    "transformer.word_embeddings.weight": "model-1.safetensors",
    "transformer.word_embeddings_layernorm.weight": "model-1.safetensors",
    "transformer.h.0.ln.weight": "model-1.safetensors",
    "transformer.h.1.ln.weight": "model-2.safetensors",
    "transformer.h.2.ln.weight": "model-3.safetensors",
    "transformer.h.10.ln.weight": "model-4.safetensors",
    "transformer.ln_f.weight": "model-5.safetensors",
}


class Hub:
    """A hub's file endpoints on loopback. `files[repository]` is what it has, `given` what was taken from it."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.given: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path.partition("?")[0])
                repository, name = found.groups() if found else ("", "")
                code = "RepoNotFound" if repository not in hub.files else "EntryNotFound"
                data = hub.files.get(repository, {}).get(name)
                self.send_response(200 if data is not None else 404)
                if data is None:
                    self.send_header("X-Error-Code", code)
                else:
                    self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if body and data is not None:
                    hub.given.append(name)
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    shards = {name: name.encode() for name in set(SHARDS.values())}
    small = {"config.json": b"{}", "tokenizer.json": b"{}", "README.md": b"hello"}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": SHARDS}).encode()}
    hub.files["owner/sharded"] = {**small, **index, **shards, "petalite-manifest.json": b"{}"}
    hub.files["owner/bare"] = {**small, **index, **shards}
    hub.files["owner/single"] = {**small, "model.safetensors": b"weights"}
    hub.files["owner/empty"] = {"README.md": b"nothing here"}
    yield hub
    hub.close()


def find(hub: Hub | str, home: Path, model: str, wanted: str = "NOTHING", **environment: str) -> str:
    """`find_model` in a fresh process, as the library reads its environment once: directory or error."""
    code = (
        f"from petalite import models\nfrom petalite.errors import CheckpointError\n"
        f"try: print(models.find_model({model!r}, models.{wanted}))\n"
        "except CheckpointError as error: print('error:', error)"
    )
    endpoint = hub if isinstance(hub, str) else hub.url
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def names(directory: str) -> set[str]:
    return set(os.listdir(directory))


def test_a_server_fetches_the_files_of_its_blocks_only(hub: Hub, tmp_path: Path) -> None:
    found = find(hub, tmp_path, "owner/sharded", "blocks_part(1, 3)")
    index = {"config.json", "model.safetensors.index.json", "petalite-manifest.json"}
    assert names(found) == index | {"model-2.safetensors", "model-3.safetensors"}
    assert found.startswith(str(tmp_path)) and found.endswith(COMMIT)
    hub.given.clear()
    assert find(hub, tmp_path, "owner/sharded", "blocks_part(2, 3)") == found
    assert hub.given == []  # all of it was in the cache


def test_a_client_fetches_what_is_no_block_and_the_tokenizer(hub: Hub, tmp_path: Path) -> None:
    found = names(find(hub, tmp_path, "owner/sharded", "CLIENT_PART"))
    assert {"tokenizer.json", "model-1.safetensors", "model-5.safetensors"} <= found
    assert not found & {"model-2.safetensors", "model-3.safetensors", "model-4.safetensors", "README.md"}


def test_offline_the_cache_serves_and_what_it_lacks_is_said(hub: Hub, tmp_path: Path) -> None:
    online = find(hub, tmp_path, "owner/sharded", "CLIENT_PART")
    assert find("http://127.0.0.1:9", tmp_path, "owner/sharded", "CLIENT_PART", HF_HUB_OFFLINE="1") == online
    line = find("http://127.0.0.1:9", tmp_path, "owner/sharded", "blocks_part(2, 3)", HF_HUB_OFFLINE="1")
    assert line == "error: owner/sharded: model-3.safetensors is not in the cache, and the hub cannot be asked"


def test_without_a_manifest_one_file_is_fetched_whole_and_several_must_be_there(hub: Hub, tmp_path: Path) -> None:
    assert names(find(hub, tmp_path, "owner/single")) == {"config.json", "model.safetensors"}
    line = find(hub, tmp_path, "owner/bare", "blocks_part(1, 2)")
    assert "no petalite-manifest.json" in line and "all 5 files, of which 5 are not in the cache" in line
    assert "hf download owner/bare" in line
    assert not [name for name in hub.given if name.startswith("model-")]
    hub.files["owner/bare"]["petalite-manifest.json"] = b"{}"
    whole = find(hub, tmp_path, "owner/bare", "Wanted(lambda name: True)")
    del hub.files["owner/bare"]["petalite-manifest.json"]
    Path(whole, "petalite-manifest.json").unlink()
    assert find(hub, tmp_path, "owner/bare", "blocks_part(1, 2)") == whole


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("owner/unknown", "owner/unknown: config.json cannot be had from the hub: there is no such model"),
        ("owner/empty", "owner/empty: the hub's repository has no config.json"),
        ("owner/single/more", "owner/single/more: no such model: neither 'fairytale', nor a directory"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(model: str, words: str, hub: Hub, tmp_path: Path) -> None:
    line = find(hub, tmp_path, model)
    assert line.startswith(f"error: {words}") and "\n" not in line


def test_a_hub_that_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    line = find("http://127.0.0.1:9", tmp_path, "owner/sharded", HF_HUB_OFFLINE="1")
    assert line == "error: owner/sharded: config.json is not in the cache, and the hub cannot be asked"


def test_a_swarm_runs_from_the_hub_and_nobody_fetches_the_whole(hub: Hub, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    config = BloomConfig(hidden_size=32, n_head=4, n_layer=4, vocab_size=6144)
    write_checkpoint(checkpoint, config, shards=5)
    load_or_make(checkpoint)
    shutil.copy(find_model(FAIRYTALE) / "tokenizer.json", checkpoint)
    hub.files["owner/tiny"] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    common = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    with ExitStack() as stack:
        peers: list[str] = []
        for number, blocks in enumerate(("0:2", "2:4")):
            home = tmp_path / f"home-{number}"
            variables = {**common, "HF_HOME": str(home), "XDG_STATE_HOME": str(home)}
            words = ["serve", "owner/tiny", "--blocks", blocks, "--listen", "127.0.0.1:0", "--no-lan", "--json"]
            server = subprocess.Popen(
                [sys.executable, "-m", "petalite", *words, "--cache", "16M", *peers],
                cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.enter_context(server)
            stack.callback(server.kill)
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            assert line, server.stderr.read()
            peers += ["--peer", json.loads(line)["addresses"][0]]
            assert json.loads(line)["model"] == "owner/tiny"
            (fetched,) = (home / "hub").glob("models--owner--tiny/snapshots/*")
            assert len(list(fetched.glob("*.safetensors"))) < 5 and not (fetched / "tokenizer.json").exists()
        words = ["generate", "owner/tiny", "Once", "--json", "--max-new-tokens", "4", *peers]
        variables = {**common, "HF_HOME": str(tmp_path / "client")}
        done = subprocess.run(
            [sys.executable, "-m", "petalite", *words], cwd=ROOT, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["token_ids"]
        (fetched,) = (tmp_path / "client" / "hub").glob("models--owner--tiny/snapshots/*")
        assert len(list(fetched.glob("*.safetensors"))) < 5


def test_without_the_extra_the_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'petalite\[hub\]'"):
        find_model("owner/name")


def test_directories_and_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (find_model(FAIRYTALE) / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name") == Path("owner/name")  # a directory comes before the hub
    assert [model_name(word) for word in (FAIRYTALE, "owner/name", "owner/other")] == [FAIRYTALE, "name", "owner/other"]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file"):
        find_model("file")
