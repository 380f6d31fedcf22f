"""What a user of ``wsserver chat`` sees while a reply streams."""

import asyncio
from pathlib import Path

import pytest

import wsserver
from tests.support.puppet import Puppet
from tests.support.terminal import terminal
from wsserver import Thinking
from wsserver.client import connect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning"),
    pytest.mark.slow,
]

ANSWER = "".join(
    f"## Part {number}\n\nSome **text** of part {number}.\n\n- item {number}\n- other\n\n"
    f"```python\nvalue = {number}\n```\n\n"
    for number in range(30)
)


async def test_text_typed_during_reply_stays_below_and_is_sent_next(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with terminal(server.url, size="100x20") as person:
        await person.ready()
        person.types("First\r")
        said = (await puppet.reply()).say("One\n\nTw")
        await person.sees("> First\nOne\n\nTw\n>")
        person.types("Second")
        await person.sees("Tw\n> Second")
        said.say("o\n\nThree")
        await person.sees("> First\nOne\n\nTwo\n\nThree\n> Second")
        person.types("\rThird\r")
        await person.sees("Three\nqueued: Second\nqueued: Third\n>")
        assert len(puppet.replies) == 1
        said.end()
        second = await puppet.reply(1)
        assert second.request.prompt == "Second"
        await person.sees("> Second\n[waiting… 0 s]\nqueued: Third\n>")
        second.say("Four").end()
        await person.sees("> Second\nFour\n")
        assert (await puppet.reply(2)).request.prompt == "Third"


async def test_many_queued_prompts_are_counted(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("First\r")
        await puppet.reply()
        person.types("".join(f"q{number}\r" for number in range(6)))
        await person.sees("queued: q0\nqueued: q1\nqueued: 4 more\n>")


async def test_arrow_up_takes_waiting_prompts_back(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("First\r")
        said = (await puppet.reply()).say("One")
        person.types("Second\rThird\r")
        await person.sees("queued: Second\nqueued: Third\n>")
        person.types("\x1b[A")
        await person.sees("queued: Second\n> Third")
        person.types("\x15\x1b[A")
        await person.sees("One\n> Second")
        person.types(", changed\r")
        said.end()
        assert (await puppet.reply(1)).request.prompt == "Second, changed"


async def test_thinking_is_counted_and_then_shown(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Hi\r")
        said = (await puppet.reply()).say(Thinking("First this. "))
        await person.sees("[thinking… 12 characters, 0 s]\n>")
        said.say(Thinking("Then that."))
        await person.sees("[thinking… 22 characters, ")
        said.say("Yes")
        shown = await person.sees("First this. Then that.]\nYes\n>")
        assert "[thinking" not in shown


@pytest.mark.parametrize("size", ["100x30", "30x10", "12x4"])
async def test_reply_longer_than_screen_is_printed_once(
    server: wsserver.Server, puppet: Puppet, size: str
) -> None:
    async with terminal(server.url, size=size) as person:
        await person.sees("\n>")
        person.types("Long\r")
        said = await puppet.reply()
        for start in range(0, len(ANSWER), 40):
            said.say(ANSWER[start : start + 40])
            await asyncio.sleep(0.002)
        said.end()
        await person.sees("[puppet")
        await person.sees("\n>")
        for number in range(30):
            assert person.text.count(f"\nPart {number}\n") == 1
            assert person.text.count(f"\nvalue = {number}\n") == 1
            assert person.text.count(f" • item {number}\n") == 1
        assert "**" not in person.text


async def test_resize_during_reply_keeps_text(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url, size="100x30") as person:
        await person.ready()
        person.types("Hi\r")
        words = " ".join(f"w{number}" for number in range(40))
        said = (await puppet.reply()).say(f"Before\n\n{words}")
        await person.sees("w39")
        person.resizes(40, 20)
        said.say(f" end\n\nAfter {words}\n\nLast").end()
        await person.sees("Last\n[puppet")
        printed = person.text.replace("\n", " ")
        assert f"{words} end" in printed
        assert f"After {words}" in printed
        assert max(len(line) for line in person.screen) <= 40


async def test_wide_characters_are_printed_whole(server: wsserver.Server, puppet: Puppet) -> None:
    text = "".join(f"第{number}章很长的中文句子没有空格" for number in range(40))
    async with terminal(server.url, size="41x12") as person:
        await person.ready()
        person.types("你好\r")
        said = await puppet.reply()
        assert said.request.prompt == "你好"
        for start in range(0, len(text), 11):
            said.say(text[start : start + 11])
            await asyncio.sleep(0)
        said.say("\n\n| 名 | 🦆 |\n|---|---|\n| 中文 | الف |\n").end()
        await person.sees("[puppet")
        assert text in person.text.replace("\n", "")
        assert "中文  الف" in person.text


async def test_plain_shows_markdown_as_it_is(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url, "--plain") as person:
        await person.ready()
        person.types("Hi\r")
        said = (await puppet.reply()).say("# Title\nSome **bo")
        await person.sees("# Title\nSome **bo\n>")
        said.say("ld** text\n\n\n```\ncode\n```\n").end()
        await person.sees("# Title\nSome **bold** text\n\n\n```\ncode\n```\n[puppet")


async def test_control_characters_of_model_are_escaped(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("Hi\r")
        said = await puppet.reply()
        said.say(Thinking("\x1b]0;thought\x07"), "a\x1b]0;owned\x07b\rc\x9b2Jd\u202ee\te\nf\n\n")
        said.say("`\x1b]52;c;b3duZWQ=\x07` &#x202e;").end()
        await person.sees(r"a\x1b]0;owned\x07b\rc\x9b2Jd\u202ee")
        await person.sees(r"\x1b]52;c;b3duZWQ=\x07")
        await person.ready()
    assert b"\x1b]" not in person.output
    assert "\u202e".encode() not in person.output


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "linux"}, {"TERM": "vt100"}])
async def test_other_terminals_work(
    server: wsserver.Server, puppet: Puppet, env: dict[str, str]
) -> None:
    async with terminal(server.url, **env) as person:
        await person.ready()
        person.types("Hi\r")
        (await puppet.reply()).say("Some **bold** `code`").end()
        await person.sees("> Hi\nSome bold code\n[puppet")
    if "NO_COLOR" in env:
        assert b"\x1b[36m" not in person.output


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": ""}], ids=["dumb", "none"])
async def test_dumb_terminal_gets_plain_lines(
    server: wsserver.Server, puppet: Puppet, env: dict[str, str]
) -> None:
    async with terminal(server.url, **env) as person:
        await person.ready()
        person.types("One\n")
        said = (await puppet.reply()).say(Thinking("Hm."), "Some **bo")
        await person.sees("[thought: Hm.]\nSome **bo")
        person.types("Two\n")
        await person.sees("Some **boTwo")
        said.say("ld**\x1b[1m").end()
        await person.sees("Some **boTwo\nld**\\x1b[1m\n[puppet")
        assert (await puppet.reply(1)).request.prompt == "Two"
        await person.sees("> Two")
        puppet.replies[1].say("Fine").end()
        await person.sees("Fine\n[puppet")
        person.types("/foo\n")
        await person.sees("no command /foo")
        person.types("/exit\n")
        assert await person.leaves() == 0
    assert b"\x1b" not in person.output


async def test_dumb_terminal_has_commands_and_keys(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    (tmp_path / "editor").write_text('#!/bin/sh\nprintf Edited >"$1"\n')
    (tmp_path / "editor").chmod(0o700)
    env = {"TERM": "dumb", "VISUAL": str(tmp_path / "editor")}
    async with terminal(server.url, **env) as person:
        await person.ready()
        person.types("/edit\n")
        reply = await puppet.reply()
        assert reply.request.prompt == "Edited"
        reply.say("Half")
        await person.sees("Half")
        person.types("\x03")
        await person.sees("[stopped]")
        await person.ready()
        person.types("\x03")
        await person.sees("[Ctrl-C again or Ctrl-D leaves]")
        person.types("\x04")
        assert await person.leaves() == 0
        assert "> \nTo continue" in person.output.decode().replace("\r", "")
    async with terminal(server.url, "-c", **env) as person:
        await person.sees("> Edited\nHalf\n[stopped]")
        await person.sees("\n>")
        person.types("\x03")
        await person.sees("[Ctrl-C again or Ctrl-D leaves]")
        person.types("\x03")
        assert await person.leaves() == 0


async def test_history_does_not_scroll_screen(server: wsserver.Server, puppet: Puppet) -> None:
    async with connect(server.url) as chat:
        reply = chat.prompt("Hi")
        (await puppet.reply()).say("Hello").end()
        await reply.done()
    async with terminal(server.url, "-c") as person:
        await person.sees("out]\n>")
        assert person.screen[0].startswith("/help")
        assert person.screen[1:4] == ["[Hi]", "> Hi", "Hello"]
    # An answer about the cursor would be old after the first printed line.
    assert b"\x1b[6n" not in person.output


async def test_huge_paste_is_refused_with_its_size(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        paste = asyncio.create_task(
            asyncio.to_thread(person.types, f"\x1b[200~{20_000_000 * 'x'}\x1b[201~\r")
        )
        await person.sees("The prompt has 20,000,000 bytes; 32,768 are allowed. (too_long)]")
        await paste
        await person.ready()
        person.types("Still there?\r")
        (await puppet.reply()).say("Yes").end()
        await person.sees("Yes")
