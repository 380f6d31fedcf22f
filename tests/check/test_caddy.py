"""Checks through a real Caddy, in a right and in wrong configurations."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.check.conftest import BRIEF, PACE, Behind, checked
from tests.support.gateways import caddy
from wsserver.doctor import line
from wsserver.doctor.findings import Status

pytestmark = pytest.mark.slow

WRONG = {
    "no upgrade": ("header_up -Upgrade", "", {"upgrade"}, "remove `header_up -Upgrade`"),
    "another Host": ("header_up Host 127.0.0.1:1", "", {"origin"}, "remove `header_up Host …`"),
    "small bodies": (
        "",
        "request_body {\n max_size 64KB\n }",
        {"http"},
        "`request_body { max_size 2MB }`",
    ),
}


async def test_right_configuration_holds(behind: Behind, folder: Path) -> None:
    async with caddy(folder, behind.port) as url:
        found = await checked(url, behind.token)
    assert found.of(Status.OK) == found.findings.keys() - {"tls", "idle"}
    assert found.deployment.proxy == "caddy"


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_configuration_fails_with_setting(
    behind: Behind, folder: Path, wrong: str
) -> None:
    options, site, failing, setting = WRONG[wrong]
    async with caddy(folder, behind.port, options, site) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.failed() == failing, found.findings
    assert setting in found.mend(next(name for name in found.findings if name in failing))


async def test_buffered_stream_fails(behind: Behind, folder: Path) -> None:
    async with caddy(folder, behind.port, "buffer_responses", path="/api/*") as url:
        found = await checked(url, behind.token)
    assert found.failed() == {"sse"}, found.findings
    assert "remove `buffer_responses`" in found.mend("sse")


async def test_buffered_upgrade_and_stream_fail(
    behind: Behind, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a WebSocket to compare with, `start` that comes with the end shows the buffer."""
    monkeypatch.setattr(line, "OPEN_TIMEOUT", 1.0)
    async with caddy(folder, behind.port, "buffer_responses") as url:
        found = await checked(url, behind.token, replace(PACE, patience=1.5))
    assert found.failed() == {"upgrade", "sse"}, found.findings
    assert "`buffer_responses`" in found.mend("upgrade")
    assert found.deployment.proxy == "caddy"
