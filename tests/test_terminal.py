"""``wsserver chat`` as a dialogue, in a real pseudo-terminal and in this process."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.line import Line
from tests.support.older import older
from tests.support.process import run
from tests.support.puppet import BOUND, Puppet, until
from tests.support.replies import Frame, Send, scripted
from tests.support.terminal import terminal
from wsserver import Code, End, ModelError, Thinking, Usage
from wsserver.client import connect
from wsserver.line_editor import open_history
from wsserver.terminal import Options, Terminal, escape

CONVERSATION = "a-conversation-of-mine"

# Python 3.12 warns about a fork in a process with threads, as for a pseudo-terminal.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning"),
    pytest.mark.slow,
]


async def test_prompts_and_replies_alternate(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    async with terminal(server.url, XDG_STATE_HOME=str(tmp_path / "state")) as person:
        await person.ready()
        person.types("Tell me a story\r")
        said = (await puppet.reply()).say(Thinking("Hm,\nhm."), "Once upon\n")
        await person.sees("[thought: Hm, hm.]")
        await person.sees("Once upon\r\n")
        said.say("a time", Usage(1234, 5)).end()
        await person.sees("a time")
        await person.sees("[puppet · 1,234 tokens in, 5 out]")
        await person.ready()
        person.types("Go on\r")
        (await puppet.reply(1)).say("The end").end()
        await person.sees("The end")
        await person.ready()
        person.types("\x04")
        assert await person.leaves() == 0
    shown = [m.content for m in puppet.replies[1].request.messages]
    assert shown == ["Tell me a story", "Once upon\na time", "Go on"]
    history = tmp_path / "state/wsserver/history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert "Tell me a story" in history.read_text()


async def test_arrow_up_recalls_prompt_of_earlier_run(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    for number in range(2):
        async with terminal(server.url, XDG_STATE_HOME=str(tmp_path)) as person:
            await person.ready()
            person.types("Tell me a story\r" if number == 0 else "\x1b[A\r")
            reply = await puppet.reply(number)
            assert reply.request.prompt == "Tell me a story"
            reply.say("No").end()
            await person.sees("No")


async def test_pasted_lines_are_one_prompt(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("\x1b[200~one\ntwo\n\tthree\x1b[201~")
        person.types("\x1b\rfour\r")
        assert (await puppet.reply()).request.prompt == "one\ntwo\n\tthree\nfour"


async def test_ctrl_c_stops_only_reply(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Count\r")
        said = (await puppet.reply()).say("one, two, ")
        await person.sees("one, two, ")
        person.child.sendintr()
        await person.sees("[stopped]")
        assert said.closed.is_set()
        await person.ready()
        person.types("Neversent")
        await person.sees("Neversent")
        person.types("\x03")
        person.types("\x03")
        await person.sees("[Ctrl-D leaves]")
        person.types("Go on\r")
        (await puppet.reply(1)).say("three").end()
        await person.sees("three")
        assert [m.content for m in puppet.replies[1].request.messages] == [
            "Count",
            "one, two, ",
            "Go on",
        ]


@pytest.mark.parametrize("known", [True, False], ids=["limit known", "limit not known"])
async def test_prompt_over_size_limit_fails_alone(
    server: wsserver.Server, puppet: Puppet, known: bool
) -> None:
    async with (
        contextlib.nullcontext(server.url) if known else older(server.url, max_size=None) as url,
        terminal(url) as person,
    ):
        await person.ready()
        person.types("\x1b[200~" + "a line that is pasted\r" * 4000 + "\x1b[201~\r")
        await person.sees("(too_long)]")
        await person.ready()
        person.types("Still there?\r")
        (await puppet.reply()).say("Yes").end()
        await person.sees("Yes")


async def test_alt_r_repeats_prompt_and_replaces_turn(
    server: wsserver.Server, puppet: Puppet
) -> None:
    arguments = (server.url, "--conversation", CONVERSATION)
    async with terminal(*arguments) as person:
        await person.ready()
        person.types("\x1br")
        await person.sees("[there is no prompt to repeat]")
        await person.ready()
        person.types("Tell me a story\r")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        await person.sees("overloaded")
        await person.ready()
        person.types("\x1br")
        await person.sees("> Tell me a story")
        (await puppet.reply(1)).say("Whole").end()
        await person.sees("Whole")
        await person.ready()
    async with terminal(*arguments) as person:
        await person.sees("Whole")
        await person.ready()
        person.types("\x1br")
        (await puppet.reply(2)).say("Better").end()
        await person.sees("Better")
        await person.ready()
        person.types("Go on\r")
        said = [m.content for m in (await puppet.reply(3)).request.messages]
        assert said == ["Tell me a story", "Better", "Go on"]


async def test_reply_of_killed_server_is_marked_interrupted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    store = f"sqlite:///{tmp_path}/c.sqlite"
    serve_ = ("-m", "wsserver", "serve", "--port", port, "--store", store, "--demo-rate", "50")
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(run(*serve_))
        await first.line("listening")
        person = await stack.enter_async_context(terminal(f"ws://127.0.0.1:{port}"))
        await person.ready()
        person.types("Tell me a story\r")
        await person.sees("This is the demo")
        first.signal(signal.SIGKILL)
        await first.end()
        await stack.enter_async_context(run(*serve_))
        await person.sees("(interrupted); try again]")
        await person.ready()


async def test_lost_connection_is_shown_and_text_continues(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, terminal(line.url) as person:
        await person.ready()
        person.types("Tell me a story\r")
        said = (await puppet.reply()).say("Once ")
        await person.sees("Once ")
        line.cut()
        await person.sees("[connection lost, trying again…]")
        said.say("upon ")
        line.mend()
        await person.sees("[connected again]")
        said.say("a time").end()
        assert "Once" not in await person.sees("upon a time")


async def test_error_shows_message_and_retry_time(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Hi\r")
        reply = (await puppet.reply()).say("Half")
        reply.fail(ModelError(Code.OVERLOADED, retry_after=7))
        await person.sees("Half")
        await person.sees("overloaded")
        await person.sees("try again in 7 s")
        await person.ready()


async def test_control_characters_of_model_are_escaped(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Hi\r")
        (await puppet.reply()).say("a\x1b]0;owned\x07b\rc\x9b2Jd\u202ee\te\nf").end()
        await person.sees(r"a\x1b]0;owned\x07b\rc\x9b2Jd\u202ee")
        await person.sees("\r\nf")


async def test_continued_conversation_shows_last_messages(
    server: wsserver.Server, puppet: Puppet
) -> None:
    arguments = (server.url, "--conversation", CONVERSATION)
    async with terminal(*arguments) as person:
        await person.sees("[a new conversation]")
        person.types("Remember 7\r")
        (await puppet.reply()).say("I \x1b[1mwill").end()
        await person.sees("will")
    async with terminal(*arguments) as person:
        before = await person.sees(r"I \x1b[1mwill")
        assert "> Remember 7" in before
        person.types("Which?\r")
        assert len((await puppet.reply(1)).request.messages) == 3


async def test_chat_without_url_uses_demo_model() -> None:
    async with terminal(WSSERVER_DEMO_RATE="0", WSSERVER_PORT="1") as person:
        await person.sees("this is the demo model")
        person.types("Hello\r")
        await person.sees("You wrote: “Hello”")
        await person.sees("start the server again.")
        person.types("\x04")
        assert await person.leaves() == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode 🧑‍🚀\n\ttab", "plain, ünïcode 🧑‍🚀\n\ttab"),
        ("\x1b[2J\r\x00\x7f", r"\x1b[2J\r\x00\x7f"),
        ("\x85\x9b", r"\x85\x9b"),
        ("abc\u202edcb\u2066", r"abc\u202edcb\u2066"),
    ],
)
def test_escape_keeps_line_ends_and_tabs(text: str, shown: str) -> None:
    assert escape(text) == shown


@asynccontextmanager
async def dialogue(*, url: str, **options: Any) -> AsyncIterator[tuple[Any, asyncio.Task[int]]]:
    """Run a dialogue without a terminal; yield the input and the task."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        talking = asyncio.ensure_future(Terminal(Options(url=url, **options)).run(None))
        try:
            yield keys, talking
        finally:
            talking.cancel()
            await asyncio.wait({talking}, timeout=BOUND)


