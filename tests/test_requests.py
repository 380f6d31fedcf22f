"""Requests and their answers: names, order, answered stops, retries, races."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, Frame, client
from tests.support.gated import Gated, gated_server
from tests.support.puppet import BOUND, Puppet, until
from tests.support.talk import ID, ONE, OTHER, TWO, exchange, turns
from tests.support.yielding import YieldingStore
from wsserver import Code, ModelError
from wsserver.stores import MemoryStore


@pytest.fixture
async def gated(monkeypatch: pytest.MonkeyPatch, puppet: Puppet) -> AsyncIterator[Gated]:
    async with gated_server(monkeypatch, puppet) as made:
        yield made


# The name of a request.


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        ({"type": "ping"}, "pong"),
        ({"type": "auth", "token": "any"}, "authenticated"),
        ({"prompt": "Hello"}, "start"),
        ({"type": "resume", "id": ID}, "start"),
        ({"type": "open", "conversation": ONE}, "history"),
        ({"type": "list"}, "conversations"),
        ({"type": "rename", "conversation": ONE, "title": "New"}, "renamed"),
        ({"type": "close", "conversation": ONE}, "closed"),
        ({"type": "delete", "conversation": ONE}, "deleted"),
    ],
)
async def test_answer_has_request(chat: Client, puppet: Puppet, frame: Frame, kind: str) -> None:
    await exchange(chat, puppet, "First", "x", conversation=ONE, id=ID)
    await chat.send(frame | {"request": "r1"})
    assert (await chat.next(kind))["request"] == "r1"
    await chat.send(frame)
    assert "request" not in await chat.next(kind, "error")


@pytest.mark.parametrize(
    ("frame", "code", "about"),
    [
        ({"type": "stop", "id": ID}, "not_running", ID),
        ({"type": "resume", "id": ID}, "not_found", ID),
        ({"type": "resume", "id": "42"}, "invalid_frame", None),
        ({"prompt": "Hello", "id": "42"}, "invalid_frame", None),
        ({"prompt": "x" * 40_000, "id": ID}, "too_long", ID),
        ({"type": "open", "conversation": ONE}, "not_found", ONE),
        ({"type": "open", "conversation": ONE, "before": 0}, "invalid_frame", ONE),
        ({"type": "open", "conversation": "team/42"}, "invalid_frame", None),
        ({"type": "rename", "conversation": ONE, "title": ""}, "invalid_frame", ONE),
        ({"type": "rename", "conversation": ONE, "title": "x" * 201}, "invalid_frame", ONE),
        ({"type": "delete", "conversation": ONE}, "not_found", ONE),
        ({"type": "list", "before": "nonsense"}, "invalid_frame", None),
        ({"type": "sing", "conversation": ONE}, "unknown_type", ONE),
    ],
)
async def test_error_has_request_and_about(
    chat: Client, frame: Frame, code: str, about: str | None
) -> None:
    await chat.send(frame | {"request": "r-1"})
    error = await chat.next("error")
    assert (error["code"], error.get("about"), error["request"]) == (code, about, "r-1")


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "é", 5])
async def test_invalid_request_key_is_refused(chat: Client, name: object) -> None:
    await chat.send({"type": "list", "request": name})
    error = await chat.next("error")
    assert (error["code"], error["message"][:8]) == ("invalid_frame", "request:")
    assert "request" not in error


async def test_repeated_prompt_attaches_under_other_request(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("Hello", id=ID, request="one")
    assert (await chat.prompt("Hello", id=ID, request="two"))["request"] == "two"
    await puppet.reply()
    assert len(puppet.replies) == 1


async def test_two_resumes_get_two_answers(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("Hello", id=ID)
    (await puppet.reply()).say("a", "b", "c")
    await chat.next("token", seq=3)
    await chat.send({"type": "resume", "id": ID, "after": 2, "request": "one"})
    await chat.send({"type": "resume", "id": ID, "after": 1, "request": "two"})
    starts = [await chat.next("start"), await chat.next("start")]
    assert [(f["request"], f["after"]) for f in starts] == [("one", 2), ("two", 1)]


async def test_start_of_whole_reply_has_no_after(chat: Client) -> None:
    assert "after" not in await chat.prompt()


# Hello.


async def test_hello_is_first_frame_with_subprotocol(
    server: wsserver.Server,
) -> None:
    async with client(server, subprotocols=["wsserver.v1"]) as chat:
        hello = await chat.receive()
        assert (hello["type"], hello["protocol"]) == ("hello", "wsserver.v1")
        assert hello["principal"] == "anonymous"
        assert "auth" not in hello
        settings = server.settings
        assert hello["limits"] == {
            "message_size": settings.message_size,
            "prompt_size": settings.prompt_size,
            "answer_size": settings.max_unsent - settings.write_buffer,
            "frame_rate": settings.frame_rate,
            "frame_burst": settings.frame_burst,
            "bad_frames": settings.bad_frames,
            "requests": 32,
            "generations_per_socket": settings.generations_per_socket,
            "queue_size": settings.queue_size,
        }


async def test_client_without_subprotocol_gets_no_hello(chat: Client) -> None:
    assert await chat.quiet() == []


# Order.


async def test_error_of_unusable_frame_follows_earlier_answers(
    gated: Gated,
) -> None:
    store, server = gated
    async with client(server) as chat:
        await chat.send({"type": "list"})
        await chat.send("nonsense")
        await chat.send(b"binary")
        await chat.send({"type": "list", "limit": 0})
        await chat.send({"type": "list"})
        assert await chat.quiet() == []
        store.gate.set()
        answers = [await chat.receive() for _ in range(5)]
    assert [f.get("code", f["type"]) for f in answers] == [
        "conversations",
        "invalid_json",
        "invalid_frame",
        "invalid_frame",
        "conversations",
    ]


async def test_requests_over_queue_limit_are_refused_at_once(
    gated: Gated,
) -> None:
    store, server = gated
    async with client(server) as chat:
        for _ in range(32):
            await chat.send({"type": "list"})
        await chat.send({"type": "list", "request": "last"})
        error = await chat.next("error")
        assert (error["code"], error["request"]) == ("limit", "last")
        store.gate.set()
        for _ in range(32):
            await chat.next("conversations")


# A stop and its answer.


async def test_stop_with_request_is_answered_after_upstream_closes(
    chat: Client, puppet: Puppet
) -> None:
    await chat.prompt("Hello", id=ID)
    reply = await puppet.reply()
    reply.hold = asyncio.Event()
    await chat.send({"type": "stop", "id": ID, "request": "s"})
    assert await chat.quiet() == []
    reply.hold.set()
    stopped = await chat.next("stopped")
    assert stopped == {"type": "stopped", "ids": [ID], "request": "s"}
    assert reply.closed.is_set()


async def test_stop_of_reply_followed_by_other_socket_is_answered(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await chat.prompt("Hello", id=ID)
    await puppet.reply()
    async with client(server) as other:
        await other.send({"type": "stop", "id": ID, "request": "s"})
        assert (await other.next("stopped"))["ids"] == [ID]
        assert [f["type"] for f in other.frames] == ["stopped"]


async def test_stopped_frame_lists_all_replies_for_stop_without_id(
    chat: Client, puppet: Puppet
) -> None:
    await chat.prompt("One", id=ID, conversation=ONE)
    await chat.prompt("Two", id=OTHER, conversation=ONE, on_busy="queue")
    await chat.send({"type": "stop", "request": "s"})
    assert set((await chat.next("stopped"))["ids"]) == {ID, OTHER}
    assert {f["id"] for f in chat.frames if f["type"] == "done"} == {ID, OTHER}
    assert len(puppet.replies) <= 1


async def test_stop_without_running_reply_is_not_running_error(chat: Client) -> None:
    await chat.send({"type": "stop", "request": "s"})
    error = await chat.next("error")
    assert (error["code"], error["request"]) == ("not_running", "s")


async def test_stop_of_refused_waiting_prompt_is_answered(
    gated: Gated,
) -> None:
    store, server = gated
    async with client(server) as chat:
        await chat.send({"type": "list"})
        await chat.send({"prompt": "x", "id": ID, "model": "unknown"})
        await chat.send({"type": "stop", "id": ID})
        assert await chat.quiet() == []
        store.gate.set()
        errors = [await chat.next("error"), await chat.next("error")]
    assert [e["code"] for e in errors] == ["model_not_allowed", "not_running"]
    assert [e["about"] for e in errors] == [ID, ID]


# Retry.


async def test_retry_replaces_failed_turn(chat: Client, puppet: Puppet) -> None:
    await exchange(chat, puppet, "Before", "said", conversation=ONE)
    failed = await chat.prompt("Question", conversation=ONE)
    (await puppet.reply(1)).say("half").fail(ModelError(Code.OVERLOADED))
    await chat.text(failed["id"])
    await exchange(chat, puppet, "Question", "whole", conversation=ONE, retry_of=failed["id"])
    assert [m.content for m in puppet.replies[2].request.messages] == [
        "Before", "said", "Question",
    ]  # fmt: skip
    assert await turns(chat) == [
        ("user", "Before", None),
        ("assistant", "said", None),
        ("user", "Question", None),
        ("assistant", "whole", None),
    ]
    await exchange(chat, puppet, "After", "x", conversation=ONE)
    assert [m.content for m in puppet.replies[3].request.messages] == [
        "Before", "said", "Question", "whole", "After",
    ]  # fmt: skip


async def test_retry_may_change_prompt_of_whole_turn(chat: Client, puppet: Puppet) -> None:
    first = await exchange(chat, puppet, "Quesion", "What?", conversation=ONE)
    await exchange(chat, puppet, "Question", "Answer", conversation=ONE, retry_of=first)
    assert await turns(chat) == [("user", "Question", None), ("assistant", "Answer", None)]
    await chat.send({"type": "resume", "id": first})
    assert (await chat.next("token", id=first))["text"] == "What?"


async def test_retry_of_running_reply_interrupts_and_replaces_it(
    chat: Client, puppet: Puppet
) -> None:
    await chat.prompt("Slow", id=ID, conversation=ONE)
    (await puppet.reply()).say("half")
    await chat.next("token")
    await exchange(
        chat, puppet, "Quick", "done", conversation=ONE, retry_of=ID, on_busy="interrupt"
    )
    assert [m.content for m in puppet.replies[1].request.messages] == ["Quick"]
    assert await turns(chat) == [("user", "Quick", None), ("assistant", "done", None)]


async def test_retry_of_earlier_turn_is_refused(chat: Client, puppet: Puppet) -> None:
    first = await exchange(chat, puppet, "One", "x", conversation=ONE)
    last = await exchange(chat, puppet, "Two", "x", conversation=ONE)
    for wrong in (first, "never-heard-of-this-id"):
        refused = await chat.prompt("Again", conversation=ONE, retry_of=wrong)
        assert refused["code"] == "not_last"
    assert (await chat.prompt("Again", conversation=TWO, retry_of=last))["code"] == "not_last"
    assert len(await turns(chat)) == 4


async def test_retry_stopped_while_queued_keeps_turn(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("Question", id=ID, conversation=ONE)
    reply = (await puppet.reply()).say("half")
    reply.hold = asyncio.Event()
    await chat.next("token")
    await chat.send({"type": "stop", "id": ID})
    retried = await chat.prompt("Question", conversation=ONE, retry_of=ID)
    await chat.send({"type": "stop", "id": retried["id"]})
    await chat.next("done", id=retried["id"])
    reply.hold.set()
    await chat.next("done", id=ID)
    assert await turns(chat) == [("user", "Question", None), ("assistant", "half", "client")]


async def test_retry_is_kept_in_store(puppet: Puppet, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/conversations.sqlite"
    async with wsserver.serve(puppet, port=0, store=store, drain_timeout=0) as server:
        async with client(server) as chat:
            first = await exchange(chat, puppet, "Quesion", "What?", conversation=ONE)
            await exchange(chat, puppet, "Question", "Answer", conversation=ONE, retry_of=first)
    async with wsserver.serve(puppet, port=0, store=store, drain_timeout=0) as server:
        async with client(server) as chat:
            assert await turns(chat) == [("user", "Question", None), ("assistant", "Answer", None)]
            await exchange(chat, puppet, "More", "x", conversation=ONE)
    assert [m.content for m in puppet.replies[2].request.messages] == [
        "Question", "Answer", "More",
    ]  # fmt: skip


# Races.


@pytest.mark.parametrize("store", ["memory:", "sqlite"])
async def test_one_of_four_concurrent_prompts_runs_in_new_conversation(
    puppet: Puppet, tmp_path: Path, store: str
) -> None:
    if store == "sqlite":
        store = f"sqlite:///{tmp_path}/conversations.sqlite"
    async with wsserver.serve(puppet, port=0, store=store, drain_timeout=0) as server:
        async with AsyncExitStack() as stack:
            chats = [await stack.enter_async_context(client(server)) for _ in range(4)]
            prompt = {"prompt": "x", "conversation": ONE}
            await asyncio.gather(*(chat.send(prompt) for chat in chats))
            answers = await asyncio.gather(*(chat.next("start", "error") for chat in chats))
            assert sorted(str(f.get("code", f["type"])) for f in answers) == ["busy"] * 3 + [
                "start"
            ]
            await puppet.reply()
            assert len(puppet.replies) == 1


@pytest.mark.parametrize("turns_before", range(14))
async def test_prompt_racing_delete_gets_no_deleted_history(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet, turns_before: int
) -> None:
    monkeypatch.setattr("wsserver.stores.make", lambda *_: YieldingStore(2))
    async with wsserver.serve(puppet, port=0, drain_timeout=0, conversations=1) as server:
        async with client(server) as chat, client(server) as other:
            await exchange(chat, puppet, "Secret", "x", conversation=ONE)
            await exchange(chat, puppet, "Drops the other from memory", "x", conversation=TWO)
            connection, racing = server.app.connections.values()
            racing.receive(json.dumps({"prompt": "New", "conversation": ONE}))
            for _ in range(turns_before):
                await asyncio.sleep(0)
            connection.receive(json.dumps({"type": "delete", "conversation": ONE}))
            await chat.next("deleted")
            await other.next("start", "error")
            await chat.send({"type": "open", "conversation": ONE})
            seen = await chat.next("history", "error")
            if seen["type"] == "error":  # the delete came last
                assert seen["code"] == "not_found"
            else:  # the prompt came last, in a new conversation
                await until(lambda: len(puppet.replies) == 3)
                assert [m.content for m in puppet.replies[2].request.messages] == ["New"]
                assert seen["messages"] == []


async def test_resume_racing_delete_gets_no_deleted_text(
    monkeypatch: pytest.MonkeyPatch, puppet: Puppet
) -> None:
    gate = asyncio.Event()
    gate.set()

    class Late(MemoryStore):
        async def find(self, *arguments: Any) -> Any:
            found = await super().find(*arguments)
            await gate.wait()
            return found

    monkeypatch.setattr("wsserver.stores.make", lambda *_: Late())
    async with wsserver.serve(puppet, port=0, replay_size=1, drain_timeout=0) as server:
        async with client(server) as chat, client(server) as other:
            await exchange(chat, puppet, "Secret", "x", conversation=ONE, id=ID)
            gate.clear()
            await other.send({"type": "resume", "id": ID})
            await other.quiet()
            await chat.send({"type": "delete", "conversation": ONE})
            await chat.next("deleted")
            gate.set()
            assert (await other.next("start", "error"))["code"] == "forgotten"


# While the server drains.


async def test_repeated_prompt_attaches_while_server_drains(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=BOUND) as server:
        async with client(server) as chat, client(server) as other:
            await chat.prompt("Hello", id=ID)
            reply = (await puppet.reply()).say("half")
            await chat.next("token")
            closing = asyncio.ensure_future(server.close())
            await until(lambda: server.app.hub.scheduler.draining)
            assert (await other.prompt("Hello", id=ID))["type"] == "start"
            assert (await other.prompt("Another"))["code"] == "shutting_down"
            reply.say(" whole").end()
            assert (await other.text(ID))[0] == "half whole"
            await closing
