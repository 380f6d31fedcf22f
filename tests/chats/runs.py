"""Runs of AG-UI, whose events AG-UI's own Python types accept."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from ag_ui.core import Event
from pydantic import BaseModel, TypeAdapter

import wsserver
from tests.chats.events import Chat
from tests.support.puppet import Puppet, Reply

__all__ = ["THREAD", "connect", "events_of", "run", "run_input"]

THREAD = "thread-of-the-test-1"
EVENT: TypeAdapter[Any] = TypeAdapter(Event)


def run_input(*messages: tuple[str, object], **keys: object) -> dict[str, object]:
    listed = [
        {"id": f"message-{number}", "role": role, "content": content}
        for number, (role, content) in enumerate(messages)
    ]
    given: dict[str, object] = {"state": {}, "tools": [], "context": [], "forwardedProps": {}}
    return {"threadId": THREAD, "runId": "run-1", "messages": listed, **given, **keys}


def check(event: BaseModel) -> None:
    """Check that AG-UI knows all keys of an event, and that none is null."""
    assert not event.model_extra, event
    for name in event.model_fields_set:
        value = getattr(event, name)
        assert value is not None, (event, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                check(inner)


async def events_of(
    chat: Chat, body: object, target: str = "/agui"
) -> AsyncIterator[dict[str, Any]]:
    """Post a run, and give its events, each of which AG-UI's own types accept."""
    chat.send("POST", target, body)
    status, headers = await chat.browser.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    if "content-length" in headers:
        data = await chat.browser.reader.readexactly(int(headers["content-length"]))
        for event in parse(data):
            yield event
        return
    while data := await chat.browser.chunk():
        for event in parse(data):
            yield event


def parse(data: bytes) -> list[dict[str, Any]]:
    lines = data.decode().removesuffix("\n\n").split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    for event in events:
        check(EVENT.validate_python(event))
    return events


async def run(
    chat: Chat, puppet: Puppet, body: object, say: Callable[[Reply], object]
) -> list[dict[str, Any]]:
    """Post a run, and return its events; ``say`` tells the model what to reply."""
    asking = asyncio.create_task(puppet.reply(len(puppet.replies)))
    asking.add_done_callback(lambda done: say(done.result()))
    return [event async for event in events_of(chat, body)]


async def connect(
    server: wsserver.Server, say: Callable[[], object] = lambda: None, **keys: object
) -> list[dict[str, Any]]:
    """Connect to the thread, and return all events; ``say`` is called after the first one."""
    body = {"threadId": THREAD, "runId": "run-connect", **keys}
    async with Chat.open(server) as chat:
        events = events_of(chat, body, "/agui/connect")
        first = await anext(events)
        say()
        return [first, *[event async for event in events]]
