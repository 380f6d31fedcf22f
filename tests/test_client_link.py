"""One connection of the Python client: requests and answers, limits, dead connections.

Scripted servers violate the protocol; the other servers are real.
"""

import asyncio
import json
import time
from collections.abc import Awaitable

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.line import Line
from tests.support.older import older
from tests.support.puppet import BOUND, Puppet, until
from tests.support.replies import Frame, Send, failure_of, read, scripted
from wsserver import Code, ModelError
from wsserver.client import (
    ConnectionFailed,
    ServerError,
    State,
    connect,
    dial,
    link,
    new_id,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


# Requests and answers.


async def test_error_fails_only_named_request() -> None:
    waiting: list[Frame] = []

    async def answer(frame: Frame, send: Send) -> None:
        waiting.append(frame)
        if len(waiting) < 3:
            return
        error = {"type": "error", "code": "store", "message": "No.", "retryable": False}
        for asked in reversed(waiting):
            if asked["type"] == "list":
                await send({"type": "conversations", "items": []}, request=asked["request"])
            else:
                await send(error, request=asked["request"])

    async with scripted(answer) as url, connect(url) as chat:
        renamed, listed, deleted = await asyncio.wait_for(
            asyncio.gather(
                chat.rename(chat.conversation, "Title"),
                chat.conversations(),
                chat.delete(chat.conversation),
                return_exceptions=True,
            ),
            BOUND,
        )
    assert isinstance(renamed, ServerError)
    assert isinstance(deleted, ServerError)
    assert listed == []
    assert len({frame["request"] for frame in waiting}) == 3


async def test_unrelated_frames_answer_no_request() -> None:
    async def answer(frame: Frame, send: Send) -> None:
        await send({"type": "renamed", "conversation": frame["conversation"], "title": "Theirs"})
        await send({"type": "error", "code": "limit", "message": "Other.", "retryable": True})
        error = {"type": "error", "code": "not_found", "message": "Mine.", "retryable": False}
        await send(error, request=frame["request"])

    async with scripted(answer) as url, connect(url) as chat:
        with pytest.raises(ServerError, match="Mine"):
            await asyncio.wait_for(chat.rename(chat.conversation, "Ours"), BOUND)


async def test_frames_after_hello_have_request_key() -> None:
    seen: list[Frame] = []

    async def answer(frame: Frame, send: Send) -> None:
        seen.append(frame)
        if frame["type"] == "auth":
            await send({"type": "authenticated", "principal": "a"}, request=frame["request"])
        elif frame["type"] == "prompt":
            start = {"type": "start", "id": frame["id"], "model": "m"}
            await send(start, request=frame["request"])
        elif frame["type"] == "stop":
            end = {"type": "done", "id": frame["id"], "seq": 0, "reason": "stopped", "usage": {}}
            await send(end, by="client")
            await send({"type": "stopped", "ids": [frame["id"]]}, request=frame["request"])
        else:
            await send({"type": "conversations", "items": []}, request=frame["request"])

    async with scripted(answer) as url, connect(url, token="good") as chat:
        reply = chat.prompt("Hi")
        async with asyncio.timeout(BOUND):
            await reply.accepted()
            await reply.stop()
            assert (await reply.done()).by == "client"
            await chat.conversations()
    assert [frame["type"] for frame in seen] == ["auth", "prompt", "stop", "list"]
    assert [next(iter(frame)) for frame in seen] == ["request"] * 4, "the first key"
    assert len({frame["request"] for frame in seen}) == 4


async def test_unanswered_requests_fail_after_patience() -> None:
    seen: list[str] = []

    async def answer(frame: Frame, _: Send) -> None:
        seen.append(frame["type"])

    async with scripted(answer) as url, connect(url, patience=0.2) as chat:
        reply = chat.prompt("Hi")
        for call in (chat.history(), chat.conversations(), chat.delete(chat.conversation)):
            with pytest.raises(ConnectionFailed, match="not answer in time") as raised:
                await asyncio.wait_for(call, BOUND)
            assert not raised.value.final
        assert "not answer in time" in str(await failure_of(reply))
        await until(lambda: "stop" in seen)  # no caller waits for the reply
        assert chat.state is State.OPEN


async def test_older_server_gets_no_request_keys(server: wsserver.Server, puppet: Puppet) -> None:
    async with older(server.url) as url, connect(url) as chat:
        first = chat.prompt("One")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        assert (await failure_of(first)).code == "overloaded"
        again = chat.prompt("One", retry_of=first.id)
        (await puppet.reply(1)).say("Whole").end()
        assert await read(again) == "Whole", "it is asked without `retry_of`"
        results = await asyncio.wait_for(
            asyncio.gather(
                chat.history(),
                chat.rename("no-conversation-of-this-id", "Title"),
                chat.conversations(),
                chat.prompt("Two", conversation=chat.conversation, model="none").done(),
                return_exceptions=True,
            ),
            BOUND,
        )
        codes = [result.code for result in results if isinstance(result, ServerError)]
        assert codes == ["not_found", "model_not_allowed"]
        stopped = chat.prompt("Three")
        await puppet.reply(2)
        await stopped.stop()
        assert (await asyncio.wait_for(stopped.done(), BOUND)).by == "client"
        assert chat.limits is None


async def test_request_before_late_hello_is_answered_without_key() -> None:
    async def talk(socket: ServerConnection) -> None:
        asked = [json.loads(await socket.recv())]
        await socket.send(json.dumps({"type": "hello", "limits": {"prompt_size": 5}}))
        await socket.send(json.dumps({"type": "conversations", "items": []}))
        asked.append(json.loads(await socket.recv()))
        answer = {"type": "conversations", "items": [], "request": asked[1]["request"]}
        await socket.send(json.dumps(answer))
        assert "request" not in asked[0]

    async with serve(talk, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with connect(url) as chat:
            for _ in range(2):
                assert await asyncio.wait_for(chat.conversations(), BOUND) == []
            assert chat.limits is not None
            assert chat.limits.prompt_size == 5


# Limits.


@pytest.mark.parametrize(
    "prompt",
    ["x" * 1001, "ü" * 501, "\x01" * 400],
    ids=["of the prompt", "in bytes", "of the frame, with its escapes"],
)
async def test_prompt_over_message_size_is_refused_unsent(
    puppet: Puppet, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        wsserver.serve(
            puppet, port=0, prompt_size=1000, message_size=2000, drain_timeout=0
        ) as server,
        connect(server.url) as chat,
    ):
        running = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(running))
        sent: list[bytes] = []
        with monkeypatch.context() as patch:
            patch.setattr(dial.Socket, "send", sent.append)
            error = await failure_of(chat.prompt(prompt, conversation=new_id()))
        assert (error.code, error.retryable) == ("too_long", False)
        assert sent == []
        assert chat.limits is not None
        assert (chat.limits.prompt_size, chat.limits.message_size) == (1000, 2000)
        said.say("upon").end()
        assert await read(running) == "Once upon"
        fits = chat.prompt("x" * 1000, conversation=new_id())
        (await puppet.reply(1)).say("It fits").end()
        assert await read(fits) == "It fits"


async def test_close_1009_refuses_only_the_longest_prompt(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with older(server.url, max_size=None) as url, connect(url) as chat:
        running = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(running))
        longest = chat.prompt("x" * 70_000, conversation=new_id())
        short = chat.prompt("Short", conversation=new_id())
        assert (await failure_of(longest)).code == "too_long"
        (await puppet.reply(1)).say("Here").end()
        said.say("upon").end()
        assert await read(running) == "Once upon"
        assert await read(short) == "Here"


async def test_frame_over_client_limit_is_protocol_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dial, "FRAME_SIZE", 1000)

    async def answer(frame: Frame, send: Send) -> None:
        await send({"type": "start", "id": frame["id"], "model": "x" * 1000})

    async with scripted(answer) as url, connect(url) as chat:
        error = await failure_of(chat.prompt("Hi"))
        assert (type(error), error.final) == (ConnectionFailed, True)
        assert "violates the protocol" in str(error)


