"""Replies that outlive their socket: resume, open, grace; conversations as people use them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import wsserver
from tests.support.client import Client, client
from tests.support.line import Line
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import BOUND, Puppet, until
from tests.test_slow_reader import sluggard
from wsserver import Code, ModelError, Thinking, hub
from wsserver.errors import StoreError
from wsserver.stores import MemoryStore
from wsserver.stores.base import Entry, StoredGeneration

ID, OTHER = "chosen-by-the-client", "another-of-the-client"
ONE, TWO = "conversation-one", "conversation-two"


async def resume(chat: Client, after: int = 0, id_: str = ID) -> dict[str, Any]:
    await chat.send({"type": "resume", "id": id_, "after": after})
    return await chat.next("start", "error")


async def opened(chat: Client, conversation: str = ONE, **keys: Any) -> dict[str, Any]:
    await chat.send({"type": "open", "conversation": conversation, **keys})
    return await chat.next("history", "error")


async def exchange(chat: Client, puppet: Puppet, prompt: str, answer: str, **keys: Any) -> None:
    number = len(puppet.replies)
    start = await chat.prompt(prompt, **keys)
    (await puppet.reply(number)).say(answer).end()
    await chat.text(start["id"])


# Resume


async def test_a_client_that_is_cut_in_each_frame_gets_smaller_ones_and_gets_on(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    said = [f"{number:09} " for number in range(4000)]  # in frames of 16 KB
    await chat.prompt(id=ID)
    (await puppet.reply()).say(*said)
    await chat.next("token", seq=len(said))
    heard, last, sizes = "", 0, []
    async with Proxy(server.port, *[Cut(after=4000)] * 60) as proxy:
        while last < len(said):
            assert proxy.cuts, "the client never gets on"
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
    assert min(sizes[:-1]) >= 1024, "no smaller than needed"


async def test_frames_are_no_smaller_for_clients_that_get_on(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.prompt(id=ID)
    (await puppet.reply()).say(*["x"] * 1000)
    await chat.next("token", seq=1000)
    for after in range(0, 500, 10):
        async with client(server) as other:
            await resume(other, after=after)
            assert (await other.next("token"))["seq"] == 1000


async def test_a_conversation_that_is_opened_does_not_restart_what_the_socket_follows(
    chat: Client, puppet: Puppet
) -> None:
    await chat.prompt(id=ID, conversation=ONE)
    reply = (await puppet.reply()).say("a", "b")
    await chat.next("token", seq=2)
    assert (await opened(chat))["running"] == [ID]
    reply.say("c").end()
    frames = [await chat.receive(), await chat.receive()]
    assert [(frame["type"], frame["seq"]) for frame in frames] == [("token", 3), ("done", 3)]


async def test_a_second_tab_is_told_which_turn_a_retry_replaces(
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


async def test_what_was_missed_comes_first_and_then_what_is_said_live(
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


async def test_a_start_tells_the_conversation_even_if_there_is_no_text_yet(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    first = await chat.prompt(id=ID)
    async with client(server) as other:
        assert await resume(other) == first
        assert await other.quiet() == []


@pytest.mark.parametrize("id_", [ID, "no-such-generation"])
async def test_what_is_not_there_is_not_found(chat: Client, id_: str) -> None:
    error = await resume(chat, id_=id_)
    assert (error["code"], error["about"], error["retryable"]) == ("not_found", id_, False)


async def test_an_after_that_was_not_reached_is_a_gap(chat: Client, puppet: Puppet) -> None:
    await chat.prompt(id=ID)
    (await puppet.reply()).say("a")
    await chat.next("token")
    error = await resume(chat, after=2)
    assert (error["code"], error["about"]) == ("gap", ID)


async def test_the_end_can_be_had_again(chat: Client, puppet: Puppet) -> None:
    await chat.prompt(id=ID)
    (await puppet.reply()).say("a", "b").fail(ModelError(Code.OVERLOADED, retry_after=7))
    failed = await chat.next("error")
    await resume(chat, after=2)
    assert await chat.receive() == failed
    await resume(chat, after=1)
    assert (await chat.receive())["text"] == "b"
    assert await chat.receive() == failed


async def test_a_follower_within_the_grace_time_keeps_it_alive(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, grace=5, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.prompt(id=ID)
            reply = await puppet.reply()
        async with client(server) as other:
            await resume(other)
            (generation,) = server._hub.retention
            assert generation.grace is None
            reply.say("alive").end()
            assert (await other.text(ID))[0] == "alive"


async def test_nobody_reading_costs_only_so_many_tokens(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, grace=1000, grace_tokens=10) as server:
        async with client(server) as chat:
            await chat.prompt(id=ID)
            reply = (await puppet.reply()).say("read ")
            await chat.next("token")
        await until(lambda: all(not g.readers for g in server._hub.retention))
        reply.say(*["unread "] * 20)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        async with client(server) as other:
            await resume(other)
            text, done = await other.text(ID)
            assert done["by"] == "disconnect"
            assert text == "read " + "unread " * 6, "the piece that crosses the limit is the last"


async def test_a_client_has_time_to_notice_a_dead_link_before_unread_tokens_count(
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
            await until(lambda: all(not g.readers for g in server._hub.retention))
        reply.say(*["unread "] * 200)
        await until(reply.heard_out)
        (generation,) = server._hub.retention
        assert generation.log.seq == 201
        async with client(server) as other:
            await resume(other, after=1)
            await other.next("token", seq=201)
        # The next client closes. It knows that it does.
        await until(lambda: not generation.readers)
        reply.say(*["unread "] * 20)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        async with client(server) as other:
            await resume(other)
            assert (await other.text(ID))[1]["by"] == "disconnect"


async def test_unread_tokens_count_when_the_time_to_notice_a_dead_link_is_over(
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
            await until(lambda: all(not g.readers for g in server._hub.retention))
        reply.say(*["unread "] * 20)
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()


async def test_resuming_at_the_end_of_a_long_reply_costs_no_more_than_of_a_short_one(
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
        generation = server._hub.known("anonymous", name)
        assert generation is not None
        generation.log.pieces = Counted(generation.log.pieces)
        Counted.read = 0
        async with client(server) as other:
            await resume(other, after=count - 1, id_=name)
            assert (await other.text(name))[0] == "x"
        costs.append(Counted.read)
    assert costs[0] == costs[1] <= 2


async def test_ended_replies_leave_nothing_behind_after_the_replay_time(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, replay=0, save_interval=0.001, drain_timeout=0
    ) as server:
        async with client(server) as chat:
            for number in range(200):
                await chat.send({"messages": [{"role": "user", "content": f"{number}"}]})
                (await puppet.reply(number)).say("x").end()
                await chat.next("done")
            await chat.quiet()
            hub = server._hub
            await until(lambda: not list(hub.retention))
            assert hub.tasks == 0
            assert not hub._journal._unsaved
            assert hub.retention.size == 0


# Open


async def test_history_tells_what_was_said_and_which_is_partial_and_why(
    chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "One", "Yes", conversation=ONE)
    await chat.prompt("Two", conversation=ONE, id=ID)
    (await puppet.reply(1)).say(Thinking("hm"), "Half")
    await chat.next("token")
    await chat.send({"type": "stop"})
    await chat.next("done")
    await chat.prompt("Three", conversation=ONE, id=OTHER)
    (await puppet.reply(2)).fail(ModelError(Code.OVERLOADED))
    await chat.next("error")
    history = await opened(chat)
    assert (history["title"], history["running"], "before" in history) == ("One", [], False)
    told = [(m["role"], m["content"], m.get("partial")) for m in history["messages"]]
    assert told == [
        ("user", "One", None),
        ("assistant", "Yes", None),
        ("user", "Two", None),
        ("assistant", "Half", "client"),
        ("user", "Three", None),
        ("assistant", "", "overloaded"),
    ]
    assert {m["id"] for m in history["messages"][2:4]} == {ID}


async def test_a_second_tab_sees_what_runs_and_what_comes_and_may_stop_it(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Before", "Yes", conversation=ONE)
    await chat.prompt("Now", conversation=ONE, id=ID)
    await chat.prompt("Later", conversation=ONE, id=OTHER, on_busy="queue")
    reply = (await puppet.reply(1)).say("live ")
    await chat.next("token", id=ID)
    async with client(server) as tab:
        history = await opened(tab)
        assert [m["content"] for m in history["messages"]] == ["Before", "Yes"]
        assert history["running"] == [ID, OTHER]
        running, queued = await tab.next("start"), None
        assert (running["id"], running["prompt"]) == (ID, "Now")
        assert (await tab.next("token"))["text"] == "live "
        queued = await tab.next("start")
        assert (queued["id"], queued["prompt"], queued["queued"]) == (OTHER, "Later", 1)
        reply.say("text").end()
        assert (await tab.text(ID))[0] == (await chat.text(ID))[0] == "live text"
        await puppet.reply(2)
        await tab.send({"type": "stop", "id": OTHER})
        assert (await chat.next("done", id=OTHER))["by"] == "client"
        assert (await tab.next("done", id=OTHER))["by"] == "client"
        await chat.prompt("Once more", conversation=ONE)
        shown = await tab.next("start")
        assert shown["prompt"] == "Once more"
        (await puppet.reply(3)).say("for both").end()
        assert (await tab.text(shown["id"]))[0] == "for both"


async def test_the_prompt_of_a_watching_tab_has_one_start_there(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Before", "Yes", conversation=ONE)
    async with client(server) as tab:
        await opened(tab)
        start = await tab.prompt("From the tab")  # the conversation is the tab's own now
        assert (start["conversation"], "prompt" in start) == (ONE, False)
        (await puppet.reply(1)).say("x").end()
        await tab.text(start["id"])
        assert [f["type"] for f in tab.frames].count("start") == 1
    assert [m.content for m in puppet.replies[1].request.messages][:2] == ["Before", "Yes"]


async def test_a_tab_that_is_gone_is_told_nothing(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Before", "Yes", conversation=ONE)
    async with client(server) as tab:
        await opened(tab)
    await until(lambda: len(server._connections) == 1)
    assert not server._hub.conversations._known["anonymous", ONE].watchers
    await exchange(chat, puppet, "After", "Yes")


async def test_a_conversation_that_is_not_there_is_not_found(chat: Client) -> None:
    error = await opened(chat, "no-such-conversation")
    assert (error["code"], error["about"]) == ("not_found", "no-such-conversation")


async def test_a_long_history_is_had_page_by_page(chat: Client, puppet: Puppet) -> None:
    for number in range(8):
        await exchange(chat, puppet, f"{number}", f"{number}" * 60_000, conversation=ONE)
    pages: list[list[str]] = []
    before: dict[str, Any] = {}
    while True:
        history = await opened(chat, **before)
        pages.append([m["content"] for m in history["messages"]])
        assert len(str(history)) < 262_144
        if "before" not in history:
            break
        before = {"before": history["before"]}
    assert len(pages) == 3
    said = [content for page in reversed(pages) for content in page]
    assert said == [text for n in range(8) for text in (f"{n}", f"{n}" * 60_000)]


async def test_the_last_page_knows_that_it_is_the_last(puppet: Puppet, file: str) -> None:
    async with (
        wsserver.serve(puppet, port=0, store=file, history_messages=3, drain_timeout=0) as server,
        client(server) as chat,
    ):
        await exchange(chat, puppet, "Elsewhere", "x", conversation=TWO)
        for number in range(6):
            await exchange(chat, puppet, f"{number}", "x", conversation=ONE)
        newest = await opened(chat)
        oldest = await opened(chat, before=newest["before"])
        assert "before" not in oldest
        said = [m["content"] for page in (oldest, newest) for m in page["messages"]]
        assert [text for text in said if text != "x"] == [f"{number}" for number in range(6)]


async def test_a_message_too_long_for_a_frame_is_cut_and_says_so(
    chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Long", "é" * 300_000, conversation=ONE)
    history = await opened(chat)
    _, message = history["messages"]
    assert message["partial"] == "cut"
    assert 10_000 < len(message["content"]) < 300_000


# List, rename, delete


async def test_conversations_are_listed_newest_first_and_paged(
    chat: Client, puppet: Puppet
) -> None:
    names = [f"conversation-number-{number}" for number in range(5)]
    for name in names:
        await exchange(chat, puppet, f"About {name}", "x", conversation=name)
    await exchange(chat, puppet, "Again", "x", conversation=names[1])
    seen: list[str] = []
    before: dict[str, Any] = {}
    while True:
        await chat.send({"type": "list", "limit": 2, **before})
        page = await chat.next("conversations")
        seen += [item["id"] for item in page["items"]]
        if "next" not in page:
            break
        before = {"before": page["next"]}
    assert seen == [names[1], names[4], names[3], names[2], names[0]]
    assert page["items"][0]["title"] == f"About {names[0]}"
    await chat.send({"type": "list", "before": "nonsense"})
    assert (await chat.next("error"))["code"] == "invalid_frame"


async def test_a_conversation_is_renamed_and_deleted(chat: Client, puppet: Puppet) -> None:
    await exchange(chat, puppet, "Old", "x", conversation=ONE)
    await chat.send({"type": "rename", "conversation": ONE, "title": "New"})
    assert (await chat.next("renamed"))["title"] == "New"
    assert (await opened(chat))["title"] == "New"
    await chat.send({"type": "delete", "conversation": ONE})
    assert (await chat.next("deleted"))["conversation"] == ONE
    for frame in (
        {"type": "open", "conversation": ONE},
        {"type": "rename", "conversation": ONE, "title": "x"},
        {"type": "delete", "conversation": ONE},
    ):
        await chat.send(frame)
        assert (await chat.next("error"))["code"] == "not_found"
    await chat.send({"type": "list"})
    assert (await chat.next("conversations"))["items"] == []


async def test_deleting_stops_what_runs_and_waits_and_nothing_brings_it_back(
    chat: Client, puppet: Puppet
) -> None:
    await chat.prompt("Runs", conversation=ONE, id=ID)
    await chat.prompt("Waits", conversation=ONE, id=OTHER, on_busy="queue")
    (await puppet.reply()).say("half")
    await chat.next("token")
    await chat.send({"type": "delete", "conversation": ONE})
    frames = [await chat.next("done"), await chat.next("done"), await chat.next("deleted")]
    assert {f["id"] for f in frames[:2]} == {ID, OTHER}
    await chat.send({"type": "list"})
    assert (await chat.next("conversations"))["items"] == []
    await chat.prompt("Anew", conversation=ONE)
    await puppet.reply(1)
    assert [m.content for m in puppet.replies[1].request.messages] == ["Anew"]


async def test_a_deletion_is_carried_out_though_its_client_has_gone(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Mine", "x", conversation=ONE)
    async with client(server) as other:
        await other.prompt("Runs", conversation=ONE)
        await other.send({"type": "list"})
        await other.send({"type": "rename", "conversation": ONE, "title": "x"})
        await other.send({"type": "delete", "conversation": ONE})
    await until(lambda: len(server._connections) == 1)
    await until(lambda: ("anonymous", ONE) not in server._hub.conversations._known)
    assert (await opened(chat))["code"] == "not_found"


async def test_id_of_a_deleted_reply_is_forgotten_and_costs_nothing(
    chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "One", "x", conversation=ONE, id=ID)
    await chat.send({"type": "delete", "conversation": ONE})
    await chat.next("deleted")
    assert (await resume(chat))["code"] == "forgotten"
    assert (await chat.prompt("One", conversation=ONE, id=ID))["code"] == "forgotten"
    assert len(puppet.replies) == 1


async def test_one_that_asks_for_much_and_reads_little_gets_the_next_answer_when_it_has(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    for number in range(3):
        await exchange(chat, puppet, f"{number}", "x" * 60_000, conversation=ONE)
    async with sluggard(server) as slow:
        for _ in range(20):
            await slow.send('{"type": "open", "conversation": "conversation-one"}')
        await until(lambda: any(not socket.writable for socket in server._connections))
        while sum('"history"' in text for text in slow.texts) < 20:
            assert await slow.read(), "it was cut off"


async def test_who_has_a_conversation_open_is_told_that_it_was_deleted(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "One", "x", conversation=ONE)
    async with client(server) as watching, client(server) as other:
        await watching.send({"type": "open", "conversation": ONE})
        await watching.next("history")
        await other.quiet()
        await chat.send({"type": "delete", "conversation": ONE})
        told = {"type": "deleted", "conversation": ONE}
        assert await chat.next("deleted") == told
        assert await watching.next("deleted") == told
        assert await chat.quiet() == await other.quiet() == await watching.quiet() == []
        anew = await watching.prompt("Two")
        assert anew["conversation"] != ONE


# Owners


async def test_what_is_somebody_elses_looks_exactly_like_what_is_not_there(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Mine", "x", conversation=ONE, id=ID)
    before = set(server._connections)
    async with client(server) as other:
        await other.quiet()
        (socket,) = set(server._connections) - before
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

        # A prompt begins one of the same name, and neither owner notices the other.
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
        assert "somebody else" not in {owner for owner, _ in server._hub.conversations._known}
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


# Lasting


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/deep/conversations.sqlite"


async def test_conversations_last_from_one_server_to_the_next(puppet: Puppet, file: str) -> None:
    async with wsserver.serve(puppet, port=0, store=file) as server, client(server) as chat:
        await exchange(chat, puppet, "I am Ann", "Hello Ann", conversation=ONE, id=ID)
        done = chat.frames[-1]
    async with wsserver.serve(puppet, port=0, store=file, drain_timeout=0) as server:
        async with client(server) as chat:
            history = await opened(chat)
            assert [m["content"] for m in history["messages"]] == ["I am Ann", "Hello Ann"]
            await resume(chat)
            assert await chat.text(ID) == ("Hello Ann", done)
            await chat.prompt("I am Ann", conversation=ONE, id=ID)  # paid for already
            assert (await chat.next("done", id=ID)) == done
            await chat.prompt("Who am I?")
            await puppet.reply(1)
    said = [m.content for m in puppet.replies[1].request.messages]
    assert said == ["I am Ann", "Hello Ann", "Who am I?"]


async def test_shutting_down_mid_stream_loses_nothing(puppet: Puppet, file: str) -> None:
    async with wsserver.serve(puppet, port=0, store=file, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.prompt("Talk", conversation=ONE, id=ID)
            (await puppet.reply()).say(*["word "] * 1000)
            await chat.next("token", seq=1000)
            await server.close()
            await chat.closed()
    async with wsserver.serve(puppet, port=0, store=file) as server, client(server) as chat:
        await resume(chat)
        text, done = await chat.text(ID)
        assert (text, done["by"], done["seq"]) == ("word " * 1000, "shutdown", 1000)


class Broken(MemoryStore):
    """A store that fails when it is told to, or never comes back."""

    failing = False
    hanging: asyncio.Event | None = None

    async def commit(self, entries: Sequence[Entry]) -> None:
        if self.hanging is not None:
            await self.hanging.wait()
        self._check()
        await super().commit(entries)

    async def load(self, *args: Any, **bounds: Any) -> Any:
        self._check()
        return await super().load(*args, **bounds)

    def _check(self) -> None:
        if self.failing:
            raise StoreError("the disk with the secret is full")


@pytest.fixture
async def broken(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> AsyncIterator[tuple[Broken, wsserver.Server]]:
    store = Broken()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    async with wsserver.serve(
        puppet, port=0, save_interval=0.001, store_timeout=0.05, drain_timeout=0
    ) as server:
        yield store, server


async def test_a_store_that_fails_does_not_stop_the_stream_and_done_says_so(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    store, server = broken
    async with client(server) as chat:
        await exchange(chat, puppet, "Saved", "x")
        assert "saved" not in chat.frames[-1]
        store.failing = True
        start = await chat.prompt("Not saved")
        reply = (await puppet.reply(1)).say("still ")
        await chat.next("token")
        reply.say("here").end()
        text, done = await chat.text(start["id"])
        assert (text, done["saved"], done["reason"]) == ("still here", False, "end_turn")
        assert "secret" not in str(chat.frames)
        errors = [r for r in caplog.records if "cannot be saved" in r.getMessage()]
        assert len(errors) == 1, "an outage is told once"
        store.failing = False
        await exchange(chat, puppet, "Saved again", "x")
        assert "saved" not in chat.frames[-1]
        said = [m.content for m in puppet.replies[2].request.messages]
        assert "still here" in said, "it is remembered all the same"


async def test_what_could_not_be_saved_is_saved_when_the_store_is_back(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet
) -> None:
    store, server = broken
    async with client(server) as chat:
        store.failing = True
        await chat.prompt("Talk", id=ID)
        reply = (await puppet.reply()).say("during ")
        await chat.next("token")
        await until(lambda: server._hub._journal._failures)
        store.failing = False
        reply.say("after").end()
        assert "saved" not in (await chat.next("done"))
        found = await store.find(ID, "anonymous")
        assert isinstance(found, StoredGeneration)
        assert found.pieces == ["during ", "after"]


async def test_a_store_that_hangs_delays_an_end_only_so_long(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet
) -> None:
    store, server = broken
    store.hanging = asyncio.Event()
    async with client(server) as chat:
        start = await chat.prompt("Talk")
        (await puppet.reply()).say("x").end()
        text, done = await chat.text(start["id"])
        assert (text, done["saved"]) == ("x", False)
        await exchange(chat, puppet, "Meanwhile", "y")
        assert chat.frames[-1]["saved"] is False
        await chat.send({"type": "list"})
        await chat.next("conversations")
        store.hanging.set()
        store.hanging = None
        await exchange(chat, puppet, "Next", "z")
        assert "saved" not in chat.frames[-1]
        history = await opened(chat, start["conversation"])
        said = [m["content"] for m in history["messages"]]
        assert said == ["Talk", "x", "Meanwhile", "y", "Next", "z"], "saved after all"


async def test_a_store_that_hangs_does_not_hinder_the_shutdown(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    store = Broken()
    store.hanging = asyncio.Event()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    before = asyncio.all_tasks()
    async with wsserver.serve(
        puppet, port=0, drain_timeout=0, shutdown_timeout=0.3, store_timeout=1000, stop_timeout=1000
    ) as server:
        async with client(server) as chat:
            await chat.prompt("Talk")
            (await puppet.reply()).say("x")
            await chat.next("token")
            async with asyncio.timeout(BOUND):
                await server.close()
            await chat.closed()
    store.hanging.set()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_deleting_and_prompting_at_the_same_time_loses_nothing_in_silence(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Secret", "x", conversation=ONE)
    async with client(server) as other:
        await chat.send({"type": "delete", "conversation": ONE})
        await other.send({"prompt": "New", "conversation": ONE})
        await chat.next("deleted")
        answer = await other.next("start", "error")
        if answer["type"] == "error":
            assert answer["code"] == "not_found"
        else:
            reply = await puppet.reply(1)
            assert [m.content for m in reply.request.messages][-1] == "New"


async def test_a_conversation_that_cannot_be_read_is_an_error_that_may_pass(
    broken: tuple[Broken, wsserver.Server], puppet: Puppet
) -> None:
    store, server = broken
    async with client(server) as chat:
        store.failing = True
        error = await opened(chat)
        assert (error["code"], error["retryable"], error["about"]) == ("store", True, ONE)
        assert (await chat.prompt("x", conversation=ONE))["code"] == "store"
        store.failing = False
        assert (await chat.prompt("x", conversation=ONE))["type"] == "start"


async def test_a_stop_overtakes_a_prompt_that_waits_for_the_store(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def load(self, *args: Any, **bounds: Any) -> Any:
            await gate.wait()
            return await super().load(*args, **bounds)

    monkeypatch.setattr("wsserver.stores.make", lambda *_: Slow())
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        await chat.send({"prompt": "x", "conversation": ONE, "id": ID})
        assert await chat.quiet() == []
        await chat.send({"type": "stop"})
        assert await chat.quiet() == []
        gate.set()
        await chat.next("start", id=ID)
        assert (await chat.next("done", id=ID))["by"] == "client"
        assert all(not reply.said for reply in puppet.replies)


async def test_too_many_requests_at_once_are_refused(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    gate = asyncio.Event()

    class Slow(MemoryStore):
        async def list(self, owner: str, limit: int, before: Any) -> Any:
            await gate.wait()
            return await super().list(owner, limit, before)

    monkeypatch.setattr("wsserver.stores.make", lambda *_: Slow())
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        for _ in range(40):
            await chat.send({"type": "list"})
        refused = await chat.quiet()
        assert {frame["code"] for frame in refused} == {"limit"}
        gate.set()
        for _ in range(40 - len(refused)):
            await chat.next("conversations")


@pytest.mark.parametrize("store", ["postgres://x", "sqlite://", "sqlite:///", "nonsense"])
async def test_a_store_that_is_none_is_a_clear_error(puppet: Puppet, store: str) -> None:
    with pytest.raises(wsserver.ConfigError, match="store: "):
        async with wsserver.serve(puppet, port=0, store=store):
            raise AssertionError


async def test_history_has_no_more_messages_than_set(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, history_messages=3, drain_timeout=0) as server:
        async with client(server) as chat:
            for number in range(4):
                await exchange(chat, puppet, f"q{number}", f"a{number}")
    said = [m.content for m in puppet.replies[3].request.messages]
    assert said == ["q2", "a2", "q3"]
