"""What holds on one socket holds across nodes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

import wsserver
from tests.chats.reading import Stream
from tests.cluster.conftest import Start
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.talk import ID, ONE, OTHER, exchange, opened, resume, turns

pytestmark = pytest.mark.slow
Nodes = list[wsserver.Server]


@pytest.fixture
async def chats(nodes: Nodes) -> AsyncIterator[list[Client]]:
    """A client of each node."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(client(node)) for node in nodes]


async def test_reply_is_resumed_on_another_node_while_it_runs_and_after(
    chats: list[Client], puppet: Puppet
) -> None:
    a, b, c = chats
    await a.prompt("Hello?", conversation=ONE, id=ID)
    reply = (await puppet.reply()).say("One ", "two ")
    await a.next("token", seq=2)
    async with asyncio.timeout(BOUND):  # the store has it within the save interval
        while (await resume(b))["type"] == "error":  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await b.next("token", seq=2)
    await resume(c, after=1)
    await c.next("token", seq=2)
    reply.say("three").end()
    outcomes = [await chat.text(ID) for chat in (a, b, c)]
    assert [text for text, _ in outcomes] == ["One two three", "One two three", "two three"]
    assert all(done == outcomes[0][1] for _, done in outcomes)
    b.frames.clear()
    await resume(b)
    assert await b.text(ID) == outcomes[0]
    assert len(puppet.replies) == 1


async def test_conversation_continues_on_any_node(chats: list[Client], puppet: Puppet) -> None:
    for number in range(6):
        chat = chats[number % 3]
        await exchange(chat, puppet, f"Q{number}", f"A{number}", conversation=ONE)
    said = [message.content for message in puppet.replies[-1].request.messages]
    assert said == ["Q0", "A0", "Q1", "A1", "Q2", "A2", "Q3", "A3", "Q4", "A4", "Q5"]
    for chat in chats:
        assert [text for _, text, _ in await turns(chat)][-2:] == ["Q5", "A5"]


async def test_open_on_another_node_follows_running_and_later_replies(
    chats: list[Client], puppet: Puppet
) -> None:
    a, b, _ = chats
    await exchange(a, puppet, "Q", "A", conversation=ONE)
    start = await a.prompt("More?", conversation=ONE)
    reply = (await puppet.reply(1)).say("Yes, ")
    await a.next("token", id=start["id"])
    history = await opened(b)
    assert history["running"] == [start["id"]]
    shown = await b.next("start")
    assert (shown["id"], shown["prompt"]) == (start["id"], "More?")
    reply.say("more.").end()
    assert await b.text(start["id"]) == await a.text(start["id"])
    later = await a.prompt("And?", conversation=ONE)
    (await puppet.reply(2)).say("So.").end()
    assert (await b.next("start", id=later["id"]))["prompt"] == "And?"
    assert (await b.text(later["id"]))[0] == "So."


async def test_stop_on_another_node_closes_the_request_before_it_is_answered(
    chats: list[Client], puppet: Puppet
) -> None:
    a, b, c = chats
    await exchange(a, puppet, "Q", "A", conversation=ONE)
    await opened(b)
    await a.prompt("Count", conversation=ONE, id=ID)
    reply = (await puppet.reply(1)).say("1, 2, ")
    await b.next("token", id=ID)
    await b.send({"type": "stop", "id": ID, "request": "S"})
    stopped = await b.next("stopped")
    assert (stopped["ids"], reply.closed.is_set()) == ([ID], True)
    text, done = await a.text(ID)
    assert (text, done["by"]) == ("1, 2, ", "client")
    assert [frame for frame in b.frames if frame["type"] == "done"] == [done]
    assert b.said(ID) == text
    await c.send({"type": "stop", "id": ID})
    assert (await c.next("error"))["code"] == "not_running"


@pytest.mark.parametrize("how", ["reject", "queue", "interrupt"])
async def test_busy_queue_and_interrupt_are_decided_by_one_node(
    chats: list[Client], puppet: Puppet, how: str
) -> None:
    a, b, c = chats
    await a.prompt("First", conversation=ONE, id=ID)
    first = (await puppet.reply()).say("half")
    await a.next("token")
    answer = await b.prompt("Second", conversation=ONE, id=OTHER, on_busy=how)
    if how == "reject":
        assert answer["code"] == "busy"
        assert len(puppet.replies) == 1
        return
    if how == "queue":
        assert answer["queued"] == 1
        third = await c.prompt("Third", conversation=ONE, on_busy="queue")
        assert third["queued"] == 2
        first.end()
    else:
        assert (await a.text(ID))[1]["by"] == "replaced"
    (await puppet.reply(1)).say("whole").end()
    assert (await b.text(OTHER))[0] == "whole"
    if how == "queue":
        (await puppet.reply(2)).say("last").end()
        assert (await c.text(third["id"]))[0] == "last"