async def test_low_bad_frames_limit_lowers_request_window() -> None:
    most = waiting = 0

    async def answer(frame: Frame, send: Send) -> None:
        nonlocal most, waiting
        waiting += 1
        most = max(most, waiting)
        waiting -= 1
        await send({"type": "start", "id": frame["id"], "model": "m"}, request=frame["request"])
        await send({"type": "done", "id": frame["id"], "seq": 0, "reason": "r", "usage": {}})

    async with scripted(answer, bad_frames=3, requests=32) as url, connect(url) as chat:
        assert (await asyncio.wait_for(chat.prompt("Hi").done(), BOUND)).reason == "r"


# Dead connections.


async def test_silence_during_reply_replaces_connection(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENCE_WHILE_WAITING", 0.05)
    states: list[State] = []
    async with (
        Line(server.port) as line,
        connect(line.url, ping_timeout=1000, close_timeout=1000, on_state=states.append) as chat,
    ):
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.hush()
        # The client ends the connection without an answer of the dead server.
        await until(lambda: State.LOST in states)
        said.say("upon").end()
        line.mend()
        assert await read(reply) == "Once upon"
        line.reset()


async def test_prompt_on_dead_idle_connection_is_resent(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENCE_WHILE_WAITING", 0.05)
    states: list[State] = []
    async with (
        Line(server.port) as line,
        connect(line.url, ping_timeout=1000, on_state=states.append) as chat,
    ):
        await chat.conversations()
        line.hush()
        reply = chat.prompt("Are you there?")
        await until(lambda: State.LOST in states)
        line.mend()
        (await puppet.reply()).say("Yes").end()
        assert await read(reply) == "Yes"
        assert len(puppet.replies) == 1
        line.reset()


async def test_answered_pings_keep_silent_connection(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENCE_WHILE_WAITING", 0.01)
    states: list[State] = []
    pings = 0
    ping = dial.Socket.ping

    def counted_ping(self: dial.Socket, data: bytes | None = None) -> Awaitable[Awaitable[float]]:
        nonlocal pings
        pings += 1
        return ping(self, data)

    monkeypatch.setattr(dial.Socket, "ping", counted_ping)
    async with connect(server.url, on_state=states.append) as chat:
        reply = chat.prompt("Think")
        said = await puppet.reply()
        await until(lambda: pings > 5)
        said.say("Done").end()
        assert await read(reply) == "Done"
    assert states == [State.OPEN, State.CLOSED]


async def test_blocked_event_loop_does_not_count_as_silence(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "SILENCE_WHILE_WAITING", 0.05)
    states: list[State] = []
    async with connect(server.url, on_state=states.append) as chat:
        reply = chat.prompt("Think")
        said = await puppet.reply()
        for _ in range(3):
            time.sleep(0.2)  # noqa: ASYNC251
            await chat.conversations()
        said.say("Done").end()
        assert await read(reply) == "Done"
    assert states == [State.OPEN, State.CLOSED]


async def test_close_of_dead_connection_takes_at_most_close_timeout(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line:
        async with asyncio.timeout(BOUND):
            async with connect(line.url, close_timeout=0.05) as chat:
                chat.prompt("Tell me a story")
                await puppet.reply()
                line.hush()
        assert chat.state is State.CLOSED
        line.reset()
