"""The Python client while connections are cut and servers restart."""

import asyncio
import contextlib
import inspect
import itertools
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.line import Line
from tests.support.ports import free_port
from tests.support.process import run
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import BOUND, Puppet, until
from tests.support.replies import (
    TEXT,
    WORDS,
    Frame,
    Send,
    end_of,
    failure_of,
    read,
    recite,
    scripted,
    seq_reached,
)
from wsserver.client import (
    ConnectionFailed,
    Message,
    ReplyError,
    ServerError,
    State,
    connect,
    new_id,
)
from wsserver.client.dial import Backoff

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


# Connections that are cut.


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("late", [False, True], ids=["at", "after"])
async def test_text_is_whole_after_cut_at_any_byte(reset: bool, late: bool) -> None:
    calls = 0

    async def counted(request: wsserver.Request) -> AsyncIterator[str | wsserver.Thinking]:
        nonlocal calls
        calls += 1
        async for piece in recite(request):
            yield piece

    async with wsserver.serve(counted, port=0, drain_timeout=0) as server:
        async with Proxy(server.port) as whole, connect(whole.url) as chat:
            await read(chat.prompt("Recite"))
            length = whole.passed[0]
        # From the middle of the handshake to the last byte of the last frame.
        places = [*range(1, length, 211), length - 150, length - 20, length - 1, length]
        for number, place in enumerate(places):
            other = places[-number]
            cuts = Cut(place, reset, late), Cut(other, reset, late), Cut(200, reset, late)
            before = calls
            async with Proxy(server.port, *cuts) as proxy, connect(proxy.url) as chat:
                reply = chat.prompt("Recite")
                assert await read(reply) == TEXT, place
                assert reply.thoughts == "hm ", place
                assert (await end_of(reply)).reason == "end_turn"
            assert calls == before + 1, "asked once, whatever was lost"


async def test_running_and_queued_replies_continue_over_many_cuts(
    line: Line, puppet: Puppet
) -> None:
    async with connect(line.url) as chat:
        one, two = chat.prompt("One"), chat.prompt("Two", conversation=new_id())
        three = chat.prompt("Three", on_busy="queue")
        await three.accepted()
        assert three.queued == 1
        for number, word in enumerate(WORDS[:10], start=1):
            for said in puppet.replies:
                said.say(word)
            line.reset()
            await until(partial(seq_reached, number, one, two))
        for said in (await puppet.reply(0), await puppet.reply(1)):
            said.end()
        (await puppet.reply(2)).say("last").end()
        assert await read(one) == await read(two) == "".join(WORDS[:10])
        assert await read(three) == "last"
        assert len(puppet.replies) == 3


async def test_stop_without_connection_is_sent_on_reconnect(line: Line, puppet: Puppet) -> None:
    states: list[State] = []
    async with connect(line.url, on_state=states.append) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.cut()
        await until(lambda: chat.state is State.LOST)
        await reply.stop()
        unsent = chat.prompt("Never said")
        await unsent.stop()
        assert (await end_of(unsent)).by == "client", "nobody need be asked"
        line.mend()
        end = await end_of(reply)
        assert (end.by, end.text) == ("client", "Once ")
        assert said.closed.is_set()
        assert len(puppet.replies) == 1
    assert states == [State.OPEN, State.LOST, State.OPEN, State.CLOSED]


async def test_stopped_unconfirmed_prompt_is_not_resent(line: Line, puppet: Puppet) -> None:
    async with connect(line.url) as chat:
        line.deafen()
        arrived, lost = chat.prompt("One"), chat.prompt("Two")
        await puppet.reply()
        line.cut()
        await until(lambda: chat.state is State.LOST)
        await arrived.stop()
        await lost.stop()
        line.mend()
        assert (await end_of(arrived)).by == "client"
        assert (await end_of(lost)).by == "client"
        assert len(puppet.replies) == 1


async def test_dead_connection_is_replaced(line: Line, puppet: Puppet) -> None:
    async with connect(line.url, ping_timeout=0.1) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.deafen()
        said.say("upon").end()
        await until(lambda: chat.state is State.LOST)
        line.cut()
        line.mend()
        assert await read(reply) == "Once upon"


async def test_queries_without_connection_are_answered_on_reconnect(
    line: Line, puppet: Puppet
) -> None:
    async with connect(line.url) as chat:
        reply = chat.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await end_of(reply)
        line.cut()
        await until(lambda: chat.state is State.LOST)
        asking = asyncio.gather(chat.history(), chat.conversations())
        await until(lambda: line.tried > 2)
        line.mend()
        history, conversations = await asyncio.wait_for(asking, BOUND)
        assert [m.text for m in history.messages] == ["One", "Yes"]
        assert [c.id for c in conversations] == [chat.conversation]


