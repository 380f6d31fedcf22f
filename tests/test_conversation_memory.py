"""Turns in memory: their sizes, and when they are dropped."""

import sys
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet, until
from wsserver.hub.live import Conversation
from wsserver.limits import CACHE, Memory

ONE, TWO = "conversation-one", "conversation-two"
OWNER = "anonymous"


@pytest.fixture
async def server(puppet: Puppet, tmp_path: Path) -> AsyncIterator[wsserver.Server]:
    store = f"sqlite:///{tmp_path}/chat.db"
    async with wsserver.serve(puppet, port=0, store=store, replay=0, drain_timeout=0) as server:
        yield server


async def say(chat: Client, puppet: Puppet, prompt: str, text: str, conversation: str) -> None:
    number = len(puppet.replies)
    start = await chat.prompt(prompt, conversation=conversation)
    (await puppet.reply(number)).say(text).end()
    await chat.text(start["id"])


def known(server: wsserver.Server, name: str) -> Conversation | None:
    return server.app.hub.conversations.known(OWNER, name)


def fill(memory: Memory) -> dict[str, int]:
    """Take nearly all free memory with many accounts; return the bytes of each account."""
    taken: dict[str, int] = {}
    size = memory.limit // 10
    while size > 100:
        name = f"client {len(taken)}"
        if memory.acquire((name,), size):
            taken[name] = size
        else:
            size //= 2
    return taken


async def test_turns_are_counted_by_size_in_memory(server: wsserver.Server, puppet: Puppet) -> None:
    async with client(server) as chat:
        await say(chat, puppet, "warm", "up", TWO)
        before = server.memory.used
        await say(chat, puppet, "Hello", "🎈" * 10_000, ONE)
        await until(lambda: server.app.hub.known(OWNER, "x") is None)
        conversation = known(server, ONE)
        assert conversation is not None
        (turn,) = conversation.turns
        # Four bytes for each character, and four more if Python caches its UTF-8.
        size = sys.getsizeof(turn.text) + sys.getsizeof(turn.prompt)
        assert 40_000 < size < 81_000
        assert size < server.memory.used - before < size + 1000
        assert server.memory.used == server.memory.cached