async def test_history_shows_thinking_model_and_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = [
        {"type": "thinking", "thinking": "x" * 1000, "signature": "s"},
        {"type": "text", "text": "Hello"},
    ]
    reply: Frame = {"role": "assistant", "content": "Hello", "id": "i", "model": "m"}
    usage: Frame = {"input_tokens": 1, "cache_read_input_tokens": 2000, "output_tokens": 7}
    messages: list[Frame] = [
        {"role": "user", "content": "Hi", "id": "i"},
        {**reply, "blocks": blocks, "usage": {**usage, "estimated": True}},
    ]

    async def answer(frame: Frame, send: Send) -> None:
        history = {"type": "history", "title": "T", "messages": messages, "running": []}
        await send(history, conversation=CONVERSATION, request=frame["request"])

    shown = ""

    def sees(text: str) -> bool:
        nonlocal shown
        shown += capsys.readouterr().out
        return text in shown

    async with scripted(answer) as url, dialogue(url=url, conversation=CONVERSATION):
        await until(lambda: sees("[m · 2,001 tokens in, about 7 out]"))
    assert f"> Hi\n[thought: {'x' * 300}…]\nHello\n" in shown


async def test_end_of_each_reply_is_marked(
    puppet: Puppet, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ""

    def sees(text: str) -> bool:
        nonlocal shown
        shown += capsys.readouterr().out
        return text in shown

    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server, Line(server.port) as line:
        async with dialogue(url=line.url, conversation=CONVERSATION) as (keys, talking):
            await until(lambda: sees("[a new conversation]"))
            keys.send_text(" \rOne\r")
            (await puppet.reply()).say("x", End("max_tokens")).end()
            await until(lambda: sees("[the reply reached its maximum length]"))
            keys.send_text("Two\r")
            (await puppet.reply(1)).say("y").fail(ModelError(Code.REFUSAL, "No."))
            await until(lambda: sees("[No. (refusal)]"))
            keys.send_text("Three\r")
            (await puppet.reply(2)).say("z")
            await until(lambda: sees("z"))
            os.kill(os.getpid(), signal.SIGINT)
            await until(lambda: sees("[stopped]"))
            keys.send_text("Four\r")
            four = (await puppet.reply(3)).say("still")
            await until(lambda: sees("still"))
            line.cut()
            await until(lambda: sees("[connection lost, trying again…]"))
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0)
            await until(lambda: sees("[gave up waiting for the end]"))
            line.mend()
            async with asyncio.timeout(BOUND):
                await four.closed.wait()
            keys.send_text("\x03\x04")
            async with asyncio.timeout(BOUND):
                assert await talking == 0
        async with dialogue(url=server.url, conversation=CONVERSATION) as (keys, talking):
            await until(lambda: sees("[incomplete: client]"))
            keys.send_text("Five\r")
            five = (await puppet.reply(4)).say("never")
            await until(lambda: sees("never"))
            async with dialogue(url=server.url, conversation=CONVERSATION):
                before = len(shown)  # the chat follows the running reply from its beginning
                five.say("theless")
                await until(lambda: sees("theless") and "nevertheless" in shown[before:])
            five.end()
            keys.send_text("\x04")
            async with asyncio.timeout(BOUND):
                assert await talking == 0


