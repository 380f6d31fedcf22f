"""Replies that outlive their socket: resume, grace time, replay time."""

import asyncio
import contextlib
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import wsserver
from tests.support.client import Client, client
from tests.support.line import Line
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import BOUND, Puppet, until
from tests.support.sockets import sockets_of
from tests.support.talk import ID, ONE, OTHER, exchange, opened, resume
from wsserver import Code, ModelError, Thinking
from wsserver.hub import hub


async def test_frames_get_smaller_after_repeated_disconnects(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    said = [f"{number:09} " for number in range(4000)]  # in frames of 16 KB
    await chat.prompt(id=ID)
    (await puppet.reply()).say(*said)
    await chat.next("token", seq=len(said))
    heard, last, sizes = "", 0, []
    async with Proxy(server.port, *[Cut(after=4000)] * 60) as proxy:
        while last < len(said):
            assert proxy.cuts, "the client makes no progress"
            async with connect(proxy.url, proxy=None) as socket:
                other = Client(socket)
                await other.send({"type": "resume", "id": ID, "after": last})
                with contextlib.suppress(ConnectionClosed):
                    while last < len(said):
                        frame = await other.next("token")
                        heard, last = heard + frame["text"], frame["seq"]
                        sizes.append(len(frame["text"]))
    assert heard == "".join(said)
    assert max(sizes) < 4000
    assert min(sizes[:-1]) >= 1024, "frames are no smaller than needed"


async def test_frames_keep_size_for_clients_making_progress(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.prompt(id=ID)
    (await puppet.reply()).say(*["x"] * 1000)
    await chat.next("token", seq=1000)
    for after in range(0, 500, 10):
        async with client(server) as other:
            await resume(other, after=after)
            assert (await other.next("token"))["seq"] == 1000


async def test_open_does_not_restart_followed_reply(chat: Client, puppet: Puppet) -> None:
    await chat.prompt(id=ID, conversation=ONE)
    reply = (await puppet.reply()).say("a", "b")
    await chat.next("token", seq=2)
    assert (await opened(chat))["running"] == [ID]
    reply.say("c").end()
    frames = [await chat.receive(), await chat.receive()]
    assert [(frame["type"], frame["seq"]) for frame in frames] == [("token", 3), ("done", 3)]


async def test_second_tab_gets_retry_of(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.prompt(id=ID, conversation=ONE)
    (await puppet.reply()).fail(ModelError(Code.OVERLOADED))
    await chat.next("error")
    async with client(server) as tab:
        await opened(tab)
        await chat.prompt(id=OTHER, conversation=ONE, retry_of=ID)
        start = await tab.next("start")
        assert (start["id"], start["retry_of"], start["prompt"]) == (OTHER, ID, "Hello")


async def test_second_tab_gets_types_of_blocks_of_prompt(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.prompt(id=ID, conversation=ONE)
    (await puppet.reply()).end()
    await chat.next("done")
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/duck.png"}}
    said = {"type": "text", "text": "What is this?"}
    async with client(server) as tab:
        await opened(tab)
        for number, (content, text, types) in enumerate(
            (
                ([image, said], "What is this?", ["image", "text"]),
                ([image], "", ["image"]),
                ([said], "What is this?", None),
                ("Text", "Text", None),
            ),
            start=1,
        ):
            await chat.send({"prompt": content, "conversation": ONE})
            start = await tab.next("start")
            (await puppet.reply(number)).end()
            await tab.next("done")
            assert (start["prompt"], start.get("blocks")) == (text, types)


async def test_resume_gets_missed_text_then_live_text(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.prompt(id=ID)
    reply = (await puppet.reply()).say("a", "b", "c", Thinking("d"), "e")
    await chat.next("token", seq=5)
    async with client(server) as other:
        await resume(other, after=1)
        frames = [await other.receive() for _ in range(3)]
        assert [(f["type"], f["seq"], f["text"]) for f in frames] == [
            ("token", 3, "bc"),
            ("thinking", 4, "d"),
            ("token", 5, "e"),
        ]
        reply.say("f").end()
        assert (await other.next("token"))["text"] == "f"
        assert (await other.next("done"))["seq"] == 6
    assert (await chat.next("done"))["seq"] == 6


async def test_start_has_conversation_and_precedes_text(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    first = await chat.prompt(id=ID)
    async with client(server) as other:
        assert await resume(other) == first
        assert await other.quiet() == []


@pytest.mark.parametrize("id_", [ID, "no-such-generation"])
async def test_resume_of_unknown_id_is_not_found(chat: Client, id_: str) -> None:
    error = await resume(chat, id_=id_)
    assert (error["code"], error["about"], error["retryable"]) == ("not_found", id_, False)


async def test_resume_after_later_piece_is_gap(chat: Client, puppet: Puppet) -> None:
    await chat.prompt(id=ID)
    (await puppet.reply()).say("a")
    await chat.next("token")
    error = await resume(chat, after=2)
    assert (error["code"], error["about"]) == ("gap", ID)


async def test_resume_after_end_gets_terminal_again(chat: Client, puppet: Puppet) -> None:
    await chat.prompt(id=ID)
    (await puppet.reply()).say("a", "b").fail(ModelError(Code.OVERLOADED, retry_after=7))
    failed = await chat.next("error")
    await resume(chat, after=2)
    assert await chat.receive() == failed
    await resume(chat, after=1)
    assert (await chat.receive())["text"] == "b"
    assert await chat.receive() == failed


async def test_follower_within_grace_time_keeps_reply_running(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, grace=5, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.prompt(id=ID)
            reply = await puppet.reply()
        async with client(server) as other:
            await resume(other)
            (generation,) = server.app.hub.retention
            assert generation.grace is None
            reply.say("alive").end()
            assert (await other.text(ID))[0] == "alive"


async def test_unread_reply_is_stopped_after_grace_tokens(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, grace=1000, grace_tokens=10) as server:
        async with client(server) as chat:
            await chat.prompt(id=ID)
            reply = (await puppet.reply()).say("read ")
            await chat.next("token")
        await until(lambda: all(not g.readers for g in server.app.hub.retention))
        reply.say(*["unread "] * 20)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        async with client(server) as other:
            await resume(other)
            text, done = await other.text(ID)
            assert done["by"] == "disconnect"
            assert text == "read " + "unread " * 6, "the last piece crosses the limit"


async def test_grace_tokens_do_not_count_until_client_can_notice_disconnect(
    puppet: Puppet,
) -> None:
    async with (
        wsserver.serve(puppet, port=0, grace=1000, grace_tokens=10, drain_timeout=0) as server,
        Line(server.port) as line,
    ):
        async with connect(line.url, proxy=None) as socket:
            chat = Client(socket)
            await chat.prompt(id=ID)
            reply = (await puppet.reply()).say("read ")
            await chat.next("token")
            line.reset()
            await until(lambda: all(not g.readers for g in server.app.hub.retention))
        reply.say(*["unread "] * 200)
        await until(reply.heard_out)
        (generation,) = server.app.hub.retention
        assert generation.log.seq == 201
        async with client(server) as other:
            await resume(other, after=1)
            await other.next("token", seq=201)
        # The next client closes its connection itself.
        await until(lambda: not generation.readers)
        reply.say(*["unread "] * 20)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        async with client(server) as other:
            await resume(other)
            assert (await other.text(ID))[1]["by"] == "disconnect"


async def test_grace_tokens_count_after_client_could_notice_disconnect(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "UNAWARE", 0.0)
    async with (
        wsserver.serve(puppet, port=0, grace=1000, grace_tokens=10) as server,
        Line(server.port) as line,
    ):
        async with connect(line.url, proxy=None) as socket:
            await Client(socket).prompt(id=ID)
            reply = await puppet.reply()
            line.reset()
            await until(lambda: all(not g.readers for g in server.app.hub.retention))
        reply.say(*["unread "] * 20)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()


async def test_cost_of_resume_at_end_does_not_grow_with_reply(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    class Counted(list[str]):
        read = 0

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            Counted.read += len(found) if isinstance(key, slice) else 1
            return found

    costs = []
    for number, count in enumerate((100, 100_000)):
        name = f"{ID}-{number}"
        await chat.prompt(id=name)
        (await puppet.reply(number)).say(*["x"] * count).end()
        await chat.next("done", id=name)
        generation = server.app.hub.known("anonymous", name)
        assert generation is not None
        generation.log.pieces.data = Counted(generation.log.pieces.data)
        Counted.read = 0
        async with client(server) as other:
            await resume(other, after=count - 1, id_=name)
            assert (await other.text(name))[0] == "x"
        costs.append(Counted.read)
    assert costs[0] == costs[1] <= 2


async def test_ended_replies_are_forgotten_after_replay_time(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, replay=0, save_interval=0.001, drain_timeout=0
    ) as server:
        async with client(server) as chat:
            for number in range(200):
                await chat.send({"messages": [{"role": "user", "content": f"{number}"}]})
                (await puppet.reply(number)).say("x").end()
                await chat.next("done")
            await chat.quiet()
            hub = server.app.hub
            await until(lambda: not list(hub.retention))
            assert hub.tasks == 0
            assert not hub.journal.unsaved
            assert hub.retention.size == 0


# Owners


async def test_data_of_other_owner_is_not_found(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Mine", "x", conversation=ONE, id=ID)
    before = set(sockets_of(server))
    async with client(server) as other:
        await other.quiet()
        (socket,) = set(sockets_of(server)) - before
        socket.visitor.principal = wsserver.Principal("somebody else")
        for frame in (
            {"type": "resume", "id": ID},
            {"type": "open", "conversation": ONE},
            {"type": "rename", "conversation": ONE, "title": "x"},
            {"type": "delete", "conversation": ONE},
        ):
            await other.send(frame)
            foreign = await other.next("error")
            await other.send(_with_other_names(frame))
            absent = await other.next("error")
            assert foreign["message"] == absent["message"]
            assert foreign["code"] == absent["code"] == "not_found"
        await other.send({"type": "stop", "id": ID})
        assert (await other.next("error"))["code"] == "not_running"
        await other.send({"type": "list"})
        assert (await other.next("conversations"))["items"] == []

        # The other owner has a conversation of the same id. Neither owner notices the other.
        watched = (await opened(chat))["messages"]
        await exchange(other, puppet, "Yours", "y", conversation=ONE, id=ID)
        assert [m.content for m in puppet.replies[1].request.messages] == ["Yours"]
        assert [m["content"] for m in (await opened(other))["messages"]] == ["Yours", "y"]
        await exchange(other, puppet, "And then", "z")
        history = await opened(other, before=2)
        assert [m["content"] for m in history["messages"]] == ["Yours", "y"]
        await other.send({"type": "rename", "conversation": ONE, "title": "Theirs"})
        await other.next("renamed")
        await other.send({"type": "list"})
        assert [i["title"] for i in (await other.next("conversations"))["items"]] == ["Theirs"]
        start = await other.prompt("Runs", conversation=ONE)
        await puppet.reply(3)
        await exchange(chat, puppet, "Meanwhile", "x", conversation=ONE)
        await other.send({"type": "delete", "conversation": ONE})
        assert (await other.next("done"))["id"] == start["id"]
        await other.next("deleted")
        assert (await resume(other))["code"] == "forgotten"
        assert (await opened(other))["code"] == "not_found"
        assert "somebody else" not in {known.owner for known in server.app.hub.conversations}
        assert await chat.quiet() == []
        assert (await resume(chat))["type"] == "start"
        assert (await chat.next("token", id=ID))["text"] == "x"
        history = await opened(chat)
        assert history["title"] == "Mine"
        assert history["messages"][: len(watched)] == watched
        assert [m["content"] for m in history["messages"][len(watched) :]] == ["Meanwhile", "x"]


def _with_other_names(frame: dict[str, Any]) -> dict[str, Any]:
    return {
        key: "there-is-none-of-this" if key in {"id", "conversation"} else value
        for key, value in frame.items()
    }
