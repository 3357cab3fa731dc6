"""Which addresses are published and dialled (spec/11; the hostile ones of the mDNS table)."""

from __future__ import annotations

import ipaddress

import pytest

from petalite.lan.addresses import (
    LocalAddress,
    addresses_named,
    is_virtual,
    lan_addresses,
    published,
    sockets_for,
    to_dial,
)


def local(name: str, index: int, text: str) -> LocalAddress:
    host, _, prefix = text.partition("/")
    return LocalAddress(name, index, ipaddress.ip_address(host), int(prefix))


LO = local("lo", 1, "127.0.0.1/8")
LO6 = local("lo", 1, "::1/128")
ETH = local("eth0", 2, "192.168.7.5/24")
ETH_LINK = local("eth0", 2, "fe80::5/64")
ETH_ULA = local("eth0", 2, "fd00:1::5/64")
ETH_GLOBAL = local("eth0", 2, "2001:db8::5/64")
WIFI = local("wlan0", 3, "10.0.0.9/16")
WIFI_LINK = local("wlan0", 3, "fe80::9/64")
DOCKER = local("docker0", 4, "172.17.0.1/16")
TUNNEL = local("wg0", 5, "10.8.0.2/24")
PUBLIC = local("eth1", 6, "203.0.113.9/24")
AUTO = local("eth2", 7, "169.254.3.4/16")
ALL = [LO, LO6, DOCKER, TUNNEL, ETH_LINK, ETH_ULA, ETH_GLOBAL, AUTO, PUBLIC, ETH, WIFI, WIFI_LINK]


@pytest.mark.parametrize(
    "name", ["docker0", "br-1a2b", "veth12", "virbr0", "tun0", "wg0", "tailscale0", "utun3", "zt5"]
)
def test_containers_and_tunnels_are_no_local_networks(name: str) -> None:
    assert is_virtual(name)


@pytest.mark.parametrize("name", ["eth0", "enp3s0", "wlan0", "en0", "br0", "bond0"])
def test_real_interfaces_are(name: str) -> None:
    assert not is_virtual(name)


def test_local_networks_are_private_and_real_ipv4_first() -> None:
    assert lan_addresses(ALL) == [ETH, WIFI, AUTO, ETH_LINK, ETH_ULA, WIFI_LINK]


def test_an_address_named_by_its_owner_may_be_any() -> None:
    assert addresses_named(ALL, ["10.8.0.2", "127.0.0.1", "fe80::5%eth0"]) == [LO, TUNNEL, ETH_LINK]


def test_a_group_is_joined_once_a_link_and_version() -> None:
    second = local("eth0", 2, "192.168.8.5/24")
    assert sockets_for([ETH, second, ETH_ULA, ETH_LINK, WIFI]) == [ETH, ETH_LINK, WIFI]


def test_published_addresses_have_no_scope_and_only_open_ports() -> None:
    own = [ETH, WIFI, ETH_LINK]
    assert published(own) == ["192.168.7.5", "10.0.0.9", "fe80::5"]
    assert published(own, ["192.168.7.5", "127.0.0.1"]) == ["192.168.7.5"]
    assert published(own, ["fe80::5%eth0"]) == ["fe80::5"]
    assert published(own, ["0.0.0.0"]) == ["192.168.7.5", "10.0.0.9"]
    assert published(own, ["::"]) == published(own)
    assert published(own, ["8.8.8.8"]) == []
    assert len(published([local("eth0", 2, f"10.0.{i}.1/24") for i in range(30)])) == 8


def test_own_subnets_come_first() -> None:
    assert to_dial(["10.9.9.9", "172.20.0.4", "192.168.7.77"], [ETH]) == ("192.168.7.77", "10.9.9.9", "172.20.0.4")


@pytest.mark.parametrize(
    "text",
    [
        "8.8.8.8",
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "0.0.0.0",
        "::",
        "224.0.0.251",
        "ff02::fb",
        "255.255.255.255",
        "240.0.0.1",
        "192.168.7.255",  # broadcast of our own subnet
        "::ffff:8.8.8.8",
        "::ffff:127.0.0.1",
        "2a00::1",
        "100.64.0.1",
        "fe80::1%wlan9",  # a link we do not have
        "",
        "example.org",
        "1.2.3",
        "10.0.0.1:80",
        "١٠.٠.٠.١",
    ],
)
def test_what_is_no_neighbour_is_not_dialled(text: str) -> None:
    assert to_dial([text], [ETH, WIFI]) == ()


def test_loopback_only_where_we_look_on_loopback() -> None:
    assert to_dial(["127.0.0.1"], [LO]) == ("127.0.0.1",)
    assert to_dial(["8.8.8.8"], [LO]) == ()


def test_a_public_subnet_that_is_our_own_counts_as_near() -> None:
    assert to_dial(["203.0.113.77", "203.0.114.77"], [PUBLIC]) == ("203.0.113.77",)


def test_link_local_addresses_get_the_name_of_their_link() -> None:
    both = [ETH_LINK, WIFI_LINK]
    assert to_dial(["fe80::1%3"], both) == ("fe80::1%wlan0",)
    assert to_dial(["fe80::1%eth0", "fe80::1%2"], both) == ("fe80::1%eth0",)
    assert to_dial(["fe80::1"], both) == ()  # which of the two links?
    assert to_dial(["fe80::1"], [ETH, ETH_LINK]) == ("fe80::1%eth0",)
    assert to_dial(["fe80::1%2"], [ETH]) == ()


def test_at_most_four_are_dialled_and_none_twice() -> None:
    assert to_dial([f"10.1.1.{i}" for i in range(1, 200)] * 2, [ETH]) == (
        "10.1.1.1",
        "10.1.1.2",
        "10.1.1.3",
        "10.1.1.4",
    )
