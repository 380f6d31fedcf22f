"""A server with a token, and checks of a deployment in front of it."""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import wsserver
from wsserver.auth import tokens
from wsserver.doctor.checks import check
from wsserver.doctor.deployment import Deployment, Pace
from wsserver.doctor.findings import Finding, Report, Status
from wsserver.doctor.line import parse_target
from wsserver.models.demo import Demo

Check = Callable[[Deployment, Report], Awaitable[None]]
PACE = Pace(patience=10.0, listening=1.0, idle=0.0, whole=float("inf"))
BRIEF = replace(PACE, listening=0.2)  # too short to judge how a reply flows
RATE = 40  # words per second of the model


@dataclass
class Checked:
    """The findings of all checks by name."""

    deployment: Deployment
    findings: dict[str, Finding]

    def report(self, finding: Finding) -> None:
        assert finding.check not in self.findings
        self.findings[finding.check] = finding

    def failed(self) -> set[str]:
        """Return the names of the checks that failed."""
        return self.of(Status.FAILED)

    def of(self, status: Status) -> set[str]:
        return {name for name, finding in self.findings.items() if finding.status is status}

    def mend(self, name: str) -> str:
        return "\n".join(self.findings[name].mend)


async def checked(url: str, token: str | None, pace: Pace = PACE) -> Checked:
    """Check a deployment."""
    found = Checked(Deployment(parse_target(url), token, pace), {})
    await check(found.deployment, found.report)
    return found


async def checked_replies(url: str, token: str, run: Check) -> Checked:
    """Run one check of the replies of a deployment."""
    found = Checked(Deployment(parse_target(url), token, PACE), {})
    found.deployment.upgrades = found.deployment.chats = True
    found.deployment.admits = "header"
    await run(found.deployment, found.report)
    return found


@dataclass
class Behind:
    """A server and a valid token."""

    server: wsserver.Server
    token: str

    @property
    def port(self) -> int:
        return self.server.port


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ws-") as name:
        yield Path(name)


@pytest.fixture
async def behind(tmp_path: Path) -> AsyncIterator[Behind]:
    token, line = tokens.new("alice")
    tokens.add(tmp_path / "tokens", line)
    async with wsserver.serve(
        Demo(RATE), port=0, drain_timeout=0, token_file=str(tmp_path / "tokens")
    ) as server:
        yield Behind(server, token)
