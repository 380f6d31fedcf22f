"""Checks of `Host`, `Origin` and `X-Forwarded-For` against the names in the settings."""

from collections.abc import Mapping
from http import HTTPStatus

from wsserver.addresses import (
    HOST,
    host_pattern,
    ip_address,
    is_local,
    network,
    origin_of,
    origin_pattern,
)
from wsserver.denials import Denied
from wsserver.settings import Settings

_OWN_SITE = (None, "same-origin", "none")  # of Sec-Fetch-Site, where there is no Origin


class Names:
    """The hosts, origins and proxies of the settings.

    Raises:
        ConfigError: an item of `hosts`, `origins` or `proxies` is malformed.
    """

    def __init__(self, settings: Settings) -> None:
        self._host = settings.host.lower()
        self._hosts = [host_pattern(host) for host in settings.hosts]
        self._any_origin = "*" in settings.origins
        self._origins = [origin_pattern(origin) for origin in settings.origins]
        self._proxies = [network(name) for name in settings.proxies if name != "unix"]
        self._unix_proxy = "unix" in settings.proxies

    def trusted(self, peer: str) -> bool:
        """Whether the peer is a listed proxy, whose `X-Forwarded-` headers are true."""
        if peer == "unix":
            return self._unix_proxy
        if not self._proxies:
            return False
        address = ip_address(peer)
        return address is not None and any(address in network for network in self._proxies)

    def client_address(self, peer: str, forwarded_for: str) -> str:
        """Return the address of the client behind listed proxies.

        Each proxy appends the address of its peer. Read from the right, the first address that is
        no listed proxy is the client. The client itself may have written all to the left of it.
        """
        if not self.trusted(peer):
            return peer
        found = peer
        for name in reversed([part.strip() for part in forwarded_for.split(",")]):
            match = HOST.fullmatch(name.lower())  # some proxies append a port
            address = ip_address(match["name"] if match is not None else name)
            if address is None:
                break
            found = str(address)
            if not self.trusted(found):
                break
        return found

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Check the `Host` header against DNS rebinding.

        Raises:
            Denied: the host is not a name of this server.
        """
        host = headers.get("host", "")
        match = HOST.fullmatch(host.lower())
        name = "" if match is None else match["name"]
        if name and (is_local(name) or ip_address(name) or name == self._host):
            return
        if name and any(pattern.fullmatch(name) for pattern in self._hosts):
            return
        raise Denied(
            HTTPStatus.MISDIRECTED_REQUEST,
            "host",
            "This server is not known by this name. Its operator can add the name to the setting "
            "`hosts` (WSSERVER_HOSTS).",
        )

    def check_origin(self, headers: Mapping[str, str], *, local: bool, secure: bool) -> None:
        """Check the `Origin` header against cross-site WebSocket hijacking.

        Args:
            headers: headers of the request, names in lower case.
            local: whether the client is a program of this machine.
            secure: whether the client uses TLS.

        Raises:
            Denied: the origin is malformed, or another one that is not listed; or `Sec-Fetch-Site`
                of a request without `Origin` names another site.
        """
        origin = headers.get("origin")
        if origin is None:
            allowed = self._any_origin or headers.get("sec-fetch-site") in _OWN_SITE
        else:
            allowed = self._allows(origin.lower(), headers, local=local, secure=secure)
        if not allowed:
            raise Denied(
                HTTPStatus.FORBIDDEN,
                "origin",
                "Pages of this origin may not connect. The server's operator can add it to the "
                "setting `origins` (WSSERVER_ORIGINS).",
            )

    def _allows(
        self, origin: str, headers: Mapping[str, str], *, local: bool, secure: bool
    ) -> bool:
        if self._any_origin or any(pattern.fullmatch(origin) for pattern in self._origins):
            return True
        page = origin_of(origin)
        if page is None:
            return False
        scheme, name, _ = page
        if local and is_local(name):
            return True
        if secure and scheme != "https":
            return False  # where a proxy ends TLS without a header, the browser alone knows
        return origin_of(f"{scheme}://{headers.get('host', '').lower()}") == page
