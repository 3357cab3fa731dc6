"""Why a swarm is not found or not usable, in words: findings in, verdicts out. Pure; `examination` makes the findings.

Each fault has one verdict with what to do about it. Of several causes the handshake must not tell apart (another
network, another swarm key), there is one verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from petalite.identity import PeerId
from petalite.lan.announcement import Kind

CLOCK_TOLERANCE = 60.0
"""Seconds by which clocks may differ: more, and records of the DHT begin to look forged or expired."""


class Outcome(StrEnum):
    """How far we came with one address of one peer."""

    ANSWERED = "answered"
    REFUSED = "port refused"
    NO_ROUTE = "no route"
    SILENT = "no answer"
    BROKEN = "connection broken"
    NO_SUCH_NAME = "no such name"
    NO_HANDSHAKE = "no handshake in time"
    OTHER_NETWORK = "other network or key"
    OTHER_VERSION = "other version"
    CLOCK = "clock"
    WRONG_PEER = "wrong peer"
    NOT_PETALITE = "not petalite"
    FORBIDDEN = "not allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server said that it serves."""

    model: bytes
    name: str
    blocks: tuple[int, int]
    layers: int
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFinding:
    """One peer at one place. `own`: it is a server of this machine's user."""

    place: str
    """HOST:PORT, as dialled."""
    outcome: Outcome
    peer: PeerId | None = None
    near: bool = False
    """`place` is in a subnet of this machine, loopback excluded."""
    own: bool = False
    heard: bool = False
    """It was heard on the LAN."""
    skew: float = 0.0
    """Its clock less ours, seconds."""
    served: Served | None = None
    """None: it serves no model (a bootstrap), or did not say."""
    dialled_back: bool | None = None
    """Of an own server: whether another peer could dial it; None where none was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The model that the user wants: its id, what they call it, and its number of blocks."""

    model: bytes
    name: str
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All that was found. `seen` counts the instances on the LAN by kind; `own_running` are servers of this machine."""

    lan: bool = True
    lan_problem: str = ""
    interfaces: tuple[str, ...] = ()
    loopback_only: bool = False
    seconds: float = 0.0
    seen: Counter[Kind] = field(default_factory=Counter)
    peers: tuple[PeerFinding, ...] = ()
    asked_for_peers: bool = False
    private: bool = False
    wanted: Wanted | None = None
    own_running: tuple[PeerId, ...] = ()


class Severity(StrEnum):
    FINE = "fine"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`code` is for scripts, `what` says what was found, `advice` what to do (empty if nothing)."""

    severity: Severity
    code: str
    what: str
    advice: str = ""


def diagnose(findings: Findings) -> list[Verdict]:
    """Every verdict that the findings allow, the worst first; never empty."""
    verdicts = [
        *_lan(findings),
        *(_of_peer(each, findings.private) for each in findings.peers if each.outcome is not Outcome.ANSWERED),
        *_multicast(findings),
        *_clocks(findings.peers),
        *_own_servers(findings),
        *_models(findings),
    ]
    order = list(Severity)
    verdicts.sort(key=lambda verdict: -order.index(verdict.severity))
    return verdicts or [Verdict(Severity.NOTE, "nothing", "nothing was found, and nothing is wrong")]


def is_wrong(verdicts: Iterable[Verdict]) -> bool:
    """Whether anything needs doing."""
    return any(verdict.severity is Severity.WRONG for verdict in verdicts)


def _wrong(code: str, what: str, advice: str) -> Verdict:
    return Verdict(Severity.WRONG, code, what, advice)


# --- the LAN ---------------------------------------------------------------------------------------------------------

_GIVE_A_PEER = "give the address that the server printed when it started: --peer petalite://PEER_ID@HOST:PORT"


def _lan(findings: Findings) -> Iterator[Verdict]:
    answered = any(peer.outcome is Outcome.ANSWERED for peer in findings.peers)
    if not findings.lan:
        if not findings.asked_for_peers:
            yield _wrong("nowhere_to_look", "the local network is not searched and no peer is given", _GIVE_A_PEER)
        return
    if findings.lan_problem:
        advice = f"end the program that holds UDP port 5353 for itself alone, or {_GIVE_A_PEER}"
        yield _wrong("mdns_unavailable", findings.lan_problem, advice)
        return
    if findings.loopback_only:
        text = "this machine has no local network: only servers on this machine can be found without an address"
        yield Verdict(
            Severity.NOTE if answered else Severity.WRONG, "no_interface", text, f"connect it, or {_GIVE_A_PEER}"
        )
    yield from _heard(findings, answered)


