"""Servers and clients of petalite, whole or with one defect, forked from a process that has imported everything.

Starting a Python process with torch takes seconds; forking one takes milliseconds, so that each defect can have a
process of its own. `python zygote.py SOCKET DIRECTORY` listens on a Unix socket. A request is one JSON line:
{"serve": defect, ...} is answered by the server's address and served until the connection closes; {"run": defect,
"env": ...} comes with two file descriptors, runs a client on them and is answered by its exit code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(path: str, directory: str) -> None:
    import mutants  # and with it torch and petalite, once for all children

    mutants.prepare(Path(directory))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os._exit(_child(connection, mutants))
        connection.close()


def _child(connection: socket.socket, mutants: Any) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    request = json.loads(data)
    if "serve" in request:

        def started(addresses: list[str]) -> None:
            connection.sendall(json.dumps(addresses).encode())
            threading.Thread(target=_leave_with, args=(connection,), daemon=True).start()

        mutants.serve(request, started)
        return 0
    for fd, place in zip(fds, (1, 2), strict=True):
        os.dup2(fd, place)
    os.environ.clear()
    os.environ.update(request["env"])
    threading.Thread(target=_leave_with, args=(connection,), daemon=True).start()
    try:
        code = mutants.run_client(request["run"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    connection.sendall(json.dumps(code).encode())
    return 0


def _leave_with(connection: socket.socket) -> None:
    """Whoever asked for this process is gone: so are we."""
    try:
        connection.recv(1)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