async def test_idle_turns_are_dropped_for_memory_and_reread(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as chat:
        await say(chat, puppet, "one", "x" * 10_000, ONE)
        await say(chat, puppet, "two", "y" * 10_000, TWO)
        server.app.hub.conversations.shed(1)  # the least recently used first
        assert known(server, ONE) is None
        assert known(server, TWO) is not None
        taken = fill(server.memory)
        assert server.memory.cached == 0
        assert known(server, TWO) is None
        for name, size in taken.items():
            server.memory.release((name,), size)
        await say(chat, puppet, "again", "x", ONE)
        said = [message.content for message in puppet.replies[-1].request.messages]
        assert said == ["one", "x" * 10_000, "again"]


async def test_turns_of_watched_conversation_may_be_dropped(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as chat, client(server) as watcher:
        await say(chat, puppet, "one", "x" * 10_000, ONE)
        await watcher.send({"type": "open", "conversation": ONE})
        await watcher.next("history")
        server.app.hub.conversations.shed(10**9)
        conversation = known(server, ONE)
        assert conversation is not None
        assert (conversation.turns, conversation.loaded, conversation.size) == ((), False, 0)
        await say(chat, puppet, "two", "y", ONE)
        assert len(puppet.replies[-1].request.messages) == 3
        assert (await watcher.next("start"))["prompt"] == "two"
        await watcher.next("done")


async def test_turns_of_running_conversation_are_kept(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as chat:
        await say(chat, puppet, "one", "x" * 10_000, ONE)
        await chat.prompt("two", conversation=ONE)
        running = await puppet.reply(1)
        await chat.prompt("three", conversation=ONE, on_busy="queue")
        conversation = known(server, ONE)
        assert conversation is not None
        assert conversation.account == (f"principal {OWNER}",)
        taken = fill(server.memory)
        assert conversation.turns
        for name, size in taken.items():
            server.memory.release((name,), size)
        running.say("y").end()
        last = await puppet.reply(2)
        said = [message.content for message in last.request.messages]
        assert said == ["one", "x" * 10_000, "two", "y", "three"]
        last.say("z").end()
        await until(lambda: not conversation.live)
        assert conversation.account == CACHE
        assert conversation.size > 10_000


async def test_prompt_without_memory_for_conversation_is_refused(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as chat:
        await say(chat, puppet, "one", "x" * 10_000, ONE)
        taken = fill(server.memory)
        refused = await chat.prompt("two", conversation=ONE)
        assert (refused["code"], refused["retryable"]) == ("limit", True)
        assert known(server, ONE) is None
        for name, size in taken.items():
            server.memory.release((name,), size)
        await say(chat, puppet, "two", "y", ONE)
    assert len(puppet.replies) == 2


async def test_ended_replies_are_dropped_for_memory_and_reread(
    puppet: Puppet, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path}/chat.db"
    async with wsserver.serve(puppet, port=0, store=store) as server, client(server) as chat:
        pieces = [f"{number:04}" for number in range(1000)]
        start = await chat.prompt("Hello", conversation=ONE)
        reply = await puppet.reply()
        reply.say(*pieces).end()
        await chat.text(start["id"])
        server.app.hub.conversations.shed(10**9)
        # Each piece is an object, and takes 8 bytes of a list.
        size = 1000 * (sys.getsizeof(pieces[0]) + 8)
        assert size < server.memory.cached < size + 8000
        assert server.app.hub.retention.size == server.memory.cached == server.memory.used
        fill(server.memory)
        assert server.memory.cached == server.app.hub.retention.size == 0
        assert server.app.hub.known(OWNER, start["id"]) is None
    async with wsserver.serve(puppet, port=0, store=store) as server, client(server) as chat:
        await chat.send({"type": "resume", "id": start["id"], "after": 500})
        text, done = await chat.text(start["id"])
        assert (text, done["seq"]) == ("".join(pieces[500:]), 1000)


async def test_number_of_watched_conversations_in_memory_is_bounded(
    puppet: Puppet, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "store": f"sqlite:///{tmp_path}/chat.db",
        "port": 0,
        "conversations": 2,
        "drain_timeout": 0,
    }
    names = [f"conversation-{number:04}" for number in range(6)]
    async with wsserver.serve(puppet, **given) as server:
        async with client(server) as chat:
            for name in names:
                await say(chat, puppet, "one", "x", name)
        for name in reversed(names):
            async with client(server) as watcher:
                await watcher.send({"type": "open", "conversation": name})
                await watcher.next("history")
            await until(lambda: not server.listener.connections)
        assert len(list(server.app.hub.conversations)) <= 2 + 1


async def test_deleted_conversations_use_no_memory(server: wsserver.Server, puppet: Puppet) -> None:
    async with client(server) as chat:
        for name in (ONE, TWO):
            await say(chat, puppet, "Hello", "x" * 10_000, name)
            await chat.send({"type": "delete", "conversation": name})
            await chat.next("deleted")
    await until(lambda: not list(server.app.hub.conversations))
    assert server.memory.used == 0


async def test_histories_sent_to_clients_are_not_kept_in_memory(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as chat:
        for number in range(20):
            await say(chat, puppet, "Hello", "🎈" * 20_000, f"conversation-{number:04}")
    server.app.hub.conversations.shed(10**9)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    async with client(server) as chat:
        for number in range(20):
            await chat.send({"type": "open", "conversation": f"conversation-{number:04}"})
            await chat.next("history")
            chat.frames.clear()
    await until(lambda: not server.app.connections)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < 400_000, "twenty histories in memory would take 1.6 MB"


async def test_short_replies_take_little_of_the_memory_of_an_account(puppet: Puppet) -> None:
    given: dict[str, Any] = {"memory": 2**21, "history_size": 1000, "generations_per_socket": 20}
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **given) as server:
        async with client(server) as chat:
            starts = [
                await chat.prompt(str(number), conversation=f"conversation-number-{number:03}")
                for number in range(15)
            ]
            for number in range(15):
                (await puppet.reply(number)).say("Hello")
            for _ in range(15):
                await chat.next("token")
            assert server.memory.used < 15 * 16_384
            for number in range(15):
                (await puppet.reply(number)).end()
            for start in starts:
                assert (await chat.text(start["id"]))[1]["reason"] == "end_turn"
