"""Replies in the Python client, without lost connections."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.support.puppet import Puppet, until
from tests.support.replies import Frame, Send, end_of, failure_of, read, scripted
from wsserver import Code, ModelError, Thinking, content
from wsserver.client import (
    ConnectionFailed,
    Message,
    ReplyError,
    State,
    Usage,
    connect,
    new_id,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


async def test_reply_yields_text_thinking_and_end(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Tell me a story")
        (await puppet.reply()).say(Thinking("hm"), "Once ", "upon").end()
        assert await read(reply) == "Once upon"
        thought = [text async for text in reply.thinking]
        assert ("".join(thought), reply.thoughts) == ("hm", "hm")
        end = await end_of(reply)
        assert (end.reason, end.by, end.text, end.saved) == ("end_turn", None, "Once upon", True)
        assert end.usage == reply.usage
        assert end.usage.estimated
        assert (reply.model, reply.conversation) == ("puppet", chat.conversation)
        assert chat.models == ("puppet",)
        history = await chat.history()
        assert end.thought == reply.thought == history.messages[-1].thought is not None
        again = chat.prompt("Go on")
        (await puppet.reply(1)).say("And so").end()
        assert await read(again) == "And so"
        assert [m.content for m in puppet.replies[1].request.messages][:2] == [
            "Tell me a story",
            "Once upon",
        ]


async def test_break_from_iteration_does_not_stop_reply(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        async for text in reply:
            assert text == "Once "
            break
        said.say("upon").end()
        assert (await end_of(reply)).text == "Once upon"


async def test_iteration_raises_failure_after_text(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Go")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED, retry_after=7))
        pieces = aiter(reply)
        assert await anext(pieces) == reply.text == "Half"
        with pytest.raises(ReplyError, match="overloaded") as raised:
            await anext(pieces)
        assert (raised.value.retryable, raised.value.retry_after) == (True, 7)
        assert raised.value.ref
        assert reply.usage is not None


@pytest.mark.parametrize("failing", [False, True])
async def test_chat_exit_stops_its_replies(
    server: wsserver.Server, puppet: Puppet, failing: bool
) -> None:
    with contextlib.suppress(RuntimeError):
        async with connect(server.url) as chat:
            reply = chat.prompt("Tell me a story")
            said = (await puppet.reply()).say("Once ")
            await anext(aiter(reply))
            if failing:
                raise RuntimeError
    assert said.closed.is_set()
    end = await end_of(reply)
    assert (end.reason, end.by, end.text) == ("stopped", "client", "Once ")
    assert chat.state is State.CLOSED
    with pytest.raises(ConnectionFailed):
        chat.prompt("More")


async def test_chat_exit_does_not_stop_followed_reply(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        async with connect(server.url) as other:
            followed = other.resume(reply.id)
            assert await anext(aiter(followed)) == "Once "
            assert other.resume(reply.id) is followed
        said.say("upon").end()
        assert await read(reply) == "Once upon"
        with pytest.raises(ConnectionFailed):
            await end_of(followed)
        later = chat.resume(reply.id, after=1)
        assert await read(later) == "upon"


async def test_prompt_with_messages_has_no_conversation(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        messages = [("user", "One"), ("assistant", "Two"), ("user", "Three")]
        reply = chat.prompt(messages=messages, system="Be kind", max_tokens=5)  # type: ignore[arg-type]
        (await puppet.reply()).say("Four").end()
        request = puppet.replies[0].request
        assert (await end_of(reply)).text == "Four"
        assert [m.content for m in request.messages] == ["One", "Two", "Three"]
        assert (request.system, request.max_tokens, reply.conversation) == ("Be kind", 5, None)
        assert await chat.conversations() == []


@pytest.mark.parametrize("prompt", ["", " ", "half of \ud83e"])
async def test_invalid_prompt_raises_value_error(server: wsserver.Server, prompt: str) -> None:
    async with connect(server.url) as chat:
        with pytest.raises(ValueError, match="prompt"):
            chat.prompt(prompt)


async def test_retry_replaces_failed_turn(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat:
        first = chat.prompt("One")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        await failure_of(first)
        again = chat.prompt("Better one", retry_of=first.id)
        (await puppet.reply(1)).say("Whole").end()
        assert await read(again) == "Whole"
        assert [m.content for m in puppet.replies[1].request.messages] == ["Better one"]
        history = await chat.history()
        assert [m.text for m in history.messages] == ["Better one", "Whole"]
        assert (await failure_of(chat.prompt("One", retry_of=first.id))).code == "not_last"


async def test_slow_reader_gets_rest_as_one_piece() -> None:
    async def long(request: wsserver.Request) -> AsyncIterator[str]:
        for _ in range(2000):
            yield "x" * 100
            await asyncio.sleep(0)

    async with wsserver.serve(long, port=0, drain_timeout=0) as server, connect(server.url) as chat:
        reply = chat.prompt("Go")
        pieces = aiter(reply)
        first = await anext(pieces)
        await end_of(reply)
        rest = [text async for text in pieces]
        assert len(rest) == 1, "all that came meanwhile is one text"
        assert len(first) + len(rest[0]) == 200_000


async def test_200_concurrent_replies_arrive_whole() -> None:
    async def echo(request: wsserver.Request) -> AsyncIterator[str]:
        for word in request.prompt.split():
            await asyncio.sleep(0)
            yield word + " "

    async with (
        wsserver.serve(echo, port=0, generations_per_socket=200) as server,
        connect(server.url) as chat,
    ):
        prompts = [f"{number} and {number} again " for number in range(200)]
        replies = [chat.prompt(prompt, conversation=new_id()) for prompt in prompts]
        assert await asyncio.gather(*map(read, replies)) == prompts


async def test_prompts_over_frame_rate_are_sent_later() -> None:
    async def echo(request: wsserver.Request) -> AsyncIterator[str]:
        yield request.prompt

    async with (
        wsserver.serve(
            echo, port=0, generations_per_socket=200, frame_burst=5, frame_rate=200, bad_frames=20
        ) as server,
        connect(server.url) as chat,
    ):
        replies = [chat.prompt(f"{n}", conversation=new_id()) for n in range(60)]
        assert await asyncio.gather(*map(read, replies)) == [f"{n}" for n in range(60)]
        assert len(await chat.conversations(limit=60)) == 60


async def test_prompt_over_limit_fails_if_retry_after_exceeds_patience(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, prompts_per_minute=1, drain_timeout=0) as server,
        connect(server.url, patience=5) as chat,
    ):
        first = chat.prompt("One")
        (await puppet.reply()).say("x").end()
        await end_of(first)
        reply = chat.prompt("Two")
        with pytest.raises(ReplyError) as raised:
            await end_of(reply)
        assert (raised.value.code, raised.value.retryable) == ("limit", True)
        assert raised.value.retry_after is not None
        assert 50 < raised.value.retry_after <= 60


@pytest.mark.parametrize("code", ["limit", "unavailable"])
async def test_refused_prompt_is_resent_after_retry_after(code: str) -> None:
    prompts: list[Frame] = []

    async def answer(frame: Frame, send: Send) -> None:
        prompts.append(frame)
        if len(prompts) == 1:
            error = {"type": "error", "code": code, "message": "Later.", "about": frame["id"]}
            await send(error, retryable=True, retry_after=0.1, request=frame["request"])
            return
        await send({"type": "start", "id": frame["id"], "model": "m"}, request=frame["request"])
        await send({"type": "done", "id": frame["id"], "seq": 0, "reason": "end", "usage": {}})

    async with scripted(answer) as url, connect(url) as chat:
        assert (await end_of(chat.prompt("Hi"))).reason == "end"
    assert [prompt["id"] for prompt in prompts] == [prompts[0]["id"]] * 2


async def test_stop_is_resent_while_the_node_of_the_reply_does_not_answer() -> None:
    stops: list[Frame] = []

    async def answer(frame: Frame, send: Send) -> None:
        if frame.get("type") != "stop":
            await send({"type": "start", "id": frame["id"], "model": "m"}, request=frame["request"])
            return
        stops.append(frame)
        about = {"about": frame["id"], "request": frame["request"]}
        if len(stops) < 3:
            error = {"type": "error", "code": "unavailable", "message": "Later.", **about}
            await send(error, retryable=True, retry_after=0.1)
            return
        usage = {"input_tokens": 1, "output_tokens": 1}
        await send(
            {"type": "done", "id": frame["id"], "seq": 0, "reason": "stopped", "usage": usage}
        )

    async with scripted(answer) as url, connect(url) as chat:
        reply = chat.prompt("Hi")
        await reply.accepted()
        await reply.stop()
        assert (await end_of(reply)).reason == "stopped"
    assert len(stops) == 3


async def test_prompt_after_idle_close_connects_again(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, idle_timeout=0.05) as server:
        async with connect(server.url) as chat:
            await until(lambda: chat.state is State.IDLE)
            reply = chat.prompt("Still there?")
            (await puppet.reply()).say("Yes").end()
            assert await read(reply) == "Yes"


# Content blocks and histories.


async def test_reply_assembles_content_blocks() -> None:
    block = json.dumps({"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}})
    citation = {"type": "char_location", "cited_text": "x"}
    frames: list[Frame] = [
        {"type": "thinking", "seq": 2, "text": "Let me "},
        {"type": "thinking", "seq": 3, "text": "see."},
        {"type": "thinking", "seq": 4, "text": "", "signature": "sig"},
        {"type": "token", "seq": 5, "text": "It ", "block": 1},
        {"type": "token", "seq": 6, "text": "is", "block": 1},
        {"type": "token", "seq": 7, "text": "", "citation": citation, "block": 1},
        {"type": "block", "seq": 8, "partial_json": block[:9], "block": 2},
        {"type": "block", "seq": 9, "partial_json": block[9:], "block": 2},
        {"type": "token", "seq": 10, "text": "so.", "block": 3},
    ]

    async def answer(frame: Frame, send: Send) -> None:
        await send({"type": "start", "id": frame["id"], "model": "m"}, request=frame["request"])
        for one in frames:
            await send(one, id=frame["id"])
        await send({"type": "done", "id": frame["id"], "seq": 10, "reason": "end", "usage": {}})

    async with scripted(answer) as url, connect(url) as chat:
        reply = chat.prompt("Hi")
        await end_of(reply)
        assert (reply.text, reply.thoughts) == ("It isso.", "Let me see.")
        assert reply.blocks == (
            content.Thinking("Let me see.", "sig"),
            content.Text("It is", {"citations": [citation]}),
            content.ToolUse("t", "add", {"a": 1}),
            content.Text("so."),
        )


async def test_reply_omits_unfinished_block() -> None:
    async def answer(frame: Frame, send: Send) -> None:
        await send({"type": "start", "id": frame["id"], "model": "m"}, request=frame["request"])
        await send({"type": "token", "id": frame["id"], "seq": 1, "text": "Hm"})
        await send(
            {"type": "block", "id": frame["id"], "seq": 2, "block": 1, "partial_json": '{"type'}
        )
        await send({"type": "done", "id": frame["id"], "seq": 2, "reason": "end", "usage": {}})

    async with scripted(answer) as url, connect(url) as chat:
        reply = chat.prompt("Hi")
        await end_of(reply)
        assert reply.blocks == (content.Text("Hm"),)


async def test_prompt_with_content_blocks_reaches_model(
    server: wsserver.Server, puppet: Puppet
) -> None:
    image = content.Image({"type": "url", "url": "https://example.com/duck.png"})
    async with connect(server.url) as chat:
        reply = chat.prompt([content.Text("What is this?"), image])
        (await puppet.reply()).say("A duck").end()
        await end_of(reply)
        asked, said = (await chat.history()).messages
        assert asked.blocks == (content.Text("What is this?"), image)
        again = chat.prompt(messages=[asked, said, ("user", "Are you sure?")])
        (await puppet.reply(1)).say("Yes").end()
        await end_of(again)
        first, _, last = puppet.replies[1].request.messages
        assert (first.blocks, last.text) == (asked.blocks, "Are you sure?")


async def test_server_history_keeps_thinking_model_usage_and_times(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        before = time.time()
        reply = chat.prompt("Hi")
        (await puppet.reply()).say(Thinking("Hm, "), Thinking("hm."), "Hello", Usage(3, 4)).end()
        await end_of(reply)
        asked, said = (await chat.history()).messages
        assert (said.text, said.thinking, said.model) == ("Hello", "Hm, hm.", reply.model)
        assert (said.usage, said.blocks) == (reply.usage, reply.blocks)
        assert asked.began is not None
        assert said.ended is not None
        assert before - 1 < asked.began <= said.ended < time.time() + 1


async def test_history_keeps_blocks_model_usage_and_times() -> None:
    prompt = {"role": "user", "content": "Hi", "id": "i", "began": 5.0}
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "sig"},
        {"type": "text", "text": "Hello"},
    ]
    usage = {"input_tokens": 3, "output_tokens": 4, "estimated": True, "unknown": 1}
    reply = {"role": "assistant", "content": "Hello", "id": "i", "blocks": blocks, "model": "m"}
    messages = [prompt, {**reply, "usage": usage, "began": 5.0, "ended": 6.5, "unknown": 1}]

    async def answer(frame: Frame, send: Send) -> None:
        await send(
            {"type": "history", "title": "T", "messages": messages, "running": []},
            conversation=frame["conversation"],
            request=frame["request"],
        )

    async with scripted(answer) as url, connect(url) as chat:
        asked, said = (await chat.history()).messages
    assert asked == Message("user", "Hi", id="i", began=5.0)
    assert said == Message(
        "assistant",
        (content.Thinking("Hm.", "sig"), content.Text("Hello")),
        id="i",
        model="m",
        usage=Usage(3, 4, estimated=True),
        began=5.0,
        ended=6.5,
    )
    assert (said.text, said.thinking) == ("Hello", "Hm.")
