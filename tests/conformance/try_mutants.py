"""`python try_mutants.py [server|client] [NAME...]`: every defect against the cases that should notice it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from zygote import Zygote

from tools.conformance.command import main


def failing(zygote: Zygote, side: str, name: str, cases: tuple[str, ...]) -> list[str]:
    """Which of `cases` fail against petalite with this defect."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        options = ["--report", str(report), "--seed", "1"]
        for case in cases:
            options += ["--case", case]
        with contextlib.redirect_stdout(io.StringIO()):
            if side == "server":
                with zygote.serve(name) as address:
                    main(["server", address, *options])
            else:
                main(["client", *options, "--", *zygote.command(name)])
        found = json.loads(report.read_text())["cases"]
    return [f"{case['id']}: {case['text']}" for case in found if case["verdict"] == "fail"]


def run(arguments: list[str]) -> int:
    import session_defects  # noqa: F401 - registers
    import training_defects  # noqa: F401 - registers
    from client_defects import CLIENT
    from defects import SERVER

    sides = [arguments.pop(0)] if arguments[:1] in (["server"], ["client"]) else ["server", "client"]
    zygote, missed = Zygote(), []
    try:
        for side, mutants in (("server", SERVER), ("client", CLIENT)):
            for name, mutant in mutants.items():
                if side in sides and (not arguments or name in arguments):
                    caught = failing(zygote, side, name, mutant.cases)
                    print(f"{side:<7} {name:<48} {caught[0][:150] if caught else 'NOT CAUGHT'}", flush=True)
                    if not caught:
                        missed.append(name)
    finally:
        zygote.close()
    print(f"not caught: {missed or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
