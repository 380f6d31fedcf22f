"""AG-UI: the project's own client, in Node, whose verifier refuses events out of order."""

import asyncio
from typing import Any

import pytest

import wsserver
from tests.support.npm import agent
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Code, ModelError
from wsserver.content import ToolUse

pytestmark = pytest.mark.slow

THREAD = "thread-of-the-test-1"
ID = "0123456789abcdef0123"


async def test_two_runs_on_one_thread_share_a_history(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with agent(server, THREAD) as client:
        client.send("say", text="first")
        (await puppet.reply()).say(Thinking("hm"), "one").end()
        assert await client.next("outcome") == "success"
        assert await client.contents() == [
            ("user", "first"),
            ("reasoning", "hm"),
            ("assistant", "one"),
        ]
        client.send("say", text="second")
        reply = (await puppet.reply(1)).say("two")
        assert [m.text for m in reply.request.messages] == ["first", "one", "second"]
        reply.end()
        assert (await client.contents())[-2:] == [("user", "second"), ("assistant", "two")]


async def test_abort_closes_the_request_to_the_model(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with agent(server, THREAD) as client:
        client.send("say", text="Hello?")
        reply = (await puppet.reply()).say("half")
        await client.sees("half")
        client.send("abort")
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        assert (await client.contents())[-1] == ("assistant", "half")


async def test_blocks_of_all_kinds_pass_the_verifier(
    server: wsserver.Server, puppet: Puppet
) -> None:
    tool = ToolUse("tool-1", "look", {})
    async with agent(server, THREAD) as client:
        client.send("say", text="Hello?")
        reply = await puppet.reply()
        reply.say(Thinking("a"), "one ", Thinking("b"), tool, "two ", tool, "three").end()
        assert await client.next("outcome") == "success"
        assert await client.contents() == [
            ("user", "Hello?"),
            ("reasoning", "a"),
            ("assistant", "one two three"),
            ("reasoning", "b"),
        ]


@pytest.mark.parametrize("said", [(), ("half",), (Thinking("hm"),)])
async def test_error_ends_the_run(
    server: wsserver.Server, puppet: Puppet, said: tuple[Any, ...]
) -> None:
    async with agent(server, THREAD) as client:
        client.send("say", text="Hello?")
        (await puppet.reply()).say(*said).fail(ModelError(Code.OVERLOADED))
        while (event := await client.next("event"))["type"] != "RUN_ERROR":
            pass
        assert event["code"] == "overloaded"
        assert len(await client.contents()) == 1 + len(said)


async def test_refused_run_fails(server: wsserver.Server, puppet: Puppet) -> None:
    async with agent(server, THREAD) as client:
        client.send("say", text="Hello?", props={"model": "another"})
        failed = await client.next("failed")
        assert "403" in failed
        assert "model_not_allowed" in failed
    assert not puppet.replies


async def test_stop_by_another_client_cancels_the_run(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with agent(server, THREAD) as client, agent(server, THREAD) as other:
        client.send("say", text="Hello?")
        reply = (await puppet.reply()).say("half")
        await client.sees("half")
        other.send("stop")
        assert len((await other.next("stopped"))["ids"]) == 1
        assert reply.closed.is_set()
        assert await client.next("outcome") == "cancelled"
        assert await client.contents() == [("user", "Hello?"), ("assistant", "half")]


@pytest.mark.parametrize("reload", [False, True])
async def test_client_resumes_exactly_in_mid_sentence(
    server: wsserver.Server, puppet: Puppet, *, reload: bool
) -> None:
    async with agent(server, THREAD) as client:
        client.send("say", text="Hello?", props={"id": ID})
        reply = (await puppet.reply()).say(Thinking("hm"), "one ")
        await client.sees("one ")
        client.send("abort")
        await client.contents()
        await until(lambda: not server.listener.connections)
        reply.say("two ")
        if reload:
            client.send("reload")
        client.send("connect")
        await client.sees("two ")
        reply.say("three").end()
        assert await client.next("outcome") == "success"
        assert await client.contents() == [
            ("user", "Hello?"),
            ("reasoning", "hm"),
            ("assistant", "one two three"),
        ]


async def test_client_connects_to_a_conversation_that_has_ended(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with agent(server, THREAD) as client:
        client.send("say", text="Hello?")
        (await puppet.reply()).say(Thinking("hm"), "one").end()
        messages = await client.contents()
        client.send("connect")
        assert await client.contents() == messages
        client.send("reload")
        client.send("connect")
        assert await client.contents() == messages
