"""From the word MODEL on a command line to a directory in Hugging Face layout.

A hub name (`owner/name`) becomes a directory in the hub library's own cache, which the library's environment variables
place and steer (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN). Only the files that hold wanted tensors are fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from petalite.errors import CheckpointError

FAIRYTALE = "fairytale"
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MANIFEST = "petalite-manifest.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which part of a model: tensors by canonical name (no `transformer.`), and files besides."""

    tensor: Callable[[str], bool]
    files: tuple[str, ...] = ()


NOTHING = Wanted(lambda name: False)
CLIENT_PART = Wanted(lambda name: not name.startswith("h."), ("tokenizer.json",))


def blocks_part(start: int, end: int) -> Wanted:
    """The tensors of blocks [start, end)."""
    prefixes = tuple(f"h.{block}." for block in range(start, end))
    return Wanted(lambda name: name.startswith(prefixes))


def find_model(model: str, wanted: Wanted = NOTHING) -> Path:
    """The directory of `model`: the embedded one's name, a directory, or a hub name (with the hub extra).

    Of a hub model it holds config, index, manifest, and the files of what is `wanted`; it is fetched where it is not
    in the cache yet, so call it in a thread. Without a manifest in the repository the model id needs every tensor: a
    model of one file is fetched whole then, one of several must be in the cache already.

    Raises CheckpointError saying what was looked for, or why the hub did not give it.
    """
    if model == FAIRYTALE:
        return Path(__file__).parent / FAIRYTALE
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: a file; a model is a directory with config.json")
    if not _HUB_NAME.fullmatch(model):
        raise CheckpointError(
            f"{model}: no such model: neither {FAIRYTALE!r}, nor a directory with config.json, nor a hub name"
        )
    return _from_hub(model, wanted)


def model_name(model: str) -> str:
    """What to call it where people read it: the word itself or the directory's name, never a whole path."""
    path = Path(model).expanduser()
    if model == FAIRYTALE or (_HUB_NAME.fullmatch(model) and not path.exists()):
        return model
    return path.resolve().name


def _from_hub(model: str, wanted: Wanted) -> Path:
    fetch = _hub(model)
    config = fetch(CONFIG, None)
    if config is None:
        raise CheckpointError(
            f"{model}: the hub's repository has no {CONFIG}, so it is no model in Hugging Face layout"
        )
    directory = config.parent
    revision = directory.name  # one commit for all files, whatever is pushed meanwhile
    index = fetch(INDEX, revision)
    files = _files_of(index, wanted) if index else {SINGLE} if wanted is not NOTHING else set()
    if not (directory / MANIFEST).exists() and fetch(MANIFEST, revision) is None:
        if index is None:
            files = {SINGLE}
        else:
            _need_all(model, directory, _files_of(index, Wanted(lambda name: True)))
    for name in sorted({*files, *wanted.files}):
        if fetch(name, revision) is None:
            raise CheckpointError(f"{model}: the hub's repository has no {name}")
    return directory


def _files_of(index: Path, wanted: Wanted) -> set[str]:
    """Names of the files that hold wanted tensors."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {file for name, file in weight_map.items() if wanted.tensor(name.removeprefix("transformer."))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files") from error


def _need_all(model: str, directory: Path, files: set[str]) -> None:
    missing = [name for name in files if not (directory / name).exists()]
    if missing:
        raise CheckpointError(
            f"{model}: no {MANIFEST} in the hub's repository, and without it the model id needs all {len(files)} files,"
            f" of which {len(missing)} are not in the cache: fetch them once with `hf download {model}`"
        )


def _hub(model: str) -> Callable[[str, str | None], Path | None]:
    """What fetches one file of a repository: (name, commit or None for the newest) -> its path, None if not there."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{model}: no such directory; to take it from the hub: pip install 'petalite[hub]'"
        ) from error

    def fetch(name: str, revision: str | None) -> Path | None:
        try:
            return Path(hf_hub_download(model, name, revision=revision))
        except LocalEntryNotFoundError as error:
            if revision is not None and name in (INDEX, MANIFEST):
                return None  # offline: the cache is all there is
            raise CheckpointError(f"{model}: {name} is not in the cache, and the hub cannot be asked") from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            reason = "there is no such model, or it is not public" if status in (401, 403, 404) else f"answer {status}"
            raise CheckpointError(f"{model}: {name} cannot be had from the hub: {reason}") from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise CheckpointError(f"{model}: {name} cannot be had from the hub: {reason}") from error

    return fetch
