"""A stop closes the request to the API in every state of the API."""

import asyncio
from pathlib import Path

import pytest

import wsserver
from tests.support.certificate import certificate
from tests.support.claude import claude, goes_on, stop
from tests.support.client import Client, client
from tests.support.puppet import until
from tests.support.raw import Raw
from tests.support.upstream import Gate, Hang, Script, Step, Upstream, error, event, reply, stream
from tests.test_slow_reader import sluggard


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
async def test_stop_closes_api_request(
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


async def test_stop_between_attempts_ends_retries(chat: Client, upstream: Upstream) -> None:
    upstream.play(error(429, "rate_limit_error", headers={"retry-after": "10"}))
    start = await chat.prompt()
    await (await upstream.request()).closed()
    await chat.quiet()
    await stop(chat, start)
    assert len(upstream.requests) == 1
    await goes_on(chat)


async def test_stop_of_one_reply_leaves_other_running(chat: Client, upstream: Upstream) -> None:
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


async def test_stop_with_full_send_buffer_closes_api_request(
    server: wsserver.Server, upstream: Upstream
) -> None:
    upstream.play(reply(["0123456789abcde "] * 100_000, interval=0.0001))
    async with sluggard(server) as slow:
        await slow.send('{"prompt": "Talk", "id": "the-slow-one-0001"}')
        received = await upstream.request()
        (transport,) = server.app.connections
        await until(lambda: not transport.writable)
        await slow.send('{"type": "stop"}')
        assert await received.closed() == "closed"
        frames = [Client.parse(text) for text in await slow.until('"done"')]
        assert frames[-1]["by"] == "client"
        await slow.send('{"prompt": "Again", "id": "the-slow-one-0002"}')
        texts = await slow.until('"end_turn"')
        assert "the-slow-one-0002" in texts[-1]


async def test_reply_of_lost_client_is_stopped_after_grace_time(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    upstream.play(reply("some ", Hang()))
    async with claude(monkeypatch, upstream.url, grace=0) as server:
        async with client(server) as chat:
            await chat.prompt()
            await chat.next("token")
        assert await upstream.requests[0].closed() == "closed"


async def test_hundreds_of_stops_leave_no_open_request(
    server: wsserver.Server, chat: Client, upstream: Upstream
) -> None:
    upstream.default = reply("some ", Hang())
    for _ in range(200):
        start = await chat.prompt()
        await stop(chat, start)
    for received in upstream.requests:
        assert await received.closed() == "closed"
    assert upstream.open == 0
    assert server.app.hub.live == 0


async def test_stop_over_tls_does_not_wait_for_close_notify(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on in both directions until a moment, and then only read them."""
        answers, requests = await asyncio.open_connection("127.0.0.1", port)

        async def answer() -> None:
            while data := await answers.read(65536):
                writer.write(data)

        answering = asyncio.create_task(answer())
        while data := await reader.read(65536):
            if not silent.is_set():
                requests.write(data)
        ended.set()
        answering.cancel()
        await asyncio.wait({answering})
        requests.close()

    silent, ended = asyncio.Event(), asyncio.Event()
    (tmp_path / "certificate.pem").write_text(certificate())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    async with Upstream(tls=True) as upstream, Raw(pass_on) as way:
        port = int(upstream.url.rpartition(":")[2])
        upstream.play(reply("some words", Hang()))
        async with claude(monkeypatch, f"https://127.0.0.1:{way.port}") as server:
            async with client(server) as chat:
                start = await chat.prompt()
                await chat.next("token")
                silent.set()
                await stop(chat, start)
                assert await asyncio.wait_for(ended.wait(), 1)
