"""Conversations that are open: history, watching, closing, titles, deletes."""

from pathlib import Path
from typing import Any

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet, until
from tests.support.talk import ID, ONE, OTHER, TWO, exchange, opened, resume
from tests.test_slow_reader import sluggard
from wsserver import Code, ModelError, Thinking

# Conversations that are open.


async def test_closed_conversation_is_not_followed(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "First", "x", conversation=ONE)
    async with client(server) as other:
        await other.send({"type": "open", "conversation": ONE})
        await other.next("history")
        await chat.prompt("Running", id=ID, conversation=ONE)
        await other.next("start", id=ID)
        await other.send({"type": "close", "conversation": ONE})
        await other.next("closed")
        (await puppet.reply(1)).say("unheard").end()
        await chat.text(ID)
        await exchange(chat, puppet, "Unheard too", "x", conversation=ONE)
        assert await other.quiet() == []


async def test_close_keeps_own_replies_of_socket(chat: Client, puppet: Puppet) -> None:
    await exchange(chat, puppet, "First", "x", conversation=ONE)
    await chat.send({"type": "open", "conversation": ONE})
    await chat.next("history")
    await chat.prompt("Mine", id=ID, conversation=ONE)
    await chat.send({"type": "close", "conversation": ONE})
    await chat.next("closed")
    (await puppet.reply(1)).say("heard").end()
    assert (await chat.text(ID))[0] == "heard"


async def test_close_of_unopened_conversation_gets_closed(chat: Client) -> None:
    await chat.send({"type": "close", "conversation": ONE, "request": "c"})
    assert await chat.next() == {"type": "closed", "conversation": ONE, "request": "c"}


async def test_open_conversations_of_socket_are_limited(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, drain_timeout=0, frame_burst=1000) as server,
        client(server) as chat,
    ):
        names = [f"conversation-{number:04}" for number in range(65)]
        for name in names:
            await exchange(chat, puppet, name, "x", conversation=name)
            await chat.send({"type": "open", "conversation": name})
        refused = await chat.next("error")
        assert (refused["code"], refused["about"]) == ("limit", names[64])
        await chat.send({"type": "close", "conversation": names[0]})
        await chat.send({"type": "open", "conversation": names[64]})
        assert (await chat.next("history", "error"))["type"] == "history"
        await chat.send({"type": "delete", "conversation": names[1]})
        await chat.send({"type": "open", "conversation": names[0]})
        assert (await chat.next("history", "error"))["conversation"] == names[0]


async def test_new_title_reaches_sockets_with_conversation_open(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "First", "x", conversation=ONE)
    async with client(server) as other:
        await other.send({"type": "open", "conversation": ONE})
        await other.next("history")
        await chat.send({"type": "rename", "conversation": ONE, "title": "New", "request": "r"})
        assert await chat.next("renamed") == {
            "type": "renamed", "conversation": ONE, "title": "New", "request": "r",
        }  # fmt: skip
        assert await other.next() == {"type": "renamed", "conversation": ONE, "title": "New"}
    assert [f["type"] for f in chat.frames].count("renamed") == 1


async def test_delete_stops_replies_with_by_deleted(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("Hello", id=ID, conversation=ONE)
    (await puppet.reply()).say("x")
    await chat.next("token")
    await chat.send({"type": "delete", "conversation": ONE})
    assert (await chat.next("done"))["by"] == "deleted"


# Open


async def test_history_marks_partial_messages_with_reason(chat: Client, puppet: Puppet) -> None:
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


async def test_second_tab_gets_running_and_later_replies_and_can_stop(
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


async def test_prompt_of_watching_tab_gets_one_start(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Before", "Yes", conversation=ONE)
    async with client(server) as tab:
        await opened(tab)
        start = await tab.prompt("From the tab")  # the prompt goes to the open conversation
        assert (start["conversation"], "prompt" in start) == (ONE, False)
        (await puppet.reply(1)).say("x").end()
        await tab.text(start["id"])
        assert [f["type"] for f in tab.frames].count("start") == 1
    assert [m.content for m in puppet.replies[1].request.messages][:2] == ["Before", "Yes"]


async def test_closed_tab_gets_nothing(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Before", "Yes", conversation=ONE)
    async with client(server) as tab:
        await opened(tab)
    await until(lambda: len(server.app.connections) == 1)
    conversation = server.app.hub.conversations.known("anonymous", ONE)
    assert conversation is not None
    assert not conversation.watchers
    await exchange(chat, puppet, "After", "Yes")


async def test_unknown_conversation_is_not_found(chat: Client) -> None:
    error = await opened(chat, "no-such-conversation")
    assert (error["code"], error["about"]) == ("not_found", "no-such-conversation")


async def test_long_history_comes_in_pages(chat: Client, puppet: Puppet) -> None:
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


async def test_last_page_of_history_has_no_before(puppet: Puppet, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/db"
    async with (
        wsserver.serve(puppet, port=0, store=store, history_messages=3, drain_timeout=0) as server,
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


async def test_message_over_frame_size_is_cut_and_marked(chat: Client, puppet: Puppet) -> None:
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


async def test_conversation_is_renamed_and_deleted(chat: Client, puppet: Puppet) -> None:
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


async def test_delete_stops_running_and_queued_replies(chat: Client, puppet: Puppet) -> None:
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


async def test_delete_is_done_after_disconnect(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "Mine", "x", conversation=ONE)
    async with client(server) as other:
        await other.prompt("Runs", conversation=ONE)
        await other.send({"type": "list"})
        await other.send({"type": "rename", "conversation": ONE, "title": "x"})
        await other.send({"type": "delete", "conversation": ONE})
    await until(lambda: len(server.app.connections) == 1)
    await until(lambda: server.app.hub.conversations.known("anonymous", ONE) is None)
    assert (await opened(chat))["code"] == "not_found"


async def test_prompt_with_id_of_deleted_reply_is_forgotten_and_free(
    chat: Client, puppet: Puppet
) -> None:
    await exchange(chat, puppet, "One", "x", conversation=ONE, id=ID)
    await chat.send({"type": "delete", "conversation": ONE})
    await chat.next("deleted")
    assert (await resume(chat))["code"] == "forgotten"
    assert (await chat.prompt("One", conversation=ONE, id=ID))["code"] == "forgotten"
    assert len(puppet.replies) == 1


async def test_client_gets_next_answer_after_reading(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    for number in range(3):
        await exchange(chat, puppet, f"{number}", "x" * 60_000, conversation=ONE)
    async with sluggard(server) as slow:
        for _ in range(20):
            await slow.send('{"type": "open", "conversation": "conversation-one"}')
        await until(lambda: any(not socket.writable for socket in server.app.connections))
        while sum('"history"' in text for text in slow.texts) < 20:
            assert await slow.read(), "the server aborted the connection"


async def test_delete_is_announced_to_sockets_with_conversation_open(
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
