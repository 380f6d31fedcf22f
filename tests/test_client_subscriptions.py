"""Conversations that the Python client has open, with other clients in them."""

import asyncio

import pytest

import wsserver
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet, until
from tests.support.replies import Frame, Send, end_of, read, scripted
from wsserver.client import (
    ConnectionFailed,
    Reply,
    ServerError,
    State,
    Subscription,
    connect,
    new_id,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


async def following(subscription: Subscription) -> Reply:
    async with asyncio.timeout(BOUND):
        return await anext(subscription)


async def test_subscription_yields_running_and_later_replies_of_others(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat, connect(server.url) as other:
        first = other.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await end_of(first)
        other.prompt("Two")
        said = (await puppet.reply(1)).say("Half ")
        subscription = await chat.open(other.conversation)
        assert [m.text for m in subscription.history.messages] == ["One", "Yes"]
        running = await following(subscription)
        assert (running.prompt, running.id in subscription.history.running) == ("Two", True)
        assert await anext(aiter(running)) == "Half "
        said.say("of it").end()
        assert await read(running) == "Half of it"
        retry = other.prompt("Better two", retry_of=running.id)
        later = await following(subscription)
        assert (later.id, later.prompt, later.retry_of) == (retry.id, "Better two", running.id)
        await later.stop()
        assert (await end_of(retry)).by == "client"
        assert await chat.open(other.conversation) is subscription


async def test_subscription_omits_own_replies(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat, connect(server.url) as other:
        own = chat.prompt("Mine")
        (await puppet.reply()).say("Yes").end()
        await end_of(own)
        subscription = await chat.open()
        own = chat.prompt("Mine again")
        (await puppet.reply(1)).say("Yes").end()
        await end_of(own)
        other.prompt("Theirs", conversation=chat.conversation)
        await puppet.reply(2)
        assert (await following(subscription)).prompt == "Theirs"


async def test_subscription_continues_after_lost_connection(
    server: wsserver.Server, puppet: Puppet, line: Line
) -> None:
    async with connect(line.url) as chat, connect(server.url) as other:
        other.prompt("One")
        said = (await puppet.reply()).say("Half ")
        subscription = await chat.open(other.conversation)
        running = await following(subscription)
        assert await anext(aiter(running)) == "Half "
        line.cut()
        await until(lambda: chat.state is State.LOST)
        said.say("of it").end()
        missed = other.prompt("Two", on_busy="queue")
        (await puppet.reply(1)).say("Missed").end()
        await end_of(missed)
        line.mend()
        assert await read(running) == "Half of it"
        await until(lambda: len(subscription.history.messages) == 4)
        assert subscription.history.messages[-1].text == "Missed"
        other.prompt("Three")
        await puppet.reply(2)
        assert (await following(subscription)).prompt == "Three"


async def test_close_ends_subscription_and_running_replies_continue(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat, connect(server.url) as other:
        other.prompt("One")
        said = (await puppet.reply()).say("Half ")
        async with await chat.open(other.conversation) as subscription:
            running = await following(subscription)
        said.say("of it").end()
        assert await read(running) == "Half of it"
        with pytest.raises(StopAsyncIteration):
            await following(subscription)
        again = other.prompt("Two")
        (await puppet.reply(1)).say("Unseen").end()
        await end_of(again)
        assert len((await chat.open(other.conversation)).history.messages) == 4


async def test_subscription_yields_rename_and_delete_by_others(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat, connect(server.url) as other:
        other.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await until(lambda: len(puppet.replies) == 1)
        subscription = await chat.open(other.conversation)
        await other.rename(other.conversation, "Better")
        await until(lambda: subscription.title == "Better")
        await other.delete(other.conversation)
        async with asyncio.timeout(BOUND):
            async for _ in subscription:
                pass
        assert subscription.deleted


async def test_conversation_deleted_while_offline_ends_subscription(
    server: wsserver.Server, puppet: Puppet, line: Line
) -> None:
    async with connect(line.url) as chat, connect(server.url) as other:
        reply = other.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await end_of(reply)
        subscription = await chat.open(other.conversation)
        line.cut()
        await other.delete(other.conversation)
        line.mend()
        with pytest.raises(StopAsyncIteration):
            await following(subscription)
        assert subscription.deleted


async def test_open_of_unknown_conversation_raises(server: wsserver.Server) -> None:
    async with connect(server.url) as chat:
        with pytest.raises(ServerError) as raised:
            await chat.open(new_id())
        assert raised.value.code == "not_found"


async def test_chat_close_ends_subscriptions(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat:
        chat.prompt("One")
        await puppet.reply()
        subscription = await chat.open()
    with pytest.raises(ConnectionFailed):
        await following(subscription)


async def test_open_loads_earlier_pages() -> None:
    asked: list[int | None] = []

    async def answer(frame: Frame, send: Send) -> None:
        asked.append(frame.get("before"))
        page: Frame = {"type": "history", "title": "T", "running": []}
        if "before" in frame:
            page["messages"] = [{"role": "user", "content": "One", "id": "i"}]
        else:
            page |= {"messages": [{"role": "user", "content": "Two", "id": "j"}], "before": 2}
        await send(page, conversation=frame["conversation"], request=frame["request"])

    async with scripted(answer) as url, connect(url) as chat:
        subscription = await chat.open()
        assert [m.text for m in subscription.history.messages] == ["One", "Two"]
    assert asked == [None, 2]
