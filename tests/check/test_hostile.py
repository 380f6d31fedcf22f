"""Servers that answer the checks with something else: each is a finding, and none is a failure."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from tests.check.conftest import PACE, Checked
from wsserver.doctor import frames, replies
from wsserver.doctor.deployment import Deployment
from wsserver.doctor.line import FAILURES, parse_target
from wsserver.protocol import SUBPROTOCOL

DEEP = "[" * 100_000
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    "limits", [5, None, {"message_size": "x"}, {"message_size": 10**15}, {"message_size": -1}]
)
async def test_hello_with_unusable_limits_fails_check(limits: object) -> None:
    async def answer(chat: ServerConnection) -> None:
        await chat.send(json.dumps({"type": "hello", "principal": "x", "limits": limits}))
        async for _ in chat:
            await chat.send('{"type": "pong"}')

    async with serve(answer, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)]) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        found = Checked(Deployment(parse_target(f"ws://127.0.0.1:{port}/"), None, PACE), {})
        for check in (frames.large_frame, frames.close_code):
            with pytest.raises(FAILURES, match="message_size"):
                await check(found.deployment, found.report)


@pytest.mark.parametrize(
    "data",
    [
        *("[]", "5", "{}", DEEP, '{"type": 5}', '{"type": "token"}', "9" * 5000),
        '{"type": "token", "seq": "x"}',
        '{"type": "token", "seq": 1, "block": []}',
    ],
)
async def test_event_that_is_no_frame_fails_check(data: str) -> None:
    async with answering(HEAD + f"data: {data}\n\n".encode()) as port:
        found = Checked(Deployment(parse_target(f"http://127.0.0.1:{port}/"), None, PACE), {})
        found.deployment.chats = True
        await replies.stream(found.deployment, found.report)
    assert found.failed() == {"sse"}
    assert "not that of a wsserver" in found.findings["sse"].seen


async def test_endless_body_is_read_in_part() -> None:
    async with answering(HEAD, b"x" * 65_536) as port:
        found = Checked(Deployment(parse_target(f"http://127.0.0.1:{port}/"), None, PACE), {})
        await replies.http(found.deployment, found.report)
    assert found.failed() == {"http"}


@asynccontextmanager
async def answering(begin: bytes, again: bytes = b"") -> AsyncIterator[int]:
    """Answer each request with bytes, the second ones without end."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        writer.write(begin)
        try:
            while again:
                writer.write(again)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
