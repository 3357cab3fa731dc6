"""`python -m petalite.cli.child ...` is `petalite ...` that ends when its stdin closes: with whoever started it."""

from __future__ import annotations

import os
import sys
import threading

from petalite.cli import main


def _wait_for_the_end(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    finally:
        os._exit(1)


if __name__ == "__main__":
    # A thread, so that it works while torch is being imported and while weights are read.
    threading.Thread(target=_wait_for_the_end, args=(sys.stdin.fileno(),), daemon=True).start()
    main()
