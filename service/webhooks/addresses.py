"""Which addresses a webhook may be sent to: those of the public internet, and no way into a network behind it."""

from __future__ import annotations

import ipaddress
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

# Python's `is_global` is a beginning: it holds for all of these, in some of its versions or in all.
_REFUSED_V4 = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments; clouds keep metadata services there
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
    IPv4Network("224.0.0.0/3"),  # multicast, reserved, broadcast
    IPv4Network("168.63.129.16/32"),  # public by its number; the host of every machine in Azure
)
# All unicast that is given out. What lies outside leads elsewhere: mapped, compatible and translated (NAT64) IPv4,
# unique local, link local, site local, multicast.
_UNICAST_V6 = IPv6Network("2000::/3")
_REFUSED_V6 = (
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them, which holds an IPv4 address
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4, which holds an IPv4 address
    IPv6Network("3fff::/20"),  # documentation
)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one that anybody on the internet may be reached at."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _REFUSED_V4)
    return (
        address.scope_id is None
        and address.is_global
        and address in _UNICAST_V6
        and not any(address in network for network in _REFUSED_V6)
    )


def resolve(host: str, port: int) -> list[tuple[str, int]]:
    """The addresses of a name, or the address itself, with the port to connect to.

    Raises:
        OSError: it has none.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        host += "."  # as it stands: not completed by the search list of this machine's resolver
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [(str(address), int(number)) for *_, (address, number, *_) in found]
