"""Clients that abort their requests, hundreds of times: each request to the model is closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import wsserver
from tests.asgi.servers import serving
from tests.chats.reading import Stream
from tests.support.host import Host, Mounted
from tests.support.puppet import until
from tests.support.upstream import Gate, Upstream, reply

pytestmark = pytest.mark.slow

ABORTS = 200
AT_ONCE = 20


@asynccontextmanager
async def claude(name: str) -> AsyncIterator[Host]:
    """Serve Claude on the server's own port, or under uvicorn."""
    if name == "own":
        async with wsserver.serve(port=0, drain_timeout=0) as running:
            yield running
    else:
        chat = wsserver.asgi(allow_anonymous=True, drain_timeout=0)
        async with serving(chat) as port:
            assert chat.app is not None
            yield Mounted(port, chat.settings, chat.app)


async def abort(server: Host, number: int) -> None:
    """Post a prompt, read its events up to a point that differs, and close the connection."""
    prompt = {"prompt": f"prompt {number}"}
    drop = ("fin", "rst")[number % 2]
    async with Stream.open(server.port, "/api/chat", prompt, drop=drop) as stream:
        assert stream.status == 200
        for _ in range(number % 3):  # nothing, the start, a token
            assert await stream.event() is not None


@pytest.mark.parametrize("name", ["own", "uvicorn"])
async def test_hundreds_of_aborted_requests_close_theirs_to_the_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asyncio.all_tasks()
    async with Upstream() as upstream:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", upstream.url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
        upstream.default = reply("Hel", "lo", Gate("never"))
        async with claude(name) as server:
            for start in range(0, ABORTS, AT_ONCE):
                async with asyncio.TaskGroup() as group:
                    for number in range(start, start + AT_ONCE):
                        group.create_task(abort(server, number))
            # A request that was aborted before it was sent to the model is not sent.
            requests = len(upstream.requests)
            for index in range(requests):
                assert await (await upstream.request(index)).closed() == "closed"
            hub, admission = server.app.hub, server.app.admission
            await until(lambda: not (hub.live or hub.tasks))
            await until(lambda: not admission.connections)
            assert len(upstream.requests) == requests >= ABORTS * 2 / 3
            assert b"\nwsserver_streams_open 0.0\n" in server.app.metrics.exposition()
            ended = 'wsserver_generations_total{outcome="stopped",why="disconnect"}'
            assert f"\n{ended} {ABORTS}.0\n".encode() in server.app.metrics.exposition()
    await until(lambda: asyncio.all_tasks() == before)
