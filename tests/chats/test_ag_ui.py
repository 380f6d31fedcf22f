"""AG-UI: requests, and events as its own Python types have them."""

import asyncio
import gc
import json
import time
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ag_ui.core import Event
from pydantic import BaseModel, TypeAdapter

import wsserver
from tests.chats.events import Chat
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, Reply, until
from wsserver import Code, ModelError, Usage
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


async def test_texts_of_a_reply_are_one_message_with_its_id(
    server: wsserver.Server, puppet: Puppet
) -> None:
    pieces = (Thinking("a"), "one ", Thinking("b"), "two ", ToolUse("tool-1", "look", {}), "three")
    async with Chat.open(server) as chat:
        events = await run(
            chat, puppet, run_input(("user", "?")), lambda reply: reply.say(*pieces).end()
        )
    texts = [event for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"]
    (name,) = {event["messageId"] for event in texts}
    assert server.app.hub.known("anonymous", name) is not None
    assert "".join(event["delta"] for event in texts) == "one two three"
    thoughts = [event for event in events if event["type"] == "REASONING_MESSAGE_CONTENT"]
    assert len({event["messageId"] for event in thoughts}) == 2


async def test_usage_counts_tokens_of_the_cache_as_input(
    server: wsserver.Server, puppet: Puppet
) -> None:
    usage = Usage(
        1, 7, cache_creation_input_tokens=20, cache_read_input_tokens=300, thinking_tokens=4
    )
    async with Chat.open(server) as chat:
        events = await run(
            chat, puppet, run_input(("user", "?")), lambda reply: reply.say("one", usage).end()
        )
    assert events[-1]["usage"] == [
        {
            "model": "puppet",
            "inputTokens": 321,
            "outputTokens": 7,
            "reasoningTokens": 4,
            "cachedInputTokens": 300,
            "cacheWriteInputTokens": 20,
        }
    ]


async def test_run_declares_its_version_and_its_parent(
    server: wsserver.Server, puppet: Puppet
) -> None:
    body = run_input(("user", "?"), parentRunId="run-0", protocolVersion="1.0")
    async with Chat.open(server) as chat:
        started = (await run(chat, puppet, body, lambda reply: reply.say("one").end()))[0]
    expected = {"threadId": THREAD, "runId": "run-1", "parentRunId": "run-0"}
    assert started == {"type": "RUN_STARTED", **expected, "protocolVersion": "1.0"}


async def test_error_before_the_first_token_is_the_second_event(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        events = await run(
            chat,
            puppet,
            run_input(("user", "?")),
            lambda reply: reply.fail(ModelError(Code.OVERLOADED)),
        )
    assert [event["type"] for event in events] == ["RUN_STARTED", "RUN_ERROR"]


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
        (run_input(("user", "x"), forwardedProps={"id": "?"}), 400),
        ({**run_input(("user", "x")), "messages": "x"}, 400),
        (run_input(("user", "x"), threadId="\ud800"), 400),
        (run_input(("user", "x"), runId="x" * 257), 400),
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


@pytest.mark.parametrize(
    ("part", "kind", "source"),
    [
        (
            {"mimeType": "image/png", "data": "aGk="},
            "image",
            {"type": "base64", "media_type": "image/png", "data": "aGk="},
        ),
        (
            {"mimeType": "application/pdf", "url": "https://example.com/a.pdf"},
            "document",
            {"type": "url", "url": "https://example.com/a.pdf"},
        ),
    ],
)
async def test_binary_parts_of_older_clients_reach_the_model(
    server: wsserver.Server, puppet: Puppet, part: object, kind: str, source: object
) -> None:
    assert isinstance(part, dict)
    content = [{"type": "text", "text": "?"}, {"type": "binary", **part}]
    async with Chat.open(server) as chat:
        body = run_input(("user", content))
        await run(chat, puppet, body, lambda reply: reply.say("A dot.").end())
    block = puppet.replies[0].request.messages[-1].blocks[-1]
    assert (block.type, block.source) == (kind, source)  # type: ignore[union-attr]


async def test_only_the_newest_message_is_added_to_a_known_thread(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await run(chat, puppet, run_input(("user", "one")), lambda reply: reply.say("1").end())
    async with Chat.open(server) as chat:
        body = run_input(("user", "changed"), ("assistant", "changed"), ("user", "two"))
        await run(chat, puppet, body, lambda reply: reply.say("2").end())
    assert [m.text for m in puppet.replies[1].request.messages] == ["one", "1", "two"]


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


async def test_client_connects_to_the_messages_of_a_thread(
    server: wsserver.Server, puppet: Puppet
) -> None:
    image = {"type": "image", "source": {"type": "data", "value": "aGk=", "mimeType": "image/png"}}
    content = [{"type": "text", "text": "What is this?"}, image]
    async with Chat.open(server) as chat:
        await run(
            chat,
            puppet,
            run_input(("user", content)),
            lambda reply: reply.say(Thinking("hm"), "A dot.").end(),
        )
    started, snapshot, finished = await connect(server)
    assert (started["type"], started["runId"]) == ("RUN_STARTED", "run-connect")
    assert (finished["type"], finished["outcome"]) == ("RUN_FINISHED", {"type": "success"})
    question, thought, answer = snapshot["messages"]
    assert (question["role"], question["content"]) == ("user", content)
    assert (thought["role"], thought["content"]) == ("reasoning", "hm")
    assert (answer["role"], answer["content"]) == ("assistant", "A dot.")


async def test_client_connects_to_the_running_reply_from_its_start(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        running = events_of(chat, run_input(("user", "Hello?")))
        assert (await anext(running))["type"] == "RUN_STARTED"
        reply = (await puppet.reply()).say(Thinking("hm"), "Hel")
        while (await anext(running))["type"] != "TEXT_MESSAGE_CONTENT":
            pass
        events = await connect(server, lambda: reply.say("lo").end())
    snapshot = events[1]
    assert [(m["role"], m["content"]) for m in snapshot["messages"]] == [
        ("user", "Hello?"),
        ("reasoning", ""),
        ("assistant", ""),
    ]
    texts = [event for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert "".join(event["delta"] for event in texts) == "Hello"
    assert {event["messageId"] for event in texts} == {snapshot["messages"][-1]["id"]}


async def test_connection_to_an_unknown_thread_is_an_empty_run(server: wsserver.Server) -> None:
    assert [event["type"] for event in await connect(server)] == ["RUN_STARTED", "RUN_FINISHED"]


async def test_history_that_only_the_client_has_is_shown_while_its_reply_runs(
    server: wsserver.Server, puppet: Puppet
) -> None:
    body = run_input(("user", "one"), ("assistant", "two"), ("user", "three"))
    async with Chat.open(server) as chat:
        chat.send("POST", "/agui", body)
        reply = await puppet.reply()
        snapshot = (await connect(server, lambda: reply.say("four").end()))[1]
    assert [m["content"] for m in snapshot["messages"]] == ["one", "two", "three"]
    assert len({m["id"] for m in snapshot["messages"]}) == 3


async def test_run_with_an_id_outlives_its_client(server: wsserver.Server, puppet: Puppet) -> None:
    name = "0123456789abcdef0123"
    async with Chat.open(server) as chat:
        chat.send("POST", "/agui", run_input(("user", "?"), forwardedProps={"id": name}))
        reply = (await puppet.reply()).say("one ")
        await until(lambda: reply.said == ["one "])
    await until(lambda: not server.listener.connections)
    events = await connect(server, lambda: reply.say("two").end())
    texts = [event for event in events if event["type"] == "TEXT_MESSAGE_CONTENT"]
    assert "".join(event["delta"] for event in texts) == "one two"
    assert {event["messageId"] for event in texts} == {name}


async def test_stop_of_a_thread_is_answered_once_the_model_has_closed(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat, Chat.open(server) as other:
        running = asyncio.create_task(
            run(chat, puppet, run_input(("user", "?")), lambda reply: reply.say("half"))
        )
        reply = await puppet.reply()
        await until(lambda: reply.said == ["half"])
        status, stopped = await other.ask("POST", f"/agui/{THREAD}/stop")
        assert (status, len(stopped["ids"])) == (200, 1)
        assert reply.closed.is_set()
        finished = (await running)[-1]
    assert finished["outcome"] == {"type": "cancelled"}
    assert finished["metadata"] == {"by": "client"}
    assert "result" not in finished


async def test_stop_of_a_thread_drops_the_prompts_that_wait(
    server: wsserver.Server, puppet: Puppet
) -> None:
    waiting = {"prompt": "two", "conversation": THREAD, "on_busy": "queue"}
    async with Chat.open(server) as chat, Chat.open(server) as other, Chat.open(server) as third:
        chat.send("POST", "/agui", run_input(("user", "one")))
        await puppet.reply()
        assert (await other.prompt(waiting))["queued"] == 1
        _, stopped = await third.ask("POST", f"/agui/{THREAD}/stop")
        assert len(stopped["ids"]) == 2
        assert (await other.text())[1]["by"] == "client"
    assert len(puppet.replies) == 1


async def test_stop_of_a_thread_without_a_run_is_not_running(server: wsserver.Server) -> None:
    async with Chat.open(server) as chat:
        status, error = await chat.ask("POST", f"/agui/{THREAD}/stop")
        assert (status, error["code"]) == (409, "not_running")


async def test_snapshot_leaves_out_the_turn_that_is_replaced(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        start = await chat.prompt({"prompt": "one", "conversation": THREAD})
        (await puppet.reply()).say("1").end()
        await chat.text()
    async with Chat.open(server) as chat:
        again = {"prompt": "another", "conversation": THREAD, "retry_of": start["id"]}
        await chat.prompt(again)
        reply = await puppet.reply(1)
        snapshot = (await connect(server, lambda: reply.say("2").end()))[1]
    assert [m["content"] for m in snapshot["messages"]] == ["another"]


async def test_second_run_of_a_thread_cancels_the_first(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat, Chat.open(server) as other:
        first = asyncio.create_task(
            run(chat, puppet, run_input(("user", "one")), lambda reply: reply.say("half"))
        )
        await puppet.reply()
        body = run_input(("user", "two"), runId="run-2")
        second = await run(other, puppet, body, lambda reply: reply.say("whole").end())
        cancelled = (await first)[-1]
    assert (cancelled["runId"], cancelled["outcome"]) == ("run-1", {"type": "cancelled"})
    assert cancelled["metadata"] == {"by": "replaced"}
    assert (second[-1]["runId"], second[-1]["outcome"]) == ("run-2", {"type": "success"})


PIECES = (Thinking("a"), "one ", ToolUse("tool-1", "look", {}), "two ", Thinking("b"), "three")


def apply(messages: dict[str, tuple[str, str]], event: dict[str, Any]) -> None:
    """Change the messages of a client, by id, as ``@ag-ui/client`` does."""
    kind, name = event["type"], event.get("messageId", "")
    if kind == "MESSAGES_SNAPSHOT":
        given = event["messages"]
        reasoning = any(m["role"] == "reasoning" for m in given)
        kept = {name: m for name, m in messages.items() if m[0] == "reasoning" and not reasoning}
        messages.clear()
        messages.update(kept | {m["id"]: (m["role"], m["content"]) for m in given})
    elif kind in {"TEXT_MESSAGE_START", "REASONING_MESSAGE_START"}:
        messages.setdefault(name, (event["role"], ""))
    elif kind in {"TEXT_MESSAGE_CONTENT", "REASONING_MESSAGE_CONTENT"}:
        role, content = messages[name]
        messages[name] = role, content + event["delta"]


async def test_snapshot_has_the_ids_of_the_client(server: wsserver.Server, puppet: Puppet) -> None:
    messages = [{"id": "a", "role": "user", "content": "Go on"}]
    for number in range(2):
        async with Chat.open(server) as chat:
            body = run_input(("user", "Go on"))
            events = await run(chat, puppet, body, lambda reply: reply.say("one").end())
        name = next(event["messageId"] for event in events if "messageId" in event)
        messages.append({"id": name, "role": "assistant", "content": "one"})
        messages.append({"id": f"b{number}", "role": "user", "content": "Go on"})
    snapshot = (await connect(server, messages=messages))[1]
    assert snapshot["messages"] == messages[:-1]


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "one", "id": "part-1"}],
        [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        [{"type": "text", "text": "one"}, {"type": "audio", "source": {"type": "url"}}],
    ],
)
async def test_snapshot_has_the_id_of_a_message_with_parts(
    server: wsserver.Server, puppet: Puppet, parts: object
) -> None:
    async with Chat.open(server) as chat:
        await run(chat, puppet, run_input(("user", parts)), lambda reply: reply.say("1").end())
    given = [{"id": "a", "role": "user", "content": parts}]
    question, _ = (await connect(server, messages=given))[1]["messages"]
    assert question["id"] == "a"


async def test_snapshot_has_no_id_that_cannot_be_encoded(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        await run(chat, puppet, run_input(("user", "?")), lambda reply: reply.say("one").end())
    given = [{"id": "\ud800", "role": "user", "content": "?"}]
    messages = (await connect(server, messages=given, parentRunId="\ud800"))[1]["messages"]
    assert [message["content"] for message in messages] == ["?", "one"]


async def test_snapshot_of_an_unknown_thread_has_the_ids_of_the_client(
    server: wsserver.Server, puppet: Puppet
) -> None:
    body = run_input(("user", "one"), ("assistant", "two"), ("user", "three"))
    async with Chat.open(server) as chat:
        chat.send("POST", "/agui", body)
        reply = await puppet.reply()
        messages = body["messages"]
        events = await connect(server, lambda: reply.say("four").end(), messages=messages)
    assert events[1]["messages"] == messages


@pytest.mark.parametrize("seen", range(17))
async def test_reply_is_exact_after_a_cut_at_any_event(
    server: wsserver.Server, puppet: Puppet, seen: int
) -> None:
    messages: dict[str, tuple[str, str]] = {"message-0": ("user", "?")}
    body = run_input(("user", "?"), forwardedProps={"id": "0123456789abcdef0123"})
    async with Chat.open(server) as chat:
        asking = asyncio.create_task(puppet.reply())
        asking.add_done_callback(lambda done: done.result().say(*PIECES))
        events = events_of(chat, body)
        for _ in range(1 + seen):
            apply(messages, await anext(events))
    await until(lambda: not server.listener.connections)
    given = [{"id": "message-0", "role": "user", "content": "?"}]
    for event in await connect(server, asking.result().end, messages=given):
        apply(messages, event)
    assert messages == {
        "message-0": ("user", "?"),
        "0123456789abcdef0123-0": ("reasoning", "a"),
        "0123456789abcdef0123": ("assistant", "one two three"),
        "0123456789abcdef0123-4": ("reasoning", "b"),
    }


async def test_reply_to_an_unknown_thread_is_not_kept_after_its_end(puppet: Puppet) -> None:
    body = run_input(("user", "one"), ("assistant", "two"), ("user", "three"))
    async with wsserver.serve(puppet, port=0, replay_size=1) as server:
        async with Chat.open(server) as chat:
            running = events_of(chat, body)
            await anext(running)
            (generation,) = server.app.hub.scheduler.live
            kept = weakref.ref(generation)
            del generation
            (await puppet.reply()).say("four").end()
            assert (await anext(running))["type"] == "TEXT_MESSAGE_START"
            assert [event async for event in running][-1]["type"] == "RUN_FINISHED"
        await until(lambda: not server.listener.connections)
        gc.collect()
        assert kept() is None
