"""A node leaves while its clients have running replies: they follow them from another node."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import wsserver
from tests.cluster.conftest import Start
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, Reply
from tests.support.talk import ID, ONE, OTHER, TWO, exchange, resume, turns

pytestmark = pytest.mark.slow


@asynccontextmanager
async def leaving(
    start: Start, puppet: Puppet
) -> AsyncIterator[tuple[asyncio.Task[None], Reply, Client, Client]]:
    """Close a node whose client has a running reply; yield a client of another node too."""
    node, other = await start(drain_timeout=8), await start()
    async with client(node) as chat, client(other) as reader:
        await chat.prompt("Q", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("One ")
        await chat.next("token")
        closing = asyncio.create_task(node.close())
        closed = await chat.closed()
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1012
        yield closing, reply, chat, reader
        if not closing.done():
            reply.end()
        async with asyncio.timeout(BOUND):
            await closing


async def test_reply_of_a_leaving_node_is_followed_from_another_one(
    start: Start, puppet: Puppet
) -> None:
    async with leaving(start, puppet) as (closing, reply, _, reader):
        assert (await resume(reader, after=1))["type"] == "start"
        reply.say("two ").say("three.")
        await reader.next("token", seq=3)
        assert not closing.done()
        reply.end()
        text, done = await reader.text(ID)
        assert (text, done["reason"]) == ("two three.", "end_turn")
        await closing
        assert (await turns(reader))[-1] == ("assistant", "One two three.", None)
        await exchange(reader, puppet, "More?", "Yes.", conversation=ONE)


async def test_prompt_for_a_conversation_of_a_leaving_node_waits_for_the_next_one(
    start: Start, puppet: Puppet
) -> None:
    async with leaving(start, puppet) as (_, reply, _, reader):
        assert (await reader.prompt("Now?", conversation=ONE))["code"] == "busy"
        await reader.send({"prompt": "Then?", "id": OTHER, "conversation": ONE, "on_busy": "queue"})
        reply.say("two.").end()
        assert (await reader.next("start", id=OTHER)).get("queued") is None
        last = await puppet.reply(1)
        assert [message.content for message in last.request.messages] == ["Q", "One two.", "Then?"]
        last.say("Thus.").end()
        assert (await reader.text(OTHER))[0] == "Thus."


async def test_interrupt_of_a_reply_of_a_leaving_node(start: Start, puppet: Puppet) -> None:
    async with leaving(start, puppet) as (closing, reply, _, reader):
        await resume(reader)
        await reader.send(
            {"prompt": "No", "id": OTHER, "conversation": ONE, "on_busy": "interrupt"}
        )
        assert (await reader.text(ID))[1]["by"] == "replaced"
        assert reply.closed.is_set()
        await reader.next("start", id=OTHER)
        await closing
        (await puppet.reply(1)).say("Better.").end()
        assert (await reader.text(OTHER))[0] == "Better."


async def test_waiting_prompts_of_a_leaving_node_run_there(start: Start, puppet: Puppet) -> None:
    node, other = await start(drain_timeout=8), await start()
    async with client(node) as chat, client(other) as reader:
        await chat.prompt("First", conversation=ONE, id=ID)
        await chat.prompt("Second", conversation=ONE, id=OTHER, on_busy="queue")
        closing = asyncio.create_task(node.close())
        await chat.closed()
        await resume(reader, id_=OTHER)
        (await puppet.reply()).say("1").end()
        (await puppet.reply(1)).say("2").end()
        assert (await reader.text(OTHER))[0] == "2"
        await closing


async def test_prompts_to_the_other_node_begin_at_once(start: Start, puppet: Puppet) -> None:
    async with leaving(start, puppet) as (closing, _, _, reader):
        await exchange(reader, puppet, "Hi", "Hello", conversation=TWO)
        assert not closing.done()


async def test_reply_is_found_on_another_node_right_after_its_start(
    nodes: list[wsserver.Server], puppet: Puppet
) -> None:
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        for number in range(10):
            name = f"just-accepted-{number:04}"
            await a.prompt("Hello?", conversation=f"conversation-{number:04}", id=name)
            assert (await resume(b, id_=name))["type"] == "start"
            (await puppet.reply(number)).say("Hi").end()
            assert (await b.text(name))[0] == "Hi"
