"""Claude through the real SDK, against a server that speaks the Messages API and all its faults."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import until
from tests.support.upstream import (
    END,
    GARBAGE,
    INVALID_UTF8,
    MALFORMED_JSON,
    UNKNOWN_EVENT,
    Answer,
    Cut,
    Gate,
    Hang,
    Script,
    Step,
    ToolUse,
    Upstream,
    error,
    error_event,
    event,
    refused_url,
    reply,
    stream,
)
from tests.test_slow_reader import sluggard

AT_ONCE = {"retry-after": "0"}
MODEL = "claude-sonnet-4-6"


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as running:
        yield running


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")


@asynccontextmanager
async def claude(
    monkeypatch: pytest.MonkeyPatch, url: str, **given: Any
) -> AsyncIterator[wsserver.Server]:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
    async with wsserver.serve(port=0, drain_timeout=0, **given) as server:
        yield server


@pytest.fixture
async def server(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> AsyncIterator[wsserver.Server]:
    async with claude(monkeypatch, upstream.url) as running:
        yield running


# The way there


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("location", ["{}/v1/messages", "/v1/messages?again", "?again"])
async def test_a_redirect_within_the_host_is_followed_with_the_same_body(
    chat: Client, upstream: Upstream, status: int, location: str
) -> None:
    to = {"location": location.format(upstream.url)}
    redirect = Answer(status, "text/plain", "There", to)
    upstream.play(redirect, redirect, reply("Hello"))
    text, done = await chat.text((await chat.prompt())["id"])
    assert (text, done["reason"]) == ("Hello", "end_turn")
    first, *others = [(received.raw, received.headers) for received in upstream.requests]
    assert others == [first, first]


@pytest.mark.parametrize(
    ("status", "location"),
    [
        (307, "{elsewhere}/v1/messages"),
        (308, "{elsewhere}/v1/messages"),
        (307, "//localhost:{port}/v1/messages"),
        (307, "https://127.0.0.1:{port}/v1/messages"),
        (307, "http://[/v1/messages"),
        (301, "/v1/messages"),
        (302, "/v1/messages"),
        (303, "/v1/messages"),
    ],
)
async def test_a_redirect_elsewhere_is_refused_by_name_and_gets_no_prompt(
    chat: Client,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
    status: int,
    location: str,
) -> None:
    async with Upstream() as other:
        port = upstream.url.rpartition(":")[2]
        to = {"location": location.format(elsewhere=other.url, port=port)}
        upstream.play(Answer(status, "text/plain", "There", to))
        await chat.prompt()
        failed = await chat.next("error")
        assert (failed["code"], failed["retryable"]) == ("redirected", False)
        assert (len(upstream.requests), other.requests) == (1, [])
    assert "redirected" in caplog.text


async def test_redirects_without_end_are_given_up(chat: Client, upstream: Upstream) -> None:
    to = {"location": f"{upstream.url}/v1/messages"}
    upstream.default = Script((Answer(307, "text/plain", "There", to),))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "redirected"
    assert len(upstream.requests) < 30


@pytest.mark.parametrize(
    ("name", "value"),
    [("HTTP_PROXY", "http://{}"), ("HTTP_PROXY", "user:word@{}"), ("ALL_PROXY", "http://{}")],
)
async def test_the_environments_proxy_is_used(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value.format(upstream.url.removeprefix("http://")))
    async with claude(monkeypatch, "http://api.example") as server, client(server) as chat:
        await chat.prompt()
        request = await upstream.request()
        await chat.next("error")
    assert request.path == "http://api.example/v1/messages"
    assert ("proxy-authorization" in request.headers) == ("@" in value)


@pytest.mark.parametrize("exempt", ["127.0.0.1", "127.0.0.0/8", "*"])
async def test_what_needs_no_proxy_goes_past_it(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, exempt: str
) -> None:
    with refused_url() as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("NO_PROXY", exempt)
        async with claude(monkeypatch, upstream.url) as server, client(server) as chat:
            assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"


async def test_passwords_kept_for_others_are_not_used(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with claude(monkeypatch, upstream.url) as server, client(server) as chat:
        assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"
    assert "sk-secret" in str((await upstream.request()).headers)


# A whole reply


async def test_text_and_thinking_arrive_as_they_were_said(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("Hello ", "wide world", thinking="Let me think", output_tokens=9))
    start = await chat.prompt("Hi")
    text, done = await chat.text(start["id"])
    assert start["model"] == MODEL
    assert text == "Hello wide world"
    assert chat.said(start["id"], "thinking") == "Let me think"
    assert done["reason"] == "end_turn"
    assert done["usage"] == {"input_tokens": 25, "output_tokens": 9}


async def test_the_request_is_what_the_api_documents(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    async with claude(monkeypatch, upstream.url, models="claude-opus-5") as server:
        async with client(server) as chat:
            await chat.prompt("One")
            await chat.next("done")
            await chat.prompt(
                "Two", model="claude-opus-5", system="Be brief", max_tokens=77, temperature=0.5
            )
            await chat.next("done")
    first, second = [(await upstream.request(number)).body for number in (0, 1)]
    assert first == {
        "model": MODEL,
        "max_tokens": server.settings.max_tokens,
        "messages": [{"role": "user", "content": "One"}],
        "cache_control": {"type": "ephemeral"},
        "stream": True,
    }
    assert second == {
        "model": "claude-opus-5",
        "max_tokens": 77,
        "system": "Be brief",
        "temperature": 0.5,
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Hello world"},
            {"role": "user", "content": "Two"},
        ],
        "cache_control": {"type": "ephemeral"},
        "stream": True,
    }
    headers = upstream.requests[0].headers
    assert "sk-secret" in str(headers), "the SDK's own authentication"
    assert "anthropic-version" in headers


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"thinking": "adaptive"}, {"type": "adaptive", "display": "summarized"}),
        ({"thinking": "disabled"}, {"type": "disabled"}),
        ({"thinking": "2000"}, {"type": "enabled", "budget_tokens": 2000}),
        ({}, None),
    ],
)
async def test_thinking_is_asked_for_as_set(
    monkeypatch: pytest.MonkeyPatch,
    upstream: Upstream,
    given: dict[str, Any],
    sent: dict[str, Any] | None,
) -> None:
    async with claude(monkeypatch, upstream.url, prompt_caching=False, **given) as server:
        async with client(server) as chat:
            await chat.prompt()
            await chat.next("done")
            await chat.prompt(max_tokens=100)
            await chat.next("done")
    body = (await upstream.request()).body
    assert body.get("thinking") == sent
    assert "cache_control" not in body
    budget = given.get("thinking", "").isdigit()
    small = (await upstream.request(1)).body
    assert small.get("thinking") == (None if budget else sent), "a budget must be below max_tokens"


@pytest.mark.parametrize(
    ("thinking", "max_tokens", "sent"),
    [("adaptive", 2000, None), ("1500", 2000, None), ("1500", 1500, 0.2), ("disabled", 2000, 0.2)],
)
async def test_temperature_is_left_out_while_the_model_thinks(
    monkeypatch: pytest.MonkeyPatch,
    upstream: Upstream,
    thinking: str,
    max_tokens: int,
    sent: float | None,
) -> None:
    async with claude(monkeypatch, upstream.url, thinking=thinking) as server:
        async with client(server) as chat:
            await chat.prompt(temperature=0.2, max_tokens=max_tokens)
            await chat.next("done")
    assert (await upstream.request()).body.get("temperature") == sent


@pytest.mark.parametrize(
    "message",
    [
        "`temperature` is deprecated for this model.",
        "`temperature` may only be set to 1 when thinking is enabled or in adaptive mode.",
    ],
)
async def test_a_model_that_refuses_temperature_is_asked_without_from_then_on(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, message: str
) -> None:
    upstream.play(error(400, "invalid_request_error", message))
    async with claude(monkeypatch, upstream.url, models="claude-opus-4-1", retries=0) as server:
        async with client(server) as chat:
            for model in (MODEL, MODEL, "claude-opus-4-1"):
                await chat.prompt(temperature=0.2, model=model)
                await chat.next("done")
    sent = [received.body.get("temperature") for received in upstream.requests]
    assert sent == [0.2, None, None, 0.2]


async def test_a_temperature_over_the_apis_range_is_refused_by_name(
    chat: Client, upstream: Upstream
) -> None:
    message = "temperature: Input should be less than or equal to 1"
    upstream.play(error(400, "invalid_request_error", message))
    await chat.prompt(temperature=1.5)
    failed = await chat.next("error")
    assert failed["code"] == "bad_request"
    assert "temperature" in failed["message"]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    "reason",
    [
        "end_turn",
        "max_tokens",
        "stop_sequence",
        "tool_use",
        "pause_turn",
        "model_context_window_exceeded",
        "a_reason_of_tomorrow",
    ],
)
async def test_every_stop_reason_is_told(chat: Client, upstream: Upstream, reason: str) -> None:
    upstream.play(reply("So", stop_reason=reason))
    await chat.prompt()
    assert (await chat.next("done"))["reason"] == reason


async def test_a_refusal_is_an_error_and_its_text_is_kept(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("Well, ", stop_reason="refusal", output_tokens=3))
    start = await chat.prompt()
    text, refusal = await chat.text(start["id"])
    assert (text, refusal["code"], refusal["retryable"]) == ("Well, ", "refusal", False)
    assert refusal["usage"] == {"input_tokens": 25, "output_tokens": 3}


async def test_cached_tokens_are_told(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("So", cache_read_input_tokens=1000))
    await chat.prompt()
    usage = (await chat.next("done"))["usage"]
    assert usage == {"input_tokens": 25, "output_tokens": 1, "cache_read_input_tokens": 1000}


@pytest.mark.parametrize(
    "script",
    [
        reply("naïve 😀 ", "words", thinking="hm", chop=1),
        reply("naïve 😀 ", "words", thinking="hm", chop=7, crlf=True),
        reply("naïve 😀 ", "words", thinking="hm", crlf=True),
        reply("naïve 😀 ", UNKNOWN_EVENT, b": a comment\n\n", "words", thinking="hm"),
        reply("naïve 😀 ", b"id: 5\nretry: 9\n\n", "words", thinking="hm"),
        reply(["na", "ïve ", "😀 ", "words"], ToolUse("weather", {"in": "Rome"}), thinking="hm"),
    ],
    ids=["byte by byte", "CRLF in bits", "CRLF", "unknown events", "other fields", "a tool"],
)
async def test_the_stream_is_read_however_it_is_cut(
    chat: Client, upstream: Upstream, script: Script
) -> None:
    upstream.play(script)
    start = await chat.prompt()
    text, done = await chat.text(start["id"])
    assert (text, done["type"]) == ("naïve 😀 words", "done")
    assert chat.said(start["id"], "thinking") == "hm"


async def test_what_arrives_at_once_is_sent_at_once(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply(["word "] * 5000))
    start = await chat.prompt()
    text, _ = await chat.text(start["id"])
    assert text == "word " * 5000
    tokens = [frame for frame in chat.frames if frame["type"] == "token"]
    assert len(tokens) < 500


# One client for the process


async def test_a_connection_serves_one_reply_after_another(
    chat: Client, upstream: Upstream
) -> None:
    for _ in range(3):
        start = await chat.prompt()
        await chat.text(start["id"])
    assert len({received.peer for received in upstream.requests}) == 1


async def test_the_client_is_closed_with_the_server(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    async with claude(monkeypatch, upstream.url) as server, client(server) as chat:
        await chat.prompt()
        await chat.next("done")
        assert len(upstream.connections) == 1
    await until(lambda: not upstream.connections)


# Stop


def escaped(text: str, kind: str = "text") -> bytes:
    return event(
        "content_block_delta", index=0, delta={"type": f"{kind}_delta", kind: "@"}
    ).replace(b"@", text.encode())


async def stop(chat: Client, start: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    await chat.send({"type": "stop", "id": start["id"]})
    text, done = await chat.text(start["id"])
    assert (done["type"], done["by"]) == ("done", "client")
    return text, done


async def goes_on(chat: Client) -> None:
    assert await chat.quiet() == []
    start = await chat.prompt("And on")
    assert (await chat.text(start["id"]))[0] == "Hello world"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Hang(), ""),
        (stream(Hang()), ""),
        (stream(event("ping"), Hang(ping_every=0.01)), ""),
        (reply("some words", Hang()), "some words"),
        (reply("some words", Hang(), thinking="well"), "some words"),
        (reply("word " * 100, interval=0.01), None),
    ],
    ids=["before headers", "after headers", "pings only", "mid-stream", "thinking", "streaming"],
)
async def test_stop_closes_the_upstream(
    chat: Client, upstream: Upstream, script: Script | Step, said: str | None
) -> None:
    upstream.play(script)
    start = await chat.prompt()
    received = await upstream.request()
    if said or said is None:
        await chat.next("token")
    text, _ = await stop(chat, start)
    assert await received.closed() == "closed"
    assert said is None or text == said
    await goes_on(chat)


async def test_stop_during_a_pause_between_attempts(chat: Client, upstream: Upstream) -> None:
    upstream.play(error(429, "rate_limit_error", headers={"retry-after": "10"}))
    start = await chat.prompt()
    await (await upstream.request()).closed()
    await chat.quiet()
    await stop(chat, start)
    assert len(upstream.requests) == 1
    await goes_on(chat)


async def test_text_after_the_end_of_a_message_is_none_of_it(
    chat: Client, upstream: Upstream
) -> None:
    said, late = (
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        for text in ("Hello", " and more")
    )
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1})
    upstream.play(stream(said + end + event("message_stop") + late))  # all of it in one read
    text, done = await chat.text((await chat.prompt())["id"])
    assert (text, done["reason"]) == ("Hello", "end_turn")


async def test_damaged_compression_is_no_reason_to_ask_again(
    chat: Client, upstream: Upstream
) -> None:
    headers = {"content-encoding": "gzip"}
    upstream.play(Answer(200, "text/event-stream", "this is not gzip", headers))
    _, error_ = await chat.text((await chat.prompt())["id"])
    assert error_["code"] == "malformed"
    assert len(upstream.requests) == 1


async def test_a_fault_of_our_own_is_not_called_the_apis(
    chat: Client, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr("wsserver.journal.Record.wake", broken)
    upstream.play(reply("Hello", thinking="hm"))
    _, error_ = await chat.text((await chat.prompt())["id"])
    assert error_["code"] == "internal"


async def test_stop_of_one_of_two(chat: Client, upstream: Upstream) -> None:
    upstream.play(reply("one ", Hang()), reply("two ", Gate("go"), "three"))
    one = await chat.prompt("1", conversation="conversation-one")
    await upstream.request(0)
    two = await chat.prompt("2", conversation="conversation-two")
    await upstream.request(1)
    await stop(chat, one)
    assert await upstream.requests[0].closed() == "closed"
    assert upstream.open == 1
    upstream.gates["go"].set()
    assert (await chat.text(two["id"]))[0] == "two three"


async def test_stop_while_the_sockets_send_buffer_is_full(
    server: wsserver.Server, upstream: Upstream
) -> None:
    upstream.play(reply(["0123456789abcde "] * 100_000, interval=0.0001))
    async with sluggard(server) as slow:
        await slow.send('{"prompt": "Talk", "id": "the-slow-one-0001"}')
        received = await upstream.request()
        (transport,) = server._connections
        await until(lambda: not transport.writable)
        await slow.send('{"type": "stop"}')
        assert await received.closed() == "closed"
        frames = [Client.parse(text) for text in await slow.until('"done"')]
        assert frames[-1]["by"] == "client"
        await slow.send('{"prompt": "Again", "id": "the-slow-one-0002"}')
        texts = await slow.until('"end_turn"')
        assert "the-slow-one-0002" in texts[-1]


async def test_usage_of_a_stopped_reply_has_the_exact_input(
    chat: Client, upstream: Upstream
) -> None:
    upstream.play(reply("twelve chars", Hang(), input_tokens=321))
    start = await chat.prompt()
    await chat.next("token")
    _, done = await stop(chat, start)
    assert done["usage"] == {"input_tokens": 321, "output_tokens": 3, "estimated": True}


async def test_usage_of_a_stopped_reply_in_chinese_is_a_token_a_character_or_more(
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
async def test_thinking_that_is_only_summarised_counts_by_its_time(
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
        (generation,) = server._hub.retention
        await until(lambda: generation.usage)
        terminal = (await stop(chat, start))[1]
    used = {"input_tokens": 9, "output_tokens": 600 + 7 * (later != "stopped"), "estimated": True}
    assert terminal["usage"] == used


async def test_thinking_costs_no_more_than_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    clock = itertools.chain([100.0], itertools.repeat(110.0))
    monkeypatch.setattr("wsserver.models.anthropic.reply.monotonic", lambda: next(clock))
    begin = event("content_block_start", index=0, content_block={"type": "thinking"})
    upstream.play(stream(begin, escaped("hm", "thinking"), Hang()))
    start = await chat.prompt(max_tokens=300)
    await chat.next("thinking")
    assert (await stop(chat, start))[1]["usage"]["output_tokens"] == 300


async def test_the_apis_own_count_of_thinking_wins(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    clock = itertools.chain([100.0], itertools.repeat(110.0))
    monkeypatch.setattr("wsserver.models.anthropic.reply.monotonic", lambda: next(clock))
    upstream.play(reply("Yes", thinking="hm", output_tokens=77))
    done = (await chat.text((await chat.prompt())["id"]))[1]
    assert done["usage"] == {"input_tokens": 25, "output_tokens": 77}


async def test_a_client_that_is_gone_costs_nothing_after_the_grace_time(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    upstream.play(reply("some ", Hang()))
    async with claude(monkeypatch, upstream.url, grace=0) as server:
        async with client(server) as chat:
            await chat.prompt()
            await chat.next("token")
        assert await upstream.requests[0].closed() == "closed"


async def test_hundreds_of_stops_leave_nothing_behind(
    server: wsserver.Server, chat: Client, upstream: Upstream
) -> None:
    upstream.default = reply("some ", Hang())
    for _ in range(200):
        start = await chat.prompt()
        await stop(chat, start)
    for received in upstream.requests:
        assert await received.closed() == "closed"
    assert upstream.open == 0
    assert server._hub.live == 0


# Faults before the first token


@pytest.mark.parametrize(
    ("status", "kind", "error_code", "code", "attempts"),
    [
        (400, "invalid_request_error", None, "bad_request", 1),
        (401, "authentication_error", None, "credentials", 1),
        (402, "billing_error", None, "spend_limit", 1),
        (403, "permission_error", None, "credentials", 1),
        (403, "billing_error", None, "spend_limit", 1),
        (404, "not_found_error", None, "model_not_found", 1),
        (408, "timeout_error", None, "timeout", 3),
        (413, "request_too_large", None, "request_too_large", 1),
        (418, "teapot_error", None, "bad_request", 1),
        (429, "rate_limit_error", None, "rate_limited", 3),
        (429, "rate_limit_error", "ramp_limit_exceeded", "rate_limited", 3),
        (429, "rate_limit_error", "enforced_spend_limit_reached", "spend_limit", 1),
        (429, "rate_limit_error", "contract_spend_limit_reached", "spend_limit", 1),
        (500, "api_error", None, "upstream_error", 3),
        (502, "api_error", None, "upstream_error", 3),
        (503, "api_error", None, "overloaded", 3),
        (504, "timeout_error", None, "timeout", 3),
        (529, "overloaded_error", None, "overloaded", 3),
    ],
)
async def test_a_refused_request_is_one_error_with_a_stable_code(
    chat: Client,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
    status: int,
    kind: str,
    error_code: str | None,
    code: str,
    attempts: int,
) -> None:
    refused = error(status, kind, "planted-secret", error_code=error_code, headers=AT_ONCE)
    upstream.default = Script((refused,))
    caplog.set_level("INFO", "wsserver")
    await chat.prompt()
    failed = await chat.next("error")
    assert failed["code"] == code
    assert failed["retryable"] is wsserver.Code[code.upper()].retryable
    assert len(upstream.requests) == attempts
    assert "planted-secret" not in str(chat.frames)
    (line,) = [r.getMessage() for r in caplog.records if failed["ref"] in r.getMessage()]
    assert kind in line
    assert "planted-secret" not in caplog.text
    upstream.default = reply("Hello world")
    await goes_on(chat)


async def test_a_failed_attempt_is_made_again(chat: Client, upstream: Upstream) -> None:
    upstream.play(
        error(429, "rate_limit_error", headers={"retry-after-ms": "1"}),
        error(529, "overloaded_error", headers=AT_ONCE),
        reply("at last"),
    )
    start = await chat.prompt()
    assert (await chat.text(start["id"]))[0] == "at last"
    assert len(upstream.requests) == 3


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3600", 3600), ("Wed, 21 Oct 2099 07:28:00 GMT", None)],
    ids=["seconds", "a date"],
)
async def test_a_retry_after_beyond_the_budget_is_passed_on_and_not_slept_through(
    chat: Client, upstream: Upstream, value: str, seconds: float | None
) -> None:
    upstream.play(error(429, "rate_limit_error", headers={"retry-after": value}))
    await chat.prompt()
    failed = await chat.next("error")
    assert failed["retry_after"] == (seconds or failed["retry_after"])
    assert failed["retry_after"] >= 3600
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
async def test_a_retry_after_that_is_none_is_ignored(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, value: str
) -> None:
    upstream.default = Script((error(429, "rate_limit_error", headers={"retry-after": value}),))
    async with claude(monkeypatch, upstream.url, retries=0) as server, client(server) as chat:
        await chat.prompt()
        assert "retry_after" not in await chat.next("error")


async def test_the_api_may_say_not_to_try_again(chat: Client, upstream: Upstream) -> None:
    headers = {"x-should-retry": "false"}
    upstream.default = Script((error(500, "api_error", headers=headers),))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "upstream_error"
    assert len(upstream.requests) == 1


async def test_without_a_retry_after_it_pauses_at_random(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    monkeypatch.setattr("wsserver.models.anthropic.model.random.uniform", uniform)
    upstream.default = Script((error(500, "api_error"),))
    await chat.prompt()
    await chat.next("error")
    assert bounds[:2] == [(0, 0.5), (0, 1.0)]


async def test_a_refused_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused_url() as url:
        async with claude(monkeypatch, url, retries=0) as server, client(server) as chat:
            await chat.prompt()
            failed = await chat.next("error")
    assert (failed["code"], failed["retryable"]) == ("unreachable", True)


async def test_a_certificate_that_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Upstream(tls=True) as upstream, claude(monkeypatch, upstream.url) as server:
        async with client(server) as chat:
            await chat.prompt()
            failed = await chat.next("error")
    assert (failed["code"], failed["retryable"]) == ("untrusted", False)
    assert upstream.requests == []


async def test_a_connection_that_is_cut_before_the_headers(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    upstream.default = Script((Cut(),))
    async with claude(monkeypatch, upstream.url, retries=0) as server, client(server) as chat:
        await chat.prompt()
        assert (await chat.next("error"))["code"] == "unreachable"


@pytest.mark.parametrize("script", [Hang(), stream(Hang()), stream(Hang(ping_every=0.01))])
async def test_an_api_that_never_answers(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, script: Script | Step
) -> None:
    # The first one to have all loaded, so that the second is under way before its time is up.
    upstream.play(reply("ready"), script)
    async with claude(monkeypatch, upstream.url, retries=0, silence_timeout=1) as server:
        async with client(server) as chat:
            await chat.prompt()
            await chat.next("done")
            await chat.prompt()
            failed = await chat.next("error")
            assert (failed["code"], failed["retryable"]) == ("timeout", True)
        assert await upstream.requests[1].closed() == "closed"


@pytest.mark.parametrize(
    "fault",
    [
        stream(END),
        stream(event("ping"), END),
        reply(END),
        stream(event("message_stop"), END),
        reply(Cut()),
    ],
    ids=["nothing", "a ping", "a start", "an end of nothing", "cut"],
)
async def test_an_end_before_the_first_text_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream, fault: Script
) -> None:
    monkeypatch.setattr("wsserver.models.anthropic.model.random.uniform", lambda low, high: 0.0)
    upstream.play(fault, reply("at last"))
    start = await chat.prompt()
    assert (await chat.text(start["id"]))[0] == "at last"
    assert len(upstream.requests) == 2


async def test_usage_of_a_failed_attempt_is_added_to_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.anthropic.model.random.uniform", lambda low, high: 0.0)
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


async def test_usage_of_a_failed_attempt_survives_a_next_one_that_tells_none(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.anthropic.model.random.uniform", lambda low, high: 0.0)
    refused = error(400, "invalid_request_error")
    upstream.play(reply(Cut(), input_tokens=100), refused)
    await chat.prompt()
    failed = await chat.next("error")
    assert (failed["code"], failed["usage"]["input_tokens"]) == ("bad_request", 100)


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        ([r"Hi \ud83d\ude00!"], "Hi 😀!"),
        ([r"Hi \ud83d", r"\ude00!"], "Hi 😀!"),
        ([r"Hi \uD83D", "", r"\uDE00!"], "Hi 😀!"),
        ([r"Hi \ud83d", "!"], "Hi \ufffd!"),
        ([r"Hi \ud83d there"], "Hi \ufffd there"),
        ([r"Hi \ude00"], "Hi \ufffd"),
        ([r"Hi \ud83d"], "Hi \ufffd"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "thinking"])
@pytest.mark.parametrize("chop", [0, 7], ids=["one read", "many reads"])
async def test_halves_of_a_surrogate_pair_are_joined(
    chat: Client, upstream: Upstream, deltas: list[str], said: str, kind: str, chop: int
) -> None:
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 1})
    parts = [escaped(text, kind) for text in deltas]
    upstream.play(stream(*parts, end, event("message_stop"), chop=chop))
    start = await chat.prompt()
    _, done = await chat.text(start["id"])
    assert chat.said(start["id"], "token" if kind == "text" else "thinking") == said
    assert done["reason"] == "end_turn"


# Faults mid-stream


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (error_event("overloaded_error"), "overloaded"),
        (error_event("api_error"), "upstream_error"),
        (error_event("rate_limit_error"), "rate_limited"),
        (error_event("invalid_request_error"), "bad_request"),
        (error_event("an_error_of_tomorrow"), "upstream_error"),
        (Cut(), "incomplete"),
        (Cut(reset=True), "incomplete"),
        (END, "incomplete"),
        (GARBAGE, "malformed"),
        (MALFORMED_JSON, "malformed"),
        (INVALID_UTF8, "malformed"),
        (b"data: []\n\n", "malformed"),
        (b"data: 5\n\n", "malformed"),
        (b'data: {"type": "content_block_delta"}\n\n', "malformed"),
        (
            b'data: {"type": "content_block_delta", "delta": {"type": "text_delta"}}\n\n',
            "malformed",
        ),
        (
            b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":5}}\n\n',
            "malformed",
        ),
        (b"data: " + b"x" * 1_100_000, "malformed"),
        (event("message_stop"), "incomplete"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:50],
)
async def test_a_fault_mid_stream_is_one_error_and_the_text_before_it_is_kept(
    chat: Client, upstream: Upstream, fault: bytes | Step, code: str
) -> None:
    upstream.play(reply("half an ", "answer", fault, " more"))
    start = await chat.prompt()
    text, failed = await chat.text(start["id"])
    assert (text, failed["code"]) == ("half an answer", code)
    assert failed["retryable"] is wsserver.Code[code.upper()].retryable
    assert failed["seq"] >= 1
    assert failed["usage"]["estimated"] is True
    assert "No luck" not in str(chat.frames)
    assert len(upstream.requests) == 1, "never again once something was said"
    await goes_on(chat)
    sent = (await upstream.request(1)).body["messages"]
    assert sent[1] == {"role": "assistant", "content": "half an answer"}


async def test_a_stall_after_some_tokens(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    upstream.play(reply("half", Hang(ping_every=0.01)))
    async with claude(monkeypatch, upstream.url, silence_timeout=1) as server:
        async with client(server) as chat:
            start = await chat.prompt()
            text, failed = await chat.text(start["id"])
            assert (text, failed["code"]) == ("half", "timeout")
        assert await upstream.requests[0].closed() == "closed"


async def test_an_error_event_before_the_first_word_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, chat: Client, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.anthropic.model.random.uniform", lambda low, high: 0.0)
    upstream.play(reply(error_event("overloaded_error")), reply("at last"))
    start = await chat.prompt()
    assert (await chat.text(start["id"]))[0] == "at last"
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
async def test_an_answer_that_is_no_stream(chat: Client, upstream: Upstream, kind: str) -> None:
    upstream.play(Answer(200, kind, "<html>hello</html>"))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "malformed"


async def test_the_end_of_a_reply_does_not_wait_for_the_end_of_the_body(
    chat: Client, upstream: Upstream
) -> None:
    whole = reply("whole")
    upstream.play(Script((*whole.steps, Gate("go"))))
    start = await chat.prompt()
    text, done = await chat.text(start["id"])
    assert (text, done["reason"]) == ("whole", "end_turn")
    assert upstream.open == 1, "the body has no end yet"
    upstream.gates["go"].set()
    assert await upstream.requests[0].closed() == "finished"
    await chat.text((await chat.prompt())["id"])
    assert upstream.requests[0].peer == upstream.requests[1].peer
