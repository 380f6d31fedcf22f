"""Types the transcript of examples/wscat.md into a real wscat, and compares the output."""

import asyncio
import json
import os
import re
import shlex
import termios
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.support.puppet import BOUND
from tests.support.tools import ROOT, require_wscat
from wsserver import Request
from wsserver.models.base import Output
from wsserver.models.demo import Demo

pytestmark = pytest.mark.slow

WALK_THROUGH = ROOT / "examples/wscat.md"
SERVER = "localhost:3001"  # in the walk-through
ELLIPSIS = "…"


class HeldDemo:
    """The demo model without pauses. It waits for a stop where the transcript has one.

    Args:
        stops: per reply, the number of the word after which it waits; None if it does not.
    """

    name = "demo"

    def __init__(self, stops: Iterator[int | None]) -> None:
        self._stops = stops
        self._demo = Demo(rate=0)

    async def __call__(self, request: Request, /) -> AsyncGenerator[Output]:
        left = next(self._stops)
        async for piece in self._demo(request):
            yield piece
            if left is not None and isinstance(piece, str):
                left -= 1
                if left == 0:
                    await asyncio.Event().wait()


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, process: asyncio.subprocess.Process, side: int) -> None:
        self.process = process
        self._side = side
        self._output = asyncio.StreamReader()

    @classmethod
    @asynccontextmanager
    async def running(cls, *command: str) -> AsyncIterator["Terminal"]:
        own, its = os.openpty()
        termios.tcsetwinsize(its, (50, 10_000))  # wide, so that no line wraps
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=its,
            stdout=its,
            stderr=its,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(its)
        terminal = cls(process, own)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(terminal._output), os.fdopen(own, "rb", 0)
        )
        try:
            yield terminal
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            transport.close()

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    async def line(self) -> str:
        """Return the next line of output, without the typed lines."""
        async with asyncio.timeout(BOUND):
            while True:
                raw = (await self._output.readuntil(b"\n")).decode()
                plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", raw).strip("\r\n")
                line = plain.rpartition("\r")[2]
                if line and not line.startswith(">"):  # the prompt, with the typed text
                    return line


class Names:
    """Maps the ids of the transcript to those of this run."""

    def __init__(self) -> None:
        self._ours: dict[str, str] = {}

    def put(self, expected: str, line: str) -> str:
        """Return a line of the transcript with the ids of this run.

        A new id is taken from the received line.
        """
        for key in ("id", "conversation", "ref"):
            ids = re.compile(rf'(?<="{key}":")[^"]+')
            if (theirs := ids.search(expected)) is None or (ours := ids.search(line)) is None:
                continue
            if ours.group() not in self._ours.values():
                self._ours.setdefault(theirs.group(), ours.group())
            expected = ids.sub(self._ours.get(theirs.group(), theirs.group()), expected)
        return expected


def transcript() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", WALK_THROUGH.read_text(), re.DOTALL)
    return "".join(blocks).splitlines()


def stops(lines: list[str]) -> Iterator[int | None]:
    """Yield, per reply of the transcript, the number of words before its stop; None without one."""
    frames: list[dict[str, Any]] = [json.loads(line[2:]) for line in lines if line[:2] == "< "]
    done = {frame["id"]: frame for frame in frames if frame["type"] == "done"}
    for name in dict.fromkeys(frame["id"] for frame in frames if frame["type"] == "start"):
        yield done[name]["seq"] if done[name]["reason"] == "stopped" else None


async def follow(lines: list[str], terminal: Terminal) -> None:
    """Type the typed lines of the transcript, and compare the other lines."""
    names = Names()
    more = False  # further tokens may follow
    for expected in lines:
        if expected == ELLIPSIS:
            more = True
        elif expected.startswith("> "):
            terminal.type(expected[2:].replace("^C", "\x03") + "\r")
        else:
            line = await terminal.line()
            while (
                more and line.startswith('< {"type":"token"') and names.put(expected, line) != line
            ):
                line = await terminal.line()
            assert line == names.put(expected, line)
            more = False


async def test_transcript_matches_real_session() -> None:
    wscat = require_wscat()
    command, *lines = transcript()
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "wscat"
    async with wsserver.serve(HeldDemo(stops(lines)), port=0) as server:
        arguments = [a.replace(SERVER, f"localhost:{server.port}") for a in arguments]
        async with Terminal.running(wscat, *arguments) as terminal:
            await follow(lines, terminal)
            async with asyncio.timeout(BOUND):
                assert await terminal.process.wait() == 0
