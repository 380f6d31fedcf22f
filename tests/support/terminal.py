"""Runs ``wsserver chat`` in a pseudo-terminal and with pipes."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pexpect

from tests.support.puppet import BOUND

__all__ = ["Person", "once", "outcome", "terminal"]


class Person:
    """A user at a terminal."""

    def __init__(self, child: Any) -> None:
        self.child = child

    async def sees(self, text: str) -> str:
        """Wait for a text on the screen; return the output before it."""
        await asyncio.to_thread(self.child.expect_exact, text, timeout=BOUND)
        return str(self.child.before)

    async def ready(self) -> None:
        """Wait for the prompt: it switches bracketed paste on."""
        await self.sees("\x1b[?2004h")

    def types(self, text: str) -> None:
        self.child.send(text)

    async def leaves(self) -> int:
        await asyncio.to_thread(self.child.expect, pexpect.EOF, timeout=BOUND)
        await asyncio.to_thread(self.child.wait)
        return int(self.child.exitstatus)


@asynccontextmanager
async def terminal(*arguments: str, **env: str) -> AsyncIterator[Person]:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "wsserver", "chat", *arguments],
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
        encoding="utf-8",
        dimensions=(40, 200),
        echo=False,
        timeout=BOUND,
    )
    try:
        yield Person(child)
    finally:
        await asyncio.to_thread(child.close, force=True)


@asynccontextmanager
async def once(*arguments: str, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "wsserver", "chat", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def outcome(process: asyncio.subprocess.Process, given: str = "") -> tuple[int, str, str]:
    async with asyncio.timeout(BOUND):
        out, err = await process.communicate(given.encode())
    assert process.returncode is not None
    assert "Traceback" not in err.decode()
    return process.returncode, out.decode(), err.decode()
