"""Limits of what the server may use under attack, and helpers of these tests.

The server is its own process. In each test a normal client at another address chats during the
attack, and the server must serve this client without delay; see
:func:`tests.support.abuse.meanwhile`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from tests.support.abuse import (
    MEBIBYTE,
    Served,
)
from tests.support.puppet import until
from tests.support.upstream import Received, Script, Upstream, reply

GROWTH = 20 * MEBIBYTE  # bytes by which the memory of the server may grow in an attack
# Descriptors beyond the limit: of a hundred refused connections, of connections that were just
# accepted or are about to close, and a few others.
AT_THE_DOOR = 350
FRAMES = ("--frame-rate", "5", "--frame-burst", "40")
NOBODY = 65534  # id of another user
PING = '{"type": "ping"}'
SECRET = "hunter2-planted"
NASTY = "a\x1b[2Jb\r\nc\x00\x85\u2028\u2029\u202e\u200bé\x9b31m end"
KEY = "sk-ant-" + SECRET
KEPT = 2  # idle connections to the API after one client: of its replies, and a warm one


@contextlib.asynccontextmanager
async def flat(server: Served, growth: int = GROWTH, kept: int = 0) -> AsyncIterator[None]:
    """Check that the block leaves no connection or reply, and uses little memory.

    Args:
        server: which.
        growth: bytes of memory at its peak.
        kept: connections to the model's API that may be idle in the end.
    """
    memory, descriptors = server.memory, server.descriptors
    yield
    await server.reaches(connections_open=0, generations_running=0)
    await until(lambda: server.descriptors <= descriptors + kept)
    assert server.peak - memory < growth


async def each(count: int, abuse: Any, *arguments: Any) -> list[Any]:
    """Run a number of attacks at once; return their results."""
    return await asyncio.gather(*(abuse(*arguments) for _ in range(count)))


class Listener(Upstream):
    """A fake API that answers `speak` at once, and other prompts with its script."""

    def receive(self, received: Received) -> Script:
        script = super().receive(received)
        said = received.body["messages"][-1]["content"]
        return reply("fine") if "speak" in json.dumps(said) else script


def lines(server: Served) -> list[dict[str, Any]]:
    """Return the events of the log. Each line must be one JSON object."""
    text = "".join(server.log)
    assert all(line.isprintable() for line in text.rstrip("\n").split("\n")), text
    found = [line for line in server.log if not line.startswith(("wsserver ", "  "))]
    return [json.loads(line) for line in found]
