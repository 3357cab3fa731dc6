"""`python tools/bench NAME [--json] [options]`: the one entry to all benchmarks; without NAME it lists them."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import bench


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/bench", description="Benchmarks of petalite.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for found in pkgutil.iter_modules(bench.__path__):
        if not found.name.startswith("_"):
            module = importlib.import_module(f"tools.bench.{found.name}")
            text = (module.__doc__ or "").strip()
            command = commands.add_parser(found.name, help=text.partition("\n")[0], description=text)
            command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    result = arguments.run(arguments)
    if result is not None:
        print(result.as_json() if arguments.json else result.as_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
