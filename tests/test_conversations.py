"""Prompts in conversations: history, on_busy, ids, limits."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Code, End, ModelError, Thinking, Usage
from wsserver.models.demo import Demo

ONE, TWO = "conversation-one", "conversation-two"
ID = "chosen-by-the-client"


def said(puppet: Puppet, number: int) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in puppet.replies[number].request.messages]


async def exchange(chat: Client, puppet: Puppet, number: int, prompt: str, answer: str) -> None:
    start = await chat.prompt(prompt)
    (await puppet.reply(number)).say(answer).end()
    await chat.text(start["id"])


async def test_prompt_without_conversation_uses_conversation_of_socket(
    chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, 0, "I am Ann", "Hello Ann")
    await exchange(chat, puppet, 1, "Who am I?", "Ann")
    assert said(puppet, 1) == [
        ("user", "I am Ann"),
        ("assistant", "Hello Ann"),
        ("user", "Who am I?"),
    ]


async def test_thinking_is_streamed_but_not_sent_back_to_model(
    chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt("Think")
    (await puppet.reply()).say(Thinking("hm, "), Thinking("well"), "Yes").end()
    await chat.text(start["id"])
    assert chat.said(start["id"], "thinking") == "hm, well"
    assert chat.said(start["id"]) == "Yes"
    await chat.prompt("And?")
    await puppet.reply(1)
    assert said(puppet, 1)[1] == ("assistant", "Yes")


async def test_failed_reply_stays_in_history_as_partial(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt("One")
    (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
    text, error = await chat.text(start["id"])
    assert (text, error["code"], error["seq"], error["retryable"]) == (
        "Half",
        "overloaded",
        1,
        True,
    )
    await chat.prompt("Two")
    message = (await puppet.reply(1)).request.messages[1]
    assert (message.content, message.partial) == ("Half", "overloaded")


async def test_failed_prompt_sent_again_is_sent_to_model_once(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt("Once")
    (await puppet.reply()).fail(ModelError(Code.OVERLOADED))
    await chat.text(start["id"])
    await chat.prompt("Once")
    await puppet.reply(1)
    assert said(puppet, 1) == [("user", "Once")]


async def test_exception_text_of_model_is_not_sent(
    chat: Client, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    await chat.prompt()
    (await puppet.reply()).fail(RuntimeError("the key is hunter2, in /etc/secret"))
    error = await chat.next("error")
    assert error["code"] == "internal"
    assert "hunter2" not in str(error)
    assert any(error["ref"] in record.getMessage() for record in caplog.records)


async def nonsense() -> AsyncIterator[object]:
    yield 5


NONSENSE: dict[str, Callable[[], object]] = {
    "a number": nonsense,
    "an end without a reason": lambda: End(None),  # type: ignore[arg-type]
    "half a token": lambda: Usage(0.5),  # type: ignore[arg-type]
    "a retry_after that is none": lambda: ModelError(Code.LIMIT, retry_after="soon"),  # type: ignore[arg-type]
    "no iterator": lambda: "text",
    "nothing": lambda: None,
    "a cancellation of its own": lambda: asyncio.CancelledError("mine"),
    "an exit": lambda: SystemExit(7),
    "an exception when called": lambda: 1 / 0,
}


@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE.keys())
async def test_invalid_model_output_is_internal_error(
    make: Callable[[], object],
) -> None:
    calls = 0

    def model(request: wsserver.Request) -> Any:
        nonlocal calls
        calls += 1
        made = make() if calls == 1 else Demo(rate=0)(request)
        if isinstance(made, BaseException):
            raise made
        return made

    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        await chat.prompt()
        assert (await chat.next("error"))["code"] == "internal"
        await chat.prompt()
        assert (await chat.next("done"))["reason"] == "end_turn"
        assert server.app.hub.live == 0


async def test_lone_surrogates_in_end_and_error_are_replaced(chat: Client, puppet: Puppet) -> None:
    await chat.prompt()
    (await puppet.reply()).fail(ModelError(Code.REFUSAL, "caf\udce9"))
    assert (await chat.next("error"))["message"] == "caf\ufffd"
    await chat.prompt()
    (await puppet.reply(1)).say("x", End("all\ud83dwell")).end()
    assert (await chat.next("done"))["reason"] == "all\ufffdwell"


async def test_large_piece_is_split_into_frames(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt()
    said = "\0" * 100_000 + "é" * 1_000_000  # six and two bytes each in JSON
    (await puppet.reply()).say(said).end()
    text, done = await chat.text(start["id"])
    assert text == said
    assert done["reason"] == "end_turn"


async def test_refused_turn_is_not_sent_to_model_again(chat: Client, puppet: Puppet) -> None:
    await exchange(chat, puppet, 0, "Fine", "Yes")
    for number, error in enumerate((Code.REFUSAL, Code.REFUSAL, Code.BAD_REQUEST), start=1):
        await chat.prompt(f"Bad {number}")
        reply = await puppet.reply(number)
        reply.say(*["Well, "] * (number == 1)).fail(ModelError(error))
        await chat.next("error")
    await chat.prompt("Good")
    await puppet.reply(4)
    assert said(puppet, 4) == [("user", "Fine"), ("assistant", "Yes"), ("user", "Good")]


async def test_prompt_with_messages_changes_no_conversation(chat: Client, puppet: Puppet) -> None:
    await exchange(chat, puppet, 0, "Mine", "Yes")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    await chat.send({"messages": messages})
    start = await chat.next("start")
    assert "conversation" not in start
    (await puppet.reply(1)).say("d").end()
    assert (await chat.text(start["id"]))[0] == "d"
    assert said(puppet, 1) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    await chat.prompt("Next")
    await puppet.reply(2)
    assert said(puppet, 2) == [("user", "Mine"), ("assistant", "Yes"), ("user", "Next")]


async def test_one_socket_streams_several_conversations(chat: Client, puppet: Puppet) -> None:
    one = await chat.prompt("1", conversation=ONE)
    two = await chat.prompt("2", conversation=TWO)
    first, second = await puppet.reply(0), await puppet.reply(1)
    for word in ("a", "b", "c"):
        first.say(word)
        await chat.next("token", id=one["id"])
        second.say(word.upper())
        await chat.next("token", id=two["id"])
    second.end()
    assert (await chat.text(two["id"]))[0] == "ABC"
    first.end()
    assert (await chat.text(one["id"]))[0] == "abc"
    assert (one["conversation"], two["conversation"]) == (ONE, TWO)


async def test_conversation_continues_on_other_socket(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt("From one")
    (await puppet.reply()).say("Heard").end()
    await chat.text(start["id"])
    async with client(server) as other:
        await other.prompt("From two", conversation=start["conversation"])
        await puppet.reply(1)
    assert said(puppet, 1)[:2] == [("user", "From one"), ("assistant", "Heard")]


async def test_history_over_limit_is_cut_at_user_turn(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, history_size=12, drain_timeout=0) as server,
        client(server) as chat,
    ):
        await exchange(chat, puppet, 0, "aaaa", "bbbb")
        await exchange(chat, puppet, 1, "cc", "dd")
        await exchange(chat, puppet, 2, "eeee", "ffff")
        await chat.prompt("a very long prompt")
        await puppet.reply(3)
    assert said(puppet, 2) == [("user", "cc"), ("assistant", "dd"), ("user", "eeee")]
    assert said(puppet, 3) == [("user", "a very long prompt")]


# on_busy


async def test_prompt_in_busy_conversation_is_refused_by_default(
    chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt("A")
    refused = await chat.prompt("B", id=ID)
    assert (refused["code"], refused["retryable"], refused["about"]) == ("busy", True, ID)
    (await puppet.reply()).say("undisturbed").end()
    assert (await chat.text(start["id"]))[0] == "undisturbed"
    again = await chat.prompt("B", id=ID)
    assert again["type"] == "start", "a refused id is still free"


async def test_queued_prompts_run_in_order(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("A")
    starts = [await chat.prompt(text, on_busy="queue") for text in ("B", "C")]
    assert [start["queued"] for start in starts] == [1, 2]
    for number, answer in enumerate(("a", "b", "c")):
        (await puppet.reply(number)).say(answer).end()
        await chat.next("done")
    assert [content for _, content in said(puppet, 2)] == ["A", "a", "B", "b", "C"]


async def test_prompt_to_full_queue_is_refused(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, queue_size=1, drain_timeout=0) as server,
        client(server) as chat,
    ):
        await chat.prompt("A")
        assert (await chat.prompt("B", on_busy="queue"))["type"] == "start"
        assert (await chat.prompt("C", on_busy="queue"))["code"] == "limit"


async def test_interrupt_keeps_partial_text_and_starts_new_reply(
    chat: Client, puppet: Puppet
) -> None:
    old = await chat.prompt("A")
    first = (await puppet.reply()).say("half an an")
    await chat.next("token")
    new = await chat.prompt("B", on_busy="interrupt")
    assert "queued" not in new
    text, done = await chat.text(old["id"])
    assert (text, done["reason"], done["by"]) == ("half an an", "stopped", "replaced")
    (await puppet.reply(1)).say("new").end()
    assert first.closed.is_set()
    assert (await chat.text(new["id"]))[0] == "new"
    assert [content for _, content in said(puppet, 1)] == ["A", "half an an", "B"]


async def test_interrupt_replaces_queued_prompts(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("A")
    (await puppet.reply()).hold = asyncio.Event()
    queued = await chat.prompt("B", on_busy="queue")
    interrupting = await chat.prompt("C", on_busy="interrupt")
    last = await chat.prompt("D", on_busy="interrupt")
    # Neither terminal waits for the model, which has not closed its request.
    while {queued["id"], interrupting["id"]} != {f["id"] for f in chat.frames if "by" in f}:
        await chat.receive()
    assert {f["by"] for f in chat.frames if "by" in f} == {"replaced"}
    hold = puppet.replies[0].hold
    assert hold is not None
    hold.set()
    (await puppet.reply(1)).say("only this").end()
    assert (await chat.text(last["id"]))[0] == "only this"
    assert len(puppet.replies) == 2


async def test_interrupt_in_idle_conversation_starts_reply(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt("A", on_busy="interrupt")
    (await puppet.reply()).say("x").end()
    assert (await chat.text(start["id"]))[0] == "x"


# Ids


async def test_repeated_prompt_attaches_to_running_reply(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    frame = {"prompt": "Hello", "id": ID}
    await chat.send(frame)
    (await puppet.reply()).say("one ", "two ")
    await chat.next("token", seq=2)
    async with client(server) as other:
        await other.send(frame)
        start = await other.next("start")
        assert start["id"] == ID
        assert (await other.next("token"))["text"] == "one two ", "all so far, in one frame"
        puppet.replies[0].say("three").end()
        assert (await other.text(ID))[0] == "one two three"
        assert (await chat.text(ID))[0] == "one two three"
    assert len(puppet.replies) == 1


async def test_repeated_prompt_gets_ended_reply(server: wsserver.Server, puppet: Puppet) -> None:
    async with client(server) as chat:
        await chat.prompt("Hello", id=ID)
        (await puppet.reply()).say("all").end()
        await chat.text(ID)
    async with client(server) as other:
        await other.prompt("Hello", id=ID)
        text, done = await other.text(ID)
        assert (text, done["reason"]) == ("all", "end_turn")
        await other.prompt("And?")  # the socket now uses that conversation
        await puppet.reply(1)
    assert [content for _, content in said(puppet, 1)] == ["Hello", "all", "And?"]


async def test_repeated_prompt_on_same_socket_gets_all_content_again(
    chat: Client, puppet: Puppet
) -> None:
    await chat.prompt("Hello", id=ID)
    (await puppet.reply()).say("one ", "two ")
    await chat.next("token", seq=2)
    await chat.prompt("Hello", id=ID)
    (again,) = await chat.quiet()
    assert (again["seq"], again["text"]) == (2, "one two ")
    puppet.replies[0].say("three").end()
    await chat.next("token", seq=3, text="three")
    assert (await chat.next("done"))["seq"] == 3
    assert len(puppet.replies) == 1


async def test_other_prompt_with_known_id_is_refused(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("Hello", id=ID)
    refused = await chat.prompt("Goodbye", id=ID)
    assert (refused["code"], refused["about"]) == ("id_conflict", ID)
    assert "id" not in refused, "it is no terminal of what runs under that id"
    (await puppet.reply()).say("on").end()
    assert (await chat.text(ID))[0] == "on"


async def test_repeated_prompt_after_replay_time_is_read_from_store(
    puppet: Puppet,
) -> None:
    async with wsserver.serve(puppet, port=0, replay=0, drain_timeout=0) as server:
        for number in range(3):
            async with client(server) as chat:
                await chat.prompt("Hello", id=ID)
                if not number:
                    (await puppet.reply()).say("x").end()
                text, done = await chat.text(ID)
                assert (text, done["reason"]) == ("x", "end_turn")
                await until(lambda: server.app.hub.known("anonymous", ID) is None)
        assert len(puppet.replies) == 1


# Disconnecting


async def test_reply_without_reader_continues_for_grace_time(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as chat:
        await chat.prompt("Hello", id=ID)
        reply = (await puppet.reply()).say("before ")
        await chat.next("token")
    reply.say("meanwhile ")
    async with client(server) as other:
        await other.prompt("Hello", id=ID)
        reply.say("after").end()
        assert (await other.text(ID))[0] == "before meanwhile after"


async def test_reply_without_reader_is_stopped_after_grace_time(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, grace=0, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.prompt("Hello", id=ID)
            reply = (await puppet.reply()).say("before ")
            await chat.next("token")
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        async with client(server) as other:
            await other.prompt("Hello", id=ID)
            text, done = await other.text(ID)
            assert (text, done["by"]) == ("before ", "disconnect")


# Limits and options


async def test_replies_of_one_socket_are_limited(server: wsserver.Server, chat: Client) -> None:
    for number in range(server.settings.generations_per_socket):
        start = await chat.prompt("x", conversation=f"conversation-number-{number}")
        assert start["type"] == "start"
    assert (await chat.prompt("x", conversation=ONE))["code"] == "limit"
    async with client(server) as other:
        assert (await other.prompt("x"))["type"] == "start"


async def test_replies_of_server_are_limited(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, generations=1, drain_timeout=0) as server:
        async with client(server) as one, client(server) as two:
            await one.prompt()
            refused = await two.prompt()
            assert (refused["code"], refused["retryable"]) == ("limit", True)
            (await puppet.reply()).end()
            await one.next("done")
            assert (await two.prompt())["type"] == "start"


async def test_interrupt_does_not_count_replaced_prompts(chat: Client) -> None:
    await chat.prompt("A")
    for text in ("B", "C", "D"):
        await chat.prompt(text, on_busy="queue")
    assert (await chat.prompt("E", on_busy="queue"))["code"] == "limit"
    assert (await chat.prompt("E", on_busy="interrupt"))["type"] == "start"


async def test_failed_reply_releases_objects_of_model() -> None:
    class Held:
        pass

    kept: list[weakref.ref[Held]] = []

    async def holding(_: wsserver.Request) -> AsyncIterator[str]:
        held = Held()
        kept.append(weakref.ref(held))
        yield "x"
        raise ModelError(Code.OVERLOADED)

    async with wsserver.serve(holding, port=0) as own, client(own) as chat:
        await chat.prompt()
        await chat.next("error")
        await chat.quiet()
        gc.collect()
        assert kept[0]() is None


async def test_ended_replies_are_kept_within_replay_size(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, replay_size=10_000, drain_timeout=0) as server,
        client(server) as chat,
    ):
        for number in range(3):
            await chat.prompt("x" * 100, id=f"number-{number}-{ID}")
            (await puppet.reply(number)).say("y" * 300).end()
            await chat.next("done")
        assert server.app.hub.known("anonymous", f"number-0-{ID}") is None
        assert server.app.hub.known("anonymous", f"number-2-{ID}") is not None


async def test_longest_idle_conversation_is_dropped_first(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, conversations=2, drain_timeout=0) as server,
        client(server) as chat,
    ):
        names = [f"conversation-number-{number}" for number in range(3)]
        for number, name in enumerate([names[0], names[1], names[0], names[2]]):
            start = await chat.prompt("x", conversation=name)
            (await puppet.reply(number)).say("y").end()
            await chat.text(start["id"])
        kept = {known.id for known in server.app.hub.conversations}
        assert kept == {names[0], names[2]}


async def test_prompt_options_reach_model_within_limits(puppet: Puppet) -> None:
    async with (
        wsserver.serve(
            puppet,
            port=0,
            drain_timeout=0,
            models="other-model, third-model",
            max_tokens=50,
            max_tokens_limit=100,
            system="Be brief.",
        ) as server,
        client(server) as chat,
    ):
        await chat.prompt("x")
        first = (await puppet.reply(0)).request
        start = await chat.prompt(
            "x",
            conversation=ONE,
            model="other-model",
            max_tokens=7,
            temperature=1,
            system="Be long.",
        )
        second = (await puppet.reply(1)).request
        await chat.prompt("x", conversation=TWO, max_tokens=1_000_000)
        third = (await puppet.reply(2)).request
    assert (first.model, first.max_tokens, first.temperature) == ("puppet", 50, None)
    assert first.system == "Be brief."
    assert start["model"] == "other-model"
    assert (second.model, second.max_tokens, second.temperature) == ("other-model", 7, 1.0)
    assert second.system == "Be long."
    assert third.max_tokens == 100


# Time


async def endless(_: wsserver.Request) -> AsyncIterator[str]:
    while True:
        yield "more "


async def test_silent_model_is_timeout_and_text_is_kept(
    puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wsserver")
    async with (
        wsserver.serve(puppet, port=0, silence_timeout=0.5, drain_timeout=0) as server,
        client(server) as chat,
    ):
        start = await chat.prompt()
        reply = (await puppet.reply()).say("then nothing")
        text, error = await chat.text(start["id"])
        assert (text, error["code"], error["retryable"]) == ("then nothing", "timeout", True)
        assert reply.closed.is_set()
    assert "raise silence_timeout" in caplog.text


async def test_reply_over_reply_timeout_is_stopped(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, reply_timeout=0.5, drain_timeout=0) as server,
        client(server) as chat,
    ):
        start = await chat.prompt()
        (await puppet.reply()).say("on and on")
        text, done = await chat.text(start["id"])
        assert (text, done["reason"], done["by"]) == ("on and on", "stopped", "timeout")


async def test_endless_reply_ends_at_reply_size() -> None:
    async with (
        wsserver.serve(endless, port=0, reply_size=10_000) as server,
        client(server) as chat,
    ):
        start = await chat.prompt()
        text, done = await chat.text(start["id"])
        assert done["reason"] == "max_tokens"
        assert len(text) == 10_000


async def test_model_without_awaits_can_be_stopped() -> None:
    async with wsserver.serve(endless, port=0) as server, client(server) as chat:
        start = await chat.prompt()
        await chat.next("token")
        await chat.send({"type": "stop"})
        assert (await chat.text(start["id"]))[1]["by"] == "client"
