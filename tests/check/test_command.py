"""``wsserver check`` as a user runs it."""

import asyncio
import json
import os
import signal
import socket
import sys

import pytest

import wsserver
from tests.check.conftest import RATE, Behind
from tests.support.process import Process, run
from tests.support.tools import ROOT
from wsserver.doctor.checks import CHECKS
from wsserver.doctor.findings import Status, failed, ok
from wsserver.doctor.report import summary, to_lines
from wsserver.models.demo import Demo

pytestmark = pytest.mark.slow

DOCUMENT = (ROOT / "examples/deploy/README.md").read_text()
CHECK = ("-m", "wsserver", "check")
NAMES = [name for one in CHECKS for name in one.names]


async def test_quick_check_takes_less_than_ten_seconds_and_shows_no_token(behind: Behind) -> None:
    async with run(
        *CHECK, behind.server.url, "--quick", WSSERVER_CHAT_TOKEN=behind.token
    ) as process:
        assert await process.end() == 0, process.output
    lines = process.output.splitlines()
    assert [line[8:24].strip().replace(" ", "_") for line in lines[:-2]] == NAMES
    assert lines[-1] == "15 ok, 2 skipped"
    assert behind.token not in process.output
    assert "\033" not in process.output, "colours are for terminals"


async def test_json_has_documented_keys(behind: Behind) -> None:
    async with run(
        *CHECK, behind.server.url, "--quick", "--json", WSSERVER_CHAT_TOKEN="wrong"
    ) as process:
        assert await process.end() == 1
    found = json.loads(process.output)
    assert found.keys() == {"url", "ok", "proxy", "seconds", "findings"}
    assert (found["url"], found["ok"], found["proxy"]) == (behind.server.url, False, None)
    assert found["seconds"] < 10
    assert [finding["check"] for finding in found["findings"]] == NAMES
    for finding in found["findings"]:
        assert finding.keys() == {"check", "status", "seen", "mend"}
        assert finding["status"] in {*Status}


async def failure(*arguments: str, cwd: None = None, **env: str) -> str:
    """Run a check that cannot run; return its last line."""
    async with run(*CHECK, *arguments, cwd=cwd, **env) as process:
        assert await process.end() == 2, process.output
    return process.output.splitlines()[-1]


async def test_check_that_cannot_run_exits_with_2_and_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{unused.getsockname()[1]}/"
        assert await failure(url) == f"wsserver: no check of {url}: nothing listens at this port"
        assert "token has characters" in await failure(url, WSSERVER_CHAT_TOKEN="ä")
    assert "the address must be like" in await failure("localhost:3001")
    assert "is not a number of seconds" in await failure("ws://localhost", "--idle", "x")
    assert "--help" in await failure()


async def test_interrupted_check_exits_with_130() -> None:
    async with wsserver.serve(Demo(RATE), port=0) as server, run(*CHECK, server.url) as process:
        await interrupted(process)


async def interrupted(process: Process) -> None:
    await process.line("ok +resume")
    process.signal(signal.SIGINT)
    assert await process.end() == 130
    assert "Traceback" not in process.output


async def test_closed_pipe_ends_check_without_traceback() -> None:
    reading, writing = os.pipe()
    async with wsserver.serve(Demo(RATE), port=0) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *CHECK, server.url),
            stdout=writing,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(writing)
        await asyncio.to_thread(os.read, reading, 1)
        os.close(reading)
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (1, b"")


def test_lines_have_colour_and_advice_without_control_characters() -> None:
    finding = failed("foreign_origin", "seen\033[2J", "one", "two")
    assert to_lines(finding, colour=False) == [
        "failed  foreign origin  seen\\x1b[2J",
        "        → one",
        "        → two",
    ]
    assert to_lines(finding, colour=True)[0].startswith("\033[31mfailed  \033[0mforeign")
    assert summary([finding, ok("a", ""), ok("b", "")]) == "2 ok, 1 failed"


def test_readme_shows_all_checks() -> None:
    output = DOCUMENT.partition("wsserver check wss://chat.example.com/\n")[2].partition("```")[0]
    lines = [line for line in output.splitlines()[:-2] if not line.startswith(" ")]
    assert [line[8:24].strip().replace(" ", "_") for line in lines] == NAMES
    for status in Status:
        assert f"`{status}`" in DOCUMENT
