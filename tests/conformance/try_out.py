"""`python try_out.py server|client [--defect NAME] [--private] [options of the tool]`: the tool against petalite."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from zygote import Zygote

from tools.conformance.command import main


def take(name: str, arguments: list[str]) -> str:
    if name not in arguments:
        return ""
    at = arguments.index(name)
    arguments.pop(at)
    return arguments.pop(at)


def run(arguments: list[str]) -> int:
    side, defect = arguments.pop(0), take("--defect", arguments)
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, str] = {}
        if "--private" in arguments:
            arguments.remove("--private")
            options["key"] = f"{directory}/key"
            Path(options["key"]).write_text(f"petalite swarm key v1\n{'07' * 32}\n")
            arguments += ["--swarm-key", options["key"]]
        zygote = Zygote()
        try:
            if side == "client":
                return main(["client", *arguments, "--", *zygote.command(defect or "none")])
            with zygote.serve(defect, **options) as address:
                return main(["server", address, *arguments])
        finally:
            zygote.close()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
