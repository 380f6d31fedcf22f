"""Titles that a model writes after the first reply of a conversation."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import wsserver
from tests.support.claude import claude
from tests.support.client import Client, client
from tests.support.completions import completion
from tests.support.puppet import BOUND, Puppet, Reply
from tests.support.script import reply
from tests.support.upstream import Upstream
from wsserver import Code, End, ModelError, Usage
from wsserver.hub.titles import SYSTEM, title_in

CONVERSATION = "conversation-one"
WORDS = "How do I bake a sourdough bread?"


@pytest.fixture
async def server(puppet: Puppet) -> AsyncIterator[wsserver.Server]:
    async with wsserver.serve(puppet, port=0, drain_timeout=0, titles="on") as running:
        yield running


@pytest.fixture
async def chat(server: wsserver.Server) -> AsyncIterator[Client]:
    async with client(server) as chat:
        yield chat


async def converse(chat: Client, puppet: Puppet, prompt: str = WORDS, **keys: Any) -> None:
    """Send a prompt to a conversation, and wait for the whole reply."""
    number = len(puppet.replies)
    start = await chat.prompt(prompt, conversation=CONVERSATION, **keys)
    (await puppet.reply(number)).say("With flour.", Usage(10, 3)).end()
    await chat.text(start["id"])


async def title(chat: Client) -> str:
    await chat.send({"type": "list"})
    (item,) = (await chat.next("conversations"))["items"]
    assert item["id"] == CONVERSATION
    return str(item["title"])


async def settled(chat: Client, reply: Reply) -> None:
    """Wait until the server has ended a request for a title, and used its answer."""
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()
    for _ in range(3):  # a list waits for all that is being saved
        await chat.send({"type": "list"})
        await chat.next("conversations")


async def test_title_replaces_words_and_reaches_other_clients(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    await converse(chat, puppet)
    asked = await puppet.reply(1)
    assert await title(chat) == WORDS
    assert asked.request.system == SYSTEM
    assert WORDS in asked.request.prompt
    assert "With flour." in asked.request.prompt
    async with client(server) as other:
        for each in (chat, other):
            await each.send({"type": "open", "conversation": CONVERSATION})
            assert (await each.next("history"))["title"] == WORDS
        asked.say("**Sourdough", " at home**\n").end()
        for each in (chat, other):
            assert await each.next("renamed") == {
                "type": "renamed",
                "conversation": CONVERSATION,
                "title": "Sourdough at home",
            }
    assert await title(chat) == "Sourdough at home"
    await converse(chat, puppet, "And rye?")
    said = [message.content for message in puppet.replies[2].request.messages]
    assert said == [WORDS, "With flour.", "And rye?"]
    await chat.quiet()
    assert len(puppet.replies) == 3


@pytest.mark.parametrize("when", ["before", "during"])
async def test_title_of_client_stays(chat: Client, puppet: Puppet, when: str) -> None:
    rename = {"type": "rename", "conversation": CONVERSATION, "title": "Mine"}
    start = await chat.prompt(WORDS, conversation=CONVERSATION)
    model = await puppet.reply()
    if when == "before":
        await chat.send(rename)
        await chat.next("renamed")
    model.say("With flour.").end()
    await chat.text(start["id"])
    if when == "during":
        asked = await puppet.reply(1)
        await chat.send(rename)
        await chat.next("renamed")
        asked.say("Sourdough at home").end()
        await settled(chat, asked)
    assert await title(chat) == "Mine"
    await chat.send({"type": "open", "conversation": CONVERSATION})
    assert (await chat.next("history"))["title"] == "Mine"
    assert [model.request.prompt for model in puppet.replies][1:] == (
        [] if when == "before" else [puppet.replies[1].request.prompt]
    )


async def test_failed_title_leaves_words_and_reports_nothing(chat: Client, puppet: Puppet) -> None:
    await converse(chat, puppet)
    asked = await puppet.reply(1)
    asked.say("Half a ti").fail(ModelError(Code.OVERLOADED))
    await settled(chat, asked)
    assert {frame["type"] for frame in await chat.quiet()} == set()
    assert not any(frame["type"] == "error" for frame in chat.frames)
    assert await title(chat) == WORDS


async def test_title_waits_for_first_whole_reply(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt(WORDS, conversation=CONVERSATION)
    (await puppet.reply()).say("With")
    await chat.next("token")
    await chat.send({"type": "stop", "id": start["id"]})
    await chat.next("done")
    await converse(chat, puppet, "Go on")
    asked = await puppet.reply(2)
    await chat.send({"type": "open", "conversation": CONVERSATION})
    await chat.next("history")
    asked.say("Sourdough").end()
    await chat.next("renamed")
    assert await title(chat) == "Sourdough"


async def test_deleted_conversation_gets_no_title(chat: Client, puppet: Puppet) -> None:
    await converse(chat, puppet)
    asked = await puppet.reply(1)
    await chat.send({"type": "delete", "conversation": CONVERSATION})
    await chat.next("deleted")
    asked.say("Sourdough").end()
    await settled(chat, asked)
    await chat.send({"type": "list"})
    assert (await chat.next("conversations"))["items"] == []


async def test_title_counts_for_budget_of_principal(puppet: Puppet) -> None:
    async with (
        wsserver.serve(
            puppet, port=0, drain_timeout=0, titles="on", tokens_per_day=5000, max_tokens=1000
        ) as server,
        client(server) as chat,
    ):
        await converse(chat, puppet)
        asked = await puppet.reply(1)
        assert asked.request.max_tokens == 300
        asked.say("Sourdough", Usage(4990, 5)).end()
        await settled(chat, asked)
        error = await chat.prompt("And rye?", conversation=CONVERSATION)
        assert error["code"] in {Code.QUOTA, Code.LIMIT}


async def test_retried_first_turn_asks_for_no_other_title(chat: Client, puppet: Puppet) -> None:
    start = await chat.prompt(WORDS, conversation=CONVERSATION)
    (await puppet.reply()).say("With flour.").end()
    await chat.text(start["id"])
    (await puppet.reply(1)).say("Sourdough").end()
    await settled(chat, puppet.replies[1])
    for number, prompt in ((2, WORDS), (3, "And rye?")):
        start = await chat.prompt(prompt, conversation=CONVERSATION, retry_of=start["id"])
        (await puppet.reply(number)).say("With water.").end()
        await chat.text(start["id"])
        await settled(chat, puppet.replies[number])
    assert len(puppet.replies) == 4
    assert await title(chat) == "Sourdough"


@pytest.mark.parametrize(
    "limit", [{"generations": 1}, {"generations_per_principal": 1}, {"prompts_per_minute": 2}]
)
async def test_title_leaves_room_for_next_prompt(puppet: Puppet, limit: dict[str, Any]) -> None:
    async with (
        wsserver.serve(puppet, port=0, drain_timeout=0, titles="on", **limit) as server,
        client(server) as chat,
    ):
        await converse(chat, puppet)
        await settled(chat, puppet.replies[0])
        await converse(chat, puppet, "And rye?")
        assert [reply.request.prompt for reply in puppet.replies] == [WORDS, "And rye?"]


async def test_answer_that_is_cut_is_no_title(chat: Client, puppet: Puppet) -> None:
    await converse(chat, puppet)
    asked = await puppet.reply(1)
    asked.say("I have to think about", End("max_tokens")).end()
    await settled(chat, asked)
    assert await title(chat) == WORDS


async def test_no_title_without_budget(puppet: Puppet) -> None:
    async with (
        wsserver.serve(
            puppet, port=0, drain_timeout=0, titles="on", tokens_per_day=3000, max_tokens=1000
        ) as server,
        client(server) as chat,
    ):
        start = await chat.prompt(WORDS, conversation=CONVERSATION)
        (await puppet.reply()).say("With flour.", Usage(2990, 9)).end()
        await chat.text(start["id"])
        await chat.quiet()
        assert await title(chat) == WORDS
        assert len(puppet.replies) == 1


async def test_model_of_titles_is_not_for_clients(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, drain_timeout=0, titles="small-model") as server,
        client(server) as chat,
    ):
        error = await chat.prompt(WORDS, model="small-model")
        assert error["code"] == Code.MODEL_NOT_ALLOWED
        await converse(chat, puppet)
        assert (await puppet.reply(1)).request.model == "small-model"


async def test_shutdown_does_not_wait_for_title(puppet: Puppet) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            wsserver.serve(puppet, port=0, drain_timeout=2 * BOUND, titles="on")
        )
        async with client(server) as chat:
            await converse(chat, puppet)
            asked = (await puppet.reply(1)).say("Sour")
        async with asyncio.timeout(BOUND):
            await stack.aclose()
    assert asked.closed.is_set()


@pytest.mark.parametrize("model", ["puppet", "demo"])
async def test_titles_are_off_for_other_models(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.delenv("WSSERVER_TITLES")
    async with (
        wsserver.serve(
            puppet if model == "puppet" else "demo", port=0, drain_timeout=0, demo_rate=0
        ) as server,
        client(server) as chat,
    ):
        if model == "puppet":
            await converse(chat, puppet)
            assert len(puppet.replies) == 1
        else:
            start = await chat.prompt(WORDS, conversation=CONVERSATION)
            await chat.text(start["id"])
        await chat.quiet()
        assert await title(chat) == WORDS


def _script(of: Callable[..., Any]) -> Callable[[Any], Any]:
    """Answer a request for a title with a title, and any other with a reply."""
    return lambda body: of("Sourdough at home" if SYSTEM in str(body) else "With flour.")


@pytest.mark.parametrize("titles", ["", "small-model"])
@pytest.mark.parametrize("api", ["anthropic", "openai"])
async def test_models_behind_an_api_write_titles(
    monkeypatch: pytest.MonkeyPatch, api: str, titles: str
) -> None:
    monkeypatch.setenv("WSSERVER_TITLES", titles)
    serving: contextlib.AbstractAsyncContextManager[wsserver.Server]
    async with Upstream() as upstream:
        if api == "anthropic":
            monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
            upstream.default = _script(reply)
            serving = claude(monkeypatch, upstream.url)
        else:
            monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
            monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream.url}/v1")
            upstream.default = _script(completion)
            serving = wsserver.serve(model="openai:a-model", port=0, drain_timeout=0)
        async with serving as server, client(server) as chat:
            start = await chat.prompt(WORDS, conversation=CONVERSATION)
            await chat.send({"type": "open", "conversation": CONVERSATION})
            await chat.text(start["id"])
            assert (await chat.next("renamed"))["title"] == "Sourdough at home"
        first, second = upstream.requests
        assert second.body["model"] == (titles or first.body["model"])
        assert 300 in {second.body.get("max_tokens"), second.body.get("max_completion_tokens")}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Sourdough at home", "Sourdough at home"),
        ('"Sourdough at home."', "Sourdough at home"),
        ("\n## Title: **Sourdough** \n\nMore", "Sourdough"),
        ("「パンの焼き方」", "「パンの焼き方」"),
        ("خبز العجين المخمر", "خبز العجين المخمر"),
        ("Is it C#?", "Is it C#?"),
        ("word " * 30, "word " * 11 + "word…"),
        ("<think>\nThey ask: bread\n</think>\n\nSourdough", "Sourdough"),
        ("<think>They ask about bread", ""),
        ("Here is a title:\n\n**Sourdough**", "Sourdough"),
        ("**Title:**", ""),
        ("Sour\x00dough\x1b[2J \u202ehcaer", "Sour dough [2J hcaer"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_title_in_answer(answer: str, expected: str) -> None:
    assert title_in(answer) == expected
