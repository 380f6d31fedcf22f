"""AG-UI: runs and stops."""

import asyncio
import gc
import time
import weakref

import pytest

import wsserver
from tests.chats.events import Chat
from tests.chats.runs import THREAD, events_of, run, run_input
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Code, ModelError, Usage
from wsserver.content import ToolUse


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
