"""Checks through gateways with faults that no setting of a common proxy has."""

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

import wsserver
from tests.check.conftest import BRIEF, RATE, Behind, checked, checked_replies
from tests.support.gateways import nginx
from wsserver.doctor import replies
from wsserver.models.demo import Demo

pytestmark = pytest.mark.slow

Answer = Callable[[bytes, StreamReader, StreamWriter], Awaitable[None]]
WEBSOCKET = b"GET / "
CLOSE = 0x88  # first byte of a close frame (RFC 6455 section 5.2)
SWITCHING = b"HTTP/1.1 101"


@asynccontextmanager
async def gateway(port: int, answer: Answer) -> AsyncIterator[str]:
    """Run a gateway; `answer` passes on what the server sends after the begin of a request."""

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        begin = await reader.read(65536)
        behind, requests = await asyncio.open_connection("127.0.0.1", port)
        requests.write(begin)
        upward = asyncio.create_task(copy(reader, requests))
        try:
            with contextlib.suppress(ConnectionError):
                await answer(begin, behind, writer)
        finally:
            upward.cancel()
            requests.close()
            writer.close()

    async def accepted(reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await serve(reader, writer)

    tasks: set[asyncio.Task[None]] = set()
    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def copy(reader: StreamReader, writer: StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def test_held_websocket_fails_beside_stream_that_flows(behind: Behind) -> None:
    async def hold(begin: bytes, behind: StreamReader, writer: StreamWriter) -> None:
        if not begin.startswith(WEBSOCKET):
            await copy(behind, writer)
            return
        writer.write(await behind.readuntil(b"\r\n\r\n"))
        kept = b""
        while data := await behind.read(65536):
            kept += data
            if b'"token"' not in kept or b'"type":"done"' in kept:
                writer.write(kept)
                kept = b""

    async with gateway(behind.port, hold) as url:
        found = await checked_replies(url, behind.token, replies.stream)
    assert found.failed() == {"tokens"}
    assert "inspect WebSockets" in found.mend("tokens")


@pytest.mark.parametrize(("begin", "check"), [(b"POST", "sse"), (WEBSOCKET, "tokens")])
async def test_connection_that_is_cut_fails(behind: Behind, begin: bytes, check: str) -> None:
    async def cut(request: bytes, behind: StreamReader, writer: StreamWriter) -> None:
        while data := await behind.read(65536):
            if request.startswith(begin) and b'"seq":3' in data:
                return
            writer.write(data)

    async with gateway(behind.port, cut) as url:
        found = await checked_replies(url, behind.token, replies.stream)
    assert found.failed() == {check}
    assert "proxy_read_timeout" in found.mend(check)


async def test_lost_close_code_fails(behind: Behind) -> None:
    async def cut(begin: bytes, behind: StreamReader, writer: StreamWriter) -> None:
        while data := await behind.read(65536):
            if data[0] == CLOSE:
                return
            writer.write(data)

    async with gateway(behind.port, cut) as url:
        found = await checked(url, behind.token, BRIEF)
    assert found.failed() == {"close_code"}
    assert "no close frame (1006)" in found.findings["close_code"].seen


async def test_limit_of_messages_fails(behind: Behind) -> None:
    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        behind_, requests = await asyncio.open_connection("127.0.0.1", behind.port)
        down = asyncio.create_task(copy(behind_, writer))
        passed = 0
        while data := await reader.read(65536):
            passed += len(data)
            if passed > 40_000 and not data.startswith(b"POST"):
                break
            requests.write(data)
        down.cancel()
        requests.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        found = await checked(f"ws://127.0.0.1:{port}/", behind.token, BRIEF)
    assert "large_frame" in found.failed()
    assert "message_size" in found.mend("large_frame")


async def test_two_servers_that_share_nothing_fail_resume(folder: Path, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        names = []
        for _ in range(2):
            server = await stack.enter_async_context(
                wsserver.serve(Demo(RATE), port=0, drain_timeout=0)
            )
            names.append(f"server 127.0.0.1:{server.port};")
        site = (
            "location / { proxy_pass http://two; proxy_http_version 1.1;\n"
            "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;\n"
            "proxy_set_header Host $http_host; }"
        )
        upstream = "upstream two {{ {} }}\n".format(" ".join(names))
        url = await stack.enter_async_context(nginx(folder, site, upstream))
        found = await checked_replies(url, "", replies.resume)
    assert found.failed() == {"resume"}
    assert "`hash $remote_addr consistent;`" in found.mend("resume")
    assert "`cluster`" in found.mend("resume")
