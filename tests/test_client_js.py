"""The JavaScript client: its types, its own tests under Node, exchanges and sequences."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.support.conformance import EXCHANGES, Seen, play
from tests.support.line import Line
from tests.support.puppet import Puppet
from tests.support.sequence_client import ScriptedServer
from tests.support.sequences import load, playable
from tests.support.tools import ROOT, require_node, require_npm_package

pytestmark = pytest.mark.slow


async def succeed(*command: str) -> None:
    """Run a program; fail with its output if it fails."""
    program = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert program.returncode == 0, said.decode()


async def test_types_are_correct() -> None:
    require_npm_package("@types/react")
    await succeed(
        require_node(), str(require_npm_package("typescript") / "bin/tsc"), "-p", "tests/js"
    )


@pytest.mark.timeout(120)  # each wait of the program has a bound
async def test_javascript_tests_pass() -> None:
    require_npm_package("ws")
    tests = sorted(str(path) for path in (ROOT / "tests/js").glob("*.test.mjs"))
    # Node 20 needs the flag; later versions have a WebSocket without it.
    await succeed(require_node(), "--experimental-websocket", "--test", *tests)


class Script:
    """A driver in another process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def tell(self, what: str, **keys: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **keys}).encode() + b"\n")
        return json.loads(await self._process.stdout.readline())

    async def prompt(
        self,
        reply: str,
        text: str | list[dict[str, str]],
        conversation: str | None,
        on_busy: str,
        retry_of: str | None = None,
    ) -> None:
        keys = {"conversation": conversation, "on_busy": on_busy, "retry_of": retry_of}
        await self.tell("prompt", reply=reply, text=text, **keys)

    async def stop(self, reply: str) -> None:
        await self.tell("stop", reply=reply)

    async def resume(self, reply: str, of: str | None, named: str | None) -> None:
        await self.tell("resume", reply=reply, of=of, named=named)

    async def seen(self, reply: str) -> Seen:
        seen: Seen = await self.tell("seen", reply=reply)
        return seen

    async def request(self, kind: str, **keys: Any) -> Any:
        return await self.tell("request", kind=kind, **keys)

    async def close_conversation(self, conversation: str) -> None:
        """The client closes a conversation by itself when it opens another."""

    async def mended(self) -> None:
        """The client reconnects by itself."""


@asynccontextmanager
async def script(url: str, *token: str) -> AsyncIterator[Script]:
    require_npm_package("ws")
    process = await asyncio.create_subprocess_exec(
        require_node(),
        str(ROOT / "tests/js/driver.mjs"),
        url,
        *token,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Script(process)
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.parametrize("name", EXCHANGES)
async def test_client_conforms_to_exchanges(
    name: str, server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, script(line.url) as driver:
        await play(EXCHANGES[name], driver, puppet, line)
        assert await driver.tell("close") == []


# No call of the client causes these: `repeat` (`prompt` returns a running reply of the same id),
# `later` (a renewal after 48 minutes), and `blocks` (prompts are texts).
UNABLE = frozenset({"blocks", "repeat", "later"})


@pytest.mark.parametrize(("name", "socket"), playable(UNABLE))
async def test_client_plays_sequences(name: str, socket: int) -> None:
    async with (
        ScriptedServer(load()[name], socket) as server,
        script(server.url, *server.tokens) as driver,
    ):
        await server.play(driver)
        assert await driver.tell("close") == []
