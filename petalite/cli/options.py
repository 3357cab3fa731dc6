"""Options that several commands share, checked where they are typed (exit code 2) and handed on as one value.

`@generation_options` gives a command the argument `generation: GenerationOptions`, `@swarm_options` the argument
`swarm: SwarmOptions`.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from petalite.identity import Address, Identity, PeerId, SwarmKey
from petalite.limits import MAX_NETWORK_ID, MAX_SESSION_LENGTH

WIRE_CODECS = ("auto", "f32", "f16", "bf16", "int8")
SPECULATION = ("auto", "off")
DEFAULT_TEMPERATURE = 0.8  # stories, not answers: greedy text of a small model soon goes in circles
DEFAULT_NEW_TOKENS = 100

Command = TypeVar("Command", bound=Callable[..., Any])


# --- types -----------------------------------------------------------------------------------------------------------


class HostPort(NamedTuple):
    """Where to listen, or what to announce: `host` without brackets, `port` 0 means any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class HostPortType(click.ParamType[HostPort]):
    """HOST:PORT with an IPv4 address, a name, or an IPv6 address in brackets; port 0 only with `any_port`."""

    name = "HOST:PORT"

    def __init__(self, *, any_port: bool) -> None:
        self.any_port = any_port

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HostPort:
        if isinstance(value, HostPort):
            return value
        host, colon, digits = str(value).rpartition(":")
        if not colon or not re.fullmatch("[0-9]{1,5}", digits):
            self.fail(f"{value!r} is not HOST:PORT (IPv6: [::1]:31337)", param, ctx)
        port = int(digits)
        if port > 65_535 or (port == 0 and not self.any_port):
            self.fail(f"port {port} is not in {0 if self.any_port else 1}..65535", param, ctx)
        # what peers will dial must be spelled as they spell it, so the rules of an address judge the host
        anybody = PeerId(bytes(32))
        try:
            return HostPort(Address.parse(f"petalite://{anybody}@{host}:{port or 1}").host, port)
        except ValueError as error:
            self.fail(str(error).replace(f"petalite://{anybody}@", ""), param, ctx)


class SizeType(click.ParamType[int]):
    """A number of bytes: 1048576, 512M, 1.5G, 2GiB (powers of 1,024)."""

    name = "SIZE"
    _UNITS = ("", "K", "M", "G", "T")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)([KMGT]?)(?:I?B)?", str(value).strip().upper())
        if found is None:
            self.fail(f"{value!r} is not a size (examples: 512M, 2G, 1048576)", param, ctx)
        size = int(float(found[1]) * 1024 ** self._UNITS.index(found[2]))
        if not 1 <= size <= 2**50:
            self.fail(f"{value!r} is not between one byte and 1024T", param, ctx)
        return size


class NumberType(click.ParamType[float]):
    """A finite number in a range; click's own FloatRange lets `nan` through."""

    name = "NUMBER"

    def __init__(self, low: float, high: float, *, above_low: bool = False) -> None:
        self.low, self.high, self.above_low = low, high, above_low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not math.isfinite(number) or not self.low <= number <= self.high or (self.above_low and number == self.low):
            words = (
                f"above {self.low:g} and at most {self.high:g}" if self.above_low else f"{self.low:g}..{self.high:g}"
            )
            self.fail(f"{value} is not in the range: {words}", param, ctx)
        return number


class ParsedType(click.ParamType[Any]):
    """Whatever `parse` makes of the text; its ValueError is the usage error."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _device(text: str) -> str:
    if not re.fullmatch("[a-z]{1,16}(:[0-9]{1,3})?", text):
        raise ValueError(f"{text!r} is not a device (examples: cpu, cuda, cuda:1)")
    return text


def _interface(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _network(text: str) -> str:
    if not 1 <= len(text.encode("utf-8", "surrogatepass")) <= MAX_NETWORK_ID or not text.isprintable():
        raise ValueError(f"a network name has 1 to {MAX_NETWORK_ID} bytes and only printable characters")
    return text


def _stop(text: str) -> str:
    if not text:
        raise ValueError("an empty text would stop at once")
    return text


def state_directory() -> Path:
    """Where what must outlive a process lies, such as a server's identity; not created here."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "petalite"


LISTEN = HostPortType(any_port=True)
ANNOUNCE = HostPortType(any_port=False)
SIZE = SizeType()
DEVICE = ParsedType("DEVICE", _device)
FILE = click.Path(path_type=Path)


# --- generation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to choose tokens, and how hidden states travel."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = DEFAULT_TEMPERATURE
    """0.0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    wire: str = "auto"
    """One of WIRE_CODECS."""
    device: str = "cpu"
    """Of the client's embeddings and head, in torch's words."""
    speculate: str = "auto"
    """One of SPECULATION."""
    draft: str | None = None
    """A small MODEL that guesses ahead."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


