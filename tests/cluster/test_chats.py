"""Chats whose messages only their page has, on several nodes."""

import pytest

import wsserver
from tests.chats.events import Chat
from tests.chats.test_ai_sdk import body, parts_of, text
from tests.cluster.conftest import Start
from tests.support.puppet import Puppet
from tests.support.redis import RedisServer
from wsserver import Handshake, Principal

pytestmark = pytest.mark.slow
NAME = "chat-0123456789abcdef"
HISTORY = [text("user", "one"), text("assistant", "two"), text("user", "three")]


async def test_page_resumes_its_reply_on_another_node(
    nodes: list[wsserver.Server], puppet: Puppet
) -> None:
    a, b, _ = nodes
    async with Chat.open(a) as chat, Chat.open(b) as again, Chat.open(b) as later:
        chat.send("POST", "/api/chat", body(*HISTORY, id=NAME))
        reply = (await puppet.reply()).say("half")
        assert [message.text for message in reply.request.messages] == ["one", "two", "three"]
        again.send("GET", f"/api/chat/{NAME}/stream")
        await again.browser.head()
        reply.say("whole").end()
        events = (await again.browser.chunks()).decode()
        assert "".join(part["delta"] for part in await parts_of(chat) if "delta" in part) == (
            "halfwhole"
        )
        assert '"half' in events
        assert "whole" in events
        later.send("GET", f"/api/chat/{NAME}/stream")
        assert (await later.browser.head())[0] == 204


async def test_page_stops_its_reply_on_another_node(
    nodes: list[wsserver.Server], puppet: Puppet
) -> None:
    a, b, _ = nodes
    async with Chat.open(a) as chat, Chat.open(b) as other:
        chat.send("POST", "/api/chat", body(*HISTORY, id=NAME))
        reply = await puppet.reply()
        status, stopped = await other.ask("POST", f"/api/chat/{NAME}/stop")
        assert (status, len(stopped["ids"])) == (200, 1)
        assert reply.closed.is_set()
        assert (await parts_of(chat))[-1]["messageMetadata"]["by"] == "client"


async def by_name(token: str | None, _: Handshake) -> Principal | None:
    return None if token is None else Principal(token)


async def test_chat_of_another_principal_is_not_found(start: Start, puppet: Puppet) -> None:
    a, b = [await start(authenticate=by_name) for _ in range(2)]
    ada, bob = ({"authorization": f"Bearer {name}"} for name in ("ada", "bob"))
    async with Chat.open(a) as chat, Chat.open(b) as other, Chat.open(b) as again:
        chat.send("POST", "/api/chat", body(*HISTORY, id=NAME), ada)
        await puppet.reply()
        other.send("GET", f"/api/chat/{NAME}/stream", headers=bob)
        assert (await other.browser.head())[0] == 204
        again.send("GET", f"/api/chat/{NAME}/stream", headers=ada)
        assert (await again.browser.head())[0] == 200


async def test_stop_without_the_other_nodes_is_no_success(
    start: Start, redis: RedisServer, puppet: Puppet
) -> None:
    a, b = await start(), await start()
    async with Chat.open(a) as chat, Chat.open(b) as other, Chat.open(b) as page:
        chat.send("POST", "/api/chat", body(*HISTORY, id=NAME))
        reply = await puppet.reply()
        redis.kill()
        status, refusal = await other.ask("POST", f"/api/chat/{NAME}/stop")
        assert (status, refusal["code"]) == (503, "unavailable")
        page.send("GET", f"/api/chat/{NAME}/stream")
        assert (await page.browser.head())[0] == 204
        assert not reply.closed.is_set()
