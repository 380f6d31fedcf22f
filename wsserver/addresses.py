"""Addresses, host names and origins: how they are written, and what they mean."""

import functools
import ipaddress
import re

from wsserver.errors import ConfigError
from wsserver.limits import Account

# Bits of an IPv6 address that one customer commonly gets: one network, a home, a site (RFC 6177).
IPV6_NETWORKS = (64, 56, 48)
LAST_PORT = 65_535

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_DEFAULT_PORTS = {"http": 80, "https": 443}
_LABELS = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"  # of a name; other alphabets are in Punycode
_PORT = r"[0-9]{1,5}"
_ADDRESS = r"\[[0-9a-f:.]+\]"  # of IPv6
HOST = re.compile(rf"(?P<name>{_ADDRESS}|{_LABELS})\.?(?::(?P<port>{_PORT}))?")
"""A `Host` header in lower case (RFC 9110 section 7.2)."""
# An origin as browsers serialise it: RFC 6454 section 6.2, URL standard section 4.7. It has neither
# user nor path, and no dot at the end of the host. Other schemes have origins of their own kinds.
_ORIGIN = re.compile(
    rf"(?P<scheme>https?)://(?P<name>{_ADDRESS}|{_LABELS})(?::(?P<port>[1-9][0-9]{{0,4}}))?"
)


def origin_of(text: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of an ``Origin`` header in lower case; None for other texts."""
    found = _ORIGIN.fullmatch(text)
    if found is None:
        return None
    port = int(found["port"] or _DEFAULT_PORTS[found["scheme"]])
    return None if port > LAST_PORT else (found["scheme"], found["name"], port)


@functools.lru_cache(1024)
def ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, an IPv4-mapped one as IPv4; None for a text that is no IP address."""
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache(1024)
def networks(address: str) -> Account:
    """Return the account of an address: an IPv4 address, or the IPv6 networks around one.

    One customer has one IPv4 address or a whole IPv6 network. The size of that network is unknown,
    so that each of the common sizes has a limit.
    """
    known = ip_address(address)
    if not isinstance(known, ipaddress.IPv6Address):
        return (f"address {address if known is None else known}",)
    return tuple(
        f"address {ipaddress.IPv6Network((int(known), bits), strict=False)}"
        for bits in IPV6_NETWORKS
    )


def is_local(name: str) -> bool:
    """Whether a host name always means the machine that resolves it (RFC 6761 section 6.3)."""
    name = name.rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = ip_address(name)
    return address is not None and address.is_loopback


def network(name: str) -> Network:
    """Parse an item of the setting `proxies`.

    Raises:
        ConfigError: the item is no address and no network.
    """
    try:
        return ipaddress.ip_network(name, strict=False)
    except ValueError:
        raise ConfigError(f"proxies: {name!r} is not an IP address, a network or `unix`") from None


def host_pattern(text: str) -> re.Pattern[str]:
    """Make a pattern of an item of the setting `hosts`.

    Raises:
        ConfigError: the item is no host name.
    """
    if not re.fullmatch(rf"\*|(\*\.)?{_LABELS}", text.lower()):
        raise ConfigError(
            f"hosts: {text!r} is not a host name without a port, or `*.` and a host name"
        )
    return re.compile(_wild(text.lower()))


def origin_pattern(text: str) -> re.Pattern[str]:
    """Make a pattern of an item of the setting `origins`.

    Raises:
        ConfigError: the item is no origin.
    """
    # A star inside a label would match names that anybody can register.
    name = rf"\*|(?:\*\.)?{_LABELS}|{_ADDRESS}"
    found = re.fullmatch(
        rf"\*|null|(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<name>{name})(?P<port>:(?:\*|{_PORT}))?",
        text.lower(),
    )
    if found is None:
        raise ConfigError(
            f"origins: {text!r} is not an origin such as https://example.com or https://*.example.com"
        )
    if found["name"] is None:
        return re.compile(_wild(text.lower()))
    port = ":" + _PORT if found["port"] == ":*" else re.escape(found["port"] or "")
    return re.compile(re.escape(found["scheme"]) + "://" + _wild(found["name"]) + port)


def _wild(name: str) -> str:
    """Return the regular expression of a name in which ``*`` stands for any labels."""
    return _LABELS.join(map(re.escape, name.split("*")))
