"""Admission: which connections the server accepts, and for which principal.

Every page in a browser can reach a server on the same machine, also through a name that an attacker
makes resolve to loopback. Admission therefore checks three headers before a WebSocket opens: `Host`
(RFC 9110 section 7.2), `Origin` (RFC 6454) and `Authorization` (RFC 6750). No page can forge them.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from wsserver.addresses import ip_address, networks
from wsserver.auth import ANONYMOUS, Authenticator, Handshake, Principal, Unavailable
from wsserver.denials import RETRY_AFTER, Denied, no_place, too_many, unauthenticated, unavailable
from wsserver.errors import Code, Refused
from wsserver.limits import Account, Shares, account_of
from wsserver.logs import log
from wsserver.names import Names
from wsserver.settings import Settings

_FORWARDED = re.compile(
    r"forwarded|x-forwarded-.*|via|x-real-ip|x-client-ip|true-client-ip|cf-connecting-ip"
)


class Admission:
    """The rules for connections, and the count of open ones.

    Args:
        settings: the hosts, origins, proxies and limits.
        authenticate: the authenticator; None where clients need no token.

    Raises:
        ConfigError: an item of `hosts`, `origins` or `proxies` is malformed.
    """

    def __init__(self, settings: Settings, authenticate: Authenticator | None) -> None:
        self.settings = settings
        self.names = Names(settings)  # the hosts, origins and proxies
        self.authenticate = authenticate
        # Whether only programs of this machine can reach the server. The server sets it once it
        # listens.
        self.loopback = True
        # Ids of the users whose programs are served without a token; None for all users of this
        # machine. The server sets it once it listens.
        self.users: frozenset[int] | None = None
        self.secure = False  # whether the server itself speaks TLS
        self.reloads = 0  # number of times that the credentials of clients were read again
        # Number of connections of each principal.
        self.principals = Shares(settings.connections_per_principal)
        # Number of connections of each address, and of the networks around it.
        self.addresses = Shares(settings.connections_per_address)
        self.connections = 0  # number of all connections, before and after their requests

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
        counted = (
            None if self.names.trusted(peer) else self.count(f"user {user}" if foreign else peer)
        )
        visitor = Visitor(self, peer, counted)
        visitor.spare = self.connections >= self.settings.connections
        visitor.user, visitor.foreign = user, foreign
        self.connections += 1
        return visitor

    def depart(self, visitor: "Visitor") -> None:
        """Forget a connection that has ended."""
        self.connections -= 1
        visitor.gone = True
        if visitor.counted is not None:
            self.addresses.release(visitor.counted)
            visitor.counted = None
        if visitor.shared is not None:
            self.principals.release(visitor.shared)
            visitor.shared = None

    def count(self, address: str) -> Account:
        """Count a connection of an address, and return the account that counts it.

        Raises:
            Denied: the address, or a network around it, has all the connections that it may have.
        """
        account = networks(address)
        if not self.addresses.acquire(account):
            raise too_many("address")
        return account


@dataclass(eq=False, slots=True)
class Visitor:
    """One connection as admission knows it, from accept to close."""

    _admission: Admission
    _peer: str
    counted: Account | None  # account of the address that counts the connection
    address: str = field(init=False)  # of the client; until the request has come, of the peer
    principal: Principal | None = None  # of the client; None before the client has authenticated
    shared: Account | None = None  # account of the principal that counts the connection
    scope: Mapping[str, Any] | None = None  # of ASGI, where a parent application has its user
    gone: bool = False  # the connection has ended, perhaps during the authentication
    spare: bool = False  # the connection has one of the places that are kept for probes
    user: int | None = None  # whose program has the other end, where `Admission.users` is set
    foreign: bool = False  # a program of another user, where `Admission.users` is set
    _handshake: Handshake | None = None
    _token: str | None = None

    def __post_init__(self) -> None:
        self.address = self._peer

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
        self.address = self._admission.names.client_address(self._peer, forwarded_for)
        if self.counted is None:
            self.counted = self._admission.count(self.address)

    def check_room(self) -> None:
        """Keep the spare places for requests of `/healthz` and `/readyz`.

        Raises:
            Denied: the connection has a spare place.
        """
        if self.spare:
            raise no_place()

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

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Check `Origin`; see :meth:`wsserver.names.Names.check_origin`.

        Raises:
            Denied: pages of the origin may not connect.
        """
        admission = self._admission
        # The nearest proxy appends the last item.
        proto = headers.get("x-forwarded-proto", "").rpartition(",")[2]
        forwarded_https = proto.strip().lower() == "https"
        secure = admission.secure or (forwarded_https and admission.names.trusted(self._peer))
        admission.names.check_origin(headers, local=self.local(headers), secure=secure)

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
        self.check_origin(headers)
        self.check_private(headers)
        if admission.authenticate is None:
            self.principal = ANONYMOUS
            return
        self._handshake = Handshake(self.address, path, headers, self.scope)
        token = bearer(headers)
        try:
            principal = await self._principal_of(token)
        except Unavailable:
            raise unavailable("unavailable", Code.AUTH_UNAVAILABLE.meaning) from None
        if principal is not None:
            if not self._act_for(principal, token):
                raise too_many("principal")
        elif token is not None or ("origin" not in headers and not self.local(headers)):
            raise unauthenticated()

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
                Code.LIMIT,
                "This principal already has its maximum number of sockets.",
                retry_after=RETRY_AFTER,
            )
        return principal

    async def is_still_valid(self) -> bool:
        """Check the token of the client again, and learn when the token expires.

        Returns:
            False if the token has become invalid, or belongs to another principal now.
        """
        if self._admission.authenticate is None or self.principal is None:
            return True
        token = self._token
        try:
            principal = await self._principal_of(token)
        except Unavailable:
            return True  # no authenticator has refused the token
        if self._token is not token:  # the client has sent another `auth` frame
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
                if (
                    self._admission.reloads == reloads
                ):  # else the old credentials may have been used
                    break
            if not isinstance(principal, Principal | None):
                raise TypeError("an authenticator returns a Principal or None")
        except Unavailable:
            raise
        except Exception as error:
            log.error("authenticator failed", failure=error)
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
            if not self._admission.principals.acquire(account):
                return False
            self.shared = account
        self.principal = principal
        self._token = token
        return True


def bearer(headers: Mapping[str, str]) -> str | None:
    """Return the token of ``Authorization: Bearer`` (RFC 6750 section 2.1)."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
