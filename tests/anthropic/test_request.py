"""Requests to the API: body, address and connection."""

import asyncio
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.support.claude import claude
from tests.support.client import Client, client
from tests.support.puppet import until
from tests.support.upstream import Answer, Hang, Script, Upstream, error, refused_url, reply
from wsserver.content import Message
from wsserver.models.anthropic import Anthropic
from wsserver.models.base import Output, Request
from wsserver.settings import Settings

MODEL = "claude-sonnet-4-6"


async def test_request_body_follows_api_reference(
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
async def test_thinking_setting_sets_thinking_parameter(
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
async def test_temperature_is_omitted_with_thinking(
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
async def test_temperature_is_omitted_after_model_refuses_it(
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


async def test_temperature_above_api_range_is_error(chat: Client, upstream: Upstream) -> None:
    message = "temperature: Input should be less than or equal to 1"
    upstream.play(error(400, "invalid_request_error", message))
    await chat.prompt(temperature=1.5)
    failed = await chat.next("error")
    assert failed["code"] == "bad_request"
    assert "temperature" in failed["message"]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("location", ["{}/v1/messages", "/v1/messages?again", "?again"])
async def test_redirect_to_same_origin_is_followed_with_same_body(
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
async def test_redirect_to_other_origin_is_refused_and_gets_no_prompt(
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


async def test_endless_redirects_are_refused(chat: Client, upstream: Upstream) -> None:
    to = {"location": f"{upstream.url}/v1/messages"}
    upstream.default = Script((Answer(307, "text/plain", "There", to),))
    await chat.prompt()
    assert (await chat.next("error"))["code"] == "redirected"
    assert len(upstream.requests) < 30


@pytest.mark.parametrize(
    ("name", "value"),
    [("HTTP_PROXY", "http://{}"), ("HTTP_PROXY", "user:word@{}"), ("ALL_PROXY", "http://{}")],
)
async def test_prompt_uses_proxy_of_environment(
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
async def test_no_proxy_exempts_address(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, exempt: str
) -> None:
    with refused_url() as url:
        monkeypatch.setenv("HTTP_PROXY", url)
        monkeypatch.setenv("NO_PROXY", exempt)
        async with claude(monkeypatch, upstream.url) as server, client(server) as chat:
            assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"


async def test_netrc_passwords_are_not_sent(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with claude(monkeypatch, upstream.url) as server, client(server) as chat:
        assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"
    assert "sk-secret" in str((await upstream.request()).headers)


async def test_replies_in_sequence_share_one_connection(chat: Client, upstream: Upstream) -> None:
    for _ in range(3):
        start = await chat.prompt()
        await chat.text(start["id"])
    assert len({received.peer for received in upstream.requests}) == 1


async def test_server_close_closes_api_connections(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    async with claude(monkeypatch, upstream.url) as server, client(server) as chat:
        await chat.prompt()
        await chat.next("done")
        assert len(upstream.connections) == 1
    await until(lambda: not upstream.connections)


async def test_request_body_is_freed_while_reply_streams(upstream: Upstream) -> None:
    upstream.play(reply("ready"), reply("some ", Hang()))
    said = asyncio.Event()

    def take(output: Output) -> None:
        if output == "some ":
            said.set()

    def request(text: str) -> Request:
        return Request((Message("user", text),), MODEL, 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTHROPIC_BASE_URL", upstream.url)
        model = Anthropic(MODEL, Settings())
        await model.push(request("Hello"), take)
        asked = request("word " * 200_000)
        tracemalloc.start()
        reading = asyncio.create_task(model.push(asked, take))
        await said.wait()
        ours = tracemalloc.Filter(inclusive=True, filename_pattern="*/wsserver/*")
        kept = tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename")
        tracemalloc.stop()
        reading.cancel()
        await asyncio.wait({reading})
        await model.aclose()
    assert sum(each.size for each in kept) < 100_000
