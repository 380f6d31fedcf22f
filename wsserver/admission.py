"""Admission: which connections the server accepts, and for which principal.

Every page in a browser can reach a server on the same machine, also through a name that an attacker
makes resolve to loopback. Admission therefore checks three headers before a WebSocket opens: `Host`
(RFC 9110 section 7.2), `Origin` (RFC 6454) and `Authorization` (RFC 6750). No page can forge them.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from http import HTTPStatus

from wsserver.addresses import (
    HOST,
    host_pattern,
    ip_address,
    is_local,
    network,
    networks,
    origin_of,
    origin_pattern,
)
from wsserver.auth import ANONYMOUS, Authenticator, Handshake, Principal, Unavailable
from wsserver.errors import Code, Refused
from wsserver.limits import Account, Shares, account_of
from wsserver.logs import log
from wsserver.settings import Settings
from wsserver.telemetry import Refusal

__all__ = ["Admission", "Denied", "Visitor", "bearer", "no_memory"]

RETRY_AFTER = 10  # seconds until a client over a limit may connect again
_FORWARDED = re.compile(
    r"forwarded|x-forwarded-.*|via|x-real-ip|x-client-ip|true-client-ip|cf-connecting-ip"
)
_OWN_SITE = (None, "same-origin", "none")  # of Sec-Fetch-Site, where there is no Origin


class Denied(Exception):
    """The server refuses a connection.

    Attributes:
        status: status of the HTTP response.
        why: reason in the log and the metrics.
        message: text for people: what the client or the operator can do.
        headers: headers of the HTTP response.
    """

    def __init__(
        self,
        status: HTTPStatus,
        why: Refusal,
        message: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.why = why
        self.message = message
        self.headers = headers or {}


class Admission:
    """The rules for connections, and the count of open ones.

    Args:
        settings: the hosts, origins, proxies and limits.
        authenticate: the authenticator; None where clients need no token.

    Attributes:
        loopback: whether only programs of this machine can reach the server. The server sets it
            once it listens.
        users: ids of the users whose programs are served without a token; None for all users of
            this machine. The server sets it once it listens.
        secure: whether the server itself speaks TLS.
        reloads: number of times that the credentials of clients were read again.

    Raises:
        ConfigError: an item of `hosts`, `origins` or `proxies` is malformed.
    """

    def __init__(self, settings: Settings, authenticate: Authenticator | None) -> None:
        self.settings = settings
        self.authenticate = authenticate
        self.loopback = True
        self.users: frozenset[int] | None = None
        self.secure = False
        self.reloads = 0
        self.principals = Shares(settings.connections_per_principal)  # their connections
        self._addresses = Shares(settings.connections_per_address)
        self._open = 0
        self._hosts = [host_pattern(host) for host in settings.hosts]
        self._any_origin = "*" in settings.origins
        self._origins = [origin_pattern(origin) for origin in settings.origins]
        self._proxies = [network(name) for name in settings.proxies if name != "unix"]
        self._unix_proxy = "unix" in settings.proxies

    def arrive(self, peer: str, user: int | None = None) -> "Visitor":
        """Accept a connection until its request has come.

        Args:
            peer: address of the other end of the connection; ``unix`` for a unix socket.
            user: id of the user whose program has the other end, where :attr:`users` is set.

        Raises:
            Denied: the address has all the connections that it may have.
        """
        foreign = self.users is not None and user not in self.users
        # A header of the request has the address of a proxy's client. Another user of this machine
        # has the same address, and a count of its own.
        counted = None if self.trusted(peer) else self.count(f"user {user}" if foreign else peer)
        visitor = Visitor(self, peer, counted)
        visitor.spare = self._open >= self.settings.connections
        visitor.foreign = foreign
        self._open += 1
        return visitor

    def depart(self, visitor: "Visitor") -> None:
        """Forget a connection that has ended."""
        self._open -= 1
        visitor.gone = True
        if visitor.counted is not None:
            self._addresses.give(visitor.counted)
            visitor.counted = None
        if visitor.shared is not None:
            self.principals.give(visitor.shared)
            visitor.shared = None

    def count(self, address: str) -> Account:
        """Count a connection of an address, and return the account that counts it.

        Raises:
            Denied: the address, or a network around it, has all the connections that it may have.
        """
        account = networks(address)
        if not self._addresses.take(account):
            raise _too_many("address")
        return account

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
            Denied: the host is no name of this server.
        """
        host = headers.get("host", "")
        match = HOST.fullmatch(host.lower())
        name = "" if match is None else match["name"]
        if name and (is_local(name) or ip_address(name) or name == self.settings.host.lower()):
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


