"""A server's identity outlives it: kept in the state directory, each file used by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from petalite.cli.options import state_directory
from petalite.errors import PetaliteError
from petalite.identity import Identity, PeerId

MOST_SERVERS = 256


class KeptIdentity:
    """An identity and the lock on its file, held until the process ends. `number`: how many servers came before."""

    def __init__(self, identity: Identity, lock: int, number: int) -> None:
        self.identity = identity
        self.number = number
        self._lock = lock

    def contacts_file(self, network: str) -> Path:
        """Where this server keeps what it knew of a network."""
        tag = hashlib.sha256(network.encode()).hexdigest()[:16]
        return state_directory() / f"contacts-{self.number}-{tag}.json"


def server_identity(file: Path | None) -> KeptIdentity:
    """The identity in `file`, or the first kept one that no running server on this machine uses (made if need be).

    Raises PetaliteError if `file` is in use or is no identity.
    """
    if file is not None:
        identity = Identity.load(file)
        lock = _try_lock(file)
        if lock is None:
            raise PetaliteError(f"{file}: another server uses this identity")
        return KeptIdentity(identity, lock, 0)
    directory = state_directory()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number in range(MOST_SERVERS):
        path = directory / f"server-{number}.key"
        lock = _try_lock(directory / f"server-{number}.lock")
        if lock is not None:
            if not path.exists():
                Identity.generate().save(path)
            return KeptIdentity(Identity.load(path), lock, number)
    raise PetaliteError(f"{MOST_SERVERS} servers run on this machine already")


def running_servers() -> list[PeerId]:
    """Ids of the kept identities that servers on this machine use right now."""
    directory, running = state_directory(), []
    for path in sorted(directory.glob("server-*.key")):
        lock = _try_lock(path.with_suffix(".lock"))
        if lock is None:
            running.append(Identity.load(path).peer_id)
        else:
            os.close(lock)
    return running


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
