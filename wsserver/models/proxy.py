"""Chooses the HTTP proxy for a request from the environment.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` mean the same as for httpx2, the
HTTP client of the SDK: https://httpx2.pydantic.dev/environment_variables/
"""

import base64
import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from wsserver.errors import ConfigError

PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy."""

    host: str  # its name or address
    port: int
    tls: bool  # whether the connection to the proxy itself is encrypted
    # The value of `Proxy-Authorization`, if its address has credentials.
    authorization: bytes | None


def proxy_for(
    scheme: str, host: str, port: int, environment: Mapping[str, str] | None = None
) -> Proxy | None:
    """Return the proxy for an address; None if there is none.

    Args:
        scheme: ``http`` or ``https``.
        host: name or address of the target.
        port: port of the target.
        environment: addresses of proxies by scheme, and the exceptions under ``no``; by default
            those of the environment or, on macOS and Windows, of the system.

    Raises:
        ConfigError: the address of the proxy is no URL, or its scheme is not supported.
    """
    proxies = getproxies() if environment is None else environment
    address = proxies.get(scheme) or proxies.get("all")
    if not address:
        return None
    exceptions = [entry.strip().lower() for entry in proxies.get("no", "").split(",")]
    if "*" in exceptions or any(_matches(entry, scheme, host, port) for entry in exceptions):
        return None
    return _parse(address if "://" in address else f"http://{address}")


def _parse(address: str) -> Proxy:
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ConfigError("the proxy of the environment is no URL") from error
    if url.scheme not in PORTS or not host:
        raise ConfigError(f"a proxy must be http:// or https://, and not {url.scheme}://")
    authorization = None
    if url.username or url.password:
        credentials = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
        authorization = b"Basic " + base64.b64encode(credentials.encode())
    return Proxy(host, port or PORTS[url.scheme], url.scheme == "https", authorization)


def _matches(entry: str, scheme: str, host: str, port: int) -> bool:
    """Whether an entry of ``NO_PROXY`` covers an address."""
    wanted_scheme, separator, rest = entry.partition("://")
    if not separator:
        wanted_scheme, rest = "all", entry
    name, wanted_port = _split(rest)
    if wanted_scheme not in {scheme, "all"} or wanted_port not in {port, None}:
        return False
    host = host.lower().strip("[]")
    with contextlib.suppress(ValueError):
        network = ipaddress.ip_network(name.strip("[]"), strict=False)
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host) in network
        return False
    below = name.lstrip("*.")
    if not below:
        return False
    if separator or name == "localhost":  # without an asterisk, no subdomains
        exact, subdomains = not name.startswith("*."), name.startswith("*")
    else:
        exact, subdomains = not name.startswith((".", "*.")), True
    return (exact and host == below) or (subdomains and host.endswith(f".{below}"))


def _split(entry: str) -> tuple[str, int | None]:
    """Return a name or an address, and the port if there is one."""
    name, colon, port = entry.rpartition(":")
    if colon and port.isdigit() and (":" not in name or name.endswith("]")):
        return name, int(port)
    return entry, None
