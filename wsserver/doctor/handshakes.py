"""Checks of the way in: TLS, the upgrade, authentication, origins and hosts."""

import asyncio
import contextlib
import ssl
import time
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

import httpx2
from websockets.exceptions import InvalidHandshake

from wsserver.addresses import is_local
from wsserver.doctor import advice
from wsserver.doctor.deployment import Deployment, fetch
from wsserver.doctor.findings import Finding, Report, failed, ok, skipped, warning
from wsserver.doctor.line import OPEN_TIMEOUT, Line, Lost, Refused, Response, describe
from wsserver.protocol import SUBPROTOCOL

SOON = 14  # days; a certificate that is not renewed by then is probably not renewed at all
DAY = 86_400  # seconds
STRANGER = "wsserver-check.invalid"  # a name that nobody has (RFC 6761 section 6.4)
WRONG = {"Authorization": "Bearer wsserver-check-wrong-token"}
CERTIFICATES = {
    "expired": "renew the certificate, and reload the proxy afterwards",
    "mismatch": "a certificate for this host name",
    "self-signed": "a certificate of a public authority; for one of your own set SSL_CERT_FILE",
    "local issuer": "the whole chain: `fullchain.pem` instead of `cert.pem`",
}
"""What mends a certificate, by a part of the message of OpenSSL."""

NO_TOKEN = "Send a valid token"  # noqa: S105 - a message
PLAIN = "the server got a request without an upgrade"
BODIES: tuple[tuple[str, str, advice.Advice], ...] = (
    ("This address speaks WebSocket", PLAIN, advice.UPGRADE),
    ("Failed to open a WebSocket connection", PLAIN, advice.UPGRADE),
    ("<title>wsserver</title>", PLAIN, advice.UPGRADE),
    (
        "The plain HTTP request was sent to HTTPS port",
        "this port is for TLS",
        advice.SCHEME,
    ),
    (
        "This server is not known by this name",
        "the server does not know the Host that the proxy sends",
        advice.HOST,
    ),
    (
        "This server is for its own user",
        "a server without tokens admits nobody through a proxy",
        advice.ANONYMOUS,
    ),
    (
        "its maximum number of connections",
        "the server has no place for another connection",
        advice.FULL,
    ),
)
"""What a response of the server means: a part of its body, the meaning, and the advice."""

NOT_FOUND = "Not found\n"  # the body of the server
UPSTREAM = "the proxy does not reach the server", advice.UPSTREAM
REFUSED = "the proxy refuses the request", advice.REFUSED
STATUSES = {502: UPSTREAM, 503: UPSTREAM, 504: UPSTREAM, 401: REFUSED, 403: REFUSED, 429: REFUSED}
"""What a response of another program means, by its status."""


class Unreachable(Exception):
    """Nothing can be checked: nothing answers at the address."""