@pytest.mark.parametrize("end", ["end_turn", "max_tokens", "stopped", "failed", "ctrl-c"])
async def test_exit_code_of_once_tells_end_of_reply(
    server: wsserver.Server, puppet: Puppet, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    asking = asyncio.ensure_future(Terminal(Options(server.url, once="Hi")).run("Hi"))
    reply = (await puppet.reply()).say("x")
    if end == "stopped":
        async with connect(server.url) as chat:
            (conversation,) = await chat.conversations()
            (running,) = (await chat.history(conversation.id)).running
            followed = chat.resume(running)
            await followed.stop()
            await followed.done()
    elif end == "failed":
        reply.fail(ModelError(Code.TIMEOUT))
    elif end == "ctrl-c":
        await until(reply.heard_out)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        reply.say(End(end)).end()
    async with asyncio.timeout(BOUND):
        code = await asking
    assert code == {"end_turn": 0, "max_tokens": 0, "ctrl-c": 130}.get(end, 1)
    said = capsys.readouterr().err
    assert {"end_turn": "", "max_tokens": "maximum length", "stopped": "stopped by client"}.get(
        end, ""
    ) in said


async def test_ctrl_c_while_connecting_exits() -> None:
    async with Line(1) as line:
        line.cut()
        opening = asyncio.ensure_future(Terminal(Options(line.url, once="Hi")).run("Hi"))
        await until(lambda: line.tried)
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(BOUND):
            assert await opening == 130


async def test_ctrl_c_while_history_loads_exits() -> None:
    asked = asyncio.Event()

    async def silent(socket: ServerConnection) -> None:
        async for message in socket:
            if json.loads(message)["type"] == "open":
                asked.set()

    async with serve(silent, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with terminal(url, "--conversation", CONVERSATION) as person:
            async with asyncio.timeout(BOUND):
                await asked.wait()
            person.types("\x03")
            assert await person.leaves() == 130


async def test_prompt_is_sent_if_history_file_is_missing(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    async with terminal(server.url, XDG_STATE_HOME=str(tmp_path)) as person:
        await person.ready()
        (tmp_path / "wsserver/history").unlink()
        (tmp_path / "wsserver").rmdir()
        person.types("Hi\r")
        (await puppet.reply()).say("Hello").end()
        assert "Exception" not in await person.sees("Hello")
        await person.ready()
        person.types("\x04")
        assert await person.leaves() == 0


def test_history_file_on_device_keeps_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "wsserver").mkdir()
    (tmp_path / "wsserver/history").symlink_to(os.devnull)
    changed: list[int] = []
    monkeypatch.setattr(os, "fchmod", lambda _, mode: changed.append(mode))
    open_history()
    assert changed == []


async def test_server_forgets_connection_of_killed_terminal(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, terminal(line.url) as person:
        await person.ready()
        person.types("Count\r")
        said = (await puppet.reply()).say("one")
        await person.sees("one")
        person.child.kill(signal.SIGKILL)
        await until(lambda: not line.connections)
        assert not said.closed.is_set(), "a terminal that died may come back"
