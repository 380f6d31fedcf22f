"""AG-UI: clients that come back to a thread."""

import asyncio
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.chats.runs import THREAD, connect, events_of, run, run_input
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, until
from wsserver.content import ToolUse


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


async def test_run_whose_id_is_null_is_stopped_by_its_client(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat:
        chat.send("POST", "/agui", run_input(("user", "?"), forwardedProps={"id": None}))
        reply = await puppet.reply()
    async with asyncio.timeout(BOUND):  # less than the grace time
        await reply.closed.wait()


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


async def test_client_connects_to_the_run_that_replaces_one_that_ends(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Chat.open(server) as chat, Chat.open(server) as other:
        first = events_of(chat, run_input(("user", "one")))
        await anext(first)
        replaced = (await puppet.reply()).say("1")
        assert (await anext(first))["type"] == "TEXT_MESSAGE_START"
        replaced.hold = asyncio.Event()
        second = events_of(other, run_input(("user", "two"), runId="run-2"))
        assert (await anext(second))["runId"] == "run-2"
        replacing = asyncio.create_task(puppet.reply(1))
        replacing.add_done_callback(lambda done: done.result().say("2").end())
        _, snapshot, *events = await connect(server, replaced.hold.set)
        assert [m["content"] for m in snapshot["messages"]] == ["one", "1", "two"]
        assert [event["delta"] for event in events if "delta" in event] == ["2"]


async def test_snapshot_of_an_edited_chat_has_only_its_own_messages(
    server: wsserver.Server, puppet: Puppet
) -> None:
    def said(role: str, text: str) -> dict[str, object]:
        return {"id": text, "role": role, "parts": [{"type": "text", "text": text}]}

    async with Chat.open(server) as chat:
        await run(chat, puppet, run_input(("user", "one")), lambda reply: reply.say("1").end())
    edited = [said("user", "changed"), said("assistant", "changed, too"), said("user", "two")]
    async with Chat.open(server) as chat:
        chat.send("POST", "/api/chat", {"id": THREAD, "messages": edited})
        reply = await puppet.reply(1)
        _, snapshot, *_ = await connect(server, lambda: reply.say("2").end())
    assert [m["content"] for m in snapshot["messages"]] == ["changed", "changed, too", "two"]
