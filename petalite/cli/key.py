"""`petalite key`: make and show key files."""

from __future__ import annotations

from pathlib import Path

import click

from petalite.cli.options import FILE, state_directory
from petalite.cli.output import line_of
from petalite.errors import PetaliteError
from petalite.identity import Identity, SwarmKey


@click.group(name="key", help="Make and show key files: identities and private swarms.")
def command() -> None:
    pass


@command.command()
@click.option("--swarm", is_flag=True, help="The key of a private swarm, for all its members, instead of an identity.")
@click.argument("file", type=FILE)
def new(file: Path, swarm: bool) -> None:
    """Write a new key to FILE, which must not exist yet and which only you can read."""
    if swarm:
        swarm_key = SwarmKey.generate()
        swarm_key.save(file)
        _show_swarm(swarm_key)
        click.echo(f"give a copy of {line_of(str(file))} to each member, and to nobody else", err=True)
    else:
        identity = Identity.generate()
        identity.save(file)
        _show_identity(identity)


@command.command()
@click.argument("file", type=FILE, required=False)
def show(file: Path | None) -> None:
    """Say what the key in FILE is known as; the secret itself is never shown.

    Without FILE: the identities that servers on this machine keep.
    """
    if file is not None:
        _show_file(file)
        return
    kept = sorted(state_directory().glob("*.key"))
    if not kept:
        raise PetaliteError(f"no identities are kept in {state_directory()} yet")
    for path in kept:
        click.echo(f"{line_of(path.name)} ", nl=False)
        _show_file(path)


def _show_file(file: Path) -> None:
    try:
        swarm_key = SwarmKey.load(file)
    except PetaliteError:
        _show_identity(Identity.load(file))  # says what is wrong with a file that is neither
    else:
        _show_swarm(swarm_key)


def _show_identity(identity: Identity) -> None:
    click.echo(f"peer id {identity.peer_id.text}")


def _show_swarm(swarm_key: SwarmKey) -> None:
    click.echo(f"network id {swarm_key.network_id}")
    click.echo(f"LAN tag {swarm_key.lan_tag}")
