"""Runs ``wsserver chat`` in an emulated terminal and with pipes."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pexpect
import pyte

from tests.support.puppet import BOUND

__all__ = ["Person", "once", "outcome", "terminal"]

HISTORY = 100_000  # lines of the terminal's scrollback


class Emulator(pyte.HistoryScreen):
    """The screen of a terminal, which answers requests of the program."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=HISTORY, ratio=0.5)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        """Send an answer of the terminal, such as the position of the cursor."""
        self._answer(data)


class Person:
    """A user at a terminal, who reads its screen and its scrollback."""

    def __init__(self, child: Any, columns: int, rows: int) -> None:
        self.child = child
        self.output = b""
        self._emulator = Emulator(columns, rows, child.send)
        self._stream = pyte.ByteStream(self._emulator)

    @property
    def screen(self) -> list[str]:
        """The rows of the screen, without spaces at their ends."""
        return [row.rstrip() for row in self._emulator.display]

    @property
    def text(self) -> str:
        """The scrollback and the screen."""
        columns = range(self._emulator.columns)
        past = [
            "".join(row[column].data for column in columns).rstrip()
            for row in self._emulator.history.top
        ]
        return "\n".join([*past, *self.screen]).rstrip()

    async def waits(self, condition: Callable[[], bool]) -> str:
        """Wait for a state of the screen; return the scrollback and the screen."""
        await asyncio.to_thread(self._read_until, condition)
        return self.text

    async def sees(self, text: str, *, times: int = 1) -> str:
        """Wait for a text; return the scrollback and the screen."""
        return await self.waits(lambda: self.text.count(text) >= times)

    async def ready(self) -> None:
        """Wait for an empty prompt at the end, with no reply above it."""
        ends = re.compile(r"(^|\n)(?!\[\w+…)[^\n]*\n>$")
        await self.waits(lambda: ends.search("\n" + self.text) is not None)

    def types(self, text: str) -> None:
        self.child.send(text)

    def resizes(self, columns: int, rows: int) -> None:
        self._emulator.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    async def leaves(self) -> int:
        """Wait for the end of the program; return its exit code."""
        await asyncio.to_thread(self._read_until, None)
        await asyncio.to_thread(self.child.wait)
        return int(self.child.exitstatus)

    def _read_until(self, condition: Callable[[], bool] | None) -> None:
        """Read until a condition holds; without one, until the end of the program."""
        end = monotonic() + BOUND
        while condition is None or not condition():
            assert monotonic() < end, f"the screen:\n{self.text}"
            try:
                data = self.child.read_nonblocking(65536, timeout=0.5)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition is None, f"the program has ended:\n{self.text}"
                return
            self.output += data
            self._stream.feed(data)


@asynccontextmanager
async def terminal(*arguments: str, size: str = "100x30", **env: str) -> AsyncIterator[Person]:
    """Run the program in a terminal of columns x rows."""
    columns, rows = map(int, size.split("x"))
    child = pexpect.spawn(
        sys.executable,
        ["-m", "wsserver", "chat", *arguments],
        env={**os.environ, "TERM": "xterm-256color", **env},
        dimensions=(rows, columns),
        timeout=BOUND,
    )
    try:
        yield Person(child, columns, rows)
    finally:
        await asyncio.to_thread(child.close, force=True)


@asynccontextmanager
async def once(
    *arguments: str, given: str = "", **env: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the program with a text on its stdin."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "wsserver", "chat", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )
    assert process.stdin is not None
    process.stdin.write(given.encode())
    process.stdin.close()
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def outcome(process: asyncio.subprocess.Process, given: str = "") -> tuple[int, str, str]:
    async with asyncio.timeout(BOUND):
        out, err = await process.communicate(given.encode() or None)
    assert process.returncode is not None
    assert "Traceback" not in err.decode()
    return process.returncode, out.decode(), err.decode()
