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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))


class Zygote:
    """The other side: starts the process, and asks it for servers and clients."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="zygote-")
        self.served = 0
        self.path = f"{self._directory.name}/socket"
        model = Path(self._directory.name) / "model"
        model.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, __file__, self.path, str(model)], env=environment)
        deadline = time.monotonic() + 120
        while not os.path.exists(self.path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the zygote did not start")
            time.sleep(0.05)

    @contextmanager
    def serve(self, defect: str = "", **options: Any) -> Iterator[str]:
        """A server; gives its address. `self.served` is its process id."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.path)
            connection.sendall(json.dumps({"serve": defect, **options}).encode())
            connection.settimeout(60)
            address, self.served = json.loads(connection.recv(4096))
            yield address

    def command(self, defect: str = "none") -> list[str]:
        """A client, as the command that starts it."""
        return [sys.executable, "-S", str(Path(__file__).with_name("forked_client.py")), self.path, defect]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()


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
            connection.sendall(json.dumps([addresses[0], os.getpid()]).encode())
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
