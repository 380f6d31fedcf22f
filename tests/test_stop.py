"""A stop at every moment of a reply."""

import asyncio
from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet
from wsserver import End, Usage


async def closed(event: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND):
        await event.wait()


async def test_stop_mid_stream_closes_upstream(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt("Count")
    reply = (await puppet.reply()).say("one ", "two ")
    await chat.next("token", seq=2)
    await chat.send({"type": "stop"})
    text, done = await chat.text(start["id"])
    assert reply.closed.is_set(), "the model is closed before its terminal frame is sent"
    assert text == "one two "
    assert (done["seq"], done["reason"], done["by"]) == (2, "stopped", "client")
    assert await chat.quiet() == []


async def test_stop_before_first_token_closes_upstream(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt()
    reply = await puppet.reply()
    await chat.send({"type": "stop", "id": start["id"]})
    text, done = await chat.text(start["id"])
    assert reply.closed.is_set()
    assert (text, done["seq"], done["by"]) == ("", 0, "client")


async def test_stop_before_model_is_called_ends_reply(chat: Client, puppet: Puppet) -> None:
    await chat.send('{"prompt": "Hello", "id": "chosen-by-client"}')
    await chat.send('{"type": "stop"}')  # the server reads the stop with the prompt, or soon after
    _, done = await chat.text("chosen-by-client")
    assert done["by"] == "client"
    assert all(reply.closed.is_set() for reply in puppet.replies if reply.said)


async def test_next_prompt_after_stop_works_on_same_socket(chat: Client, puppet: Puppet) -> None:
    first = await chat.prompt("First")
    (await puppet.reply()).say("Half an")
    await chat.next("token")
    await chat.send({"type": "stop"})
    second = await chat.prompt("Second")  # before the terminal of the first reply
    (await puppet.reply(1)).say("whole").end()
    text, done = await chat.text(second["id"])
    assert (text, done["reason"]) == ("whole", "end_turn")
    said = [(m.role, m.content, m.partial) for m in puppet.replies[1].request.messages]
    assert said == [
        ("user", "First", None),
        ("assistant", "Half an", "client"),
        ("user", "Second", None),
    ]
    terminals = [f for f in chat.frames if f["type"] == "done" and f["id"] == first["id"]]
    assert len(terminals) == 1


async def test_stop_twice_gives_one_terminal(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt()
    reply = await puppet.reply()
    reply.hold = asyncio.Event()  # the model still closes when the second stop comes
    await chat.send({"type": "stop"})
    await chat.send({"type": "stop", "id": start["id"]})
    assert await chat.quiet() == []
    reply.hold.set()
    await chat.next("done", id=start["id"])
    assert await chat.quiet() == []
    await chat.send({"type": "stop", "id": start["id"]})
    assert (await chat.receive())["code"] == "not_running"


async def test_stop_of_unknown_id_or_idle_socket_is_not_running(chat: Client) -> None:
    await chat.send({"type": "stop", "id": "no-such-generation"})
    error = await chat.receive()
    assert error["code"] == "not_running"
    assert error["about"] == "no-such-generation"
    assert "id" not in error, "the error is no terminal"
    await chat.send({"type": "stop"})
    assert (await chat.receive())["code"] == "not_running"


async def test_stop_of_one_reply_leaves_other_running(chat: Client, puppet: Puppet) -> None:
    one = await chat.prompt("One", conversation="conversation-one")
    two = await chat.prompt("Two", conversation="conversation-two")
    await puppet.reply(1)
    await chat.send({"type": "stop", "id": one["id"]})
    await chat.next("done", id=one["id"])
    puppet.replies[1].say("still here").end()
    assert await chat.text(two["id"]) == ("still here", chat.frames[-1])
    assert chat.frames[-1]["reason"] == "end_turn"


async def test_stop_without_id_stops_all_replies_of_socket(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    async with client(server) as other:
        foreign = await other.prompt("Not mine")
        mine = [
            await chat.prompt("A", conversation="conversation-one"),
            await chat.prompt("B", conversation="conversation-one", on_busy="queue"),
            await chat.prompt("C", conversation="conversation-two"),
        ]
        await puppet.reply(2)
        await chat.send({"type": "stop"})
        for _ in mine:
            done = await chat.next("done")
            assert done["by"] == "client"
        assert {f["id"] for f in chat.frames if f["type"] == "done"} == {f["id"] for f in mine}
        assert len(puppet.replies) == 3, "the queued prompt never reached the model"
        puppet.replies[0].say("untouched").end()
        assert (await other.text(foreign["id"]))[0] == "untouched"


async def test_stop_of_queued_prompt_costs_nothing(chat: Client, puppet: Puppet) -> None:
    await chat.prompt("A")
    queued = await chat.prompt("B", on_busy="queue")
    await chat.send({"type": "stop", "id": queued["id"]})
    done = await chat.next("done", id=queued["id"])
    assert done["usage"] == {"input_tokens": 0, "output_tokens": 0}


async def test_stop_by_id_works_from_other_socket(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt()
    async with client(server) as other:
        await other.send({"type": "stop", "id": start["id"]})
        assert (await chat.next("done"))["by"] == "client"
        assert await other.quiet() == []


async def test_stop_at_end_of_reply_gives_one_terminal(chat: Client, puppet: Puppet) -> None:
    # The reply ends while the stop is in flight. Either order gives one terminal.
    for number in range(20):
        start = await chat.prompt(f"Prompt {number}")
        (await puppet.reply(number)).say("all").end()
        await chat.send({"type": "stop", "id": start["id"]})
        frames = await chat.quiet()
        terminals = [f for f in frames if f["type"] == "done"]
        if not terminals:
            terminals = [await chat.next("done", id=start["id"])]
        assert len(terminals) == 1
        refused = [f for f in frames if f["type"] == "error"]
        assert [f["code"] for f in refused] in ([], ["not_running"])


async def test_model_returning_on_cancel_counts_as_stopped() -> None:
    begun = asyncio.Event()

    async def quiet(_: wsserver.Request) -> AsyncIterator[str]:
        yield "half"
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async with wsserver.serve(quiet, port=0) as own, client(own) as chat:
        start = await chat.prompt()
        await closed(begun)
        await chat.send({"type": "stop"})
        text, done = await chat.text(start["id"])
        assert (text, done["reason"]) == ("half", "stopped")


async def test_pieces_after_stop_are_dropped(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt()
    reply = (await puppet.reply()).say("before ")
    reply.stubborn = True
    await chat.next("token")
    await chat.send({"type": "stop"})
    text, done = await chat.text(start["id"])
    assert (text, done["reason"]) == ("before ", "stopped")
    await closed(reply.closed)


async def test_hanging_model_is_abandoned_after_stop_timeout(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, stop_timeout=0.05, drain_timeout=0) as server,
        client(server) as chat,
    ):
        start = await chat.prompt()
        reply = await puppet.reply()
        reply.hold = asyncio.Event()
        await chat.send({"type": "stop"})
        done = await chat.next("done", id=start["id"])
        assert done["by"] == "client"
        assert not reply.closed.is_set()
        reply.hold.set()
        await closed(reply.closed)
        assert await chat.quiet() == []


async def test_exception_of_closing_model_is_ignored() -> None:
    async def careless(_: wsserver.Request) -> AsyncIterator[str]:
        try:
            yield "half"
            await asyncio.Event().wait()
        finally:
            raise ConnectionResetError("the upstream was gone already")

    async with wsserver.serve(careless, port=0) as server, client(server) as chat:
        start = await chat.prompt()
        await chat.next("token")
        await chat.send({"type": "stop"})
        assert (await chat.next("done", "error", id=start["id"]))["by"] == "client"
        assert await chat.quiet() == []


@pytest.mark.parametrize(
    ("said", "usage"),
    [
        ([Usage(7, 3)], {"input_tokens": 7, "output_tokens": 3}),
        (
            [Usage(7, 1, estimated=True)],
            {"input_tokens": 7, "output_tokens": 3, "estimated": True},
        ),
        ([], {"input_tokens": 2, "output_tokens": 3, "estimated": True}),
    ],
    ids=["the model counted", "the model counted its input", "the model never said"],
)
async def test_usage_is_estimated_without_usage_of_model(
    chat: Client, puppet: Puppet, said: list[Usage], usage: dict[str, object]
) -> None:
    await chat.prompt("Hello")
    (await puppet.reply()).say(*said, "twelve chars")
    await chat.next("token")
    await chat.send({"type": "stop"})
    assert (await chat.next("done"))["usage"] == usage


async def test_usage_of_whole_reply_comes_from_model(chat: Client, puppet: Puppet) -> None:
    await chat.prompt()
    (await puppet.reply()).say("x", End("stop_sequence", Usage(5, 6, 7, 8))).end()
    done = await chat.next("done")
    assert done["reason"] == "stop_sequence"
    assert done["usage"] == {
        "input_tokens": 5,
        "output_tokens": 6,
        "cache_creation_input_tokens": 7,
        "cache_read_input_tokens": 8,
    }
