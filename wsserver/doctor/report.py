"""``wsserver check``: runs the checks and prints their findings."""

import asyncio
import logging
import os
import sys
import time
from dataclasses import asdict, replace
from json import dumps

from wsserver.doctor import advice
from wsserver.doctor.checks import check
from wsserver.doctor.deployment import QUICK, THOROUGH, Deployment
from wsserver.doctor.findings import Finding, Status
from wsserver.doctor.handshakes import Unreachable
from wsserver.doctor.line import parse_target
from wsserver.errors import ConfigError
from wsserver.settings import CHAT_TOKEN

HOLDS, FAILS, INTERRUPTED = 0, 1, 130
NAME_WIDTH, STATUS_WIDTH = 16, 8  # columns, with a space at the end
COLOURS = {Status.OK: "32", Status.WARNING: "33", Status.FAILED: "31", Status.SKIPPED: "2"}
"""Of the results (ECMA-48, "Select graphic rendition")."""


def run(url: str, *, token: str | None, quick: bool, json: bool, idle: float | None) -> int:
    """Check a deployment and print what was found; return the exit code.

    Args:
        url: address of the deployment.
        token: bearer token. Default: that of the environment.
        quick: take less than 10 s.
        json: print one JSON object instead of lines for people.
        idle: seconds for the check of an idle connection. Default: those of the pace.

    Returns:
        0 if no check failed, 1 if one did, 130 after Ctrl-C.

    Raises:
        ConfigError: the address is malformed, or nothing answers there.
    """
    target = parse_target(url)
    pace = QUICK if quick else THOROUGH
    if idle is not None:
        pace = replace(pace, idle=idle, whole=pace.whole + idle)
    token = token or os.environ.get(CHAT_TOKEN) or None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ConfigError("the token has characters that are not allowed")
    deployment = Deployment(target, token, pace)
    logging.getLogger().addHandler(logging.NullHandler())  # no line of a library among the findings
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    began, findings = time.monotonic(), list[Finding]()

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not json:
            _print("\n".join(to_lines(finding, colour=colour)))

    try:
        asyncio.run(check(deployment, report))
        if json:
            _print(to_json(deployment, findings, time.monotonic() - began))
        else:
            _print(f"\n{summary(findings)}")
    except Unreachable as error:
        raise ConfigError(f"no check of {target.websocket}: {error}") from error
    except KeyboardInterrupt:
        return INTERRUPTED
    except _NotPrinted:  # the flush of Python at its exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILS
    return FAILS if any(finding.status is Status.FAILED for finding in findings) else HOLDS


class _NotPrinted(Exception):
    """The reader has closed the pipe, or a disk is full. No check takes this for its failure."""


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        raise _NotPrinted from error


def summary(findings: list[Finding]) -> str:
    """Return the numbers of findings by result, in one line."""
    counts = {status: sum(f.status is status for f in findings) for status in Status}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def to_lines(finding: Finding, *, colour: bool) -> list[str]:
    """Return a finding as lines for people: one, and one for each line of advice."""
    status, name = f"{finding.status:{STATUS_WIDTH}}", finding.check.replace("_", " ")
    if colour:
        status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
    margin = " " * STATUS_WIDTH
    lines = [f"{status}{name:{NAME_WIDTH}}{_escape(finding.seen)}"]
    return lines + [f"{margin}→ {_escape(mend)}" for mend in finding.mend]


def _escape(text: str) -> str:
    # The answer of a proxy may have control characters that a terminal would execute.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def to_json(deployment: Deployment, findings: list[Finding], seconds: float) -> str:
    """Return all findings as one JSON object."""
    proxy = deployment.proxy
    found = {
        "url": deployment.target.websocket,
        "ok": all(finding.status is not Status.FAILED for finding in findings),
        "proxy": None if proxy is None else advice.NAMES[proxy],
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in findings],
    }
    return dumps(found, indent=2, ensure_ascii=False)
