"""The Python client against the real server, over lines that are cut at every kind of moment."""

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

import wsserver
from tests.support.line import Line
from tests.support.process import run
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Code, Handshake, ModelError, Principal, Thinking
from wsserver.client import (
    ChatError,
    ConnectionFailed,
    Message,
    Reply,
    ReplyError,
    ServerError,
    State,
    Usage,
    connect,
    connect_sync,
    dial,
    keeper,
    new_id,
)
from wsserver.client.dial import Pause
from wsserver.responses import respond

pytestmark = pytest.mark.slow

WORDS = [f"word{number} " for number in range(40)]
TEXT = "".join(WORDS)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "SHORTEST", 0.001)
    monkeypatch.setattr(dial, "LONGEST", 0.01)


@pytest.fixture
async def line(server: wsserver.Server) -> AsyncIterator[Line]:
    async with Line(server.port) as line:
        yield line


async def shown(reply: Reply) -> str:
    """Return all that an iteration yields."""
    async with asyncio.timeout(BOUND):
        return "".join([text async for text in reply])


def reached(seq: int, *replies: Reply) -> bool:
    return all(reply.seq == seq for reply in replies)


async def done(reply: Reply) -> Any:
    async with asyncio.timeout(BOUND):
        return await reply.done()


async def recite(request: wsserver.Request) -> AsyncIterator[str]:
    yield Thinking("hm ")
    for word in WORDS:
        await asyncio.sleep(0)
        yield word


# Replies.