_GENERATION = (
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1, MAX_SESSION_LENGTH),
        default=DEFAULT_NEW_TOKENS,
        show_default=True,
        metavar="N",
        help="Stop after so many tokens.",
    ),
    click.option(
        "--temperature",
        type=NumberType(0.0, 100.0),
        metavar="T",
        help=f"Below 1 likelier, above 1 wilder, 0 greedy.  [default: {DEFAULT_TEMPERATURE}]",
    ),
    click.option("--greedy", is_flag=True, help="Always take the likeliest token."),
    click.option("--top-k", type=click.IntRange(1), metavar="N", help="Choose among the N likeliest tokens."),
    click.option(
        "--top-p",
        type=NumberType(0.0, 1.0, above_low=True),
        metavar="P",
        help="Choose among the likeliest tokens that together have probability P.",
    ),
    click.option(
        "--repetition-penalty",
        type=NumberType(0.0, 100.0, above_low=True),
        default=1.0,
        metavar="R",
        help="Above 1: what was said already becomes less likely.",
    ),
    click.option(
        "--stop",
        type=ParsedType("TEXT", _stop),
        multiple=True,
        metavar="TEXT",
        help="End where this text appears; may be repeated.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="The same seed gives the same text."),
    click.option(
        "--wire",
        type=click.Choice(WIRE_CODECS),
        default="auto",
        show_default=True,
        help="How hidden states are coded between peers.",
    ),
    click.option(
        "--device",
        type=DEVICE,
        default="cpu",
        show_default=True,
        metavar="D",
        help="Where this client's embeddings and head live.",
    ),
    click.option(
        "--speculate",
        type=click.Choice(SPECULATION),
        default="auto",
        show_default=True,
        help="Send guesses of the next tokens along where that saves time; the text is the same.",
    ),
    click.option(
        "--draft",
        metavar="MODEL",
        help="A small model of the same vocabulary, run here, that guesses too.  [default: only look up what was read]",
    ),
)


def generation_options(command: Command) -> Command:
    """Give a command the options of generation, as the one argument `generation: GenerationOptions`."""

    def collect(*, temperature: float | None, greedy: bool, **fields: Any) -> GenerationOptions:
        if greedy and temperature:
            raise click.UsageError("--greedy and --temperature exclude each other", click.get_current_context())
        if temperature is None:
            temperature = DEFAULT_TEMPERATURE
        return GenerationOptions(temperature=0.0 if greedy else temperature, **fields)

    names = ("temperature", "greedy", *(name for name in _field_names(GenerationOptions) if name != "temperature"))
    return _collected(command, "generation", names, collect, _GENERATION)


# --- serving ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `petalite serve` was asked to do."""

    model: str
    blocks: tuple[int, int] | None
    num_blocks: int | None
    listen: HostPort | None
    announce: HostPort | None
    dtype: str
    quantize: str | None
    device: str
    cache: int | None
    idle: float | None
    push: bool
    adapter: Mapping[str, Path]
    json: bool


# --- the swarm -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmOptions:
    """Which swarm, how to find it, and who we are in it."""

    peers: tuple[Address, ...] = ()
    swarm_key: Path | None = None
    network: str | None = None
    """None: the public network, or the one that the swarm key names."""
    lan: bool = True
    lan_interface: str | None = None
    """An IP address of this machine."""
    identity: Path | None = None
    allow: tuple[PeerId, ...] = ()
    """Empty: everybody."""

    @property
    def searches_lan(self) -> bool:
        """For clients: whom a user names is enough, unless the LAN is asked for too."""
        return self.lan and (not self.peers or self.lan_interface is not None)

    def load_swarm_key(self) -> SwarmKey | None:
        """The key of the private swarm; PetaliteError if the file is not one."""
        return None if self.swarm_key is None else SwarmKey.load(self.swarm_key)

    def load_identity(self) -> Identity | None:
        """The identity that was asked for, None where none was; PetaliteError if the file is not one."""
        return None if self.identity is None else Identity.load(self.identity)


_SWARM = (
    click.option(
        "--peer",
        "peers",
        type=ParsedType("ADDRESS", Address.parse),
        multiple=True,
        metavar="ADDRESS",
        help="A peer to begin with, petalite://PEER_ID@HOST:PORT; may be repeated.",
    ),
    click.option(
        "--swarm-key", type=FILE, metavar="FILE", help="Key file of a private swarm (petalite key new --swarm)."
    ),
    click.option(
        "--network", type=ParsedType("NAME", _network), metavar="NAME", help="Name of another public network."
    ),
    click.option(
        "--no-lan",
        is_flag=True,
        envvar="PETALITE_NO_LAN",
        help="Neither search nor show anything on the local network (also by PETALITE_NO_LAN=1).",
    ),
    click.option(
        "--lan-interface",
        type=ParsedType("ADDRESS", _interface),
        metavar="ADDRESS",
        help="Use the local network of this address only.",
    ),
    click.option("--identity", type=FILE, metavar="FILE", help="Key file of this peer (petalite key new)."),
    click.option(
        "--allow",
        type=ParsedType("PEER_ID", PeerId.parse),
        multiple=True,
        metavar="PEER_ID",
        help="Talk to this peer and to no other that is not allowed too; may be repeated.",
    ),
)


def swarm_options(command: Command) -> Command:
    """Give a command the options of the swarm, as the one argument `swarm: SwarmOptions`."""

    def collect(*, no_lan: bool, **fields: Any) -> SwarmOptions:
        if no_lan and fields["lan_interface"]:
            raise click.UsageError("--no-lan and --lan-interface exclude each other", click.get_current_context())
        return SwarmOptions(lan=not no_lan, **fields)

    names = ("no_lan", *(name for name in _field_names(SwarmOptions) if name != "lan"))
    return _collected(command, "swarm", names, collect, _SWARM)


def _field_names(options: type[Any]) -> tuple[str, ...]:
    return tuple(options.__dataclass_fields__)


def _collected(
    command: Command,
    argument: str,
    names: tuple[str, ...],
    collect: Callable[..., Any],
    options: tuple[Callable[[Any], Any], ...],
) -> Command:
    """`command` with `options`, whose values `collect` turns into the one keyword `argument`."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs[argument] = collect(**{name: kwargs.pop(name) for name in names})
        return command(*args, **kwargs)

    decorated: Any = wrapper
    for option in reversed(options):
        decorated = option(decorated)
    result: Command = decorated
    return result
