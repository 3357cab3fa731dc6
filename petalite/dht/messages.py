"""The four requests of the DHT and their replies, as values (spec/09, "Messages").

`to_map` gives the map of a REQ or RES head, the `*_from_map` functions check one. A bad request costs that request
(RequestError BAD_REQUEST); a bad reply is the peer's breach (RemoteProtocolError).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from petalite.dht.contacts import Contact, make_contact
from petalite.dht.ids import ID_BYTES
from petalite.errors import ErrorCode, RemoteProtocolError, RequestError
from petalite.identity import SIGNATURE_BYTES
from petalite.limits import (
    DHT_K,
    MAX_CONTACT_ADDRESS,
    MAX_CONTACT_ADDRESSES,
    MAX_RECORD_PAYLOAD,
    MAX_RECORDS_PER_MESSAGE,
)
from petalite.wire.packing import Bin, Bool, Int, ListOf, Map, Str, field, refuse_critical

_ID = Bin(ID_BYTES)
_ADDRS = ListOf(Str(1, MAX_CONTACT_ADDRESS), 0, MAX_CONTACT_ADDRESSES)
_RECORDS = ListOf(Bin(SIGNATURE_BYTES + 1, SIGNATURE_BYTES + MAX_RECORD_PAYLOAD), 0, MAX_RECORDS_PER_MESSAGE)
_MAX_NAMED = 10_000  # contacts in a reply before the array itself is refused; heads bound it already


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Are you there. `addrs`: where the asker listens; `client`: nobody can dial it, keep it out of tables."""

    addrs: tuple[str, ...] = ()
    client: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FindNode:
    """The k contacts nearest to `target` (32 bytes)."""

    target: bytes
    addrs: tuple[str, ...] = ()
    client: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FindValue:
    """Records of `key` (32 bytes) from `cursor` on, and, on the first page, the k contacts nearest to it."""

    key: bytes
    cursor: bytes = b""
    addrs: tuple[str, ...] = ()
    client: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Keep these records, at most 10."""

    records: tuple[bytes, ...]
    addrs: tuple[str, ...] = ()
    client: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Here I am."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """At most k contacts, all verified by the sender. `excess`: more were sent, and cut (never set by a sender)."""

    contacts: tuple[Contact, ...]
    excess: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """One page of records. `cursor` is where the next page starts; None: this was the last."""

    records: tuple[bytes, ...]
    contacts: tuple[Contact, ...] = ()
    cursor: bytes | None = None
    excess: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What became of each record, in order: `records.StoreCode`, or a number that a newer version knows."""

    codes: tuple[int, ...]


Request = Ping | FindNode | FindValue | Store
Reply = Pong | Nodes | Values | Stored

METHODS: dict[str, type[Request]] = {
    "dht.ping": Ping,
    "dht.find_node": FindNode,
    "dht.find_value": FindValue,
    "dht.store": Store,
}
METHOD_OF: dict[type[Request], str] = {kind: name for name, kind in METHODS.items()}

# ------------------------------------------------------------------------------------------------------------ to maps


def to_map(message: Request | Reply) -> dict[str, Any]:
    """The head of a request or reply; absent options are left out."""
    made: dict[str, Any] = {}
    match message:
        case FindNode(target=target):
            made["target"] = target
        case FindValue(key=key, cursor=cursor):
            made["key"] = key
            if cursor:
                made["cursor"] = cursor
        case Store(records=records):
            made["records"] = list(records)
        case Nodes(contacts=contacts):
            made["contacts"] = [_contact_map(contact) for contact in contacts]
        case Values(records=records, contacts=contacts, cursor=after):
            made["records"] = list(records)
            if contacts:
                made["contacts"] = [_contact_map(contact) for contact in contacts]
            if after is not None:
                made["cursor"] = after
        case Stored(codes=codes):
            made["stored"] = [int(code) for code in codes]
        case Ping() | Pong():
            pass
    if isinstance(message, (Ping, FindNode, FindValue, Store)):
        if message.addrs:
            made["addrs"] = list(message.addrs)
        if message.client:
            made["client"] = True
    return made


def _contact_map(contact: Contact) -> dict[str, Any]:
    return {"id": bytes(contact.id), "addrs": list(contact.addrs)}


# ---------------------------------------------------------------------------------------------------------- from maps


def request_from_map(method: str, fields: Mapping[str, Any]) -> Request:
    """Check the head of a request of one of METHODS.

    Raises:
        RequestError: BAD_REQUEST, or UNSUPPORTED for an unknown method or a critical key.
    """
    refuse_critical(fields)
    addrs = field(fields, "addrs", _ADDRS, ())
    client = field(fields, "client", Bool(), False)
    kind = METHODS.get(method)
    if kind is FindNode:
        return FindNode(target=field(fields, "target", _ID), addrs=addrs, client=client)
    if kind is FindValue:
        cursor = field(fields, "cursor", _ID, b"")
        return FindValue(key=field(fields, "key", _ID), cursor=cursor, addrs=addrs, client=client)
    if kind is Store:
        return Store(records=field(fields, "records", _RECORDS), addrs=addrs, client=client)
    if kind is Ping:
        return Ping(addrs=addrs, client=client)
    raise RequestError(ErrorCode.UNSUPPORTED, f"no DHT method {method[:32]!r}")


def reply_from_map(request: Request, fields: Mapping[str, Any]) -> Reply:
    """Check the head of the reply to `request`. Contacts that make no sense are left out, those beyond k cut.

    Raises:
        RemoteProtocolError: a field is missing or of the wrong form.
    """
    try:
        refuse_critical(fields)
        return _REPLIES[type(request)](request, fields)
    except RequestError as error:
        raise RemoteProtocolError(f"bad DHT reply: {error.text}") from None


def _read_nodes(request: Request, fields: Mapping[str, Any]) -> Nodes:
    contacts, excess = _read_contacts(fields)
    return Nodes(contacts=contacts, excess=excess)


def _read_values(request: Request, fields: Mapping[str, Any]) -> Values:
    contacts, excess = _read_contacts(fields)
    records = field(fields, "records", _RECORDS)
    return Values(records=records, contacts=contacts, cursor=field(fields, "cursor", _ID, None), excess=excess)


def _read_stored(request: Request, fields: Mapping[str, Any]) -> Stored:
    count = len(request.records) if isinstance(request, Store) else 0
    return Stored(codes=field(fields, "stored", ListOf(Int(0, 255), count, count)))


def _read_pong(request: Request, fields: Mapping[str, Any]) -> Pong:
    return Pong()


_REPLIES: dict[type[Request], Callable[[Request, Mapping[str, Any]], Reply]] = {
    Ping: _read_pong,
    FindNode: _read_nodes,
    FindValue: _read_values,
    Store: _read_stored,
}


def _read_contacts(fields: Mapping[str, Any]) -> tuple[tuple[Contact, ...], bool]:
    named = field(fields, "contacts", ListOf(Map(), 0, _MAX_NAMED), ())
    found = []
    for item in named[:DHT_K]:
        addrs = field(item, "addrs", _ADDRS)
        node_id = field(item, "id", _ID)
        if any("%" in text for text in addrs):
            continue  # a scope means something on one machine only
        try:
            found.append(make_contact(node_id, addrs))
        except ValueError:
            continue  # a name, a port of 70000: no reason to lose the rest
    return tuple(found), len(named) > DHT_K
