"""Checks through a real HAProxy, in a right and in wrong configurations."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.check.conftest import BRIEF, PACE, Behind, checked
from tests.support.gateways import haproxy
from tests.support.tools import ROOT
from wsserver.doctor.findings import Status

pytestmark = pytest.mark.slow

IDLE = replace(PACE, idle=2.0)
BRIEF_IDLE = replace(BRIEF, idle=2.0)
WRONG = {
    "short tunnel": ("", "timeout tunnel 1s", {"idle"}, "`timeout tunnel 1h`"),
    "no upgrade": (
        "http-request del-header Upgrade",
        "",
        {"upgrade"},
        "remove `http-request del-header Upgrade`",
    ),
    "another Host": (
        "http-request set-header Host internal.example",
        "",
        {"upgrade", "http"},
        "remove `http-request set-header Host`",
    ),
}


async def test_lines_of_the_document_hold(behind: Behind, folder: Path) -> None:
    document = (ROOT / "examples/deploy/README.md").read_text()
    lines = document.partition("```\ndefaults\n")[2].partition("```")[0].splitlines()
    frontend = "\n".join(line for line in lines if "option" in line)
    backend = "\n".join(line for line in lines if "timeout" in line)
    async with haproxy(folder, behind.port, frontend, backend) as url:
        found = await checked(url, behind.token, IDLE)
    assert found.of(Status.OK) == found.findings.keys() - {"tls"}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_configuration_fails_with_setting(
    behind: Behind, folder: Path, wrong: str
) -> None:
    frontend, backend, failing, setting = WRONG[wrong]
    async with haproxy(folder, behind.port, frontend, backend) as url:
        found = await checked(url, behind.token, BRIEF_IDLE)
    assert found.failed() == failing, found.findings
    assert setting in found.mend(next(name for name in found.findings if name in failing))


async def test_missing_server_fails_with_setting(folder: Path) -> None:
    async with haproxy(folder, 1) as url:
        found = await checked(url, None, BRIEF)
    assert found.failed() == {"upgrade", "http"}
    assert "the `server` line must name" in found.mend("upgrade")
    assert found.deployment.proxy == "haproxy", "its own response has a known body"


async def test_delay_of_small_segments_is_warned_of(behind: Behind, folder: Path) -> None:
    """Without `option http-no-delay` the kernel waits for more data for 0.2 s (MSG_MORE)."""
    async with haproxy(folder, behind.port) as url:
        found = await checked(url, behind.token)
    assert found.of(Status.WARNING) == {"sse"}, found.findings
    assert "`option http-no-delay`" in found.mend("sse")