async def tls(deployment: Deployment, report: Report) -> None:
    """Check the certificate and the version of TLS."""
    target = deployment.target
    if not target.secure:
        if is_local(target.host):
            report(skipped("tls", "not needed on this machine"))
        else:
            report(
                warning(
                    "tls",
                    "without TLS everybody on the way can read tokens and prompts",
                    "end TLS in the proxy, and use an address that begins with wss://",
                )
            )
        return
    writer = None
    try:
        port = urlsplit(target.origin).port or 443
        async with asyncio.timeout(OPEN_TIMEOUT):
            _, writer = await asyncio.open_connection(
                target.host, port, ssl=deployment.context, server_hostname=target.host
            )
        report(_certificate(writer.get_extra_info("ssl_object")))
    except ssl.SSLError as error:
        report(failed("tls", describe(error), *_mend_tls(deployment, error)))
    except (OSError, TimeoutError) as error:  # perhaps there is a way through a proxy
        report(skipped("tls", describe(error)))
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _certificate(connection: ssl.SSLObject) -> Finding:
    until = str((connection.getpeercert() or {}).get("notAfter", ""))
    days = int((ssl.cert_time_to_seconds(until) - time.time()) // DAY)
    seen = f"{connection.version()}; the certificate is valid for {days} more days"
    if days < SOON:
        return warning("tls", seen, CERTIFICATES["expired"])
    return ok("tls", seen)


def _mend_tls(deployment: Deployment, error: ssl.SSLError) -> tuple[str, ...]:
    text = str(error).lower().replace("_", " ")
    if "no application protocol" in text:
        return deployment.advise(advice.HTTP2)
    return tuple(mend for sign, mend in CERTIFICATES.items() if sign in text)


async def upgrade(deployment: Deployment, report: Report) -> None:
    """Check that a WebSocket handshake reaches the server.

    Raises:
        Unreachable: nothing answers at the address.
    """
    began = time.monotonic()
    try:
        async with deployment.dial(deployment.bearer) as line:
            taken = time.monotonic() - began
            deployment.notice(line.response)
            report(await _greeting(deployment, line, taken))
    except Refused as refused:
        response = refused.response
        deployment.notice(response)
        if NO_TOKEN in response.body:
            deployment.upgrades = True
            report(ok("upgrade", "the handshake reaches the server, which wants a token"))
        else:
            report(await _refusal(deployment, response))
    except InvalidHandshake as error:
        report(failed("upgrade", describe(error), *deployment.advise(advice.UPGRADE)))
    except (OSError, TimeoutError) as error:
        if not await _is_alive(deployment):
            raise Unreachable(describe(error)) from error
        seen = f"plain requests reach the server, but for an upgrade {describe(error)}"
        report(failed("upgrade", seen, *deployment.advise(advice.UPGRADE)))


async def _greeting(deployment: Deployment, line: Line, taken: float) -> Finding:
    if line.subprotocol == SUBPROTOCOL:
        deployment.upgrades = True
        return ok("upgrade", f"the WebSocket opens after {taken * 1000:.0f} ms ({SUBPROTOCOL})")
    try:
        async with asyncio.timeout(OPEN_TIMEOUT):
            await line.send({"type": "ping"})
            await line.next("pong")
    except (Lost, TimeoutError, ValueError):
        return failed(
            "upgrade",
            "a WebSocket opens, but no wsserver answers on it",
            "check the address: another program is behind it",
        )
    deployment.upgrades = True
    return warning(
        "upgrade",
        "the header Sec-WebSocket-Protocol does not pass, so the server sends no `hello`",
        "let the proxy pass Sec-WebSocket-Protocol in both directions",
    )


async def _refusal(deployment: Deployment, response: Response) -> Finding:
    """Say what a response to the handshake means."""
    status, body = response.status, response.body
    if (finding := redirected("upgrade", deployment, response)) is not None:
        return finding
    own = next((found[1:] for found in BODIES if found[0] in body), None)
    if own is not None:
        meaning, trouble = own
    elif status == HTTPStatus.NOT_FOUND and body == NOT_FOUND:
        meaning, trouble = "the server has no such path as the proxy sends", advice.PREFIX
    elif status in STATUSES and STATUSES[status] is UPSTREAM:
        meaning, trouble = UPSTREAM
    elif await _is_alive(deployment):
        meaning, trouble = "plain requests reach the server, upgrades do not", advice.UPGRADE
    else:
        meaning, trouble = STATUSES.get(status, ("no wsserver answers here", advice.ROUTE))
    return failed("upgrade", f"status {status}: {meaning}", *deployment.advise(trouble))


def redirected(check: str, deployment: Deployment, response: Response) -> Finding | None:
    """Return the finding for a redirect; None for another response."""
    if not HTTPStatus.MULTIPLE_CHOICES <= response.status < HTTPStatus.BAD_REQUEST:
        return None
    to = urljoin(deployment.target.http + "/", response.headers.get("location", ""))
    return failed(
        check,
        f"status {response.status}: a redirect to {to!r}",
        "use the address that the redirect leads to: browsers follow none in a handshake",
    )


async def _is_alive(deployment: Deployment) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        async with deployment.client() as client:
            found = await fetch(client, "GET", "/healthz")
            deployment.notice(found)
            return found.status == HTTPStatus.OK and found.body == "ok\n"
    return False


async def authentication(deployment: Deployment, report: Report) -> None:
    """Check that the server admits the user, and nobody without a token."""
    check = "authentication"
    stranger = await _principal(deployment, {})
    if stranger is not None:
        deployment.admits = "anyone"
        if deployment.token is not None:
            known = await _principal(deployment, deployment.bearer)
            deployment.admits = None if known is None else "header"
        if is_local(deployment.target.host):
            report(ok(check, "the server admits programs of this machine without a token"))
        else:
            report(
                warning(
                    check,
                    "the server admits everybody, without a token",
                    "`wsserver token new NAME --file FILE`, and the setting `token_file`",
                )
            )
        return
    if await _principal(deployment, WRONG) is not None:
        report(failed(check, "the server admits a wrong token", "look at the authenticator"))
    elif deployment.token is None:
        report(
            failed(
                check,
                "the server wants a token, and the check has none",
                "set WSSERVER_CHAT_TOKEN to a token",
            )
        )
    elif await _principal(deployment, deployment.bearer) is not None:
        deployment.admits = "header"
        report(ok(check, "the token is valid; no token and a wrong token are refused"))
    elif await _admits_frame(deployment):
        deployment.admits = "frame"
        report(
            failed(
                check,
                "the token is valid, but the header Authorization does not reach the server",
                *deployment.advise(advice.AUTHORIZATION),
            )
        )
    else:
        report(
            failed(
                check,
                "the server refuses the token",
                "a new token: `wsserver token new NAME --file FILE`, then SIGHUP to the server",
            )
        )


async def _principal(deployment: Deployment, headers: dict[str, str]) -> str | None:
    """Return the principal of a client with these headers; None if it has to authenticate."""
    try:
        async with deployment.dial(headers) as line:
            if line.hello.get("auth"):
                return None
            return str(line.hello.get("principal", ""))
    except Refused as refused:
        if refused.response.status == HTTPStatus.UNAUTHORIZED:
            return None
        raise


async def _admits_frame(deployment: Deployment) -> bool:
    try:
        async with deployment.dial(origin=deployment.target.origin) as line:
            await line.send({"type": "auth", "token": deployment.token})
            answer = await line.next("authenticated", "error")
            return bool(answer["type"] == "authenticated")
    except (Refused, Lost):
        return False


async def origin(deployment: Deployment, report: Report) -> None:
    """Check that pages of the deployment may connect, and pages of other sites may not."""
    own = deployment.target.origin
    try:
        async with deployment.dial(deployment.credentials, origin=own):
            report(ok("origin", f"pages of {own} may connect"))
    except Refused as refused:
        status = refused.response.status
        # A page may connect without a token: the server takes the client for a program.
        lost = status == HTTPStatus.UNAUTHORIZED
        mend = deployment.advise(advice.ORIGIN if lost else advice.HOST)
        report(failed("origin", f"status {status}: pages of {own} may not connect", *mend))
    mend = deployment.advise(advice.ORIGIN)
    seen = "pages of any site may connect with the rights of their visitor"
    admitted = warning("foreign_origin", seen, *mend)
    try:
        async with deployment.dial(deployment.credentials, origin=f"https://{STRANGER}"):
            report(admitted)
    except Refused as refused:
        status = refused.response.status
        if status == HTTPStatus.UNAUTHORIZED:
            report(admitted)
        else:
            report(ok("foreign_origin", f"pages of other sites are refused ({status})"))


async def host(deployment: Deployment, report: Report) -> None:
    """Check that the server does not answer to names of others (DNS rebinding)."""
    mend = deployment.advise(advice.ANY_HOST)
    admitted = warning("host", "the server answers to every host name", *mend)
    try:
        async with deployment.dial(deployment.credentials, host=STRANGER):
            report(admitted)
    except Refused as refused:
        status = refused.response.status
        if status == HTTPStatus.UNAUTHORIZED:  # the server checks the host before the token
            report(admitted)
        else:
            report(ok("host", f"other host names are refused ({status})"))
    except (InvalidHandshake, OSError, TimeoutError):
        report(ok("host", "other host names get no answer"))
