"""`python tools/conformance server ADDRESS ...` and `python tools/conformance client ... -- COMMAND...`"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a folder: python tools/conformance
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.conformance.command import main

if __name__ == "__main__":
    sys.exit(main())
