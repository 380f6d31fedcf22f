"""The server as a process of its own, as a user runs it."""

import asyncio
import os
import re
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.puppet import BOUND

__all__ = ["Process", "run"]

LAST = 1.0  # seconds for a program to end after a signal


class Process:
    """A running program, and its output so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    async def line(self, pattern: str) -> re.Match[str]:
        """Wait for an output line that matches."""
        assert self.process.stdout is not None
        async with asyncio.timeout(BOUND):
            while True:
                line = (await self.process.stdout.readline()).decode()
                assert line, f"it ended without {pattern!r} after: {self.output}"
                self.output += line
                if match := re.search(pattern, line):
                    return match

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> int:
        """Wait for the end of the program; return the exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(BOUND):
            self.output += (await self.process.stdout.read()).decode()
            return await self.process.wait()


@asynccontextmanager
async def run(
    *arguments: str,
    python: Path | str = sys.executable,
    cwd: Path | None = None,
    descriptors: str = "",
    **env: str,
) -> AsyncIterator[Process]:
    """Run ``python arguments``. If it still runs in the end, ask it twice to end; then kill it.

    A program that is killed at once would not write down which of its lines ran.

    ``descriptors`` is the limit of file descriptors, as of ``ulimit -n``.
    """

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for its background jobs
        if descriptors:
            resource.setrlimit(resource.RLIMIT_NOFILE, 2 * (int(descriptors),))

    process = await asyncio.create_subprocess_exec(
        python,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env={**os.environ, **env},
        preexec_fn=begin,
    )
    try:
        yield Process(process)
    finally:
        ended = asyncio.create_task(process.communicate())
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.returncode is None:
                process.send_signal(number)
                await asyncio.wait({ended}, timeout=LAST)
        await ended
