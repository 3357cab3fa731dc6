"""`petalite key`: what it prints is public, what it writes is not overwritten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from petalite.cli import run
from petalite.identity import Identity, SwarmKey


def secret_of(path: Path) -> str:
    return path.read_text().splitlines()[-1]


def test_new_identity_prints_the_peer_id_that_its_file_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "me.key"
    assert run(["key", "new", str(path)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"peer id {Identity.load(path).peer_id.text}\n", "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run(["key", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown == out and secret_of(path) not in shown


def test_new_swarm_key_prints_its_network_and_tag_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "swarm.key"
    assert run(["key", "new", "--swarm", str(path)]) == 0
    out, err = capsys.readouterr()
    key = SwarmKey.load(path)
    assert out == f"network id {key.network_id}\nLAN tag {key.lan_tag}\n"
    assert run(["key", "show", str(path)]) == 0
    assert capsys.readouterr().out == out
    assert secret_of(path) not in out + err and key.psk.hex() not in out + err


@pytest.mark.parametrize("extra", [[], ["--swarm"]])
def test_an_existing_file_is_kept(extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.key"
    path.write_text("mine")
    assert run(["key", "new", *extra, str(path)]) == 1
    assert capsys.readouterr() == ("", f"petalite: {path}: exists already, not overwritten\n")
    assert path.read_text() == "mine"


def test_show_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.key").write_text("nonsense")
    for name in ("bad.key", "missing.key"):
        assert run(["key", "show", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"petalite: {tmp_path / name}: ") and err.count("\n") == 1


def test_show_without_a_file_lists_what_servers_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run(["key", "show"]) == 1
    assert "no identities" in capsys.readouterr().err
    (tmp_path / "petalite").mkdir()
    identity = Identity.generate()
    identity.save(tmp_path / "petalite" / "server.key")
    assert run(["key", "show"]) == 0
    assert capsys.readouterr().out == f"server.key peer id {identity.peer_id.text}\n"