async def test_a_story_is_told_and_its_end_is_known(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Tell me a story")
        (await puppet.reply()).say(Thinking("hm"), "Once ", "upon").end()
        assert await shown(reply) == "Once upon"
        thought = [text async for text in reply.thinking]
        assert ("".join(thought), reply.thoughts) == ("hm", "hm")
        end = await done(reply)
        assert (end.reason, end.by, end.text, end.saved) == ("end_turn", None, "Once upon", True)
        assert end.usage == reply.usage
        assert end.usage.estimated
        assert (reply.model, reply.conversation) == ("puppet", chat.conversation)
        again = chat.prompt("Go on")
        (await puppet.reply(1)).say("And so").end()
        assert await shown(again) == "And so"
        assert [m.content for m in puppet.replies[1].request.messages][:2] == [
            "Tell me a story",
            "Once upon",
        ]


async def test_to_leave_the_iteration_leaves_the_reply_running(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        async for text in reply:
            assert text == "Once "
            break
        said.say("upon").end()
        assert (await done(reply)).text == "Once upon"


@pytest.mark.parametrize("failing", [False, True])
async def test_to_leave_the_chat_stops_what_runs(
    server: wsserver.Server, puppet: Puppet, failing: bool
) -> None:
    with contextlib.suppress(RuntimeError):
        async with connect(server.url) as chat:
            reply = chat.prompt("Tell me a story")
            said = (await puppet.reply()).say("Once ")
            await anext(aiter(reply))
            if failing:
                raise RuntimeError
    assert said.closed.is_set()
    end = await done(reply)
    assert (end.reason, end.by, end.text) == ("stopped", "client", "Once ")
    assert chat.state is State.CLOSED
    with pytest.raises(ConnectionFailed):
        chat.prompt("More")


async def test_to_leave_the_chat_leaves_running_what_it_only_followed(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        async with connect(server.url) as other:
            followed = other.resume(reply.id)
            assert await anext(aiter(followed)) == "Once "
            assert other.resume(reply.id) is followed
        said.say("upon").end()
        assert await shown(reply) == "Once upon"
        with pytest.raises(ConnectionFailed):
            await done(followed)
        later = chat.resume(reply.id, after=1)
        assert await shown(later) == "upon"


async def test_messages_of_ones_own_touch_no_conversation(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        messages = [("user", "One"), ("assistant", "Two"), ("user", "Three")]
        reply = chat.prompt(messages=messages, system="Be kind", max_tokens=5)  # type: ignore[arg-type]
        (await puppet.reply()).say("Four").end()
        request = puppet.replies[0].request
        assert (await done(reply)).text == "Four"
        assert [m.content for m in request.messages] == ["One", "Two", "Three"]
        assert (request.system, request.max_tokens, reply.conversation) == ("Be kind", 5, None)
        assert await chat.conversations() == []


@pytest.mark.parametrize("prompt", ["", " ", "half of \ud83e"])
async def test_what_is_no_prompt_is_not_sent(server: wsserver.Server, prompt: str) -> None:
    async with connect(server.url) as chat:
        with pytest.raises(ValueError, match="prompt"):
            chat.prompt(prompt)


async def test_a_slow_reader_costs_no_more_than_the_text() -> None:
    async def long(request: wsserver.Request) -> AsyncIterator[str]:
        for _ in range(2000):
            yield "x" * 100
            await asyncio.sleep(0)

    async with wsserver.serve(long, port=0, drain_timeout=0) as server, connect(server.url) as chat:
        reply = chat.prompt("Go")
        pieces = aiter(reply)
        first = await anext(pieces)
        await done(reply)
        rest = [text async for text in pieces]
        assert len(rest) == 1, "all that came meanwhile is one text"
        assert len(first) + len(rest[0]) == 200_000


async def test_200_replies_at_once() -> None:
    async def echo(request: wsserver.Request) -> AsyncIterator[str]:
        for word in request.prompt.split():
            await asyncio.sleep(0)
            yield word + " "

    async with (
        wsserver.serve(echo, port=0, generations_per_socket=200) as server,
        connect(server.url) as chat,
    ):
        prompts = [f"{number} and {number} again " for number in range(200)]
        replies = [chat.prompt(prompt, conversation=new_id()) for prompt in prompts]
        assert await asyncio.gather(*map(shown, replies)) == prompts


async def test_the_server_may_take_few_frames_at_once() -> None:
    async def echo(request: wsserver.Request) -> AsyncIterator[str]:
        yield request.prompt

    async with (
        wsserver.serve(
            echo, port=0, generations_per_socket=200, frame_burst=5, frame_rate=200, bad_frames=20
        ) as server,
        connect(server.url) as chat,
    ):
        replies = [chat.prompt(f"{n}", conversation=new_id()) for n in range(60)]
        assert await asyncio.gather(*map(shown, replies)) == [f"{n}" for n in range(60)]
        assert len(await chat.conversations(limit=60)) == 60


async def test_a_limit_is_waited_for_as_long_as_patience_lasts(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, prompts_per_minute=1, drain_timeout=0) as server,
        connect(server.url, patience=5) as chat,
    ):
        first = chat.prompt("One")
        (await puppet.reply()).say("x").end()
        await done(first)
        reply = chat.prompt("Two")
        with pytest.raises(ReplyError) as raised:
            await done(reply)
        assert (raised.value.code, raised.value.retryable) == ("limit", True)
        assert raised.value.retry_after is not None
        assert 50 < raised.value.retry_after <= 60
    async with (
        wsserver.serve(puppet, port=0, prompts_per_minute=600, drain_timeout=0) as server,
        connect(server.url) as chat,
    ):
        # A rate of ten a second, of which one is left: the second waits a tenth of one.
        server._hub.accounts._prompts._burst = 1
        one, two = (chat.prompt(text, conversation=new_id()) for text in ("1", "2"))
        for number in (1, 2):
            (await puppet.reply(number)).say("x").end()
        assert (await shown(one), await shown(two)) == ("x", "x")


# Lines that are cut.


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("late", [False, True], ids=["at", "after"])
async def test_whatever_is_cut_the_text_is_exact(reset: bool, late: bool) -> None:
    calls = 0

    async def counted(request: wsserver.Request) -> AsyncIterator[str]:
        nonlocal calls
        calls += 1
        async for piece in recite(request):
            yield piece

    async with wsserver.serve(counted, port=0, drain_timeout=0) as server:
        async with Proxy(server.port) as whole, connect(whole.url) as chat:
            await shown(chat.prompt("Recite"))
            length = whole.passed[0]
        # From the middle of the handshake to the last byte of the last frame.
        places = [*range(1, length, 211), length - 150, length - 20, length - 1, length]
        for number, place in enumerate(places):
            other = places[-number]
            cuts = Cut(place, reset, late), Cut(other, reset, late), Cut(200, reset, late)
            before = calls
            async with Proxy(server.port, *cuts) as proxy, connect(proxy.url) as chat:
                reply = chat.prompt("Recite")
                assert await shown(reply) == TEXT, place
                assert reply.thoughts == "hm ", place
                assert (await done(reply)).reason == "end_turn"
            assert calls == before + 1, "asked once, whatever was lost"


async def test_two_replies_and_a_queue_go_on_over_a_line_that_is_cut_often(
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
            await until(partial(reached, number, one, two))
        for said in (await puppet.reply(0), await puppet.reply(1)):
            said.end()
        (await puppet.reply(2)).say("last").end()
        assert await shown(one) == await shown(two) == "".join(WORDS[:10])
        assert await shown(three) == "last"
        assert len(puppet.replies) == 3


async def test_a_stop_without_a_connection_is_sent_with_the_next(
    line: Line, puppet: Puppet
) -> None:
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
        assert (await done(unsent)).by == "client", "nobody need be asked"
        line.mend()
        end = await done(reply)
        assert (end.by, end.text) == ("client", "Once ")
        assert said.closed.is_set()
        assert len(puppet.replies) == 1
    assert states == [State.OPEN, State.LOST, State.OPEN, State.CLOSED]


async def test_a_stop_of_a_prompt_that_may_have_been_lost_begins_nothing(
    line: Line, puppet: Puppet
) -> None:
    async with connect(line.url) as chat:
        line.deafen()
        arrived, lost = chat.prompt("One"), chat.prompt("Two")
        await puppet.reply()
        line.cut()
        await until(lambda: chat.state is State.LOST)
        await arrived.stop()
        await lost.stop()
        line.mend()
        assert (await done(arrived)).by == "client"
        assert (await done(lost)).by == "client"
        assert len(puppet.replies) == 1


async def test_a_connection_that_is_dead_is_noticed(line: Line, puppet: Puppet) -> None:
    async with connect(line.url, ping_timeout=0.1) as chat:
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.deafen()
        said.say("upon").end()
        await until(lambda: chat.state is State.LOST)
        line.reset()
        line._deaf = False
        assert await shown(reply) == "Once upon"


async def test_what_is_asked_while_the_line_is_cut_is_answered_later(
    line: Line, puppet: Puppet
) -> None:
    async with connect(line.url) as chat:
        reply = chat.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await done(reply)
        line.cut()
        await until(lambda: chat.state is State.LOST)
        asking = asyncio.gather(chat.history(), chat.conversations())
        await until(lambda: line.tried > 2)
        line.mend()
        history, conversations = await asyncio.wait_for(asking, BOUND)
        assert [m.content for m in history.messages] == ["One", "Yes"]
        assert [c.id for c in conversations] == [chat.conversation]


async def test_a_deletion_whose_answer_was_lost_is_done(
    line: Line, puppet: Puppet, server: wsserver.Server
) -> None:
    async with connect(line.url) as chat:
        reply = chat.prompt("One")
        (await puppet.reply()).say("Yes").end()
        await done(reply)
        line.deafen()
        deleting = asyncio.ensure_future(chat.delete(chat.conversation))
        await until(lambda: not server._hub.conversations._known)
        line.cut()
        line.mend()
        await asyncio.wait_for(deleting, BOUND)
        with pytest.raises(ServerError) as raised:
            await chat.delete(chat.conversation)
        assert raised.value.code == "not_found"


async def test_patience_has_an_end_after_which_a_prompt_tries_anew(
    line: Line, puppet: Puppet
) -> None:
    async with connect(line.url, patience=0.05) as chat:
        reply = chat.prompt("One")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        line.cut()
        with pytest.raises(ConnectionFailed) as raised:
            await done(reply)
        assert not raised.value.final
        assert reply.text == "Once "
        await until(lambda: chat.state is State.IDLE)
        line.mend()
        said.say("upon").end()
        assert await shown(chat.resume(reply.id, after=reply.seq)) == "upon"


# Servers that go.


async def test_a_server_that_restarts_on_its_file_goes_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
        end = await done(reply)
        assert (end.by, end.text) == ("shutdown", "Once upon")
        while_away = chat.prompt("And then?")
        assert not while_away.started
        await stack.enter_async_context(wsserver.serve(puppet, **settings))
        said = await puppet.reply(1)
        assert [m.content for m in said.request.messages][:2] == ["Tell me a story", "Once upon"]
        said.say("The end").end()
        assert await shown(while_away) == "The end"
        assert [m.content for m in (await chat.history()).messages][-1] == "The end"


@pytest.mark.parametrize("interval", ["0.01", "1000"], ids=["some", "nothing"])
async def test_a_server_that_dies_mid_stream_tells_what_it_saved(
    tmp_path: Path, interval: str
) -> None:
    serve_ = ("-m", "wsserver", "serve", "--demo-rate", "100", "--save-interval", interval)
    store = ("--store", f"sqlite:///{tmp_path}/c.sqlite")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
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
            await done(reply)
        assert (raised.value.code, raised.value.retryable) == ("interrupted", True)
        said: tuple[Message, ...] = ()
        if interval == "0.01":
            said = (await chat.history()).messages[1:]
            assert said
        # The client may have more than was saved.
        assert reply.text.startswith("".join(message.content for message in said))
        assert len(reply.text) >= 5
        assert all(message.partial == "interrupted" for message in said)


async def test_a_server_that_forgot_makes_an_error_of_the_reply() -> None:
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
            await done(reply)
        assert (raised.value.code, raised.value.retryable) == ("interrupted", True)
        assert reply.text == "Once "


async def test_a_server_that_is_about_to_go_is_not_the_one_that_is_asked() -> None:
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
        await until(lambda: one._hub._draining)
        later = chat.prompt("Two", conversation=new_id())
        line.port = two.port
        said.say("here").end()
        assert await shown(running) == "Still here"
        (await second.reply()).say("Welcome").end()
        assert await shown(later) == "Welcome"
        await closing


async def test_one_that_was_idle_connects_again_when_it_is_asked(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, idle_timeout=0.05) as server:
        async with connect(server.url) as chat:
            await until(lambda: chat.state is State.IDLE)
            reply = chat.prompt("Still there?")
            (await puppet.reply()).say("Yes").end()
            assert await shown(reply) == "Yes"


# Who the client is.


class Door:
    """Lets in whoever has a token that it gave out, for a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.given: dict[str, float] = {}
        self.bad = False

    async def token(self) -> str:
        name = f"token-{len(self.given)}"
        self.given[name] = time.time() + self.seconds
        return name

    async def __call__(self, token: str | None, _: Handshake, /) -> Principal | None:
        expires = self.given.get(token or "")
        return None if expires is None or self.bad else Principal("ada", expires)


async def test_a_token_is_renewed_before_it_expires(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "RENEW_AT", 0.001)  # long before, so that none is late
    states: list[State] = []
    door = Door(60)
    async with (
        wsserver.serve(puppet, authenticate=door, port=0, drain_timeout=0) as server,
        connect(server.url, token=door.token, on_state=states.append) as chat,
    ):
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await until(lambda: len(door.given) == 3)
        assert chat.principal == "ada"
        said.say("upon").end()
        assert await shown(reply) == "Once upon"
        assert states == [State.OPEN]


async def test_a_token_that_has_expired_is_replaced_on_a_new_connection(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "RENEW_AT", 1000.0)  # too late
    door = Door(1.0)
    async with (
        wsserver.serve(puppet, authenticate=door, port=0, drain_timeout=0) as server,
        connect(server.url, token=door.token) as chat,
    ):
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        await until(lambda: len(door.given) == 2)
        said.say("upon").end()
        assert await shown(reply) == "Once upon"


async def test_a_plain_token_that_expires_ends_the_chat(puppet: Puppet) -> None:
    door = Door(1.0)
    async with wsserver.serve(puppet, authenticate=door, port=0, drain_timeout=0) as server:
        async with connect(server.url, token=await door.token()) as chat:
            reply = chat.prompt("Tell me a story")
            with pytest.raises(ConnectionFailed, match="expired") as raised:
                await done(reply)
            assert (raised.value.close_code, raised.value.final) == (1008, True)
            with pytest.raises(ConnectionFailed, match="expired"):
                chat.prompt("More")


async def test_a_token_that_is_not_good_is_final() -> None:
    async with wsserver.serve(
        port=0, tokens=f"ada sha256:{hashlib.sha256(b'good').hexdigest()}"
    ) as server:
        with pytest.raises(ConnectionFailed) as raised:
            await connect(server.url, token="bad").__aenter__()
        assert raised.value.status == 401
        async with connect(server.url, token="good") as chat:
            await until(lambda: chat.principal == "ada")
        with pytest.raises(ConnectionFailed, match="token"):
            await connect(server.url, token="a\r\nb").__aenter__()


async def test_a_source_of_tokens_that_fails_is_asked_again(puppet: Puppet) -> None:
    door, failures = Door(60), [OSError("no network"), ValueError("no key")]

    async def token() -> str:
        if failures:
            raise failures.pop()
        return await door.token()

    async with wsserver.serve(puppet, authenticate=door, port=0) as server:
        async with connect(server.url, token=token) as chat:
            assert not failures
            await until(lambda: chat.principal == "ada")
        failures += [OSError("no network")] * 1000
        with pytest.raises(ConnectionFailed, match="no token: no network"):
            await connect(server.url, token=token, open_timeout=0.05).__aenter__()


# What is final, and what is not.


@pytest.mark.parametrize("status", [400, 401, 403, 404, 421])
async def test_a_status_that_is_final_is_tried_once(status: int) -> None:
    tried = 0

    def refuse(_: ServerConnection, __: Request) -> Response:
        nonlocal tried
        tried += 1
        return respond(HTTPStatus(status), "Not you.")

    async with serve(_nothing, "127.0.0.1", 0, process_request=refuse) as server:
        with pytest.raises(ConnectionFailed, match=r"Not you\.") as raised:
            await connect(_url(server)).__aenter__()
    assert (raised.value.status, raised.value.final, tried) == (status, True, 1)


@pytest.mark.parametrize(("status", "after"), [(429, "0"), (503, "0.01"), (500, ""), (502, "x")])
async def test_a_status_that_passes_is_tried_again(
    status: int, after: str, server: wsserver.Server
) -> None:
    tried = 0

    def refuse(_: ServerConnection, __: Request) -> Response | None:
        nonlocal tried
        tried += 1
        headers = {"Retry-After": after} if after else {}
        return respond(HTTPStatus(status), "Later.", headers=headers) if tried < 4 else None

    async with serve(_nothing, "127.0.0.1", 0, process_request=refuse) as listener:
        async with connect(_url(listener)):
            assert tried == 4


async def test_retry_after_is_obeyed() -> None:
    def refuse(_: ServerConnection, __: Request) -> Response:
        return respond(HTTPStatus(503), "Later.", headers={"Retry-After": "3600"})

    async with serve(_nothing, "127.0.0.1", 0, process_request=refuse) as server:
        # An hour is more than there is, so that nothing need be waited for.
        with pytest.raises(ConnectionFailed, match=r"Later\.") as raised:
            await connect(_url(server)).__aenter__()
    assert (raised.value.status, raised.value.final) == (503, False)


@pytest.mark.parametrize("code", [1002, 1007, 1008])
async def test_a_close_code_that_is_final_ends_the_chat(code: int) -> None:
    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(code, "so it is")

    async with serve(close, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        reply = chat.prompt("Hi")
        with pytest.raises(ConnectionFailed, match="so it is") as raised:
            await done(reply)
        assert (raised.value.close_code, raised.value.final) == (code, True)
        assert chat.state is State.CLOSED


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4000])
async def test_after_any_other_close_code_it_connects_again(code: int) -> None:
    came = 0

    async def close(socket: ServerConnection) -> None:
        nonlocal came
        came += 1
        await socket.recv()
        await socket.close(code)

    async with serve(close, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        chat.prompt("Hi")
        await until(lambda: came == 3)


@pytest.mark.parametrize("said", ["no JSON", "[]", "1", '{"type": "start", "id": 1}', '{"id": []}'])
async def test_what_is_no_server_of_the_protocol_is_told(said: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        await socket.send(said.replace('"id": 1', f'"id": "{name}"'))
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        with pytest.raises(ConnectionFailed, match="no server of this protocol"):
            await done(chat.prompt("Hi"))


@pytest.mark.parametrize(
    "said",
    [
        '{"type": "history", "title": "T", "running": []}',
        '{"type": "history", "title": "T", "messages": [1], "running": []}',
        '{"type": "history", "title": "T", "messages": [], "running": [], "before": 9}',
        '{"type": "error", "code": "overloaded", "retryable": true, "retry_after": "1"}',
        '{"type": "error", "code": "overloaded", "retryable": true, "retry_after": NaN}',
    ],
)
async def test_an_answer_that_cannot_be_read_is_told_to_who_waits(said: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        async for _ in socket:
            await socket.send(said)

    async with serve(talk, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        with pytest.raises(ConnectionFailed, match="no server of this protocol"):
            await asyncio.wait_for(chat.history(), BOUND)


@pytest.mark.parametrize("seq", ["NaN", "1.5", '"1"', "true", "null"])
async def test_a_piece_without_a_number_is_not_shown_twice(seq: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        for _ in range(2):
            await socket.send(f'{{"type":"token","id":"{name}","seq":{seq},"text":"x"}}')
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        reply = chat.prompt("Hi")
        with pytest.raises(ConnectionFailed, match="no server of this protocol"):
            await done(reply)
        assert reply.text == ""


async def test_a_list_that_has_no_end_ends() -> None:
    async def talk(socket: ServerConnection) -> None:
        async for _ in socket:
            await socket.send('{"type": "conversations", "items": [], "next": "x"}')

    async with serve(talk, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        assert await asyncio.wait_for(chat.conversations(), BOUND) == []


async def test_a_server_that_only_ever_closes_is_given_up_in_the_end() -> None:
    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(1011, "no")

    async with (
        serve(close, "127.0.0.1", 0) as server,
        connect(_url(server), patience=0.5) as chat,
    ):
        with pytest.raises(ConnectionFailed, match="no") as failure:
            await done(chat.prompt("Hi"))
        assert not failure.value.final
        await until(lambda: chat.state is State.IDLE)


async def test_a_server_that_would_be_asked_again_at_once_is_not_asked_without_a_break() -> None:
    asked = 0

    async def refuse(socket: ServerConnection) -> None:
        nonlocal asked
        async for message in socket:
            asked += 1
            about = json.loads(message)["id"]
            error = {"type": "error", "about": about, "code": "overloaded"}
            await socket.send(json.dumps({**error, "retryable": True, "retry_after": -1}))

    async with (
        serve(refuse, "127.0.0.1", 0) as server,
        connect(_url(server), patience=0.5) as chat,
    ):
        with pytest.raises(ReplyError):
            await done(chat.prompt("Hi"))
    assert asked <= 11


async def test_frames_and_keys_of_a_later_version_are_ignored() -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        for frame in (
            '{"type": "fanfare"}',
            '{"type": "start", "id": "%s", "conversation": "C", "model": "m", "new": 1}',
            '{"type": "picture", "id": "%s", "seq": 1}',
            '{"type": "token", "id": "%s", "seq": 2, "text": "x", "new": 1}',
            '{"type": "done", "id": "%s", "seq": 2, "reason": "new", "usage": {"new": 3}}',
        ):
            await socket.send(frame.replace("%s", name))
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(_url(server)) as chat:
        end = await done(chat.prompt("Hi"))
    assert (end.text, end.reason, end.usage) == ("x", "new", Usage())


@pytest.mark.parametrize("url", ["http://localhost/", "ws://", "localhost:3001", "ws://["])
async def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(ConnectionFailed, match="no address"):
        await connect(url, open_timeout=1).__aenter__()


async def test_where_nobody_listens_it_is_tried_for_as_long_as_it_may() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"ws://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(ConnectionFailed, match="cannot connect") as raised:
        await connect(url, open_timeout=0.05).__aenter__()
    assert not raised.value.final


def test_pauses_are_full_jitter_with_a_bound_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    pause = Pause(uniform)
    for _ in range(7):
        pause.next()
    pause.reset()
    pause.next()
    assert [low for low, _ in bounds] == [0.0] * 8
    assert [high for _, high in bounds] == [0.5, 1, 2, 4, 8, 15, 15, 0.5]


async def _nothing(socket: ServerConnection) -> None:
    await socket.wait_closed()


def _url(server: Any) -> str:
    return f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


# Without an event loop.


@pytest.fixture
def threaded() -> Iterator[str]:
    """A server in a thread of its own, whose model says "for ever" for ever, or echoes."""

    async def echo(request: wsserver.Request) -> AsyncIterator[str]:
        yield request.prompt
        while request.prompt == "for ever":
            await asyncio.sleep(0.01)
            yield "and ever"

    loop = asyncio.new_event_loop()
    server = wsserver.serve(echo, port=0, drain_timeout=0)
    loop.run_until_complete(server.__aenter__())
    import threading

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.url
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(BOUND)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(BOUND)
    loop.close()


def test_scripts_chat_without_an_event_loop(threaded: str) -> None:
    with connect_sync(threaded) as chat:
        assert chat.state is State.OPEN
        reply = chat.prompt("Hello")
        text = "".join(reply)
        assert text == "Hello"
        assert (reply.text, reply.done().reason) == (text, "end_turn")
        assert reply.usage is not None
        assert list(reply.thinking) == []
        assert reply.conversation == chat.conversation
        assert [m.content for m in chat.history().messages] == ["Hello", text]
        chat.rename(chat.conversation, "Greeting")
        assert [c.title for c in chat.conversations()] == ["Greeting"]
        assert "".join(chat.resume(reply.id)) == text
        chat.delete(chat.conversation)
        assert chat.conversations() == []
        with pytest.raises(ReplyError):
            chat.resume("there-never-was-one").done()
        stopped = chat.prompt("for ever")
        stopped.stop()
        assert stopped.done().by == "client"
    with pytest.raises(ConnectionFailed):
        connect_sync("nowhere").__enter__()


def test_a_reply_can_be_read_when_its_chat_is_over(threaded: str) -> None:
    with connect_sync(threaded) as chat:
        reply = chat.prompt("Hello")
        reply.done()
        cut = chat.prompt("for ever")
        next(iter(cut))
        failed = chat.resume("there-never-was-one")
    assert (reply.text, "".join(reply), list(reply.thinking)) == ("Hello", "Hello", [])
    assert (reply.done().reason, cut.done().by) == ("end_turn", "client")
    assert cut.text == "".join(cut) == cut.done().text
    cut.stop()
    for call in (failed.done, lambda: list(failed)):
        with pytest.raises(ChatError):
            call()
    for ask in (lambda: chat.prompt("More"), chat.history, lambda: chat.resume(reply.id)):
        with pytest.raises(ConnectionFailed, match="closed"):
            ask()
    assert chat.state is State.CLOSED


def test_a_chat_is_used_inside_its_with() -> None:
    chat = connect_sync("ws://localhost:1/", open_timeout=0.01)
    assert chat.state is State.CONNECTING
    for ask in (lambda: chat.prompt("Hi"), chat.history):
        with pytest.raises(RuntimeError, match="inside its"):
            ask()
    with pytest.raises(ConnectionFailed):
        chat.__enter__()
    with pytest.raises(RuntimeError, match="once"):
        chat.__enter__()
    with pytest.raises(TypeError):
        connect_sync("ws://localhost:1/", colour="red")


async def test_ctrl_c_in_the_loop_of_a_script_stops_the_reply(puppet: Puppet) -> None:
    script = (
        "import sys\n"
        "from wsserver.client import connect_sync\n"
        "with connect_sync(sys.argv[1]) as chat:\n"
        "    for text in chat.prompt('Go'):\n"
        "        print(text, flush=True)\n"
    )
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            async with run("-c", script, server.url) as process:
                said = (await puppet.reply()).say("here")
                await process.line("here")
                process.signal(signal.SIGINT)
                assert await process.end() != 0
        finally:
            signal.signal(signal.SIGINT, before)
        assert process.output.rstrip().endswith("KeyboardInterrupt"), process.output
        async with asyncio.timeout(BOUND):
            await said.closed.wait()
        (generation,) = server._hub.retention
        assert generation.log.terminal is not None
        assert getattr(generation.log.terminal, "by", None) == "client", "and not `disconnect`"


async def test_an_error_mid_stream_is_raised_after_the_text(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Go")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED, retry_after=7))
        pieces = aiter(reply)
        assert await anext(pieces) == reply.text == "Half"
        with pytest.raises(ReplyError, match="overloaded") as raised:
            await anext(pieces)
        assert (raised.value.retryable, raised.value.retry_after) == (True, 7)
        assert raised.value.ref
        assert reply.usage is not None
