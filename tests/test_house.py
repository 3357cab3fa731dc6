"""The house rules as tests: who may import whom, and what nothing in petalite/ does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "petalite"

# --- who may import whom: arrows only point down ----------------------------------------------------------------------

GROUND = ("errors", "limits", "identity")
PURE_DHT = ("dht",)  # all of dht but dht.node, which is a unit of its own
NET = ("net", "wire", *PURE_DHT, *GROUND)
SWARM = ("swarm", "dht.node", "lan", *NET)
MODEL = ("bloom", "bridge", "models", "fairytale")

# unit -> the units it may import besides itself. A unit is the longest prefix of a module's name that is a key here.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "limits": (),
    "identity": ("errors", "limits"),
    "wire": GROUND,
    "dht": ("wire", *GROUND),
    "net": NET,
    "dht.node": NET,
    "lan": NET,
    "swarm": SWARM,
    "fairytale": (),
    "bloom": ("errors",),
    "models": ("errors", "fairytale"),  # which directory the word MODEL means
    "bridge": ("wire.tensors", "errors", "limits"),
    "server": (*SWARM, *MODEL),
    "client": (*SWARM, *MODEL),
    "cli": ("server", "client", *SWARM, *MODEL),
    "testing": ("server", "client", *SWARM, *MODEL),
    "transformers": ("client", *SWARM, *MODEL),  # the extra of that name, which alone may import that library
    "strategies": ("dht", "wire", *GROUND),
    "__init__": ("client", *SWARM, *MODEL),  # the library's front door, which opens when it is used
    "__main__": ("cli",),
}

# What a module may not import because time, randomness and I/O are arguments there
PURE = (
    *("errors", "limits", "identity", "wire", "dht", "lan.announcement", "lan.addresses", "lan.book"),
    *("swarm.snapshot", "swarm.placement", "swarm.routing", "swarm.diagnosis"),
)
IMPURE_LIBRARIES = frozenset(
    {"trio", "torch", "asyncio", "anyio", "zeroconf", "rich", "click"}
    | {"socket", "socketserver", "ssl", "select", "selectors", "http", "urllib"}
    | {"subprocess", "multiprocessing", "threading", "signal"}
    | {"time", "datetime", "sched", "logging", "warnings"}
)
BLOOM_LIBRARIES = frozenset({"torch", "safetensors", "triton"})
BRIDGE_LIBRARIES = frozenset({"torch", "numpy"})
HEAVY_IN = {
    "torch": ("bloom", "bridge", "server", "client", "cli", "testing", "__init__", "transformers"),
    "transformers": ("transformers",),
    "peft": (),  # tests only: we read and write its files ourselves
    "accelerate": (),
}


def unit_of(name: str) -> str:
    """The unit of `wire.frames` (a module's name without `petalite.`)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in MAY_IMPORT:
            return prefix
    return parts[0]


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module is one of `prefixes` or lies below one, dht.node not counting as part of dht."""
    return any(
        (name == prefix or name.startswith(prefix + ".")) and not (prefix == "dht" and unit_of(name) == "dht.node")
        for prefix in prefixes
    )


def imports(tree: ast.AST, name: str, modules: frozenset[str], is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that a module imports, wherever in it, type-checking blocks included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["petalite", *name.split(".")] if name != "__init__" else ["petalite", "__init__"]
                up = here[: len(here) - node.level + (1 if is_package and name != "__init__" else 0)]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from petalite import limits` imports a module, `from petalite.limits import MAX_FRAME` does not
                yield node.lineno, full if full in modules else (base if base != "petalite" else full)


def import_violations(name: str, source: str, modules: frozenset[str], is_package: bool = False) -> list[str]:
    """What is wrong with the imports of module `name`, one text each."""
    unit = unit_of(name)
    if unit not in MAY_IMPORT:
        return [f"{name}: a part of petalite/ that the import rule does not know: give it a place in MAY_IMPORT"]
    found: list[str] = []
    for line, target in imports(ast.parse(source), name, modules, is_package):
        where = f"petalite/{name.replace('.', '/')}.py:{line}"
        top, _, rest = target.partition(".")
        if top != "petalite":
            found += [f"{where}: {text}" for text in _library_violations(name, unit, target, top)]
        elif rest == "__version__" or not rest:
            continue
        elif unit_of(rest) != unit and not within(rest, MAY_IMPORT[unit]):
            allowed = ", ".join(MAY_IMPORT[unit]) or "nothing of petalite"
            found.append(f"{where}: {unit} must not import {rest}; it may import {allowed}")
    return found


def _library_violations(name: str, unit: str, target: str, top: str) -> Iterator[str]:
    if within(name, PURE) and top in IMPURE_LIBRARIES:
        yield f"{name} is pure, so it must not import {target}: time, randomness and I/O are arguments"
    if unit == "bloom" and top not in BLOOM_LIBRARIES | sys.stdlib_module_names:
        yield f"bloom imports torch, safetensors, the standard library and errors, not {target}"
    if unit == "bridge" and top not in BRIDGE_LIBRARIES | sys.stdlib_module_names:
        yield f"bridge imports torch, numpy and wire.tensors, not {target}"
    if top in HEAVY_IN and unit not in HEAVY_IN[top]:
        yield f"{top} belongs to {', '.join(HEAVY_IN[top])}, not to {unit}"


# --- what nothing in petalite/ does -----------------------------------------------------------------------------------

_UNFINISHED = re.compile(r"#.*\b(TODO|FIXME|XXX|HACK)\b")


def style_violations(name: str, source: str) -> list[str]:
    """What else breaks a house rule in module `name`, one text each."""
    found: list[tuple[int, str]] = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append((node.lineno, "assert: raise an error that says whose fault it is"))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if any(argument.arg == "timeout" for argument in arguments):
                found.append((node.lineno, "a parameter `timeout`: the caller's cancel scope is the deadline"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, text) for text in _call_violations(name, ast.unparse(node.func))]
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
            found.append((statement.lineno, "work at import: a statement that does something"))
    for number, line in enumerate(source.splitlines(), 1):
        if _UNFINISHED.search(line):
            found.append((number, "a marker of unfinished work"))
    return [f"petalite/{name.replace('.', '/')}.py:{line}: {text}" for line, text in found]


def _call_violations(name: str, called: str) -> Iterator[str]:
    unit = unit_of(name)
    if called == "print" and unit != "cli":
        yield "print outside cli"
    if called in ("importlib.import_module", "import_module", "__import__") and name not in ("cli", "__init__"):
        yield "an import that the import rule cannot see"
    if within(name, PURE):
        module, _, attribute = called.partition(".")
        # a generator made from a seed that was passed in is an argument; the shared one of the module is not
        if (
            (module == "random" and attribute and attribute != "Random")
            or module == "secrets"
            or called == "os.urandom"
        ):
            yield f"{called}() in a pure module: randomness is an argument"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = frozenset(f"petalite.{module_name(path)}" for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_module_keeps_the_import_rule(path: Path) -> None:
    found = import_violations(module_name(path), path.read_text(encoding="utf-8"), MODULES, path.stem == "__init__")
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_module_keeps_the_other_house_rules(path: Path) -> None:
    found = style_violations(module_name(path), path.read_text(encoding="utf-8"))
    assert not found, "\n".join(["", *found])


# --- the rules themselves, on sources small enough to judge by eye ----------------------------------------------------

KNOWN = frozenset(
    {f"petalite.{name}" for name in ("errors", "limits", "identity", "bloom", "bridge", "cli")}
    | {f"petalite.{name}" for name in ("wire", "wire.frames", "wire.tensors", "net", "net.connection")}
    | {f"petalite.{name}" for name in ("dht", "dht.node", "dht.lookup", "lan", "lan.browse")}
    | {f"petalite.{name}" for name in ("swarm", "swarm.node", "swarm.routing")}
    | {f"petalite.{name}" for name in ("client", "client.session", "server", "server.handlers")}
)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("wire.frames", "import trio"),
        ("wire.frames", "from time import monotonic"),
        ("wire.frames", "import logging"),
        ("wire.frames", "from petalite.net import connection"),
        ("wire.frames", "from ..net.connection import PeerConnection"),
        ("wire.frames", "def f():\n    from petalite.dht import lookup"),
        ("dht.lookup", "import socket"),
        ("dht.lookup", "from petalite.dht.node import Node"),
        ("dht.lookup", "from petalite.dht import node"),
        ("dht.lookup", "from . import node"),
        ("dht.node", "from petalite.lan import browse"),
        ("lan.browse", "import petalite.dht.node"),
        ("net.connection", "from petalite.swarm import node"),
        ("net.connection", "import torch"),
        ("swarm.routing", "import time"),
        ("swarm.node", "from petalite.client.session import Session"),
        ("swarm.node", "from petalite.bloom import blocks"),
        ("client.session", "from petalite.server import handlers"),
        ("client.session", "if TYPE_CHECKING:\n    from petalite.server.handlers import Handlers"),
        ("server.handlers", "import petalite.client"),
        ("server.handlers", "from petalite.cli import output"),
        ("bloom", "from petalite import limits"),
        ("bloom", "import numpy"),
        ("bridge", "from petalite.wire import frames"),
        ("errors", "from petalite import limits"),
        ("client.session", "from petalite import connect"),
        ("client.session", "from transformers import BloomConfig"),
        ("client.session", "from petalite.transformers import RemoteBloomModel"),
        ("transformers", "import peft"),
        ("transformers", "from petalite.server import handlers"),
        ("brandnew", "import json"),
    ],
)
def test_import_rule_refuses(name: str, source: str) -> None:
    assert len(import_violations(name, source, KNOWN)) >= 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("wire.frames", "import struct\nfrom petalite import limits\nfrom petalite.wire.tensors import encode"),
        ("wire.frames", "from . import tensors\nfrom .tensors import encode"),
        ("dht.lookup", "from petalite.wire.tensors import encode"),
        ("dht.node", "import trio, logging\nfrom petalite.dht import lookup\nfrom petalite.net import connection"),
        ("net.connection", "import logging, time, trio\nfrom petalite.wire import frames"),
        ("swarm.node", "import trio\nfrom petalite.dht.node import Node\nfrom petalite.lan import browse"),
        ("client.session", "import torch\nfrom petalite import bridge, limits\nfrom petalite.bloom import blocks"),
        ("bridge", "import torch, numpy\nfrom petalite.wire.tensors import encode\nfrom petalite.errors import E"),
        ("transformers", "import torch\nfrom transformers import BloomConfig\nfrom petalite.client import session"),
        ("cli", "from petalite import __version__\nfrom petalite.server import handlers"),
    ],
)
def test_import_rule_allows(name: str, source: str) -> None:
    assert import_violations(name, source, KNOWN) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("net.connection", "def f(x):\n    assert x"),
        ("net.connection", "def f():\n    print(1)"),
        ("net.connection", "def f(*, timeout=1): ..."),
        ("net.connection", "async def f(timeout: float) -> None: ..."),
        ("net.connection", "x = 1  # TODO: more"),
        ("net.connection", "configure()"),
        ("net.connection", "def f():\n    importlib.import_module('petalite.server')"),
        ("dht.lookup", "def f():\n    return random.random()"),
        ("wire.frames", "def f():\n    return os.urandom(4)"),
    ],
)
def test_style_rules_refuse(name: str, source: str) -> None:
    assert len(style_violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli.key", "def f():\n    print(1)"),
        ("dht.lookup", "def f(seed):\n    return random.Random(seed)"),
        ("wire.frames", '"""A docstring may speak of a TODO list."""\nx = f(timeout=1)'),
    ],
)
def test_style_rules_allow(name: str, source: str) -> None:
    assert style_violations(name, source) == []


def test_import_petalite_is_light_and_silent() -> None:
    code = "import sys, petalite; print(sorted({'torch', 'trio', 'numpy', 'click', 'logging'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
