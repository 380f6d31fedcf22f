"""One connection of the Python client: names and answers, limits, and whether the server is there.

Servers that misbehave are played here by hand. All others are real.
"""

import asyncio
import inspect
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.line import Line
from tests.support.older import older
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Code, Handshake, ModelError, Principal
from wsserver.client import (
    ConnectionFailed,
    Reply,
    ReplyError,
    ServerError,
    State,
    connect,
    dial,
    keeper,
    link,
    new_id,
)
from wsserver.client.dial import Pause
from wsserver.client.keeper import _life

pytestmark = pytest.mark.slow

ID = "chosen-by-another-program"
Frame = dict[str, Any]
Send = Callable[..., Awaitable[None]]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "SHORTEST", 0.001)
    monkeypatch.setattr(dial, "LONGEST", 0.01)


@asynccontextmanager
async def played(
    answer: Callable[[Frame, Send], Awaitable[None]], *, hello: bool = True, **limits: int
) -> AsyncIterator[str]:
    """Serve by a function of a client's frame and of what sends one; yield the address."""

    async def talk(socket: ServerConnection) -> None:
        async def send(frame: Frame, **more: Any) -> None:
            await socket.send(json.dumps(frame | more))

        if hello:
            await send({"type": "hello", "protocol": "wsserver.v1", "limits": limits})
        async for message in socket:
            await answer(json.loads(message), send)

    async with serve(talk, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def failure(reply: Reply) -> Any:
    async with asyncio.timeout(BOUND):
        with pytest.raises((ReplyError, ConnectionFailed)) as raised:
            await reply.done()
    return raised.value


async def text(reply: Reply) -> str:
    async with asyncio.timeout(BOUND):
        return (await reply.done()).text


# Names and answers.


async def test_a_refusal_reaches_the_call_that_it_names() -> None:
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

    async with played(answer) as url, connect(url) as chat:
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


async def test_news_of_others_and_errors_of_the_connection_answer_no_call() -> None:
    async def answer(frame: Frame, send: Send) -> None:
        await send({"type": "renamed", "conversation": frame["conversation"], "title": "Theirs"})
        await send({"type": "error", "code": "limit", "message": "Other.", "retryable": True})
        error = {"type": "error", "code": "not_found", "message": "Mine.", "retryable": False}
        await send(error, request=frame["request"])

    async with played(answer) as url, connect(url) as chat:
        with pytest.raises(ServerError, match="Mine"):
            await asyncio.wait_for(chat.rename(chat.conversation, "Ours"), BOUND)


async def test_every_frame_is_named_once_the_server_has_said_hello() -> None:
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

    async with played(answer) as url, connect(url, token="good") as chat:
        reply = chat.prompt("Hi")
        async with asyncio.timeout(BOUND):
            await reply.accepted()
            await reply.stop()
            assert (await reply.done()).by == "client"
            await chat.conversations()
    assert [frame["type"] for frame in seen] == ["auth", "prompt", "stop", "list"]
    assert [next(iter(frame)) for frame in seen] == ["request"] * 4, "the first key"
    assert len({frame["request"] for frame in seen}) == 4


async def test_calls_that_are_never_answered_end_with_patience() -> None:
    seen: list[str] = []

    async def answer(frame: Frame, _: Send) -> None:
        seen.append(frame["type"])

    async with played(answer) as url, connect(url, patience=0.2) as chat:
        reply = chat.prompt("Hi")
        for call in (chat.history(), chat.conversations(), chat.delete(chat.conversation)):
            with pytest.raises(ConnectionFailed, match="not answer in time") as raised:
                await asyncio.wait_for(call, BOUND)
            assert not raised.value.final
        assert "not answer in time" in str(await failure(reply))
        await until(lambda: "stop" in seen)  # nobody pays for what nobody waits for
        assert chat.state is State.OPEN


async def test_an_older_server_is_served_without_names(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with older(server.url) as url, connect(url) as chat:
        first = chat.prompt("One")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        assert (await failure(first)).code == "overloaded"
        again = chat.prompt("One", retry_of=first.id)
        (await puppet.reply(1)).say("Whole").end()
        assert await text(again) == "Whole", "it is asked without `retry_of`"
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


async def test_what_was_sent_before_a_late_hello_is_answered_without_a_name() -> None:
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


async def test_a_retry_takes_the_place_of_the_turn(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat:
        first = chat.prompt("One")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        await failure(first)
        again = chat.prompt("Better one", retry_of=first.id)
        (await puppet.reply(1)).say("Whole").end()
        assert await text(again) == "Whole"
        assert [m.content for m in puppet.replies[1].request.messages] == ["Better one"]
        history = await chat.history()
        assert [m.content for m in history.messages] == ["Better one", "Whole"]
        assert (await failure(chat.prompt("One", retry_of=first.id))).code == "not_last"


# Limits.


@pytest.mark.parametrize(
    "prompt",
    ["x" * 1001, "ü" * 501, "\x01" * 400],
    ids=["of the prompt", "in bytes", "of the frame, with its escapes"],
)
async def test_a_prompt_over_a_limit_fails_alone_and_is_not_sent(
    puppet: Puppet, prompt: str
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
        (connection,) = server._connections.values()
        before = connection.frames
        error = await failure(chat.prompt(prompt, conversation=new_id()))
        assert (error.code, error.retryable) == ("too_long", False)
        assert connection.frames == before
        assert chat.limits is not None
        assert (chat.limits.prompt_size, chat.limits.message_size) == (1000, 2000)
        said.say("upon").end()
        assert await text(running) == "Once upon"
        fits = chat.prompt("x" * 1000, conversation=new_id())
        (await puppet.reply(1)).say("It fits").end()
        assert await text(fits) == "It fits"


async def test_where_no_limit_is_known_only_the_longest_prompt_fails(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with older(server.url, max_size=None) as url, connect(url) as chat:
        running = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(running))
        longest = chat.prompt("x" * 70_000, conversation=new_id())
        short = chat.prompt("Short", conversation=new_id())
        assert (await failure(longest)).code == "too_long"
        (await puppet.reply(1)).say("Here").end()
        said.say("upon").end()
        assert await text(running) == "Once upon"
        assert await text(short) == "Here"


async def test_an_answer_over_our_own_limit_is_no_reason_to_blame_a_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dial, "LARGEST", 1000)

    async def answer(frame: Frame, send: Send) -> None:
        await send({"type": "start", "id": frame["id"], "model": "x" * 1000})

    async with played(answer) as url, connect(url) as chat:
        error = await failure(chat.prompt("Hi"))
        assert (type(error), error.final) == (ConnectionFailed, True)
        assert "no server of this protocol" in str(error)


async def test_a_server_that_bears_few_bad_frames_gets_few_at_once() -> None:
    most = waiting = 0

    async def answer(frame: Frame, send: Send) -> None:
        nonlocal most, waiting
        waiting += 1
        most = max(most, waiting)
        waiting -= 1
        await send({"type": "start", "id": frame["id"], "model": "m"}, request=frame["request"])
        await send({"type": "done", "id": frame["id"], "seq": 0, "reason": "r", "usage": {}})

    async with played(answer, bad_frames=3, requests=32) as url, connect(url) as chat:
        assert (await asyncio.wait_for(chat.prompt("Hi").done(), BOUND)).reason == "r"
        assert chat._keeper.link is not None
        assert chat._keeper.link._most == 1


# A server that died and has less than the client.


def _crashed(saved: list[Frame]) -> Callable[[Frame, Send], Awaitable[None]]:
    """Play a server that says five words, dies, and then has what was saved."""

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("saved", "code"),
    [
        ([{"type": "token", "seq": 2, "text": "1 2 "}, {**INTERRUPTED, "seq": 2}], "interrupted"),
        ([{**INTERRUPTED, "seq": 0}], "interrupted"),
        ([{"type": "token", "seq": 6, "text": "other"}], "gap"),
        ([{"type": "done", "seq": 2, "reason": "end_turn", "usage": {}}], "gap"),
    ],
    ids=["of what was saved", "of nothing", "that goes on", "that says it is whole"],
)
async def test_a_reply_that_a_server_lost_in_part_is_interrupted(
    saved: list[Frame], code: str, fresh: bool
) -> None:
    async with played(_crashed(saved)) as url, connect(url) as chat:
        reply = chat.resume(ID, after=5) if fresh else chat.prompt("Count")
        error = await failure(reply)
        assert (error.code, error.retryable) == (code, code == "interrupted")
        assert reply.text == ("" if fresh else "1 2 3 4 5 "), "what was shown stays"
        assert chat.state is State.OPEN


async def test_a_server_that_has_all_goes_on_after_one_that_had_less() -> None:
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
            assert await text(chat.prompt("Count")) == "1 2 3"


# Whether the server is there.


async def test_a_silent_link_is_noticed_while_a_reply_is_expected(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "EXPECTING", 0.05)
    states: list[State] = []
    async with (
        Line(server.port) as line,
        connect(line.url, ping_timeout=1000, close_timeout=1000, on_state=states.append) as chat,
    ):
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.hush()
        # The end of the connection waits for no answer of a server that is not there.
        await until(lambda: State.LOST in states)
        said.say("upon").end()
        line.mend()
        assert await text(reply) == "Once upon"
        line.reset()


async def test_a_prompt_into_a_link_that_died_while_idle_is_soon_sent_again(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "EXPECTING", 0.05)
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
        assert await text(reply) == "Yes"
        assert len(puppet.replies) == 1
        line.reset()


async def test_a_server_that_answers_pings_may_be_silent(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "EXPECTING", 0.01)
    states: list[State] = []
    async with connect(server.url, on_state=states.append) as chat:
        reply = chat.prompt("Think")
        said = await puppet.reply()
        assert chat._keeper.link is not None
        socket = chat._keeper.link.socket
        for _ in range(5):
            await until(partial(_heard_after, socket, socket.heard))
        said.say("Done").end()
        assert await text(reply) == "Done"
    assert states == [State.OPEN, State.CLOSED]


def _heard_after(socket: dial.Socket, when: float) -> bool:
    return socket.heard > when


async def test_a_program_that_slept_does_not_blame_the_server(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "EXPECTING", 0.05)
    states: list[State] = []
    async with connect(server.url, on_state=states.append) as chat:
        reply = chat.prompt("Think")
        said = await puppet.reply()
        for _ in range(3):
            time.sleep(0.2)  # noqa: ASYNC251
            await chat.conversations()
        said.say("Done").end()
        assert await text(reply) == "Done"
    assert states == [State.OPEN, State.CLOSED]


async def test_to_leave_a_chat_whose_link_is_dead_takes_no_longer_than_it_may(
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


# Time to connect.


async def test_the_last_attempt_is_made_at_the_end(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pause, "next", lambda _: 1000.0)  # more than there is
    async with Line(server.port) as line:
        line.cut()
        chat = connect(line.url, open_timeout=0.3, patience=0.3)
        opening = asyncio.ensure_future(chat.__aenter__())
        await until(lambda: line.tried == 1 and not line._tasks)
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
        assert await text(reply) == "Once upon"
        assert line.tried == 3
        await chat.close()


async def test_a_server_that_never_comes_is_tried_last_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pause, "next", lambda _: 1000.0)
    async with Line(1) as line:
        line.cut()
        with pytest.raises(ConnectionFailed) as raised:
            await asyncio.wait_for(connect(line.url, open_timeout=0.1).__aenter__(), BOUND)
        assert not raised.value.final
        assert line.tried >= 2


def test_the_time_for_a_first_connection_covers_a_restart_of_the_server() -> None:
    default = inspect.signature(connect).parameters["open_timeout"].default
    assert default > wsserver.Settings().shutdown_timeout + 2, "and a start"


# Who the client is.


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_a_wrong_clock_does_not_matter_for_the_renewal_of_a_token(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    given: list[str] = []

    async def token() -> str:
        given.append("good")
        return "good"

    async def authenticate(_: str | None, __: Handshake) -> Principal | None:
        return Principal("ada", time.time() + 600)

    waits: list[float] = []
    monkeypatch.setattr(keeper, "RENEW_AT", 0.5)
    renew = keeper.Keeper._renew

    async def noted(self: Any, pause: float, link: Any) -> None:
        waits.append(pause)
        await renew(self, pause, link)

    monkeypatch.setattr(keeper.Keeper, "_renew", noted)
    clock = SimpleNamespace(time=lambda: time.time() + ahead)
    monkeypatch.setattr(keeper, "time", clock)
    async with wsserver.serve(puppet, authenticate=authenticate, port=0) as server:
        async with connect(server.url, token=token) as chat:
            await until(lambda: waits)
            await chat.conversations()
    assert waits == [pytest.approx(300, abs=5)]
    assert len(given) == 1


def test_the_rest_of_a_life_is_told_or_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "time", SimpleNamespace(time=lambda: 1000.0))
    assert _life({}) is None
    assert _life({"expires": 5.0, "expires_in": 600}) == 600
    assert _life({"expires": 1600.0}) == 600
    assert _life({"expires": 900.0}) is None, "it holds: it is the clock that is wrong"
    for bad in ("1", float("nan")):
        with pytest.raises(ValueError, match="number"):
            _life({"expires_in": bad})


async def test_a_renewal_that_fails_is_tried_again(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "RENEW_AT", 0.0001)
    monkeypatch.setattr(keeper, "LEAST_RENEWAL", 0.01)
    calls = itertools.count()

    async def token() -> str:
        if 0 < next(calls) < 4:
            raise OSError("no network")
        return "good"

    async def authenticate(_: str | None, __: Handshake) -> Principal | None:
        return Principal("ada", time.time() + 60)

    async with (
        wsserver.serve(puppet, authenticate=authenticate, port=0) as server,
        connect(server.url, token=token) as chat,
    ):
        await until(lambda: next(calls) > 5)
        assert chat.state is State.OPEN


async def test_an_old_complaint_is_not_the_reason_of_a_later_close() -> None:
    async def talk(socket: ServerConnection) -> None:
        error = {"type": "error", "code": "limit", "message": "Old news.", "retryable": True}
        await socket.send(json.dumps(error))
        await socket.recv()
        await socket.close(1008, "too many pings")

    async with serve(talk, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with connect(url) as chat:
            error = await failure(chat.prompt("Hi"))
            assert str(error) == "the server closed the connection: too many pings"
