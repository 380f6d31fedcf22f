"""All checks, in their order. A check uses what earlier checks have learned of the deployment."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from wsserver.doctor import frames, handshakes, replies
from wsserver.doctor.deployment import Deployment
from wsserver.doctor.findings import Finding, Report, Status, failed, skipped
from wsserver.doctor.line import FAILURES, describe

LONGEST_CHECK = 90.0  # seconds


@dataclass(frozen=True, slots=True)
class Check:
    """A function that checks, and the names of its findings.

    Attributes:
        run: reports the findings.
        names: names of the findings, in their order.
        missing: says what the check needs and the deployment has not; None if nothing is missing.
        asks_model: whether the check waits for a model, which may be slow.
    """

    run: Callable[[Deployment, Report], Awaitable[None]]
    names: tuple[str, ...]
    missing: Callable[[Deployment], str | None] = lambda _: None
    asks_model: bool = False


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
    Check(replies.stream, ("tokens", "stop", "sse", "sse_resume"), _no_way, asks_model=True),
    Check(replies.resume, ("resume", "nodes"), _no_socket_of_user, asks_model=True),
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
        missing = one.missing(deployment) if trusted else "needs TLS"
        if missing is None and time.monotonic() < deadline:
            failure = await _run(one, deployment, take, deadline)
            if failure is not None:
                take(failed(names[0], failure))
        if missing is None:
            late = time.monotonic() >= deadline
            missing = "no time left" if late else "needs an earlier check to hold"
        for name in names:
            report(skipped(name, missing))


async def _run(one: Check, deployment: Deployment, report: Report, deadline: float) -> str | None:
    """Run a check until the deadline; return why it failed, or None."""
    failure = None
    seconds = min(deadline - time.monotonic(), deployment.pace.idle + LONGEST_CHECK)
    try:
        async with asyncio.timeout(seconds) as limit:
            await one.run(deployment, report)
    except TimeoutError as error:
        if not (one.asks_model and limit.expired()):  # else perhaps the model is slow
            failure = describe(error)
    except FAILURES as error:
        failure = describe(error)
    return failure
