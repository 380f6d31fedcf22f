"""What the server may take under abuse, and what the tests of abuse share.

The server is a process of its own. In each test another client, at another address, chats meanwhile
and is served as if there were no abuse; see :func:`tests.support.abuse.meanwhile`.
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

GROWTH = 20 * MEBIBYTE  # that the server may take of memory for any abuse
# Descriptors beyond the limit: a hundred who are turned away, who have just been accepted, and who
# are about to be closed, and a few others.
AT_THE_DOOR = 350
FRAMES = ("--frame-rate", "5", "--frame-burst", "40")
NOBODY = 65534  # a user who can be another
PING = '{"type": "ping"}'
SECRET = "hunter2-planted"
NASTY = "a\x1b[2Jb\r\nc\x00\x85\u2028\u2029\u202e\u200bé\x9b31m end"
KEY = "sk-ant-" + SECRET
KEPT = 2  # connections to the API that one client leaves idle: of its replies, and a warm one


@contextlib.asynccontextmanager
async def flat(server: Served, growth: int = GROWTH, kept: int = 0) -> AsyncIterator[None]:
    """Nothing is left of what happens in the block, and it takes little memory at its peak.

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
    """Do it so many times at once; return what came of each."""
    return await asyncio.gather(*(abuse(*arguments) for _ in range(count)))


class Listener(Upstream):
    """An API that answers one who behaves, and is still at it when the others stop."""

    def receive(self, received: Received) -> Script:
        script = super().receive(received)
        said = received.body["messages"][-1]["content"]
        return reply("fine") if "speak" in json.dumps(said) else script


def lines(server: Served) -> list[dict[str, Any]]:
    """Return the events of the log, each of them a line that nothing can disguise."""
    text = "".join(server.log)
    assert all(line.isprintable() for line in text.rstrip("\n").split("\n")), text
    found = [line for line in server.log if not line.startswith(("wsserver ", "  "))]
    return [json.loads(line) for line in found]