async def test_delete_with_lost_answer_succeeds(
    line: Line, puppet: Puppet, server: wsserver.Server
) -> None:
    async with connect(line.url) as chat:
        reply = chat.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await end_of(reply)
        line.deafen()
        deleting = asyncio.ensure_future(chat.delete(chat.conversation))
        async with asyncio.timeout(BOUND), connect(server.url) as other:
            while await other.conversations():
                pass
        line.cut()
        line.mend()
        await asyncio.wait_for(deleting, BOUND)
        with pytest.raises(ServerError) as raised:
            await chat.delete(chat.conversation)
        assert raised.value.code == "not_found"


async def test_requests_fail_after_patience_and_next_request_connects(
    line: Line, puppet: Puppet
) -> None:
    async with connect(line.url, patience=0.05) as chat:
        reply = chat.prompt("One")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.cut()
        with pytest.raises(ConnectionFailed) as raised:
            await end_of(reply)
        assert not raised.value.final
        assert reply.text == "Once "
        await until(lambda: chat.state is State.IDLE)
        line.mend()
        said.say("upon").end()
        assert await read(chat.resume(reply.id, after=reply.seq)) == "upon"


async def test_history_arrives_over_repeatedly_cut_connections(line: Line, puppet: Puppet) -> None:
    async with connect(line.url) as chat:
        texts = [str(number) * 5_000 for number in range(6)]
        for number, text in enumerate(texts):
            reply = chat.prompt(f"Prompt {number}")
            (await puppet.reply(number)).say(text).end()
            await end_of(reply)
        line.narrow(20_000)
        line.reset()
        messages = (await asyncio.wait_for(chat.history(), BOUND)).messages
        assert [message.text for message in messages[1::2]] == texts
        assert [message.text for message in messages[::2]] == [f"Prompt {n}" for n in range(6)]


@pytest.mark.filterwarnings("ignore")
async def test_older_server_gets_no_page_size() -> None:
    sizes: list[int | None] = []

    async def answer(frame: Frame, send: Send) -> None:
        sizes.append(frame.get("size"))
        if len(sizes) < 3:
            raise OSError  # closes with 1011
        if "size" in frame:
            error = {"type": "error", "code": "invalid_frame", "message": "size: unknown key."}
            await send(error, retryable=False, request=frame["request"])
        else:
            page = {"type": "history", "title": "T", "messages": [], "running": []}
            await send(page, conversation=frame["conversation"], request=frame["request"])

    async with scripted(answer) as url, connect(url) as chat:
        assert (await asyncio.wait_for(chat.history(), BOUND)).messages == ()
    assert sizes == [None, None, 32768, None]


# Servers that restart.


async def test_conversation_continues_after_server_restart(tmp_path: Path) -> None:
    port = free_port()
    settings: dict[str, Any] = {
        "port": port,
        "store": f"sqlite:///{tmp_path}/c.sqlite",
        "drain_timeout": 0,
        "save_interval": 0.01,
    }
    puppet = Puppet()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(wsserver.serve(puppet, **settings))
        chat = await stack.enter_async_context(connect(server.url))
        reply = chat.prompt("Tell me a story")
        (await puppet.reply()).say("Once ", "upon")
        await until(lambda: reply.text == "Once upon")
        await server.close()
        end = await end_of(reply)
        assert (end.by, end.text) == ("shutdown", "Once upon")
        while_away = chat.prompt("And then?")
        assert not while_away.started
        await stack.enter_async_context(wsserver.serve(puppet, **settings))
        said = await puppet.reply(1)
        assert [m.content for m in said.request.messages][:2] == ["Tell me a story", "Once upon"]
        said.say("The end").end()
        assert await read(while_away) == "The end"
        assert [m.text for m in (await chat.history()).messages][-1] == "The end"


