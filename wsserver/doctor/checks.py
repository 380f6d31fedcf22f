"""All checks, in their order. A check uses what earlier checks have learned of the deployment."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx2
from websockets.exceptions import InvalidHandshake

from wsserver.doctor import frames, handshakes, replies
from wsserver.doctor.deployment import Deployment
from wsserver.doctor.findings import Finding, Report, Status, failed, skipped
from wsserver.doctor.heard import Declined
from wsserver.doctor.line import Lost, Refused, describe

LONGEST_CHECK = 90.0  # seconds


@dataclass(frozen=True, slots=True)
class Check:
    """A function that checks, and the names of its findings.

    Attributes:
        run: reports the findings.
        names: names of the findings, in their order.
        missing: says what the check needs and the deployment has not; None if nothing is missing.
    """

    run: Callable[[Deployment, Report], Awaitable[None]]
    names: tuple[str, ...]
    missing: Callable[[Deployment], str | None] = lambda _: None


def _no_socket(deployment: Deployment) -> str | None:
    return None if deployment.upgrades else "needs the upgrade"


def _no_user(deployment: Deployment) -> str | None:
    if deployment.upgrades and deployment.admits is None:
        return "needs a valid token"
    return None


def _no_socket_of_user(deployment: Deployment) -> str | None:
    return _no_socket(deployment) or _no_user(deployment)


def _no_way(deployment: Deployment) -> str | None:
    if deployment.upgrades or deployment.chats:
        return _no_user(deployment)
    return "needs the upgrade, or chats over HTTP"


def _no_result(name: str, deployment: Deployment) -> str:
    """Say why a check that ran has no finding of this name."""
    if name.startswith("sse") and not deployment.chats:
        return "needs chats over HTTP"
    return _no_socket(deployment) or "needs the check before it"


CHECKS = (
    Check(handshakes.tls, ("tls",)),
    Check(handshakes.upgrade, ("upgrade",)),
    Check(handshakes.authentication, ("authentication",), _no_socket),
    Check(handshakes.origin, ("origin", "foreign_origin"), _no_socket),
    Check(handshakes.host, ("host",), _no_socket),
    Check(frames.ping, ("ping",), _no_socket),
    Check(frames.large_frame, ("large_frame",), _no_socket),
    Check(frames.close_code, ("close_code",), _no_socket),
    Check(replies.http, ("http",), _no_user),
    Check(replies.stream, ("tokens", "stop", "sse", "sse_resume"), _no_way),
    Check(replies.resume, ("resume",), _no_socket_of_user),
    Check(frames.idle, ("idle",), _no_socket_of_user),
)


async def check(deployment: Deployment, report: Report) -> None:
    """Check a deployment, and report one finding for each name in :data:`CHECKS`.

    Raises:
        Unreachable: nothing answers at the address.
    """
    deadline = time.monotonic() + deployment.pace.whole
    trusted = True

    def take(finding: Finding) -> None:
        nonlocal trusted
        trusted &= not (finding.check == "tls" and finding.status is Status.FAILED)
        names.remove(finding.check)
        report(finding)

    for one in CHECKS:
        names = list(one.names)
        left = deadline - time.monotonic()
        missing = one.missing(deployment) if trusted else "needs TLS"
        if missing is None and left <= 0:
            missing = "no time left"
        if missing is None:
            failure = await _run(one, deployment, take, min(left, LONGEST_CHECK))
            if failure is not None:
                take(failed(names[0], failure))
        for name in names:
            report(skipped(name, missing or _no_result(name, deployment)))


async def _run(one: Check, deployment: Deployment, report: Report, seconds: float) -> str | None:
    """Run a check; return why it could not finish, or None."""
    failure = None
    try:
        async with asyncio.timeout(seconds):
            await one.run(deployment, report)
    except Refused as refused:
        failure = f"another connection is refused: status {refused.response.status}"
    except Lost as lost:
        failure = f"the connection is cut: {lost}"
    except Declined as declined:
        failure = f"the server answers {declined}"
    except TimeoutError:
        failure = f"no end after {seconds:.0f} s"
    except httpx2.TransportError as error:
        failure = f"a request over HTTP fails: {str(error) or type(error).__name__}"
    except (httpx2.HTTPError, ValueError) as error:
        failure = f"the answer is not that of a wsserver: {str(error) or type(error).__name__}"
    except (InvalidHandshake, OSError) as error:
        failure = describe(error)
    return failure