def _heard(findings: Findings, answered: bool) -> Iterator[Verdict]:
    """What the instances on the LAN say, ours and foreign ones."""
    ours, foreign = findings.seen[Kind.OURS], findings.seen[Kind.OTHER_NETWORK]
    severity = Severity.NOTE if answered or ours else Severity.WRONG
    if ours:
        yield Verdict(Severity.FINE, "lan", f"{_count(ours, 'peer')} of this swarm on the local network")
    elif not foreign and not findings.seen[Kind.OTHER_VERSION] and not findings.asked_for_peers:
        where = ", ".join(findings.interfaces)
        yield _wrong(
            "lan_silent",
            f"no peer was heard on the local network in {findings.seconds:.0f} s (through {where})",
            "start a server (petalite serve fairytale) on a machine of this network. If one runs, multicast does not "
            "pass: guest Wi-Fi, containers and VPNs often block it, and so do firewalls (UDP port 5353); then "
            f"{_GIVE_A_PEER}",
        )
    if foreign:
        yield Verdict(
            severity,
            "other_network",
            f"{_count(foreign, 'peer')} on the local network of another network or swarm key",
            _SAME_NETWORK,
        )
    if count := findings.seen[Kind.OTHER_VERSION]:
        yield Verdict(
            severity,
            "other_version",
            f"{_count(count, 'peer')} on the local network of another protocol version",
            _SAME_VERSION,
        )
    if count := findings.seen[Kind.MALFORMED]:
        yield Verdict(Severity.NOTE, "malformed", f"{_count(count, 'announcement')} on the local network made no sense")


