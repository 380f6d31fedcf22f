"""The door: which connections are let in, and as whom.

A server on one's own machine is reached by every page in the browser on it, and by every name that
an attacker makes lead there. So three things are looked at before a WebSocket begins: the name
under which the client believes to reach the server (Host), the page that asks (Origin, RFC 6454),
and for whom (RFC 6750). None of them can be forged by a page.
"""

import asyncio
import functools
import ipaddress
import re
import time
from collections.abc import Mapping
from http import HTTPStatus

from wsserver.auth import ANONYMOUS, Authenticator, Handshake, Principal, Unavailable
from wsserver.errors import Code, ConfigError, Refused
from wsserver.limits import Account, Shares, account_of
from wsserver.logs import log
from wsserver.settings import Settings
from wsserver.telemetry import Refusal

__all__ = ["Admission", "Denied", "Visitor", "networks", "no_memory"]

RETRY_AFTER = 10  # seconds after which a client that was one too many may try again
# Bits of an IPv6 address that one customer commonly gets: one network, a home, a site (RFC 6177).
IPV6_NETWORKS = (64, 56, 48)

LAST_PORT = 65_535

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_FORWARDED = re.compile(
    r"forwarded|x-forwarded-.*|via|x-real-ip|x-client-ip|true-client-ip|cf-connecting-ip"
)
_LABELS = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"  # of a name; those of other alphabets are in Punycode
_PORT = r"[0-9]{1,5}"
_ADDRESS = r"\[[0-9a-f:.]+\]"  # of IPv6
_HOST = re.compile(rf"(?P<name>{_ADDRESS}|{_LABELS})\.?(?::(?P<port>{_PORT}))?")
# As browsers serialise it: RFC 6454 section 6.2, URL standard section 4.7. No user, no path, no dot
# at the end of the host. Schemes other than these two have origins of their own kinds.
_ORIGIN = re.compile(
    rf"(?P<scheme>https?)://(?P<name>{_ADDRESS}|{_LABELS})(?::(?P<port>[1-9][0-9]{{0,4}}))?"
)
_OWN_SITE = (None, "same-origin", "none")  # of Sec-Fetch-Site, where there is no Origin


