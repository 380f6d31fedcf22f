"""``wsserver chat`` as a dialogue, in an emulated terminal."""

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.line import Line
from tests.support.older import older
from tests.support.ports import free_port
from tests.support.process import run
from tests.support.puppet import BOUND, Puppet, until
from tests.support.replies import Frame, Send, scripted
from tests.support.terminal import once, outcome, terminal
from wsserver import Code, End, ModelError, Thinking, Usage
from wsserver.client import connect
from wsserver.terminal.files import open_history

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
        said = (await puppet.reply()).say(Thinking("Hm,\nhm."), "Once upon\n\n")
        await person.sees("> Tell me a story\n[thought: Hm, hm.]\nOnce upon\n")
        said.say("a time", Usage(1234, 5)).end()
        await person.sees("Once upon\n\na time\n[puppet · 1,234 tokens in, 5 out]\n>")
        person.types("Go on\r")
        (await puppet.reply(1)).say("The end").end()
        await person.sees("> Go on\nThe end\n")
        await person.ready()
        person.types("\x04")
        assert await person.leaves() == 0
    shown = [m.content for m in puppet.replies[1].request.messages]
    assert shown == ["Tell me a story", "Once upon\n\na time", "Go on"]
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
        await person.sees("> one\n  two\n")


async def test_ctrl_c_stops_only_reply(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Count\r")
        said = (await puppet.reply()).say("one, two, ")
        await person.sees("one, two,")
        person.types("\x03")
        await person.sees("one, two,\n[stopped]")
        assert said.closed.is_set()
        await person.ready()
        person.types("Neversent")
        await person.sees("> Neversent")
        person.types("\x03")
        await person.ready()
        person.types("Go on\r")
        (await puppet.reply(1)).say("three").end()
        await person.sees("three")
        assert [m.content for m in puppet.replies[1].request.messages] == [
            "Count",
            "one, two, ",
            "Go on",
        ]


async def test_second_ctrl_c_leaves(server: wsserver.Server) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("\x03")
        await person.sees("[Ctrl-C again or Ctrl-D leaves]")
        person.types("\x03")
        assert await person.leaves() == 0


async def test_ctrl_d_during_reply_stops_reply_and_keeps_text(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Count\r")
        said = (await puppet.reply()).say("one, *two*, ")
        await person.sees("one, two,")
        person.types("\x04")
        assert await person.leaves() == 0
        assert said.closed.is_set()
        assert "> Count\none, two,\nTo continue" in person.text


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
        shown = await person.sees("(too_long)]")
        assert "The prompt has 88,000 bytes; 32,768 are allowed." in shown or not known
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
        person.types("Tell me a story\r")
        (await puppet.reply()).say("Half").fail(ModelError(Code.OVERLOADED))
        await person.sees("(overloaded); /retry repeats it]")
        person.types("\x1br")
        await person.sees("> Tell me a story", times=2)
        (await puppet.reply(1)).say("Whole").end()
        await person.sees("Whole")
        await person.ready()
    async with terminal(*arguments) as person:
        await person.sees("Whole")
        await person.ready()
        person.types("/retry\r")
        (await puppet.reply(2)).say("Better").end()
        await person.sees("Better")
        await person.ready()
        person.types("Go on\r")
        said = [m.content for m in (await puppet.reply(3)).request.messages]
        assert said == ["Tell me a story", "Better", "Go on"]


async def test_killed_server_is_told_and_text_is_kept(tmp_path: Path) -> None:
    port = str(free_port())
    store = f"sqlite:///{tmp_path}/c.sqlite"
    serve_ = ("-m", "wsserver", "serve", "--port", port, "--store", store, "--demo-rate", "50")
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(run(*serve_))
        await first.line("listening")
        person = await stack.enter_async_context(terminal(f"ws://127.0.0.1:{port}", size="200x30"))
        await person.ready()
        person.types("Tell me a story\r")
        await person.sees("This is the demo model")
        first.signal(signal.SIGKILL)
        await first.end()
        await person.sees(
            "[connection lost, trying again… The text so far stays; Ctrl-C twice gives up.]"
        )
        await stack.enter_async_context(run(*serve_))
        await person.sees("(interrupted); the text that arrived is kept; /retry")
        await person.ready()
        assert "This is the demo model" in person.text


async def test_lost_connection_is_shown_and_text_continues(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, terminal(line.url) as person:
        await person.ready()
        person.types("Tell me a story\r")
        said = (await puppet.reply()).say("Once ")
        await person.sees("Once")
        line.cut()
        await person.sees("[connection lost, trying again…")
        said.say("upon ")
        line.mend()
        await person.sees("[connected again]")
        said.say("a time").end()
        assert (await person.sees("Once upon a time")).count("Once") == 1


async def test_ctrl_c_twice_gives_up_waiting_for_lost_connection(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, terminal(line.url) as person:
        await person.ready()
        person.types("Count\r")
        said = (await puppet.reply()).say("one")
        await person.sees("one")
        line.cut()
        await person.sees("[connection lost, trying again…")
        person.types("\x03")
        await person.sees("[stopping…]")
        person.types("\x03")
        await person.sees("one\n[gave up waiting for the end]")
        line.mend()
        async with asyncio.timeout(BOUND):
            await said.closed.wait()


async def test_error_shows_message_and_retry_time(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Hi\r")
        reply = (await puppet.reply()).say("Half")
        reply.fail(ModelError(Code.OVERLOADED, retry_after=7))
        await person.sees("Half\n[")
        await person.sees("overloaded")
        await person.sees("try again in 7 s")
        await person.ready()


async def test_end_of_each_reply_is_marked(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url, "--conversation", CONVERSATION) as person:
        await person.sees("[a new conversation]")
        person.types(" \rOne\r")
        (await puppet.reply()).say("x", End("max_tokens")).end()
        await person.sees("[the reply reached its maximum length]")
        person.types("Two\r")
        (await puppet.reply(1)).say("y").fail(ModelError(Code.REFUSAL, "No."))
        await person.sees("[No. (refusal)]")
        person.types("Three\r")
        (await puppet.reply(2)).say("z")
        await person.sees("\nz\n")
        person.child.kill(signal.SIGINT)
        await person.sees("[stopped]")
    async with terminal(server.url, "--conversation", CONVERSATION) as person:
        await person.sees(
            "> Two\ny\n[incomplete: The model declined to answer. Ask in another way.]\n"
        )
        await person.sees("> Three\nz\n[stopped]\n")


async def test_continued_conversation_shows_last_messages(
    server: wsserver.Server, puppet: Puppet
) -> None:
    arguments = (server.url, "--conversation", CONVERSATION)
    async with terminal(*arguments) as person:
        await person.sees("[a new conversation]")
        person.types("Remember 7\r")
        (await puppet.reply()).say("I \x1b[1mwill").end()
        await person.sees("will")
        await person.ready()
    async with terminal(*arguments) as person:
        await person.sees("> Remember 7\nI \\x1b[1mwill\n")
        await person.ready()
        person.types("Which?\r")
        assert len((await puppet.reply(1)).request.messages) == 3


async def test_running_reply_of_continued_conversation_is_followed(
    server: wsserver.Server, puppet: Puppet
) -> None:
    arguments = (server.url, "--conversation", CONVERSATION)
    async with terminal(*arguments) as first, terminal(*arguments) as second:
        await first.ready()
        await second.sees("[a new conversation]")
        first.types("Five\r")
        said = (await puppet.reply()).say("never")
        await first.sees("never")
        second.types("/open " + CONVERSATION + "\r")
        await second.sees("never")
        said.say("theless").end()
        await second.sees("nevertheless")
        await first.sees("nevertheless")


async def test_prompt_waits_for_reply_of_other_client(
    server: wsserver.Server, puppet: Puppet
) -> None:
    arguments = (server.url, "--conversation", CONVERSATION)
    async with terminal(*arguments) as first, terminal(*arguments) as second:
        await first.ready()
        await second.ready()
        first.types("One\r")
        said = (await puppet.reply()).say("1")
        await first.sees("> One\n1\n")
        second.types("Two\r")
        await second.sees("[waiting, place 1 in the queue…]")
        said.end()
        (await puppet.reply(1)).say("2").end()
        await second.sees("> Two\n2\n")


async def test_only_last_messages_of_long_conversation_are_shown(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with connect(server.url, conversation=CONVERSATION) as chat:
        for number in range(4):
            reply = chat.prompt(f"Prompt {number}")
            (await puppet.reply(number)).say(f"Answer {number}").end()
            await reply.done()
    async with terminal(server.url, "--conversation", CONVERSATION) as person:
        shown = await person.sees("[2 earlier messages]\n> Prompt 1\nAnswer 1\n")
        assert "Prompt 0" not in shown.partition("[2 earlier")[2]


async def test_text_that_is_no_unicode_is_refused(server: wsserver.Server) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.child.send(b"a\xffb\r")
        await person.sees("[this cannot be sent as text]")
        await person.ready()


async def test_history_shows_thinking_model_and_usage() -> None:
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

    async with (
        scripted(answer) as url,
        terminal(url, "--conversation", CONVERSATION, size="400x30") as person,
    ):
        await person.sees("[m · 2,001 tokens in, about 7 out]")
        assert f"> Hi\n[thought: {'x' * 300}…]\nHello\n" in person.text


async def test_chat_without_url_keeps_conversation(tmp_path: Path) -> None:
    env = {"WSSERVER_DEMO_RATE": "0", "WSSERVER_PORT": "1", "XDG_DATA_HOME": str(tmp_path)}
    async with terminal(**env) as person:
        await person.sees("this is the demo model")
        await person.ready()
        person.types("Hello\r")
        await person.sees("You wrote: “Hello”")
        await person.sees("start the server again.")
        async with once("--once", "And?", "-c", **env) as process:
            code, out, err = await outcome(process)
            assert (code, "You wrote: “And?”" in out) == (0, True)
            assert "will not be saved: another wsserver chat is open and uses" in err
            assert "to save it, leave that chat, and start again" in err
            assert "run `wsserver serve`, and `wsserver chat ws://localhost:3001` in each" in err
            assert "--store" not in err  # `chat` has no such flag
        person.types("\x04")
        assert await person.leaves() == 0
    async with once("--once", "What did I say?", "-c", **env) as process:
        assert await outcome(process, "") == (
            0,
            "You said: “Hello”\n",
            (
                "wsserver: this is the demo model; set ANTHROPIC_API_KEY to talk to Claude, or use "
                "--model openai:NAME\n"
            ),
        )
    (tmp_path / "wsserver/chat.sqlite").write_bytes(1000 * b"no database")
    async with once("--once", "Hi", "-c", **env) as process:
        code, _, err = await outcome(process)
        assert code == 0
        assert "file is not a database; to save it, set XDG_DATA_HOME to another folder" in err


async def test_continue_opens_last_conversation(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url, "-c", "--system", "Be kind") as person:
        await person.sees("there is no conversation to continue; this is a new one")
        await person.ready()
        person.types("Remember 7\r")
        (await puppet.reply()).say("I will").end()
        await person.sees("I will")
        await person.ready()
        person.types("\x04")
        assert await person.leaves() == 0
        (conversation,) = await _conversations(server.url)
        command = f"wsserver chat {server.url} '--system=Be kind'"
        assert f"{command} --conversation={conversation}\n  {command} -c" in person.text
    async with terminal(server.url, "-c") as person:
        await person.sees("> Remember 7\nI will\n")
        await person.ready()
        person.types("Which?\r")
        assert len((await puppet.reply(1)).request.messages) == 3


async def test_told_command_continues_conversation_whose_id_begins_with_dash(
    server: wsserver.Server, puppet: Puppet
) -> None:
    named = f"--conversation=-{CONVERSATION}"
    async with terminal(server.url, named) as person:
        await person.ready()
        person.types("Remember 7\r")
        (await puppet.reply()).say("I will").end()
        await person.sees("I will")
        await person.ready()
        person.types("\x04")
        assert await person.leaves() == 0
        (told,) = re.findall("wsserver chat (.* --conversation.*)", person.text)
    async with once(*told.split(), "--once", "Which?") as process:
        (await puppet.reply(1)).say("7").end()
        assert await outcome(process) == (0, "7\n", "")
    assert len(puppet.replies[1].request.messages) == 3


async def _conversations(url: str) -> list[str]:
    async with connect(url) as chat:
        return [known.id for known in await chat.conversations()]


async def test_ctrl_c_while_connecting_exits() -> None:
    async with Line(1) as line:
        line.cut()
        async with once(line.url, "--once", "Hi") as process:
            await until(lambda: line.tried)
            process.send_signal(signal.SIGINT)
            assert await outcome(process) == (130, "", "")


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


async def test_history_that_cannot_be_saved_is_told(
    server: wsserver.Server, tmp_path: Path
) -> None:
    (tmp_path / "wsserver").write_text("no folder")
    async with terminal(server.url, XDG_STATE_HOME=str(tmp_path)) as person:
        await person.sees("cannot save the history of your prompts")
        await person.ready()


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
