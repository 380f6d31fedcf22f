"""The fake Messages API, tested with the SDK."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import httpx2
import pytest
from anthropic import (
    AnthropicError,
    APIConnectionError,
    APIStatusError,
    AsyncAnthropic,
    DefaultAsyncHttpxClient,
    OverloadedError,
)
from anthropic.types import Message, MessageParam

from tests.support.upstream import (
    END,
    GARBAGE,
    INVALID_UTF8,
    MALFORMED_JSON,
    UNKNOWN_EVENT,
    Answer,
    Connection,
    Cut,
    Gate,
    Hang,
    Script,
    Step,
    ToolUse,
    Upstream,
    error,
    error_event,
    refused_url,
    reply,
    stream,
)

BOUND = 20.0
MODEL = "claude-of-the-tests"
HINT = {"retry-after-ms": "5", "x-should-retry": "false"}
HELLO: list[MessageParam] = [{"role": "user", "content": "Hello"}]

FAULTS: dict[str, Script | Step] = {
    "cut": reply("one ", Cut()),
    "reset": reply("one ", Cut(reset=True)),
    "cut before the headers": Cut(),
    "reset before the headers": Cut(reset=True),
    "malformed json": reply("one ", MALFORMED_JSON, "two"),
    "invalid utf-8": reply("one ", INVALID_UTF8, "two"),
    "html": Answer(200, "text/html", "<h1>Welcome</h1>", {"connection": "close"}),
    "html error": Answer(502, "text/html", "<h1>Bad gateway</h1>"),
    "no events": stream(END),
    "garbage": stream(GARBAGE, b"data: ", *[b"x" * 65536] * 10),
}

LASTING: dict[str, tuple[Script | Step, int]] = {
    "no headers": (Hang(), 0),
    "headers only": (stream(Hang()), 0),
    "hang": (reply("one ", Hang()), 4),
    "pings": (reply("one ", Hang(ping_every=0.001)), 6),
    "gate": (reply("one ", Gate("never")), 4),
    "gate before the headers": (reply("one ").after(Gate("never")), 0),
    "slow": (reply(["one ", "two ", "three "], interval=100), 4),
    "fast": (reply(["x" * 4000] * 10_000), 100),
}


def client_of(url: str) -> AsyncAnthropic:
    http = DefaultAsyncHttpxClient()
    return AsyncAnthropic(api_key="k", base_url=url, max_retries=0, http_client=http)


async def ask(client: AsyncAnthropic) -> Message:
    asking = client.messages.stream(max_tokens=9, model=MODEL, messages=HELLO)
    async with asyncio.timeout(BOUND), asking as answer:
        return await answer.get_final_message()


async def texts(client: AsyncAnthropic) -> AsyncIterator[str]:
    asking = client.messages.create(max_tokens=9, model=MODEL, messages=HELLO, stream=True)
    async with await asking as events:
        async for event in events:
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                yield event.delta.text


@pytest.mark.asyncio
async def test_reply_is_read_as_whole_message() -> None:
    tool = ToolUse("look_up", {"city": "Köln"})
    async with Upstream() as upstream, client_of(upstream.url) as client:
        upstream.play(
            reply(
                "Schöne Grüße ",
                ["an ", "alle"],
                tool,
                thinking="Greet them",
                stop_reason="tool_use",
                input_tokens=12,
                output_tokens=34,
                cache_read_input_tokens=5,
            )
        )
        message = await ask(client)
        received = await upstream.request(0)
    thought, text, use = message.content
    assert thought.type == "thinking"
    assert thought.thinking == "Greet them"
    assert thought.signature
    assert text.type == "text"
    assert text.text == "Schöne Grüße an alle"
    assert use.type == "tool_use"
    assert (use.name, use.input) == (tool.name, tool.input)
    assert (message.model, message.stop_reason) == (MODEL, "tool_use")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (12, 34)
    assert message.usage.cache_read_input_tokens == 5
    assert (received.method, received.path) == ("POST", "/v1/messages")
    assert received.headers["content-type"] == "application/json"
    assert received.body["stream"] is True
    assert await received.closed() == "finished"
    assert received.closed_at is None
    assert upstream.open == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("chop", [0, 1, 7])
@pytest.mark.parametrize("crlf", [False, True])
@pytest.mark.parametrize("interval", [0, 0.001])
async def test_message_split_in_any_way_is_read_whole(
    chop: int, interval: float, crlf: bool
) -> None:
    parts = "Grüße \u2028🙂 ", UNKNOWN_EVENT, "an alle"
    async with Upstream() as upstream, client_of(upstream.url) as client:
        upstream.play(reply(*parts, interval=interval, chop=chop, crlf=crlf))
        assert "".join([text async for text in texts(client)]) == "Grüße \u2028🙂 an alle"
        assert upstream.requests[0].sent == 11


@pytest.mark.asyncio
async def test_connection_is_kept_after_reply_and_after_error() -> None:
    async with Upstream() as upstream, client_of(upstream.url) as client:
        upstream.play(reply("one"), error(400, "invalid_request_error"))
        await ask(client)
        with pytest.raises(APIStatusError):
            await ask(client)
        await ask(client)
        assert len({received.peer for received in upstream.requests}) == 1


@pytest.mark.asyncio
async def test_errors_have_type_and_headers() -> None:
    async with Upstream() as upstream, client_of(upstream.url) as client:
        upstream.play(
            error(529, "overloaded_error", "Busy", error_code="busy", headers=HINT),
            reply("one ", error_event("api_error"), "two"),
        )
        with pytest.raises(OverloadedError) as refused:
            await ask(client)
        with pytest.raises(APIStatusError) as broken:
            await ask(client)
    assert (refused.value.api_message, refused.value.error_code) == ("Busy", "busy")
    assert refused.value.request_id == "req_000000"
    assert refused.value.response.headers.items() >= HINT.items()
    assert broken.value.type == "api_error"


@pytest.mark.asyncio
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_fault_fails_only_its_request(fault: Script | Step) -> None:
    async with Upstream() as upstream, client_of(upstream.url) as client:
        upstream.play(fault)
        with pytest.raises((AnthropicError, httpx2.HTTPError, ValueError, AssertionError)):
            await ask(client)
        assert await (await upstream.request(0)).closed() in {"finished", "closed"}
        assert (await ask(client)).stop_reason == "end_turn"


@pytest.mark.asyncio
async def test_script_may_end_body_early() -> None:
    async with Upstream() as upstream, client_of(upstream.url) as client:
        upstream.play(reply("one two ", END, "three"))
        assert [text async for text in texts(client)] == ["one ", "two "]
        assert await (await upstream.request(0)).closed() == "finished"


@pytest.mark.asyncio
@pytest.mark.parametrize(("script", "sent"), LASTING.values(), ids=LASTING)
async def test_disconnect_of_client_is_recorded(script: Script | Step, sent: int) -> None:
    async with Upstream() as upstream, client_of(upstream.url) as client, asyncio.timeout(BOUND):
        upstream.play(script)
        asking = asyncio.create_task(ask(client))
        received = await upstream.request(0)
        while received.sent < sent:  # noqa: ASYNC110 - each step is the client's doing
            await asyncio.sleep(0)
        assert upstream.open == 1
        asking.cancel()
        assert await received.closed() == "closed"
        assert [received.closed_at] == upstream.closes
        assert upstream.open == 0


@pytest.mark.asyncio
async def test_gates_hold_stream_until_opened() -> None:
    async with Upstream() as upstream, client_of(upstream.url) as client, asyncio.timeout(BOUND):
        upstream.play(reply("one ", Gate("second"), "two").after(Gate("first")))
        words = texts(client)
        word = asyncio.ensure_future(anext(words))
        assert (await upstream.request(0)).sent == 0
        upstream.gates["first"].set()
        assert await word == "one "
        assert upstream.open == 1
        upstream.gates["second"].set()
        assert [word async for word in words] == ["two"]


@pytest.mark.asyncio
async def test_slow_reader_pauses_script() -> None:
    pieces = ["x" * 10_000] * 3_000
    async with (
        Upstream() as upstream,
        client_of(upstream.url) as client,
        asyncio.timeout(BOUND),
    ):
        upstream.play(reply(pieces))
        words = texts(client)
        await anext(words)
        received, before = upstream.requests[0], -1
        while received.sent > before:
            before = received.sent
            for _ in range(1000):
                await asyncio.sleep(0)
        assert received.sent < len(pieces)
        assert len([word async for word in words]) == len(pieces) - 1
        assert await received.closed() == "finished"


@pytest.mark.asyncio
async def test_stop_ends_hanging_requests() -> None:
    async with client_of("http://127.0.0.1") as client:
        async with Upstream() as upstream:
            client.base_url = httpx2.URL(upstream.url)
            upstream.play(*(script for script, _ in LASTING.values()))
            asking = [asyncio.create_task(ask(client)) for _ in LASTING]
            received = await upstream.request(len(LASTING) - 1)
        assert await received.closed() == "stopped"
        assert (upstream.open, upstream.closes) == (0, [])
        failures = await asyncio.gather(*asking, return_exceptions=True)
        expected = APIConnectionError | httpx2.HTTPError
        assert all(isinstance(failure, expected) for failure in failures)


@pytest.mark.asyncio
async def test_request_timeout_names_request() -> None:
    async with Upstream() as upstream:
        upstream.timeout = 0
        with pytest.raises(AssertionError, match="request 0"):
            await upstream.request(0)
        upstream.timeout = BOUND


@pytest.mark.asyncio
async def test_exception_in_script_is_raised() -> None:
    class Faulty(Step):
        async def play(self, wire: Connection) -> None:
            raise RuntimeError("no such step")

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="no such step")):
        async with Upstream() as upstream, client_of(upstream.url) as client:
            upstream.play(Faulty())
            with pytest.raises(APIConnectionError):
                await ask(client)


@pytest.mark.asyncio
async def test_refused_url_refuses_connections() -> None:
    with refused_url() as url:
        async with client_of(url) as client:
            with pytest.raises(APIConnectionError):
                await ask(client)


@pytest.mark.asyncio
async def test_certificate_is_untrusted_by_default() -> None:
    async with Upstream(tls=True) as upstream, client_of(upstream.url) as client:
        with pytest.raises(APIConnectionError):
            await ask(client)
        assert upstream.requests == []


@pytest.mark.asyncio
async def test_tls_upstream_stops_during_handshake() -> None:
    http = DefaultAsyncHttpxClient(verify=False)
    async with Upstream(tls=True) as upstream:
        async with AsyncAnthropic(api_key="k", base_url=upstream.url, http_client=http) as client:
            assert (await ask(client)).stop_reason == "end_turn"
            assert await upstream.requests[0].closed() == "finished"
        host, port = upstream.url.removeprefix("https://").split(":")
        reader, writer = await asyncio.open_connection(host, port)
    async with asyncio.timeout(BOUND):
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


@pytest.mark.asyncio
async def test_upstream_process_serves_statistics() -> None:
    command = ["-m", "tests.support.upstream", "--pieces", "3", "--interval", "0.001"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--text", "token ", stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(BOUND), DefaultAsyncHttpxClient() as http:
        url = (await process.stdout.readline()).decode().strip()
        async with client_of(url) as client:
            assert [text async for text in texts(client)] == ["token "] * 3
        stats = (await http.get(f"{url}/stats")).json()
        assert stats == {"open": 0, "requests": 1, "closed_early": 0, "closes": []}
        process.stdin.close()
        assert await process.wait() == 0
