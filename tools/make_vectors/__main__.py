"""`python tools/make_vectors [--check]`: write spec/vectors/*.json, or say which files are not as they should be."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.make_vectors import FOLDER, make_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/make_vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file differs")
    check = parser.parse_args().check
    stale = 0
    for name, text in make_all().items():
        path = FOLDER / name
        if path.exists() and path.read_text() == text:
            continue
        stale += 1
        if not check:
            path.write_text(text)
        print(f"{'differs' if check else 'written'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