def _multicast(findings: Findings) -> Iterator[Verdict]:
    """A neighbour that answers when dialled but was never heard: what is sent to all does not arrive."""
    if not findings.lan or findings.lan_problem:
        return
    for peer in findings.peers:
        if peer.outcome is Outcome.ANSWERED and peer.near and not peer.heard and not peer.own:
            yield _wrong(
                "no_multicast",
                f"{peer.place} answers, but was not heard on the local network, though it is a neighbour",
                "multicast does not pass between the two machines, or that peer runs with --no-lan. Keep giving its "
                "address with --peer, or allow UDP port 5353 to 224.0.0.251 and ff02::fb in access point and firewall",
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# --- one peer --------------------------------------------------------------------------------------------------------

_SAME_NETWORK = (
    "use the same --network and the same --swarm-key file on both sides (petalite key show FILE compares key files)"
)
_SAME_VERSION = "install the same release of petalite on both sides (petalite --version)"
_SET_CLOCK = "set the clocks by the network (timedatectl set-ntp true)"

_ADVICE: dict[Outcome, tuple[str, str, str]] = {
    Outcome.REFUSED: (
        "refused_port",
        "the machine is there, but nothing listens on that port",
        "start the server, or use the address that it printed when it started",
    ),
    Outcome.NO_ROUTE: (
        "no_route",
        "there is no way to that machine: it is off, or in another network",
        "turn it on, check the address, and whether both machines are in networks that reach each other",
    ),
    Outcome.SILENT: (
        "firewalled",
        "nothing answers there: the machine is off, or a firewall drops what comes",
        "allow incoming TCP to that port on that machine and its router, or serve on a port that is open (--listen)",
    ),
    Outcome.BROKEN: (
        "broken",
        "the connection is broken off",
        "a firewall or proxy in between may cut it, or the server is at its limit of connections: try again",
    ),
    Outcome.NO_SUCH_NAME: ("no_such_name", "that host name is not known", "check the spelling, or use an IP address"),
    Outcome.NO_HANDSHAKE: (
        "no_handshake",
        "somebody accepts the connection and then says nothing",
        "either another program has that port, or the server hangs: restart it",
    ),
    Outcome.OTHER_NETWORK: ("other_network", "that peer belongs to another network or swarm key", _SAME_NETWORK),
    Outcome.OTHER_VERSION: ("other_version", "that peer speaks another version of the protocol", _SAME_VERSION),
    Outcome.CLOCK: (
        "clock_skew",
        "its clock and ours differ by hours: its identity looks expired or not yet valid",
        f"{_SET_CLOCK} on both machines",
    ),
    Outcome.WRONG_PEER: (
        "wrong_peer",
        "another peer answers there than the address names",
        "use the address that the server prints now; its identity file may be new, or somebody else has its place",
    ),
    Outcome.NOT_PETALITE: (
        "not_petalite",
        "what answers there is no petalite peer",
        "check the port: another program listens on it",
    ),
    Outcome.FORBIDDEN: (
        "forbidden",
        "that peer does not allow this one",
        "ask its owner to add your peer id with --allow, and run with the same --identity each time",
    ),
}  # fmt: skip


def _of_peer(peer: PeerFinding, private: bool) -> Verdict:
    code, what, advice = _ADVICE[peer.outcome]
    if peer.own:
        return _wrong("own_server_unreachable", f"this machine's own server at {peer.place}: {what}", advice)
    if peer.outcome is Outcome.OTHER_NETWORK and private:
        advice += "; a public swarm has no key file"
    return _wrong(code, f"{peer.place}: {what}", advice)


def _clocks(peers: Sequence[PeerFinding]) -> Iterator[Verdict]:
    """Whose clock is wrong: where most peers differ from ours in the same way, ours is."""
    told = [peer for peer in peers if peer.outcome is Outcome.ANSWERED]
    skewed = [peer for peer in told if abs(peer.skew) > CLOCK_TOLERANCE]
    if len(skewed) >= 2 and 2 * len(skewed) > len(told):
        middle = sorted(peer.skew for peer in skewed)[len(skewed) // 2]
        text = (
            f"this machine's clock is {_duration(middle)} {'behind' if middle > 0 else 'ahead of'} that of most peers"
        )
        yield _wrong("clock_skew", text, f"{_SET_CLOCK} on this machine")
        return
    for peer in skewed:
        text = f"the clock of {peer.place} is {_duration(peer.skew)} {'ahead of' if peer.skew > 0 else 'behind'} ours"
        yield _wrong("clock_skew", text, f"{_SET_CLOCK} on both machines")


def _duration(seconds: float) -> str:
    seconds = abs(seconds)
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


# --- own servers and models ------------------------------------------------------------------------------------------


def _own_servers(findings: Findings) -> Iterator[Verdict]:
    """A server that runs here must be found, and be reachable from elsewhere."""
    for peer in findings.peers:
        if peer.own and peer.dialled_back is False:
            yield _wrong(
                "own_server_firewalled",
                f"this machine's own server at {peer.place} cannot be reached from another peer",
                "allow incoming TCP to its port in this machine's firewall; behind a router, forward and --announce it",
            )
    found = {peer.peer for peer in findings.peers}
    for own in findings.own_running:
        if own not in found:
            yield Verdict(
                Severity.NOTE,
                "own_server_not_found",
                f"a server with the identity {own.short}.. runs on this machine, but was not found",
                "it may be loading, belong to another swarm, or run with --no-lan: give its address with --peer",
            )


def _models(findings: Findings) -> Iterator[Verdict]:
    served = [peer.served for peer in findings.peers if peer.served is not None]
    wanted = findings.wanted
    answered = [peer for peer in findings.peers if peer.outcome is Outcome.ANSWERED]
    if wanted is None:
        for model in dict.fromkeys(each.model for each in served):
            of_model = [each for each in served if each.model == model]
            yield from _coverage(of_model[0].name, of_model[0].layers, of_model)
    else:
        matching = [each for each in served if each.model == wanted.model and each.layers == wanted.layers]
        if not matching and served:
            others = ", ".join(sorted({f"{each.name} ({each.model.hex()[:8]}..)" for each in served}))
            yield _wrong(
                "other_checkpoint",
                f"no server holds {wanted.name} ({wanted.model.hex()[:8]}..) with these very weights; served: {others}",
                "load the same checkpoint, bit for bit, on clients and servers",
            )
        elif matching:
            yield from _coverage(wanted.name, wanted.layers, matching)
    if answered and not served:
        yield _wrong(
            "no_server",
            f"{_count(len(answered), 'peer')} found, but none serves a model",
            "start a server that knows one of them: petalite serve MODEL --peer ADDRESS",
        )


def _coverage(name: str, layers: int, servers: Sequence[Served]) -> Iterator[Verdict]:
    """Whether the servers hold every block, and if not, which are missing."""
    online = [each for each in servers if each.state == "online"]
    missing = _gaps(layers, online)
    if not missing:
        yield Verdict(Severity.FINE, "blocks", f"{name}: all {layers} blocks, {_count(len(online), 'server')}")
        return
    spans = ", ".join(f"{start}:{end}" for start, end in missing)
    soon = _gaps(layers, [each for each in servers if each.state in ("online", "joining")])
    if not soon:
        text = f"{name}: blocks {spans} are being loaded"
        yield Verdict(Severity.WRONG, "blocks_loading", text, "wait until the servers are ready")
        return
    start, end = missing[0]
    advice = f"start a server for them: petalite serve {name} --blocks {start}:{end}"
    yield _wrong("blocks_missing", f"{name}: no server holds blocks {spans} of {layers}", advice)


def _gaps(layers: int, servers: Iterable[Served]) -> list[tuple[int, int]]:
    held = {block for each in servers for block in range(*each.blocks)}
    gaps: list[tuple[int, int]] = []
    for block in range(layers):
        if block in held:
            continue
        if gaps and gaps[-1][1] == block:
            gaps[-1] = (gaps[-1][0], block + 1)
        else:
            gaps.append((block, block + 1))
    return gaps
