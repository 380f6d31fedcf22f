"""Conversations that fit the server's limits but not the model's context window."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.upstream import Script, Upstream, error, error_event, reply, stream
from wsserver import Code, ModelError

LIMIT = 20_000  # tokens of the largest request that the test model accepts, one a character


def refusal(tokens: int, *_: object) -> Script:
    message = f"prompt is too long: {tokens} tokens > {LIMIT} maximum"
    return Script((error(400, "invalid_request_error", message),))


def refusal_with_max_tokens(tokens: int, max_tokens: int) -> Script:
    message = (
        f"input length and `max_tokens` exceed context limit: {tokens} + {max_tokens} > {LIMIT}, "
        "decrease input length or `max_tokens` and try again"
    )
    return Script((error(400, "invalid_request_error", message),))


def refusal_by_size(*_: object) -> Script:
    return Script((error(413, "request_too_large", "Request exceeds the maximum size"),))


def refusal_in_the_stream(tokens: int, *_: object) -> Script:
    message = f"prompt is too long: {tokens} tokens > {LIMIT} maximum"
    return stream(error_event("invalid_request_error", message))


REFUSALS = [refusal, refusal_with_max_tokens, refusal_by_size, refusal_in_the_stream]


def texts(body: dict[str, Any]) -> list[str]:
    """Return the texts of a request's messages."""
    contents = [message["content"] for message in body["messages"]]
    return [text if isinstance(text, str) else text[0]["text"] for text in contents]


def sizes(upstream: Upstream) -> list[int]:
    return [sum(map(len, texts(received.body))) for received in upstream.requests]


@pytest.fixture(params=REFUSALS)
async def upstream(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Upstream]:
    def answer(body: Any) -> Script:
        tokens = sum(map(len, texts(body)))
        refuse: Any = request.param
        return refuse(tokens, body["max_tokens"]) if tokens > LIMIT else reply(["字" * 2000])

    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    async with Upstream() as running:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", running.url)
        running.default = answer
        yield running


@pytest.fixture
async def server(upstream: Upstream) -> AsyncIterator[wsserver.Server]:
    async with wsserver.serve(
        port=0, drain_timeout=0, prompts_per_minute=1000, frame_rate=1000
    ) as running:
        yield running


async def test_history_over_context_window_is_shortened_and_retried(
    chat: Client, upstream: Upstream
) -> None:
    for number in range(40):
        start = await chat.prompt(f"{number}".ljust(1000, "字"))
        text, done = await chat.text(start["id"])
        assert (done["type"], text) == ("done", "字" * 2000), number
        last = texts(upstream.requests[-1].body)
        assert last[-1].startswith(f"{number}字")
        if number:
            assert len(last) > 1, "the model sees a part of the conversation"
    # The first refusal is remembered: later requests stay below it.
    tried = sizes(upstream)
    assert len(tried) - 40 <= 3
    refused = [size for size in tried if size > LIMIT]
    assert max(tried[tried.index(refused[-1]) + 1 :]) < LIMIT


async def test_too_long_prompt_is_error_and_conversation_continues(
    request: pytest.FixtureRequest, chat: Client, upstream: Upstream
) -> None:
    by_size = request.node.callspec.params["upstream"] is refusal_by_size
    for _ in range(4):
        await chat.text((await chat.prompt("字" * 1000))["id"])
    before = len(upstream.requests)
    await chat.prompt("x" * (LIMIT + 1))
    failed = await chat.next("error")
    assert failed["code"] == ("request_too_large" if by_size else "prompt_too_long")
    assert failed["retryable"] is False
    assert len(upstream.requests) - before <= 5
    assert len(texts(upstream.requests[-1].body)) == 1
    start = await chat.prompt("And on")
    assert (await chat.text(start["id"]))[1]["type"] == "done"
    shown = texts(upstream.requests[-1].body)
    assert len(shown) == 9, "all turns but the failed prompt"


async def test_messages_of_client_are_not_shortened(chat: Client, upstream: Upstream) -> None:
    messages = [{"role": "user", "content": "x" * (LIMIT // 2)} for _ in range(3)]
    await chat.send({"messages": messages})
    assert (await chat.next("error"))["code"] in {"prompt_too_long", "request_too_large"}
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("upstream", [refusal], indirect=True)
async def test_other_model_gets_whole_conversation(
    upstream: Upstream,
) -> None:
    async with wsserver.serve(port=0, models="claude-with-more-room") as server:
        async with client(server) as chat:
            for _ in range(8):
                await chat.text((await chat.prompt("字" * 1000))["id"])
            await chat.prompt("Hi", model="claude-with-more-room")
            await chat.next("done")
    counts = [len(received.body["messages"]) for received in upstream.requests]
    others = [r.body["model"] == "claude-with-more-room" for r in upstream.requests]
    assert counts[others.index(True)] == 17


async def test_custom_model_is_called_again_with_shorter_history() -> None:
    asked: list[list[str]] = []

    async def model(request: wsserver.Request) -> AsyncIterator[str]:
        asked.append([message.content for message in request.messages])
        if len(asked[-1]) > 3:
            raise ModelError(Code.PROMPT_TOO_LONG)
        yield "Yes"

    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        for prompt in ("One", "Two", "Three"):
            done = (await chat.text((await chat.prompt(prompt))["id"]))[1]
            assert done["type"] == "done"
    assert asked[2] == ["One", "Yes", "Two", "Yes", "Three"]
    assert asked[3] == ["Two", "Yes", "Three"]


async def test_model_is_not_called_again_after_first_text() -> None:
    calls = 0

    async def model(request: wsserver.Request) -> AsyncIterator[str]:
        nonlocal calls
        calls += 1
        yield "Yes"
        if len(request.messages) > 1:
            raise ModelError(Code.PROMPT_TOO_LONG)

    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        await chat.text((await chat.prompt("One"))["id"])
        text, failed = await chat.text((await chat.prompt("Two"))["id"])
    assert (text, failed["code"], calls) == ("Yes", "prompt_too_long", 2)


async def test_log_event_of_too_long_prompt_has_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def model(request: wsserver.Request) -> AsyncIterator[str]:
        if len(request.messages) > 1:
            raise ModelError(Code.PROMPT_TOO_LONG)
        yield "Yes"

    caplog.set_level("INFO", "wsserver")
    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        for _ in range(2):
            await chat.text((await chat.prompt("planted-secret"))["id"])
    assert "prompt too long" in caplog.text
    assert "planted-secret" not in caplog.text
