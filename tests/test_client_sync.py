"""The Python client without an event loop."""

import asyncio
import inspect
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import pytest

import wsserver
from tests.support.process import run
from tests.support.puppet import BOUND, Puppet
from tests.support.replies import end_of
from wsserver.client import (
    Chat,
    ChatError,
    ConnectionFailed,
    ReplyError,
    State,
    connect,
    connect_sync,
)
from wsserver.content import Text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


@pytest.fixture
def threaded_server() -> Iterator[str]:
    """A server in its own thread. Its model repeats "for ever" endlessly, or echoes."""

    async def echo(request: wsserver.Request) -> AsyncIterator[str]:
        yield request.prompt
        while request.prompt == "for ever":
            await asyncio.sleep(0.01)
            yield "and ever"

    loop = asyncio.new_event_loop()
    server = wsserver.serve(echo, port=0, drain_timeout=0)
    loop.run_until_complete(server.__aenter__())

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.url
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(BOUND)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(BOUND)
    loop.close()


def test_prompt_of_blocks_gets_reply(threaded_server: str) -> None:
    with connect_sync(threaded_server) as chat:
        assert "".join(chat.prompt([Text("one")], max_tokens=9)) == "one"


@pytest.mark.parametrize(
    ("blocking", "other"),
    [(connect_sync.__init__, Chat.__init__), (connect_sync.prompt, Chat.prompt)],
    ids=["chat", "prompt"],
)
def test_keywords_are_the_same_as_with_an_event_loop(
    blocking: Callable[..., Any], other: Callable[..., Any]
) -> None:
    (keys,) = [hint for hint in get_type_hints(blocking).values() if get_origin(hint) is Unpack]
    expected, parameters = get_type_hints(other), inspect.signature(other).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert get_type_hints(*get_args(keys)) == {name: expected[name] for name in names}


def test_misspelled_argument_is_a_type_error(threaded_server: str) -> None:
    with connect_sync(threaded_server) as chat, pytest.raises(TypeError, match="max_tokns"):
        chat.prompt("one", max_tokns=9)  # type: ignore[call-arg]


def test_blocking_calls_equal_async_calls(threaded_server: str) -> None:
    with connect_sync(threaded_server) as chat:
        assert chat.state is State.OPEN
        reply = chat.prompt("Hello")
        text = "".join(reply)
        assert text == "Hello"
        assert (reply.text, reply.done().reason) == (text, "end_turn")
        assert reply.usage is not None
        assert list(reply.thinking) == []
        assert reply.conversation == chat.conversation
        assert [m.text for m in chat.history().messages] == ["Hello", text]
        assert [block.type for block in reply.blocks] == ["text"]
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


def test_subscription_yields_replies_of_others(threaded_server: str) -> None:
    with connect_sync(threaded_server) as chat, connect_sync(threaded_server) as other:
        other.prompt("Hello").done()
        subscription = chat.open(other.conversation)
        assert (subscription.title, len(subscription.history.messages)) == ("Hello", 2)
        other.prompt("Again")
        reply = next(iter(subscription))
        assert "".join(reply) == "Again"
        subscription.close()
        assert list(subscription) == []
        assert not subscription.deleted


def test_reply_is_readable_after_chat_exit(threaded_server: str) -> None:
    with connect_sync(threaded_server) as chat:
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


def test_chat_outside_with_block_raises() -> None:
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
        connect_sync("ws://localhost:1/", colour="red")  # type: ignore[call-arg]


async def test_ctrl_c_stops_reply(puppet: Puppet) -> None:
    script = (
        "import sys\n"
        "from wsserver.client import connect_sync\n"
        "with connect_sync(sys.argv[1]) as chat:\n"
        "    reply = chat.prompt('Go')\n"
        "    print(reply.id)\n"
        "    for text in reply:\n"
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
        async with connect(server.url) as chat:
            end = await end_of(chat.resume(process.output.split()[0]))
            assert end.by == "client", "and not `disconnect`"
