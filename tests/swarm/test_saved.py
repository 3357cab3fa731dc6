"""Contacts kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalite.dht.contacts import make_contact
from petalite.identity import Identity
from petalite.limits import MAX_SAVED_CONTACTS
from petalite.swarm.saved import load_contacts, save_contacts


def some(count: int) -> list:  # type: ignore[type-arg]
    return [
        make_contact(Identity.generate().peer_id, (f"10.0.{i}.1:31337", f"[fd00::{i + 1}]:31337")) for i in range(count)
    ]


def test_contacts_come_back_as_they_were(tmp_path: Path) -> None:
    contacts = some(3)
    save_contacts(tmp_path / "c.json", contacts)
    assert load_contacts(tmp_path / "c.json") == contacts
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_no_file_is_no_contacts(tmp_path: Path) -> None:
    assert load_contacts(tmp_path / "none.json") == []


NAMED_HOST = f'[["{Identity(bytes(32)).peer_id.text}", ["host:1"]]]'


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '[["a", ["b"]]]', "[[]]", NAMED_HOST])
def test_damaged_file_is_ignored_with_a_warning(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "c.json").write_text(text)
    assert load_contacts(tmp_path / "c.json") == []
    assert "cannot be used" in caplog.text


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    save_contacts(tmp_path / "c.json", some(MAX_SAVED_CONTACTS + 5))
    assert len(load_contacts(tmp_path / "c.json")) == MAX_SAVED_CONTACTS


def test_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    save_contacts(tmp_path / "missing" / "c.json", some(1))
