"""Turns that are sent to the model, and their share in the API's prompt cache."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsserver
from tests.support.client import Client, client
from tests.support.prompt_cache import PromptCache
from tests.support.puppet import Puppet
from tests.support.upstream import Hang, Script, Upstream, reply
from wsserver import Code, Message, ModelError
from wsserver.hub.context import messages_of, newest
from wsserver.stores.base import Turn

COUNT, SIZE = 200, 400_000  # the settings' defaults
CONVERSATION = "conversation-one"


def turn(number: int, prompt: str, text: str, partial: str | None = None) -> Turn:
    reply = Message("assistant", text, partial, id=f"{number}")
    return Turn(number, Message("user", prompt), reply)


def asked(turns: list[Turn], prompt: str, *, count: int = COUNT, size: int = SIZE) -> list[Message]:
    return messages_of(turns, Message("user", prompt), count=count, size=size)


def long_conversation(sizes: Iterable[int]) -> Iterable[tuple[list[Turn], str]]:
    """Yield each prompt of a conversation with the turns before it."""
    turns: list[Turn] = []
    pairs = iter(sizes)
    for number, (asked, said) in enumerate(zip(pairs, pairs, strict=True), start=1):
        prompt = f"{number}".ljust(asked, "?")
        yield turns, prompt
        turns = newest([*turns, turn(number, prompt, f"{number}".ljust(said, "!"))], COUNT, SIZE)


# Which turns


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=40),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 30),
)
def test_newest_turns_are_sent_whole_within_limits(
    sizes: list[tuple[int, int]], count: int, size: int, prompt: int
) -> None:
    turns = [
        turn(n, f"{n}?".ljust(a), f"{n}!".ljust(b) * (b > 0)) for n, (a, b) in enumerate(sizes, 1)
    ]
    everything = asked(turns, "p" * prompt, count=10**9, size=10**9)
    assert len(everything) == 1 + sum(1 + bool(turn.text) for turn in turns)
    shown = asked(turns, "p" * prompt, count=count, size=size)
    assert shown == everything[-len(shown) :]
    assert shown[0].role == "user"
    if len(shown) > 1:
        assert len(shown) <= count
        assert sum(len(message.content) for message in shown) <= size


@pytest.mark.parametrize("sizes", [(2000, 2000), (20, 20), (7000, 7000), (1, 8000)])
def test_90_percent_of_request_equals_previous_request(sizes: tuple[int, int]) -> None:
    chance = random.Random(1)
    sent = same = 0
    before: list[Message] = []
    for turns, prompt in long_conversation(chance.randint(*sizes) for _ in range(600)):
        messages = asked(turns, prompt)
        sent += sum(len(message.content) for message in messages)
        for old, new in zip(before, messages, strict=False):
            if old != new:
                break
            same += len(new.content)
        before = messages
    assert same / sent > 0.9


def test_first_turn_does_not_depend_on_turns_in_memory() -> None:
    everything: list[Turn] = []
    for turns, prompt in long_conversation([2000] * 600):
        after_a_restart = newest(everything[-COUNT:], COUNT, SIZE)
        assert asked(after_a_restart, prompt) == asked(turns, prompt, count=COUNT, size=SIZE)
        number = len(everything) + 1
        everything.append(turn(number, prompt, f"{number}".ljust(2000, "!")))


def test_all_fitting_turns_are_sent_after_first_turn_is_replaced() -> None:
    turns = [turn(number, "?" * 1000, "!" * 1000) for number in range(2, 90)]
    assert len(asked(turns, "p")) == 2 * len(turns) + 1


# Turns that failed


SAID = [("user", "Fine"), ("assistant", "Yes")]


@pytest.mark.parametrize(
    ("prompt", "text", "partial", "shown"),
    [
        ("X", "", "overloaded", []),
        ("X", " \n", "interrupted", []),
        ("X", "", "bad_request", []),
        ("X", "", "prompt_too_long", []),
        ("X", "", "shutdown", []),
        ("X", "", "disconnect", []),
        ("X", "half", "overloaded", [("user", "X"), ("assistant", "half")]),
        ("X", "half", "client", [("user", "X"), ("assistant", "half")]),
        ("X", "half", "refusal", []),
        ("X", "", "client", [("user", "X")]),
        ("Y", "", "client", []),
        ("X", "", "replaced", [("user", "X")]),
        ("X", "", None, [("user", "X")]),
    ],
)
def test_failed_prompt_without_reply_is_omitted(
    prompt: str, text: str, partial: str | None, shown: list[tuple[str, str]]
) -> None:
    turns = [turn(1, "Fine", "Yes"), turn(2, prompt, text, partial)]
    messages = asked(turns, "Y")
    assert [(m.role, m.content) for m in messages] == [*SAID, *shown, ("user", "Y")]


async def test_prompt_repeated_after_failure_is_sent_once(chat: Client, puppet: Puppet) -> None:
    for number in range(2):
        await chat.prompt("X")
        (await puppet.reply(number)).fail(ModelError(Code.OVERLOADED))
        await chat.next("error")
    await chat.prompt("X")
    messages = (await puppet.reply(2)).request.messages
    assert [(message.role, message.content) for message in messages] == [("user", "X")]


# The prompt cache


@pytest.fixture
def cache() -> PromptCache:
    return PromptCache()


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch, cache: PromptCache) -> Any:
    def answer(body: Any) -> Script:
        return reply(["!" * 2000], **cache.usage(body))

    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    async with Upstream() as running:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", running.url)
        running.default = answer
        yield running


def serve(**given: Any) -> wsserver.Server:
    return wsserver.serve(
        port=0,
        drain_timeout=0,
        tokens_per_day=0,
        prompts_per_minute=100_000,
        frame_rate=100_000,
        frame_burst=100_000,
        **given,
    )


async def ask(chat: Client, prompt: str, **keys: Any) -> dict[str, int]:
    """Return the usage of a reply."""
    start = await chat.prompt(prompt, **keys)
    usage: dict[str, int] = (await chat.text(start["id"]))[1]["usage"]
    chat.frames.clear()
    return usage


@pytest.mark.usefixtures("upstream")
async def test_90_percent_of_300_turns_are_read_from_prompt_cache(cache: PromptCache) -> None:
    async with serve() as server, client(server) as chat:
        for number in range(300):
            await ask(chat, f"{number}".ljust(2000))
    assert cache.share > 0.9


@pytest.mark.parametrize("stopped", [1, 18, 19, 20, 21, 60])
async def test_prompt_cache_is_found_after_prompts_stopped_early(
    upstream: Upstream, cache: PromptCache, stopped: int
) -> None:
    def answer(body: Any) -> Script:
        if body["messages"][-1]["content"].startswith("Stop"):
            return Script((Hang(),))  # the API writes nothing to the cache
        return reply(["!" * 2000], **cache.usage(body))

    upstream.default = answer
    async with serve() as server, client(server) as chat:
        for number in range(30):
            await ask(chat, f"{number}".ljust(2000))
        for number in range(stopped):
            start = await chat.prompt(f"Stop {number}")
            await upstream.request(30 + number)
            await chat.send({"type": "stop", "id": start["id"]})
            await chat.next("done")
        usage = await ask(chat, "And on")
    assert usage["cache_read_input_tokens"] == 29 * 1000 + 500


@pytest.mark.usefixtures("upstream")
async def test_system_prompt_is_cached_for_all_conversations(cache: PromptCache) -> None:
    system = "Be brief. " * 1000
    async with serve(system=system) as server, client(server) as chat:
        first = await ask(chat, "Hi", conversation="conversation-one")
        second = await ask(chat, "Ho", conversation="conversation-two")
    assert "cache_read_input_tokens" not in first
    assert second["cache_read_input_tokens"] == len(system) // 4


@pytest.mark.usefixtures("upstream")
async def test_prompt_cache_is_found_after_restart(cache: PromptCache, tmp_path: Any) -> None:
    for _ in range(3):
        async with serve(store=f"sqlite:///{tmp_path}/s.sqlite", history_messages=40) as server:
            async with client(server) as chat:
                used = [
                    await ask(chat, f"{number}".ljust(2000), conversation=CONVERSATION)
                    for number in range(33)
                ]
    assert used[0]["cache_read_input_tokens"] > 10 * used[0]["cache_creation_input_tokens"]
