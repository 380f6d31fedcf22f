"""Clients of other protocols: packages of npm, each in a process of Node."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import wsserver
from tests.support.puppet import BOUND
from tests.support.tools import ROOT, require_node, require_npm_package

__all__ = ["Agent", "Chat", "agent", "ai_sdk_chat"]


class Script:
    """A script that reads commands as lines of JSON, and writes what happens."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def run(cls, package: str, name: str, *arguments: str) -> AsyncIterator[Self]:
        require_npm_package(package)
        process = await asyncio.create_subprocess_exec(
            require_node(),
            str(ROOT / "tests/js" / name),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            yield cls(process)
        finally:
            process.kill()
            await process.wait()

    def send(self, command: str, **given: object) -> None:
        assert self._process.stdin is not None
        line = json.dumps({"command": command, **given})
        self._process.stdin.write(line.encode() + b"\n")

    async def next(self, key: str) -> Any:
        """Return the next value of a kind, such as ``event``. The client may not warn."""
        assert self._process.stdout is not None
        async with asyncio.timeout(BOUND):
            while True:
                told = json.loads(await self._process.stdout.readline())
                assert "warning" not in told, told
                if key in told:
                    return told[key]


class Agent(Script):
    """The agent of AG-UI's own client: ``event``, ``outcome``, ``failed`` and ``messages``."""

    async def sees(self, text: str) -> None:
        """Wait until the client has a text."""
        seen = ""
        while not seen.endswith(text):
            event = await self.next("event")
            if event["type"] == "TEXT_MESSAGE_CONTENT":
                seen += event["delta"]

    async def contents(self) -> list[tuple[str, str]]:
        """Wait for the end of a run; return the role and the content of all messages."""
        return [(m["role"], m["content"]) for m in await self.next("messages")]


def agent(server: str | wsserver.Server, thread: str) -> Any:
    """Run an agent of a server, or of the address of one, on a thread."""
    base = server if isinstance(server, str) else f"http://127.0.0.1:{server.port}"
    return Agent.run("@ag-ui/client", "ag_ui.mjs", f"{base}/agui", thread)


class Chat(Script):
    """The ``Chat`` that ``useChat`` of the AI SDK has: ``messages`` and ``finished``."""

    async def sees(self, text: str) -> Any:
        """Wait until the last message has a text, and return the message."""
        while True:
            *_, last = await self.next("messages")
            if text_of(last) == text:
                return last


def ai_sdk_chat(server: wsserver.Server, name: str) -> Any:
    """Run a chat of the AI SDK with its default transport."""
    url = f"http://127.0.0.1:{server.port}/api/chat"
    return Chat.run("@ai-sdk/react", "ai_sdk.mjs", url, name)


def text_of(message: Any) -> str:
    """Return the text of a message of the AI SDK."""
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")
