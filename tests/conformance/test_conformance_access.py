"""A server with an allow list, which the tool cannot ask for: what a peer that is not on it meets (PT-FRM-028)."""

from __future__ import annotations

from zygote import Zygote

from tools.conformance.command import parse_address
from tools.conformance.constants import END, HELLO, REQ
from tools.conformance.crypto import Identity, peer_text
from tools.conformance.link import dial
from tools.conformance.peer import Peer, hello_frame


def test_a_peer_not_on_the_list_is_told_so_and_served_nothing(zygote: Zygote) -> None:
    welcome = Identity()
    with zygote.serve(allow=[peer_text(welcome.peer)]) as address:
        target = parse_address(address, b"petalite", None)
        link = dial(target, Identity())
        link.send(hello_frame(), [REQ, 1, END, "info", {"max": 4096}])
        assert link.receive()[0] == HELLO
        assert link.expect_close({"forbidden"}, or_plain_close=False) == "forbidden"
        link.close()
        friend = Peer.dial(target, welcome)
        friend.ask("info")
        friend.close()
