"""Contacts of the DHT kept between runs, so that a restart depends on no bootstrap (spec/09, joining)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from petalite.dht.contacts import Contact, make_contact
from petalite.identity import PeerId
from petalite.limits import MAX_SAVED_CONTACTS

log = logging.getLogger("petalite.swarm")

_MOST_BYTES = 256 * 1024


def load_contacts(path: Path) -> list[Contact]:
    """What was saved; nothing where there is no file, or where it cannot be read: bootstraps do then."""
    try:
        with open(path, "rb") as file:
            listed = json.loads(file.read(_MOST_BYTES))
        return [make_contact(PeerId.parse(peer), tuple(addrs)) for peer, addrs in listed[:MAX_SAVED_CONTACTS]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        log.warning("saved contacts in %s cannot be used: %s", path, error)
        return []


def save_contacts(path: Path, contacts: Iterable[Contact]) -> None:
    """Write them whole or not at all; a directory that cannot be written costs only the next start's speed."""
    listed = [[PeerId(contact.id).text, list(contact.addrs)] for contact in contacts][:MAX_SAVED_CONTACTS]
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(listed))
        os.replace(temporary, path)
    except OSError as error:
        log.info("contacts cannot be saved in %s: %s", path, error)
