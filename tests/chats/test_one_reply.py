"""One reply, followed and stopped by clients of four protocols at once."""

import asyncio
import contextlib
import json
import re
import shlex

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.client import client
from tests.support.npm import agent, ai_sdk_chat, text_of
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, until
from tests.support.terminal import terminal
from tests.support.tools import ROOT, require_node, require_npm_package

# Python 3.12 warns about a fork in a process with threads, as for a pseudo-terminal.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning"),
    pytest.mark.slow,
]

HTTP = (ROOT / "examples/http.md").read_text()
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
        await person.sees("Once upon")
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


async def test_commands_of_the_readme_follow_continue_and_stop_a_reply(
    server: wsserver.Server, puppet: Puppet
) -> None:
    section = HTTP.partition("## One reply, several protocols")[2]
    commands = section.split("```")[3].replace("localhost:3001", f"127.0.0.1:{server.port}")
    following, continuing, stopping = map(shlex.split, commands.strip().splitlines())
    name = following[-1]
    async with ai_sdk_chat(server, name) as page:
        page.send("say", text="Tell me a story")
        reply = (await puppet.reply()).say(*"Once")
        generation = (await page.sees("Once"))["id"]
        assert following[:2] == ["wsserver", "chat"]
        async with terminal(*following[2:]) as person:
            await person.sees("Once")
            curl = await asyncio.create_subprocess_exec(
                *(re.sub(r"(?<!-)ID", generation, part) for part in continuing),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            assert curl.stdout is not None
            async with asyncio.timeout(BOUND):
                await curl.stdout.readuntil(b'"text":"e"')
            stopped = await asyncio.create_subprocess_exec(
                *stopping, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            async with asyncio.timeout(BOUND):
                told, _ = await stopped.communicate()
                assert json.loads(told) == {"type": "stopped", "ids": [generation]}
                assert reply.closed.is_set()
                rest, _ = await curl.communicate()
            assert b'"by":"client"' in rest
            await person.sees("[stopped]")
            assert (await page.next("finished"))["message"]["id"] == generation


async def test_agent_of_the_readme_runs_and_connects(
    server: wsserver.Server, puppet: Puppet
) -> None:
    section = HTTP.partition("## With AG-UI")[2]
    program = section.partition("```js\n")[2].partition("```")[0]
    (connecting,) = re.findall(r"`(new HttpAgent\(.*)`", section)
    package = require_npm_package("@ag-ui/client") / "dist/index.mjs"
    made, _, called = connecting.partition(".runAgent")
    script = f"""
        {program}
        const again = {made}
        await again.runAgent{called}
        console.log(JSON.stringify([agent.messages, again.messages].map((m) => m.at(-1).content)))
    """.replace("@ag-ui/client", str(package)).replace("localhost:3001", f"127.0.0.1:{server.port}")
    node = await asyncio.create_subprocess_exec(
        *(require_node(), "--input-type=module", "--eval", f"const threadId = {CHAT!r}\n{script}"),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(BOUND):
        (await puppet.reply()).say("Hi.").end()
        told, _ = await node.communicate()
    assert json.loads(told) == ["Hi.", "Hi."]