class Visitor:
    """One connection as admission knows it, from accept to close.

    Attributes:
        address: address of the client; until the request has come, address of the peer.
        principal: principal of the client; None before the client has authenticated.
        counted: account of the address that counts the connection.
        shared: account of the principal that counts the connection.
        spare: the connection has one of the places that are kept for probes.
        foreign: the client is a program of another user, where :attr:`Admission.users` is set.
        gone: the connection has ended, perhaps during the authentication.
    """

    __slots__ = (
        "_admission",
        "_handshake",
        "_peer",
        "_token",
        "address",
        "counted",
        "foreign",
        "gone",
        "principal",
        "shared",
        "spare",
    )

    def __init__(self, admission: Admission, peer: str, counted: Account | None) -> None:
        self._admission = admission
        self._peer = peer
        self._handshake: Handshake | None = None
        self._token: str | None = None
        self.address = peer
        self.principal: Principal | None = None
        self.counted = counted
        self.shared: Account | None = None
        self.gone = False
        self.spare = False
        self.foreign = False

    @property
    def account(self) -> Account:
        """The account whose limits hold: of the principal, or of an anonymous client's address."""
        if self.principal is None or self.principal is ANONYMOUS:
            return networks(self.address)
        return account_of(self.principal.name)

    def introduce(self, headers: Mapping[str, str]) -> None:
        """Set the address of a client behind a listed proxy from `X-Forwarded-For`.

        Raises:
            Denied: the address has all the connections that it may have.
        """
        forwarded_for = headers.get("x-forwarded-for", "")
        self.address = self._admission.client_address(self._peer, forwarded_for)
        if self.counted is None:
            self.counted = self._admission.count(self.address)

    def check_room(self) -> None:
        """Keep the spare places for requests of `/healthz` and `/readyz`.

        Raises:
            Denied: the connection has a spare place.
        """
        if self.spare:
            raise _full()

    def check_private(self, headers: Mapping[str, str]) -> None:
        """Check that a server without tokens serves programs of its own user alone.

        Raises:
            Denied: the server has no tokens, the client is not local, and `allow_anonymous` is off.
        """
        admission = self._admission
        asks = admission.authenticate is not None or admission.settings.allow_anonymous
        if not (asks or self.local(headers)):
            raise Denied(
                HTTPStatus.FORBIDDEN,
                "unauthenticated",
                "This server is for its own user on its own machine alone; this came from another "
                "user, or through a proxy. Its operator can give out tokens, or set "
                "allow_anonymous.",
            )

    def local(self, headers: Mapping[str, str]) -> bool:
        """Whether the client is a program of this machine, and of its user where users are known.

        A client behind a proxy on this machine is not local. A proxy that adds no header looks like
        a program: where there may be one, this alone must give no right to spend or to read.
        """
        address = ip_address(self.address)
        return (
            self._admission.loopback
            and not self.foreign
            and address is not None
            and address.is_loopback
            and not any(map(_FORWARDED.fullmatch, headers))
        )

    async def check_admission(self, path: str, headers: Mapping[str, str]) -> None:
        """Check whether the client may open a WebSocket.

        The client may still have to authenticate, by an ``auth`` frame.

        Args:
            path: of the request, with its query.
            headers: of the request, names in lower case.

        Raises:
            Denied: the client may not.
        """
        admission = self._admission
        local = self.local(headers)
        # The nearest proxy appends the last item.
        proto = headers.get("x-forwarded-proto", "").rpartition(",")[2]
        forwarded_https = proto.strip().lower() == "https"
        secure = admission.secure or (forwarded_https and admission.trusted(self._peer))
        admission.check_origin(headers, local=local, secure=secure)
        self.check_private(headers)
        if admission.authenticate is None:
            self.principal = ANONYMOUS
            return
        self._handshake = Handshake(self.address, path, headers)
        token = bearer(headers)
        try:
            principal = await self._principal_of(token)
        except Unavailable:
            raise _later("unavailable", Code.AUTH_UNAVAILABLE.meaning) from None
        if principal is not None:
            if not self._act_for(principal, token):
                raise _too_many("principal")
        elif token is not None or ("origin" not in headers and not local):
            raise Denied(
                HTTPStatus.UNAUTHORIZED,
                "unauthenticated",
                "Send a valid token, as `Authorization: Bearer TOKEN`.",
                {"WWW-Authenticate": "Bearer"},
            )

    async def authenticate(self, token: str) -> Principal:
        """Authenticate the client by a token, also again before the first token expires.

        Raises:
            Refused: the token is not valid or cannot be checked now, or it belongs to another
                principal than the token before.
        """
        if self._admission.authenticate is None:
            return ANONYMOUS
        try:
            principal = await self._principal_of(token)
        except Unavailable:
            raise Refused(Code.AUTH_UNAVAILABLE) from None
        if principal is None:
            log.info("token refused", address=self.address)
            raise Refused(Code.UNAUTHENTICATED)
        if self.principal is not None and principal.name != self.principal.name:
            raise Refused(
                Code.UNAUTHENTICATED, "This socket acts for another principal; open a new one."
            )
        if not self._act_for(principal, token):
            raise Refused(
                Code.LIMIT, "This principal has as many sockets as it may.", retry_after=RETRY_AFTER
            )
        return principal

    async def is_still_valid(self) -> bool:
        """Check the token of the client again, and learn when the token expires.

        Returns:
            False if the token is not valid any more, or belongs to another principal now.
        """
        if self._admission.authenticate is None or self.principal is None:
            return True
        token = self._token
        try:
            principal = await self._principal_of(token)
        except Unavailable:
            return True  # no authenticator has refused the token
        if self._token is not token:  # the client has authenticated again meanwhile
            return True
        if principal is None or principal.name != self.principal.name:
            return False
        self.principal = principal
        return True

    async def _principal_of(self, token: str | None) -> Principal | None:
        authenticate = self._admission.authenticate
        assert authenticate is not None
        assert self._handshake is not None
        try:
            while True:
                reloads = self._admission.reloads
                # Half of the time for a handshake leaves time for the answer.
                async with asyncio.timeout(self._admission.settings.open_timeout / 2):
                    principal = await authenticate(token, self._handshake)
                if self._admission.reloads == reloads:  # else the old credentials may have decided
                    break
            if not isinstance(principal, Principal | None):
                raise TypeError("an authenticator returns a Principal or None")
        except Unavailable:
            raise
        except Exception as error:
            log.error("the authenticator failed", failure=error)
            raise Unavailable from error
        if principal is None:
            return None
        if principal.expires is not None and principal.expires <= time.time():
            return None
        # A principal with the name of anonymous clients would own what they all have.
        return principal if principal is ANONYMOUS or principal.name != ANONYMOUS.name else None

    def _act_for(self, principal: Principal, token: str | None) -> bool:
        """Set the principal; return False if the principal has all the sockets that it may have."""
        if self.shared is None and not self.gone and principal is not ANONYMOUS:
            account = account_of(principal.name)
            if not self._admission.principals.take(account):
                return False
            self.shared = account
        self.principal = principal
        self._token = token
        return True


def bearer(headers: Mapping[str, str]) -> str | None:
    """Return the token of ``Authorization: Bearer`` (RFC 6750 section 2.1)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _later(why: Refusal, message: str) -> Denied:
    headers = {"Retry-After": str(RETRY_AFTER)}
    return Denied(HTTPStatus.SERVICE_UNAVAILABLE, why, message, headers)


def _full() -> Denied:
    return _later("limit", "This server has as many connections as it may.")


def no_memory() -> Denied:
    """Return the refusal of a request for which no memory is left."""
    return _later("limit", "This server has no memory left for this request.")


def _too_many(whose: str) -> Denied:
    return Denied(
        HTTPStatus.TOO_MANY_REQUESTS,
        "limit",
        f"This {whose} has as many connections as it may.",
        {"Retry-After": str(RETRY_AFTER)},
    )
