"""Checks of an open WebSocket that need no reply of the model."""

import asyncio
import time

from wsserver.doctor import advice
from wsserver.doctor.deployment import Deployment
from wsserver.doctor.findings import Report, failed, ok, skipped, warning
from wsserver.doctor.line import Line, Lost
from wsserver.protocol import Close

MESSAGE_SIZE = 65_536  # bytes, if `hello` does not tell
LARGEST = 67_108_864  # bytes of a message that a check sends at most
EXPECTED_PING = 45.0  # seconds; the server pings after 20 s by default
NO_INSPECTION = "exclude this host from gateways and virus scanners that inspect WebSockets"


async def ping(deployment: Deployment, report: Report) -> None:
    """Check pings of WebSocket, and ``ping`` frames of the protocol."""
    async with deployment.line() as line:
        taken = await line.ping()
        await line.send({"type": "ping"})
        await line.next("pong")
        report(ok("ping", f"round trip of {taken * 1000:.1f} ms"))


async def large_frame(deployment: Deployment, report: Report) -> None:
    """Check that the largest message passes, by a ``ping`` filled up with spaces."""
    async with deployment.line() as line:
        size = _message_size(line)
        try:
            await line.send_text(b'{"type":"ping"' + b" " * (size - 15) + b"}")
            await line.next("pong")
        except Lost as lost:
            report(
                failed(
                    "large_frame",
                    f"a message of {size} bytes ends the connection: {lost}",
                    f"raise the proxy's limit for messages to {size} bytes, or lower the setting "
                    "`message_size` (WSSERVER_MESSAGE_SIZE)",
                )
            )
        else:
            report(ok("large_frame", f"a message of {size} bytes passes"))


def _message_size(line: Line) -> int:
    """Return the size of the largest message, in bytes.

    Raises:
        ValueError: the `hello` has no usable size.
    """
    limits = line.hello.get("limits", {})
    size = limits.get("message_size", MESSAGE_SIZE) if isinstance(limits, dict) else None
    if not (isinstance(size, int) and 0 < size <= LARGEST):
        raise ValueError("a `hello` without a usable `message_size`")
    return size


async def close_code(deployment: Deployment, report: Report) -> None:
    """Check that the client gets the close code of the server, by a message that is too big."""
    async with deployment.line() as line:
        size = _message_size(line)
        try:
            await line.send_text(b" " * (size + 1))
            await line.receive()
        except Lost as lost:
            if lost.code == Close.MESSAGE_TOO_BIG:
                report(ok("close_code", f"the client gets {lost.code}"))
                return
            seen = f"the server closes with 1009, and the client gets {lost}"
        else:
            seen = f"the server does not close after a message of {size + 1} bytes"
        mend = "clients cannot tell whether to connect again; " + NO_INSPECTION
        report(failed("close_code", seen, mend))


async def idle(deployment: Deployment, report: Report) -> None:
    """Check that a WebSocket without frames stays open, and that the server pings."""
    seconds = deployment.pace.idle
    if not seconds:
        report(skipped("idle", "takes more than a minute; not part of --quick"))
        return
    async with deployment.line() as line:
        began = time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await line.receive()
        except TimeoutError:
            pass
        except Lost as lost:
            taken = time.monotonic() - began
            report(
                failed(
                    "idle",
                    f"it ends after {taken:.1f} s without frames, {_pings(line.pings)}: {lost}",
                    *deployment.advise(advice.IDLE),
                )
            )
            return
        pings = line.pings
        await line.send({"type": "ping"})
        await line.next("pong")
    if pings or seconds < EXPECTED_PING:
        report(ok("idle", f"still open after {seconds:.0f} s without frames, {_pings(pings)}"))
    else:
        report(
            warning(
                "idle",
                f"still open after {seconds:.0f} s without frames, but no ping of the server came",
                "the setting `ping_interval` (WSSERVER_PING_INTERVAL): 20; " + NO_INSPECTION,
            )
        )


def _pings(count: int) -> str:
    return "with 1 ping" if count == 1 else f"with {count} pings"