@pytest.mark.parametrize("interval", ["0.01", "1000"], ids=["some", "nothing"])
async def test_reply_is_interrupted_after_server_kill(tmp_path: Path, interval: str) -> None:
    serve_ = ("-m", "wsserver", "serve", "--demo-rate", "100", "--save-interval", interval)
    store = ("--store", f"sqlite:///{tmp_path}/c.sqlite")
    port = str(free_port())
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(run(*serve_, *store, "--port", port))
        match = await first.line(r"(ws://\S+)")
        chat = await stack.enter_async_context(connect(match[1]))
        reply = chat.prompt("Tell me a story")
        async with asyncio.timeout(BOUND):
            async for _ in reply:
                if reply.seq > 5:
                    break
        first.signal(signal.SIGKILL)
        await first.end()
        await stack.enter_async_context(run(*serve_, *store, "--port", port))
        with pytest.raises(ReplyError) as raised:
            await end_of(reply)
        assert (raised.value.code, raised.value.retryable) == ("interrupted", True)
        said: tuple[Message, ...] = ()
        if interval == "0.01":
            said = (await chat.history()).messages[1:]
            assert said
        # The client may have more pieces than the store.
        assert reply.text.startswith("".join(message.text for message in said))
        assert len(reply.text) >= 5
        assert all(message.partial == "interrupted" for message in said)


async def test_reply_unknown_to_next_server_is_interrupted() -> None:
    first, second = Puppet(), Puppet()
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(wsserver.serve(first, port=0, drain_timeout=0))
        two = await stack.enter_async_context(wsserver.serve(second, port=0, drain_timeout=0))
        line = await stack.enter_async_context(Line(one.port))
        chat = await stack.enter_async_context(connect(line.url))
        reply = chat.prompt("Tell me a story")
        (await first.reply()).say("Once ")
        await anext(aiter(reply))
        line.port = two.port
        line.reset()
        with pytest.raises(ReplyError) as raised:
            await end_of(reply)
        assert (raised.value.code, raised.value.retryable) == ("interrupted", True)
        assert reply.text == "Once "


async def until_refused(port: int) -> None:
    """Wait until a server has begun to shut down, and accepts no connections."""
    async with asyncio.timeout(BOUND):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            writer.close()


async def test_prompt_refused_by_draining_server_is_sent_to_next() -> None:
    first, second = Puppet(), Puppet()
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(wsserver.serve(first, port=0))
        two = await stack.enter_async_context(wsserver.serve(second, port=0, drain_timeout=0))
        line = await stack.enter_async_context(Line(one.port))
        chat = await stack.enter_async_context(connect(line.url))
        running = chat.prompt("One")
        said = (await first.reply()).say("Still ")
        await anext(aiter(running))
        closing = asyncio.ensure_future(one.close())
        await until_refused(one.port)
        later = chat.prompt("Two", conversation=new_id())
        line.port = two.port
        said.say("here").end()
        assert await read(running) == "Still here"
        (await second.reply()).say("Welcome").end()
        assert await read(later) == "Welcome"
        await closing


# A crashed server that has fewer pieces than the client.


def _crashed(saved: list[Frame]) -> Callable[[Frame, Send], Awaitable[None]]:
    """A server that sends five words, crashes, and then sends the saved frames."""

    async def answer(frame: Frame, send: Send) -> None:
        name = frame["id"]
        start = {"type": "start", "id": name, "model": "m", "request": frame["request"]}
        if frame["type"] == "prompt":
            await send(start)
            for seq in range(1, 6):
                await send({"type": "token", "id": name, "seq": seq, "text": f"{seq} "})
            raise OSError  # closes with 1011
        if frame["type"] == "resume" and frame.get("after"):
            error = {"type": "error", "code": "gap", "message": "Less.", "retryable": False}
            await send(error, about=name, request=frame["request"])
        elif frame["type"] == "resume":
            await send(start)
            for one in saved:
                await send(one, id=name)

    return answer


INTERRUPTED = {
    "type": "error",
    "code": "interrupted",
    "message": "The server died.",
    "retryable": True,
    "usage": {"output_tokens": 2},
}


CONTINUED = [
    {"type": "token", "seq": 6, "text": "other"},
    {"type": "done", "seq": 6, "reason": "end_turn", "usage": {}},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("saved", "text"),
    [
        ([{"type": "token", "seq": 2, "text": "1 2 "}, {**INTERRUPTED, "seq": 2}], "1 2 "),
        ([{**INTERRUPTED, "seq": 0}], ""),
    ],
    ids=["of what was saved", "of nothing"],
)
async def test_text_after_gap_is_replaced_by_text_of_server(saved: list[Frame], text: str) -> None:
    async with scripted(_crashed(saved)) as url, connect(url) as chat:
        reply = chat.prompt("Count")
        reader = aiter(reply)
        await until(lambda: reply.seq == 5)
        assert await anext(reader) == "1 2 3 4 5 "
        with pytest.raises(ReplyError, match="interrupted"):
            await anext(reader)
        error = await failure_of(reply)
        assert (error.code, error.retryable) == ("interrupted", True)
        assert reply.text == text
        later = []
        with pytest.raises(ReplyError, match="interrupted"):
            async for piece in reply:
                later.append(piece)  # noqa: PERF401 - until it raises
        assert "".join(later) == text
        assert chat.state is State.OPEN


