"""Requests of all dialects at once, for the same chats, that are cut anywhere: nothing is left."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

import wsserver
from tests.chats.reading import LOST, Stream
from tests.support.puppet import until
from wsserver import Request
from wsserver.dialects.chat import conversation_of
from wsserver.errors import Refused

pytestmark = pytest.mark.slow

CHATS = ("chat-one", "50%25", "a" * 16)
PRINCIPALS = ("ada", "bob")
ROUNDS = 20
AT_ONCE = 25
STATUSES = {200, 204, 404, 409, 410}
UNLIMITED: dict[str, Any] = {
    "prompts_per_minute": 10**6,
    "frame_rate": 1e6,
    "frame_burst": 10**6,
    "connections_per_address": 1000,
}
Ask = tuple[str, object]


async def model(_: Request) -> AsyncIterator[str]:
    for number in range(random.randint(0, 30)):
        yield f"word {number} "
        await asyncio.sleep(random.uniform(0, 0.01))


async def named(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
    return None if token is None else wsserver.Principal(token)


def any_request(server: wsserver.Server, number: int) -> Ask:
    """Return the target and the body of a request for one of the chats or of the replies."""
    hub, chat = server.app.hub, random.choice(CHATS)
    replies = [generation.id for generation in hub.retention][-20:]
    reply, name = random.choice([*replies, "0" * 16]), quote(chat, safe="")
    text = f"text {number}"
    part = {"type": "text", "text": text}
    message = {"id": f"message-{number}", "role": "user", "content": text, "parts": [part]}
    ui = {"id": chat, "messages": [message]}
    run = {"threadId": chat, "runId": "run", "messages": [message]}
    chosen = {"id": f"id-{random.randint(0, 40):016}"}
    busy = random.choice(["queue", "interrupt", "reject"])
    asks: list[Ask] = [
        ("/api/chat", ui),
        ("/api/chat", {**ui, "trigger": "regenerate-message"}),
        ("/agui", run),
        ("/agui", {**run, "forwardedProps": chosen}),
        ("/agui/connect", run),
        (f"/api/chat/{name}/stream", None),
        (f"/api/chat/{reply}?after={random.randint(0, 3)}", None),
        (f"/api/chat/{random.choice([name, reply])}/stop", {}),
        ("/api/chat", {"prompt": text}),
        ("/api/chat", {"prompt": text, "conversation": "a" * 16, "on_busy": busy}),
    ]
    return random.choice(asks)


async def ask(server: wsserver.Server, number: int) -> int:
    """Send a request, read some events, and drop the connection; return the status."""
    headers = {"authorization": f"Bearer {random.choice(PRINCIPALS)}"}
    target, body = any_request(server, number)
    drop = random.choice(["fin", "rst"])
    with contextlib.suppress(*LOST):
        async with Stream.open(server.port, target, body, headers=headers, drop=drop) as stream:
            events = 0 if target.endswith("/stop") or stream.status != 200 else 20
            for _ in range(random.randint(0, events)):
                if await stream.event() is None:
                    break
            return stream.status
    return 200


async def delete(server: wsserver.Server) -> None:
    with contextlib.suppress(Refused):
        chat = conversation_of(random.choice(CHATS))
        await server.app.hub.delete(random.choice(PRINCIPALS), chat)


@pytest.mark.parametrize("seed", range(3))
async def test_requests_that_race_and_are_cut_leave_nothing(
    caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    random.seed(seed)
    caplog.set_level(logging.WARNING, "wsserver")
    server = wsserver.serve(model, authenticate=named, port=0, grace=0.2, **UNLIMITED)
    async with server:
        for start in range(0, ROUNDS * AT_ONCE, AT_ONCE):
            asking = (ask(server, start + number) for number in range(AT_ONCE))
            *statuses, _ = await asyncio.gather(*asking, delete(server))
            assert set(statuses) <= STATUSES
        await until(lambda: not (server.app.hub.live or server.listener.connections))
        for generation in server.app.hub.retention:
            assert (generation.readers, generation.log.followers) == (0, [])
        assert [found.pins for found in server.app.hub.conversations if found.pins] == []
        assert server.memory.used == server.memory.cached
    assert not caplog.records
