"""Helpers for tests of the Python client."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.puppet import BOUND
from wsserver import Thinking
from wsserver.client import ConnectionFailed, Done, Reply, ReplyError

__all__ = [
    "TEXT",
    "WORDS",
    "Frame",
    "Send",
    "end_of",
    "failure_of",
    "read",
    "recite",
    "scripted",
    "seq_reached",
    "url_of",
]

Frame = dict[str, Any]
Send = Callable[..., Awaitable[None]]

WORDS = [f"word{number} " for number in range(40)]
TEXT = "".join(WORDS)


async def recite(request: wsserver.Request) -> AsyncIterator[str | Thinking]:
    """Think, then yield :data:`WORDS`."""
    yield Thinking("hm ")
    for word in WORDS:
        await asyncio.sleep(0)
        yield word


async def read(reply: Reply) -> str:
    """Return the text of an iteration over the whole reply."""
    async with asyncio.timeout(BOUND):
        return "".join([text async for text in reply])


async def end_of(reply: Reply) -> Done:
    """Wait for the end of a reply."""
    async with asyncio.timeout(BOUND):
        return await reply.done()


async def failure_of(reply: Reply) -> Any:
    """Wait for the end of a reply that fails, and return the exception."""
    async with asyncio.timeout(BOUND):
        with pytest.raises((ReplyError, ConnectionFailed)) as raised:
            await reply.done()
    return raised.value


def seq_reached(seq: int, *replies: Reply) -> bool:
    """Return whether the last piece of all replies has this number."""
    return all(reply.seq == seq for reply in replies)


def url_of(server: Any) -> str:
    """Return the address of a scripted server."""
    return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@asynccontextmanager
async def scripted(
    answer: Callable[[Frame, Send], Awaitable[None]], *, hello: bool = True, **limits: int
) -> AsyncIterator[str]:
    """Run a server that calls ``answer`` with each frame; yield the address.

    Args:
        answer: gets the client's frame, and a function that sends a frame to the client.
        hello: whether the server sends ``hello``.
        limits: of the ``hello``.
    """

    async def talk(socket: ServerConnection) -> None:
        async def send(frame: Frame, **more: Any) -> None:
            await socket.send(json.dumps(frame | more))

        if hello:
            await send({"type": "hello", "protocol": "wsserver.v1", "limits": limits})
        async for message in socket:
            await answer(json.loads(message), send)

    async with serve(talk, "127.0.0.1", 0) as server:
        yield url_of(server)