@pytest.mark.filterwarnings("ignore")
async def test_iteration_before_gap_raises_if_reply_continues() -> None:
    async with scripted(_crashed(CONTINUED)) as url, connect(url) as chat:
        reply = chat.prompt("Count")
        reader, later = aiter(reply), aiter(reply)
        await until(lambda: reply.seq == 5)
        assert await anext(reader) == "1 2 3 4 5 "
        assert (await end_of(reply)).text == "other"
        with pytest.raises(ReplyError, match="gap"):
            await anext(reader)
        assert [piece async for piece in later] == ["other"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("saved", "code"),
    [
        ([{"type": "token", "seq": 2, "text": "1 2 "}, {**INTERRUPTED, "seq": 2}], "interrupted"),
        (CONTINUED, "gap"),
        ([{"type": "done", "seq": 2, "reason": "end_turn", "usage": {}}], "gap"),
    ],
    ids=["interrupted", "that continues", "that ends"],
)
async def test_resume_after_unknown_seq_fails(saved: list[Frame], code: str) -> None:
    async with scripted(_crashed(saved)) as url, connect(url) as chat:
        reply = chat.resume("chosen-by-another-program", after=5)
        error = await failure_of(reply)
        assert (error.code, error.retryable) == (code, code == "interrupted")
        assert reply.text == ""
        assert chat.state is State.OPEN


async def test_reply_continues_on_server_without_gap_frames() -> None:
    came = itertools.count(1)

    async def talk(socket: ServerConnection) -> None:
        number = next(came)
        await socket.send(json.dumps({"type": "hello", "limits": {}}))
        async for message in socket:
            frame = json.loads(message)
            told = {"id": frame["id"], "model": "m", "request": frame["request"]}
            if number == 1:
                await socket.send(json.dumps({"type": "start", **told}))
                for seq in (1, 2):
                    token = {"type": "token", "id": frame["id"], "seq": seq, "text": f"{seq} "}
                    await socket.send(json.dumps(token))
                await socket.close(1011)
            elif number == 2 and frame.get("after"):
                error = {"type": "error", "code": "gap", "message": "Less.", "retryable": False}
                await socket.send(json.dumps({**error, "request": frame["request"]}))
            elif number == 2:
                await socket.close(1012)
            else:
                assert frame["after"] == 2
                end = {"type": "done", "id": frame["id"], "seq": 3, "reason": "end", "usage": {}}
                token = {"type": "token", "id": frame["id"], "seq": 3, "text": "3"}
                for answer in ({"type": "start", **told}, token, end):
                    await socket.send(json.dumps(answer))

    async with serve(talk, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with connect(url) as chat:
            assert await read(chat.prompt("Count")) == "1 2 3"


# Time to connect.


async def test_last_connect_attempt_begins_at_deadline(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda _: 1000.0)  # over the timeout
    async with Line(server.port) as line:
        line.cut()
        chat = connect(line.url, open_timeout=0.3, patience=0.3)
        opening = asyncio.ensure_future(chat.__aenter__())
        await until(lambda: line.tried == 1 and not line.connections)
        line.mend()
        async with asyncio.timeout(BOUND):
            await opening
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.cut()
        await until(lambda: chat.state is State.LOST)
        line.mend()
        said.say("upon").end()
        assert await read(reply) == "Once upon"
        assert line.tried == 3
        await chat.close()


async def test_connect_fails_after_last_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda _: 1000.0)
    async with Line(1) as line:
        line.cut()
        with pytest.raises(ConnectionFailed) as raised:
            await asyncio.wait_for(connect(line.url, open_timeout=0.1).__aenter__(), BOUND)
        assert not raised.value.final
        assert line.tried >= 2


def test_default_open_timeout_outlasts_server_restart() -> None:
    default = inspect.signature(connect).parameters["open_timeout"].default
    assert default > wsserver.Settings().shutdown_timeout + 2, "and a start"


async def test_connect_without_server_fails_after_open_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"ws://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(ConnectionFailed, match="cannot connect") as raised:
        await connect(url, open_timeout=0.05).__aenter__()
    assert not raised.value.final


def test_backoff_has_full_jitter_below_doubling_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    backoff = Backoff(uniform)
    for _ in range(7):
        backoff.next()
    backoff.reset()
    backoff.next()
    assert [low for low, _ in bounds] == [0.0] * 8
    assert [high for _, high in bounds] == [0.5, 1, 2, 4, 8, 15, 15, 0.5]