class Denied(Exception):
    """A connection is not let in.

    Attributes:
        status: of the HTTP response.
        why: for the log and the metrics.
        message: for people; what the client's side, or the operator, can do.
        headers: of the HTTP response.
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
    """Decides who comes in.

    Args:
        settings: the names, pages, proxies and limits that hold here.
        authenticate: what tells principals by their tokens; None where nobody is asked.

    Attributes:
        loopback: whether only this machine's programs can reach the server. Set when it listens.
        users: the ids of the users whose programs are served where nobody is asked who they are;
            None for all of this machine. Set when it listens.
        secure: whether the server speaks TLS itself.
        reloads: number of times that the credentials of clients were read again.

    Raises:
        ConfigError: a setting is not what it should be a list of.
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
        self._hosts = [_host_pattern(host) for host in settings.hosts]
        self._any_origin = "*" in settings.origins
        self._origins = [_origin_pattern(origin) for origin in settings.origins]
        self._proxies = [_network(name) for name in settings.proxies if name != "unix"]
        self._unix_proxy = "unix" in settings.proxies

    def arrive(self, peer: str, user: int | None = None) -> "Visitor":
        """Let a connection in for so long as its request takes.

        Args:
            peer: the address at its other end; ``unix`` at a unix socket.
            user: the id of the user whose program is there, where :attr:`users` matter.

        Raises:
            Denied: the address has as many as it may.
        """
        foreign = self.users is not None and user not in self.users
        # Of a proxy's client the address is still to come. Another user of this machine has the
        # same address, and takes no place from its own user.
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
        """Count a connection as one of an address; return the account that it is counted under.

        Raises:
            Denied: the address, or a network around it, has as many as it may.
        """
        account = networks(address)
        if not self._addresses.take(account):
            raise _too_many("address")
        return account

    def trusted(self, peer: str) -> bool:
        """Whether what a peer says of others is believed."""
        if peer == "unix":
            return self._unix_proxy
        if not self._proxies:
            return False
        address = _address(peer)
        return address is not None and any(address in network for network in self._proxies)

    def client_address(self, peer: str, forwarded_for: str) -> str:
        """Return the address of the client behind listed proxies.

        Each proxy appends who called it. From the right, the first that is not a listed proxy is
        the client; what stands left of it is that client's own claim.
        """
        if not self.trusted(peer):
            return peer
        found = peer
        for name in reversed([part.strip() for part in forwarded_for.split(",")]):
            match = _HOST.fullmatch(name.lower())  # some proxies tell the port too
            address = _address(match["name"] if match is not None else name)
            if address is None:
                break
            found = str(address)
            if not self.trusted(found):
                break
        return found

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Refuse names that an attacker may have made lead here (DNS rebinding).

        Raises:
            Denied: the server is not known by this name.
        """
        host = headers.get("host", "")
        match = _HOST.fullmatch(host.lower())
        name = "" if match is None else match["name"]
        if name and (_local(name) or _address(name) or name == self.settings.host.lower()):
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
        """Refuse pages that have no business here (cross-site WebSocket hijacking).

        Raises:
            Denied: the page's origin is another one and not listed, or is no origin, or the browser
                says of a request without Origin that it comes from another site.
        """
        origin = headers.get("origin")
        if origin is None:
            welcome = self._any_origin or headers.get("sec-fetch-site") in _OWN_SITE
        else:
            welcome = self._welcome(origin.lower(), headers, local=local, secure=secure)
        if not welcome:
            raise Denied(
                HTTPStatus.FORBIDDEN,
                "origin",
                "Pages of this origin may not connect. The server's operator can add it to the "
                "setting `origins` (WSSERVER_ORIGINS).",
            )

    def _welcome(
        self, origin: str, headers: Mapping[str, str], *, local: bool, secure: bool
    ) -> bool:
        if self._any_origin or any(pattern.fullmatch(origin) for pattern in self._origins):
            return True
        page = _ORIGIN.fullmatch(origin)
        if page is None or int(page["port"] or 0) > LAST_PORT:
            return False
        if local and _local(page["name"]):
            return True
        if secure and page["scheme"] != "https":
            return False  # where a proxy ends TLS without telling, only the browser knows
        own = _HOST.fullmatch(headers.get("host", "").lower())
        default = _DEFAULT_PORTS[page["scheme"]]
        return own is not None and (own["name"], int(own["port"] or default)) == (
            page["name"],
            int(page["port"] or default),
        )


class Visitor:
    """One connection, from its arrival to its end.

    Attributes:
        address: of the client; until its request is there, of the peer.
        principal: who it acts for; None as long as it has not said so.
        counted: the address, with its networks, that it is counted under.
        shared: the principal's account that it is counted under.
        spare: it has one of the places that are kept for probes.
        foreign: a program of another user of this machine, where users matter.
        gone: it has ended, perhaps while it was being found out who it is.
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
        """Whose limits count: the principal's, or the address's where nobody says who they are."""
        if self.principal is None or self.principal is ANONYMOUS:
            return networks(self.address)
        return account_of(self.principal.name)

    def introduce(self, headers: Mapping[str, str]) -> None:
        """Take the client's address from what a listed proxy says of it.

        Raises:
            Denied: that address has as many connections as it may.
        """
        forwarded_for = headers.get("x-forwarded-for", "")
        self.address = self._admission.client_address(self._peer, forwarded_for)
        if self.counted is None:
            self.counted = self._admission.count(self.address)

    def check_room(self) -> None:
        """Leave the spare places to those who only ask whether the server lives.

        Raises:
            Denied: it came when there were no others.
        """
        if self.spare:
            raise _full()

    def check_private(self, headers: Mapping[str, str]) -> None:
        """Keep strangers from a server that asks nobody who they are.

        Raises:
            Denied: it is one, and was not told to serve them.
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
        """Whether it is a program of this machine itself, and not somebody behind a proxy on it.

        Nor a program of another user, where users matter.

        A proxy that adds no header cannot be told from a program: no right to money or to what
        others say should hang on this alone where there may be one.
        """
        address = _address(self.address)
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
        # The last word is the nearest proxy's.
        told = headers.get("x-forwarded-proto", "").rpartition(",")[2]
        forwarded_https = told.strip().lower() == "https"
        secure = admission.secure or (forwarded_https and admission.trusted(self._peer))
        admission.check_origin(headers, local=local, secure=secure)
        self.check_private(headers)
        if admission.authenticate is None:
            self.principal = ANONYMOUS
            return
        self._handshake = Handshake(self.address, path, headers)
        token = bearer(headers)
        try:
            principal = await self._identify(token)
        except Unavailable:
            raise _later("unavailable", Code.AUTH_UNAVAILABLE.meaning) from None
        if principal is not None:
            if not self._become(principal, token):
                raise _too_many("principal")
        elif token is not None or ("origin" not in headers and not local):
            raise Denied(
                HTTPStatus.UNAUTHORIZED,
                "unauthenticated",
                "Send a valid token, as `Authorization: Bearer TOKEN`.",
                {"WWW-Authenticate": "Bearer"},
            )

    async def authenticate(self, token: str) -> Principal:
        """Say who it is, or once more before that expires; return who it is.

        Raises:
            Refused: the token is not good, or not now, or somebody else's than the one before.
        """
        if self._admission.authenticate is None:
            return ANONYMOUS
        try:
            principal = await self._identify(token)
        except Unavailable:
            raise Refused(Code.AUTH_UNAVAILABLE) from None
        if principal is None:
            log.info("token refused", address=self.address)
            raise Refused(Code.UNAUTHENTICATED)
        if self.principal is not None and principal.name != self.principal.name:
            raise Refused(
                Code.UNAUTHENTICATED, "This socket acts for another principal; open a new one."
            )
        if not self._become(principal, token):
            raise Refused(
                Code.LIMIT, "This principal has as many sockets as it may.", retry_after=RETRY_AFTER
            )
        return principal

    async def still_welcome(self) -> bool:
        """Whether who it is would be let in again now, with the same token; and until when."""
        if self._admission.authenticate is None or self.principal is None:
            return True
        token = self._token
        try:
            principal = await self._identify(token)
        except Unavailable:
            return True  # nobody has said no
        if self._token is not token:  # it has said it once more meanwhile
            return True
        if principal is None or principal.name != self.principal.name:
            return False
        self.principal = principal
        return True

    async def _identify(self, token: str | None) -> Principal | None:
        authenticate = self._admission.authenticate
        assert authenticate is not None
        assert self._handshake is not None
        try:
            while True:
                reloads = self._admission.reloads
                # Half of the time for a handshake, so that there is some left to answer in.
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
        # To be nobody is no name: what the anonymous have is not for one of them to take.
        return principal if principal is ANONYMOUS or principal.name != ANONYMOUS.name else None

    def _become(self, principal: Principal, token: str | None) -> bool:
        """Act for a principal from now on; False if that one has as many sockets as it may."""
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
    """Make the refusal of a request that there is no memory for."""
    return _later("limit", "This server has no memory left for this request.")


def _too_many(whose: str) -> Denied:
    return Denied(
        HTTPStatus.TOO_MANY_REQUESTS,
        "limit",
        f"This {whose} has as many connections as it may.",
        {"Retry-After": str(RETRY_AFTER)},
    )


@functools.lru_cache(1024)
def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache(1024)
def networks(address: str) -> Account:
    """Return whose limits an address counts for: its own, or those of the IPv6 networks around it.

    One customer has one IPv4 address, or a whole IPv6 network, whose size nobody tells.
    """
    known = _address(address)
    if not isinstance(known, ipaddress.IPv6Address):
        return (f"address {address if known is None else known}",)
    return tuple(
        f"address {ipaddress.IPv6Network((int(known), bits), strict=False)}"
        for bits in IPV6_NETWORKS
    )


def _local(name: str) -> bool:
    """Whether a host name always means the machine on which it is said (RFC 6761 section 6.3)."""
    name = name.rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def _network(name: str) -> _Network:
    try:
        return ipaddress.ip_network(name, strict=False)
    except ValueError:
        raise ConfigError(f"proxies: {name!r} is no address, network or `unix`") from None


def _host_pattern(text: str) -> re.Pattern[str]:
    if not re.fullmatch(rf"\*|(\*\.)?{_LABELS}", text.lower()):
        raise ConfigError(f"hosts: {text!r} is no host name, without a port, or `*.` and one")
    return re.compile(_wild(text.lower()))


def _origin_pattern(text: str) -> re.Pattern[str]:
    # A star elsewhere than before a whole name would let in names that anybody can register.
    name = rf"\*|(?:\*\.)?{_LABELS}|{_ADDRESS}"
    found = re.fullmatch(
        rf"\*|null|(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<name>{name})(?P<port>:(?:\*|{_PORT}))?",
        text.lower(),
    )
    if found is None:
        raise ConfigError(
            f"origins: {text!r} is no origin, such as https://example.com or https://*.example.com"
        )
    if found["name"] is None:
        return re.compile(_wild(text.lower()))
    port = ":" + _PORT if found["port"] == ":*" else re.escape(found["port"] or "")
    return re.compile(re.escape(found["scheme"]) + "://" + _wild(found["name"]) + port)


def _wild(name: str) -> str:
    """Make a regular expression of a name in which ``*`` stands for any labels."""
    return _LABELS.join(map(re.escape, name.split("*")))