async def test_prompt_sent_again_to_another_node_is_the_same(
    chats: list[Client], puppet: Puppet
) -> None:
    a, b, c = chats
    await a.prompt("Hello?", conversation=ONE, id=ID)
    reply = (await puppet.reply()).say("Hi")
    await b.prompt("Hello?", conversation=ONE, id=ID)
    assert (await c.prompt("Other?", conversation=ONE, id=ID))["code"] == "id_conflict"
    reply.end()
    outcome = await a.text(ID)
    assert (await b.text(ID)) == outcome
    await c.prompt("Hello?", conversation=ONE, id=ID)
    assert (await c.text(ID)) == outcome
    assert len(puppet.replies) == 1


async def test_rename_and_delete_reach_watchers_on_other_nodes(
    chats: list[Client], puppet: Puppet
) -> None:
    a, b, c = chats
    await exchange(a, puppet, "Q", "A", conversation=ONE)
    for chat in (b, c):
        await opened(chat)
    await a.send({"type": "rename", "conversation": ONE, "title": "New"})
    for chat in chats:
        assert (await chat.next("renamed"))["title"] == "New"
    await a.prompt("Go on", conversation=ONE, id=ID)
    reply = await puppet.reply(1)
    await b.next("start", id=ID)
    await b.send({"type": "delete", "conversation": ONE})
    for chat in (b, c):
        assert (await chat.next("deleted"))["conversation"] == ONE
    await until(reply.closed.is_set)
    assert (await a.text(ID))[1]["by"] == "deleted"
    assert (await opened(c))["code"] == "not_found"


async def test_deleted_reply_is_forgotten_by_all_nodes(chats: list[Client], puppet: Puppet) -> None:
    a, b, c = chats
    await exchange(a, puppet, "Q", "A", conversation=ONE, id=ID)
    await resume(c)
    await c.text(ID)  # C keeps it in memory
    await b.send({"type": "delete", "conversation": ONE})
    await b.next("deleted")
    for chat in chats:
        async with asyncio.timeout(BOUND):  # the message to the other nodes is on its way
            while (await resume(chat))["type"] == "start":
                await chat.text(ID)
        assert chat.frames[-1]["code"] == "forgotten"


