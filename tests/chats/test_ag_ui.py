"""AG-UI: events as its own Python types and its own client have them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from ag_ui.core import Event
from pydantic import TypeAdapter

import wsserver
from tests.chats.events import Chat
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, until
from tests.support.tools import ROOT, require_node, require_npm_package
from wsserver import Code, ModelError
from wsserver.content import ToolUse

THREAD = "thread-of-the-test-1"
EVENT: TypeAdapter[Any] = TypeAdapter(Event)


def run_input(*messages: tuple[str, object], **keys: object) -> dict[str, object]:
    listed = [
        {"id": f"message-{number}", "role": role, "content": content}
        for number, (role, content) in enumerate(messages)
    ]
    given: dict[str, object] = {"state": {}, "tools": [], "context": [], "forwardedProps": {}}
    return {"threadId": THREAD, "runId": "run-1", "messages": listed, **given, **keys}


async def events_of(chat: Chat, body: object) -> AsyncIterator[dict[str, Any]]:
    """Post a run, and give its events, each of which AG-UI's own types accept."""
    chat.send("POST", "/agui", body)
    status, headers = await chat.browser.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    while chunk := await chat.browser.chunk():
        for event in chunk.decode().removesuffix("\n\n").split("\n\n"):
            parsed = json.loads(event.removeprefix("data: "))
            EVENT.validate_python(parsed)
            yield parsed


async def test_run_has_reasoning_text_and_usage(server: wsserver.Server, puppet: Puppet) -> None:
    async with Chat.open(server) as chat:
        asking = asyncio.create_task(puppet.reply())
        asking.add_done_callback(lambda done: done.result().say(Thinking("hm"), "Hel", "lo").end())
        events = [event async for event in events_of(chat, run_input(("user", "Hello?")))]
    types = [event["type"] for event in events]
    assert types[0] == "RUN_STARTED"
    for name in ("REASONING", "REASONING_MESSAGE", "TEXT_MESSAGE"):
        assert types.count(f"{name}_START") == types.count(f"{name}_END") == 1
    text = [event["delta"] for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert "".join(text) == "Hello"
    finished = events[-1]
    assert (finished["type"], finished["runId"]) == ("RUN_FINISHED", "run-1")
    assert finished["outcome"] == {"type": "success"}
    assert finished["usage"][0]["outputTokens"] > 0


async def test_error_of_the_model_closes_the_open_message(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        asking = asyncio.create_task(puppet.reply())
        asking.add_done_callback(
            lambda done: done.result().say("half").fail(ModelError(Code.OVERLOADED))
        )
        events = [event async for event in events_of(chat, run_input(("user", "Hello?")))]
    assert [event["type"] for event in events[-2:]] == ["TEXT_MESSAGE_END", "RUN_ERROR"]
    assert events[-1]["code"] == "overloaded"


async def test_system_messages_and_images_reach_the_model(
    server: wsserver.Server, puppet: Puppet
) -> None:
    image = {"type": "image", "source": {"type": "data", "value": "aGk=", "mimeType": "image/png"}}
    content = [{"type": "text", "text": "What is this?"}, image]
    body = run_input(("system", "Be brief."), ("user", content))
    async with Chat.open(server) as chat:
        asking = asyncio.create_task(puppet.reply())
        asking.add_done_callback(lambda done: done.result().say("A dot.").end())
        assert [event async for event in events_of(chat, body)]
    request = asking.result().request
    assert request.system == "Be brief."
    text, picture = request.messages[-1].blocks
    assert (text.type, picture.type) == ("text", "image")
    assert picture.source["media_type"] == "image/png"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        (run_input(), 400),
        (run_input(("assistant", "Hello")), 400),
        (run_input(("user", 5)), 400),
        (run_input(("user", "x" * 40_000)), 413),
        ({**run_input(("user", "x")), "messages": "x"}, 400),
    ],
)
async def test_unusable_input_is_refused(
    server: wsserver.Server, puppet: Puppet, body: object, status: int
) -> None:
    async with Chat.open(server) as chat:
        got, error = await chat.ask("POST", "/agui", body)
        assert (got, error["type"]) == (status, "error")
    assert not puppet.replies


async def test_client_that_leaves_stops_the_run(server: wsserver.Server, puppet: Puppet) -> None:
    async with Chat.open(server) as chat:
        chat.send("POST", "/agui", run_input(("user", "Hello?")))
        reply = await puppet.reply()
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()
    await until(lambda: not server.app.hub.live)


class Agent:
    """AG-UI's own client, in a process of Node."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def send(self, **command: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def next(self, key: str) -> Any:
        """Return the next value of a kind: ``event``, ``failed`` or ``messages``."""
        assert self._process.stdout is not None
        async with asyncio.timeout(BOUND):
            while True:
                told = json.loads(await self._process.stdout.readline())
                if key in told:
                    return told[key]


@asynccontextmanager
async def agent(server: wsserver.Server) -> AsyncIterator[Agent]:
    require_npm_package("@ag-ui/client")
    process = await asyncio.create_subprocess_exec(
        require_node(),
        str(ROOT / "tests/js/ag_ui.mjs"),
        f"http://127.0.0.1:{server.port}/agui",
        THREAD,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Agent(process)
    finally:
        process.kill()
        await process.wait()


@pytest.mark.slow
async def test_client_of_ag_ui_runs_twice_and_aborts(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with agent(server) as client:
        client.send(say="first")
        (await puppet.reply()).say(Thinking("hm"), "one").end()
        messages = await client.next("messages")
        assert [m["content"] for m in messages if m["role"] != "reasoning"] == ["first", "one"]
        client.send(say="second")
        reply = await puppet.reply(1)
        assert [m.text for m in reply.request.messages] == ["first", "one", "second"]
        reply.say("half")
        while (await client.next("event"))["type"] != "TEXT_MESSAGE_CONTENT":
            pass
        client.send(stop=True)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()


async def test_messages_without_text_for_the_model_are_left_out(
    server: wsserver.Server, puppet: Puppet
) -> None:
    paper = {"type": "document", "source": {"type": "url", "value": "https://example.com/a.pdf"}}
    parts: list[object] = [{"type": "text", "text": "Read."}, paper, {"type": "binary"}, "x"]
    body = run_input(
        ("user", "first"), ("assistant", None), ("tool", "result"), ("user", " "), ("user", parts)
    )
    async with Chat.open(server) as chat:
        asking = asyncio.create_task(puppet.reply())
        tool = ToolUse("tool-1", "look", {})
        asking.add_done_callback(lambda done: done.result().say(tool, "Done.").end())
        assert [event async for event in events_of(chat, body)]
    blocks = asking.result().request.messages[-1].blocks
    assert [block.type for block in blocks] == ["text", "document"]


async def test_run_ends_with_the_login(puppet: Puppet) -> None:
    async def brief(_: str | None, __: wsserver.Handshake) -> wsserver.Principal:
        return wsserver.Principal("ada", expires=time.time() + 0.2)

    async with wsserver.serve(puppet, authenticate=brief, port=0) as server:
        async with Chat.open(server) as chat:
            events = [event async for event in events_of(chat, run_input(("user", "Hello?")))]
    assert (events[-1]["type"], events[-1]["code"]) == ("RUN_ERROR", "unauthenticated")
