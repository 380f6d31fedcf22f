"""One reply, followed and stopped by clients of four protocols at once."""

import contextlib

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.client import client
from tests.support.npm import agent, ai_sdk_chat, text_of
from tests.support.pieces import Thinking
from tests.support.puppet import Puppet, until
from tests.support.terminal import terminal

# Python 3.12 warns about a fork in a process with threads, as for a pseudo-terminal.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning"),
    pytest.mark.slow,
]

CHAT = "chat-0123456789abcdef"
TEXT = "Once upon a time"


async def test_reply_of_use_chat_is_followed_resumed_and_stopped_by_other_protocols(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        page = await stack.enter_async_context(ai_sdk_chat(server, CHAT))
        page.send("say", text="Tell me a story")
        reply = (await puppet.reply()).say(Thinking("hm"), "Once ")
        name = (await page.sees("Once "))["id"]

        async with Chat.open(server) as cut:
            await cut.resume(f"/api/chat/{name}")
            await cut.next("token")
        reply.say("upon ")
        await page.sees("Once upon ")

        person = await stack.enter_async_context(terminal(server.url, "--conversation", CHAT))
        await person.sees("Once upon ")
        events = await stack.enter_async_context(Chat.open(server))
        await events.resume(f"/api/chat/{name}", headers={"last-event-id": cut.last})
        other = await stack.enter_async_context(agent(server, CHAT))
        other.send("connect")
        await other.sees("Once upon ")
        reply.say("a time")
        await person.sees("a time")
        await page.sees(TEXT)
        await other.sees("a time")

        late = await stack.enter_async_context(agent(server, CHAT))
        late.send("stop")
        assert (await late.next("stopped"))["ids"] == [name]
        assert reply.closed.is_set()

        text, done = await events.text()
        assert (cut.said + text, done["id"], done["by"]) == (TEXT, name, "client")
        message = (await page.next("finished"))["message"]
        assert (message["id"], text_of(message)) == (name, TEXT)
        assert message["metadata"]["by"] == "client"
        await person.sees("[stopped]")
        assert await other.next("outcome") == "cancelled"
        late.send("connect")
        for one in (other, late):
            *_, message = await one.next("messages")
            assert (message["id"], message["content"]) == (name, TEXT)

    async with client(server) as chat:
        await chat.send({"type": "open", "conversation": CHAT})
        history = await chat.next("history")
    _, stored = history["messages"]
    assert (stored["id"], stored["content"], stored["partial"]) == (
        *(name, TEXT),
        "client",
    )
    await until(lambda: not server.app.hub.live)