async def test_lists_of_watched_conversations_and_leases_do_not_grow(
    nodes: Nodes, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsserver.cluster.leases.LINGER", 0.0)
    async with client(nodes[0]) as chat:
        for number in range(20):
            name = f"conversation-of-{number:04}"
            await exchange(chat, puppet, "Q", "A", conversation=name)
            await opened(chat, name)
    cluster = nodes[0].app.cluster
    assert cluster is not None
    await until(lambda: not len(cluster.leases))
    await until(lambda: not cluster.watched)
    assert not len(cluster.mirrors) + len(cluster.readers)


async def test_reply_without_readers_on_any_node_is_stopped_after_the_grace_time(
    start: Start, puppet: Puppet
) -> None:
    nodes = [await start(grace=0.2) for _ in range(2)]
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await a.prompt("Hello?", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("Hi")
        await a.next("token")
        await opened(b)
        await b.next("token", id=ID)
        (generation,) = nodes[0].app.hub.scheduler.live
        await a.socket.close()
        await until(lambda: generation.readers == 1)  # the client of the other node
        assert generation.grace is None
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()
    assert generation.why == "disconnect"


async def test_stop_of_a_client_that_follows_nothing_reaches_the_node(
    chats: list[Client], puppet: Puppet
) -> None:
    a, _, c = chats
    await a.prompt("Count", conversation=ONE, id=ID)
    reply = (await puppet.reply()).say("1, 2, ")
    await a.next("token", seq=1)
    async with asyncio.timeout(BOUND):  # the store has it within the save interval
        while True:
            await c.send({"type": "stop", "id": ID, "request": "S"})
            if (await c.next("stopped", "error"))["type"] == "stopped":
                break
            await asyncio.sleep(0.1)
    assert reply.closed.is_set()
    assert (await a.text(ID))[1]["by"] == "client"


async def test_streams_over_http_follow_and_stop_replies_of_another_node(
    nodes: Nodes, puppet: Puppet
) -> None:
    async with client(nodes[0]) as a:
        await a.prompt("Count", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("1, ", "2, ")
        await a.next("token", seq=2)
        await nodes[0].app.hub.journal.flush()
        port = nodes[1].port
        assert port
        async with (
            Stream.open(port, f"/api/chat/{ID}?after=1") as sse,
            Stream.open(port, f"/api/chat/{ONE}/stream") as ai_sdk,
        ):
            assert (sse.status, ai_sdk.status) == (200, 200)
            assert json.loads((await next_of(sse, "token"))["data"])["text"] == "2, "
            async with Stream.open(nodes[2].port or 0, f"/api/chat/{ID}/stop", {}) as stop:
                assert stop.status == 200
            assert reply.closed.is_set()
            await next_of(sse, "done")
        assert (await a.text(ID))[1]["by"] == "client"


async def test_request_that_is_closed_on_one_node_stops_the_reply_of_another(
    nodes: Nodes, puppet: Puppet
) -> None:
    async with client(nodes[0]) as a:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        body = {"prompt": "Count", "conversation": ONE}
        async with Stream.open(nodes[1].port or 0, "/api/chat", body) as stream:
            assert stream.status == 200
            reply = (await puppet.reply(1)).say("1, ")
            (generation,) = nodes[0].app.hub.scheduler.live  # the node that has the conversation
            await stream.event()
        async with asyncio.timeout(BOUND):  # and not after the grace time of 30 s
            await reply.closed.wait()
        assert generation.why == "disconnect"


async def test_copy_of_a_reply_is_counted_in_memory_and_waits_for_it(
    nodes: Nodes, puppet: Puppet
) -> None:
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await a.prompt("Long", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("x" * 5000)
        await resume(b)
        memory = nodes[1].app.memory
        before = memory.used
        await b.next("token", id=ID)
        cluster = nodes[1].app.cluster
        assert cluster is not None
        await until(lambda: memory.used >= before + 5000)
        limit, memory.limit = memory.limit, memory.used
        counts = cluster.peers.bus.counts
        before = counts.received
        reply.say("y" * 5000)
        await until(lambda: counts.received > before)
        assert not [frame for frame in await b.quiet() if frame["type"] == "token"]
        memory.limit = limit
        reply.end()
        assert (await b.text(ID))[0] == "x" * 5000 + "y" * 5000
        assert not len(cluster.mirrors)
    await until(lambda: memory.used == memory.cached)


async def test_long_reply_goes_on_although_its_acknowledgements_are_lost(
    nodes: Nodes, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WINDOW", "LONGEST_RUN"):
        monkeypatch.setattr(f"wsserver.cluster.readers.{name}", 1000)
    monkeypatch.setattr("wsserver.cluster.mirrors.ACKNOWLEDGE", 10**9)  # as if they were lost
    monkeypatch.setattr("wsserver.cluster.mirrors.PROBE", 0.05)
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await opened(b)
        await a.prompt("Long", conversation=ONE, id=ID)
        reply = await puppet.reply(1)
        for _ in range(5):
            reply.say("x" * 1000)
        reply.end()
        assert (await b.text(ID))[0] == "x" * 5000


async def test_reply_that_nobody_follows_here_is_not_copied_for_long(
    nodes: Nodes, puppet: Puppet
) -> None:
    async with client(nodes[0]) as a:
        await a.prompt("Hello?", conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("Hi")
        await a.next("token")
        (generation,) = await nodes[1].app.hub.live_in("anonymous", ONE)
        assert generation.node is not None
        cluster = nodes[1].app.cluster
        assert cluster is not None
        assert len(cluster.mirrors) == 1
        await until(lambda: not len(cluster.mirrors))
        reply.say(".").end()
        assert (await a.text(ID))[0] == "Hi."


async def next_of(stream: Stream, kind: str) -> dict[str, str]:
    """Return the next event of a type."""
    while True:
        event = await stream.event()
        assert event is not None
        if json.loads(event["data"])["type"] == kind:
            return event
