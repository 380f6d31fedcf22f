"""Usage of a reply: counted by the API, or estimated if the reply ends before the count."""

import itertools

import pytest

import wsserver
from tests.support.claude import escaped, stop
from tests.support.client import Client
from tests.support.puppet import until
from tests.support.upstream import Cut, Hang, Upstream, error, event, reply, stream


async def test_usage_includes_cached_tokens(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("So", cache_read_input_tokens=1000))
    await chat.prompt()
    usage = (await chat.next("done"))["usage"]
    assert usage == {"input_tokens": 25, "output_tokens": 1, "cache_read_input_tokens": 1000}


async def test_usage_of_stopped_reply_has_exact_input_tokens(
    chat: Client, upstream: Upstream
) -> None:
    upstream.play(reply("twelve chars", Hang(), input_tokens=321))
    start = await chat.prompt()
    await chat.next("token")
    _, done = await stop(chat, start)
    assert done["usage"] == {"input_tokens": 321, "output_tokens": 3, "estimated": True}


async def test_stopped_chinese_reply_costs_a_token_per_character(
    chat: Client, upstream: Upstream
) -> None:
    upstream.play(reply(["漢字仮名交じり文"] * 250, Hang()))
    start = await chat.prompt()
    while len(chat.said(start["id"])) < 2000:
        await chat.receive()
    _, done = await stop(chat, start)
    assert 2000 <= done["usage"]["output_tokens"] <= 3000
    assert done["usage"]["estimated"] is True


@pytest.mark.parametrize("summary", ["A short one", ""])
@pytest.mark.parametrize("later", ["stopped", "text, then stopped", "text, then cut"])
async def test_summarised_thinking_is_estimated_by_time(
    monkeypatch: pytest.MonkeyPatch,
    server: wsserver.Server,
    chat: Client,
    upstream: Upstream,
    summary: str,
    later: str,
) -> None:
    clock = itertools.chain([100.0], itertools.repeat(110.0))
    monkeypatch.setattr("wsserver.models.anthropic.reply.monotonic", lambda: next(clock))
    events = event("message_start", message={"usage": {"input_tokens": 9}})
    events += event("content_block_start", index=0, content_block={"type": "thinking"})
    events += escaped(summary, "thinking") if summary else b""
    if later != "stopped":
        events += event("content_block_stop", index=0) + escaped("An answer of many letters")
    upstream.play(stream(events, Cut() if later.endswith("cut") else Hang()))
    start = await chat.prompt()
    if later.endswith("cut"):
        terminal = await chat.next("error")
    else:
        (generation,) = server.app.hub.retention
        await until(lambda: generation.usage)
        terminal = (await stop(chat, start))[1]
    used = {"input_tokens": 9, "output_tokens": 600 + 7 * (later != "stopped"), "estimated": True}
    assert terminal["usage"] == used


async def test_estimated_thinking_is_at_most_max_tokens(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    clock = itertools.chain([100.0], itertools.repeat(110.0))
    monkeypatch.setattr("wsserver.models.anthropic.reply.monotonic", lambda: next(clock))
    begin = event("content_block_start", index=0, content_block={"type": "thinking"})
    upstream.play(stream(begin, escaped("hm", "thinking"), Hang()))
    start = await chat.prompt(max_tokens=300)
    await chat.next("thinking")
    assert (await stop(chat, start))[1]["usage"]["output_tokens"] == 300


async def test_api_token_count_replaces_estimate(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    clock = itertools.chain([100.0], itertools.repeat(110.0))
    monkeypatch.setattr("wsserver.models.anthropic.reply.monotonic", lambda: next(clock))
    upstream.play(reply("Yes", thinking="hm", output_tokens=77))
    done = (await chat.text((await chat.prompt())["id"]))[1]
    assert done["usage"] == {"input_tokens": 25, "output_tokens": 77}


async def test_usage_of_failed_attempt_is_added_to_next_attempt(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.streamed.random.uniform", lambda low, high: 0.0)
    upstream.play(
        reply(Cut(), input_tokens=100, cache_read_input_tokens=7),
        reply("at last", input_tokens=20, output_tokens=5),
    )
    text, done = await chat.text((await chat.prompt())["id"])
    assert text == "at last"
    assert done["usage"] == {
        "input_tokens": 120,
        "output_tokens": 6,
        "cache_read_input_tokens": 7,
        "estimated": True,
    }


async def test_usage_of_failed_attempt_survives_attempt_without_usage(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.streamed.random.uniform", lambda low, high: 0.0)
    refused = error(400, "invalid_request_error")
    upstream.play(reply(Cut(), input_tokens=100), refused)
    await chat.prompt()
    failed = await chat.next("error")
    assert (failed["code"], failed["usage"]["input_tokens"]) == ("bad_request", 100)
