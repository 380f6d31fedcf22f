"""Streamed responses: transfer coding, slow readers and disconnects."""

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import pytest
import uvloop

from tests.listening.answering import Browser, Recorder, listening, name_of
from tests.support.puppet import BOUND, until
from wsserver.admission import Visitor
from wsserver.responses import Answer, BodyWriter, Request, Stream, respond
from wsserver.sockets.listener import Listener
from wsserver.sockets.tcp import READ_SIZE

GET = b"GET /a HTTP/1.1\r\nHost: localhost\r\n"
KEEP = b"Connection: keep-alive\r\n"
EVENTS = {"Content-Type": "text/event-stream"}

both = pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])


class Streams:
    """Answers each request with a stream that the test controls."""

    def __init__(self) -> None:
        self._made: asyncio.Queue[Recorder] = asyncio.Queue()

    async def __call__(self, request: Request, _: Visitor) -> Answer:
        recorder = Recorder()
        self._made.put_nowait(recorder)
        return Stream(HTTPStatus.OK, EVENTS, recorder).to(request)

    async def next(self) -> Recorder:
        recorder = await self._made.get()
        await recorder.opened.wait()
        return recorder


@both
async def test_stream_is_written_in_chunks(tls: bool) -> None:
    streams = Streams()
    async with listening(streams, tls=tls) as listener, Browser.open(listener) as browser:
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        status, headers = await browser.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert (headers["transfer-encoding"], headers["connection"]) == ("chunked", "close")
        assert "content-length" not in headers
        for text in (b"data: one\n\n", b"data: two\n\n" * 1000):
            recorder.body.write(text)
            assert await browser.chunk() == text
        recorder.body.write(b"")
        recorder.body.end()
        recorder.body.write(b"too late")
        recorder.body.end()
        assert await browser.chunk() == b""
        assert await browser.ended()
        browser.writer.close()
        await recorder.gone.wait()


@both
async def test_http_1_0_stream_ends_with_connection(tls: bool) -> None:
    streams = Streams()
    async with listening(streams, tls=tls) as listener, Browser.open(listener) as browser:
        browser.send(b"GET /a HTTP/1.0\r\nHost: localhost\r\n", KEEP, b"\r\n")
        recorder = await streams.next()
        _, headers = await browser.head()
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        recorder.body.write(b"one")
        recorder.body.write(b"two")
        recorder.body.end()
        assert await browser.reader.read() == b"onetwo"


async def test_head_request_gets_no_stream() -> None:
    recorder = Recorder()

    async def answer(request: Request, _: Visitor) -> Answer:
        return Stream(HTTPStatus.OK, EVENTS, recorder).to(request)

    async with listening(answer) as listener, Browser.open(listener) as browser:
        browser.send(b"HEAD /a HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, headers = await browser.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert await browser.ended()
        assert (recorder.opened.is_set(), recorder.gone.is_set()) == (False, True)


@both
async def test_connection_is_kept_after_stream(tls: bool) -> None:
    streams = Streams()
    async with listening(streams, tls=tls) as listener, Browser.open(listener) as browser:
        for text in (b"one", b"two"):
            browser.send(GET, KEEP, b"\r\n")
            recorder = await streams.next()
            recorder.body.write(text)
            recorder.body.end()
            assert recorder.gone.is_set()
            _, headers = await browser.head()
            assert headers["connection"] == "keep-alive"
            assert await browser.chunks() == text
        assert len(listener.connections) == 1


async def test_pipelined_request_closes_connection_after_stream() -> None:
    streams = Streams()
    async with listening(streams) as listener, Browser.open(listener) as browser:
        browser.send(GET, KEEP, b"\r\n")
        recorder = await streams.next()
        await browser.head()
        browser.send(b"next")
        await until(lambda: listener.buffer[:4].tobytes() == b"next")
        recorder.body.end()
        assert await browser.chunk() == b""
        assert await browser.ended()


@both
@pytest.mark.parametrize("how", ["close", "abort", "half-close"])
async def test_producer_learns_of_disconnect_at_once(tls: bool, how: str) -> None:
    streams = Streams()
    async with listening(streams, tls=tls) as listener, Browser.open(listener) as browser:
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        recorder.body.write(b"one")
        await browser.head()
        if how == "close" or tls:
            browser.writer.close()
        elif how == "abort":
            browser.writer.transport.abort()
        else:
            browser.writer.write_eof()
        async with asyncio.timeout(BOUND):
            await recorder.gone.wait()
        recorder.body.write(b"nobody reads this")
        recorder.body.end()
        assert not recorder.body.writable


async def test_disconnect_before_stream_opens_ends_producer() -> None:
    asked, go, recorder = asyncio.Event(), asyncio.Event(), Recorder()

    async def late(_: Request, __: Visitor) -> Answer:
        asked.set()
        await go.wait()
        return Stream(HTTPStatus.OK, EVENTS, recorder)

    async with listening(late) as listener:
        async with Browser.open(listener) as browser:
            browser.send(GET + b"\r\n")
            await asked.wait()
        await until(lambda: not listener.connections)
        go.set()
        await recorder.gone.wait()
        assert not recorder.opened.is_set()


async def test_slow_reader_pauses_and_wakes_producer() -> None:
    streams = Streams()
    async with listening(streams) as listener, Browser.open(listener) as browser:
        browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        written = 0
        while recorder.body.writable:
            recorder.body.write(b"x" * 10_000)
            written += 10_000
        assert listener.memory.used > 0
        browser.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await recorder.woken.wait()
        recorder.body.end()
        status, body = await browser.response()
        assert (status, len(body)) == (200, written)
        await until(lambda: listener.memory.used == 0)


def reason(listener: Listener) -> str:
    return listener.metrics.exposition().decode()


async def test_client_not_reading_is_aborted_after_send_timeout() -> None:
    streams = Streams()
    async with (
        listening(streams, send_timeout=0.1) as listener,
        Browser.open(listener) as browser,
    ):
        browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        while recorder.body.writable:
            recorder.body.write(b"x" * 10_000)
        await recorder.gone.wait()
        assert 'why="does not read"} 1.0' in reason(listener)


async def test_client_not_reading_earlier_response_is_aborted_after_send_timeout() -> None:
    streams = Streams()

    async def answer(request: Request, visitor: Visitor) -> Answer:
        if request.path == "/stream":
            return await streams(request, visitor)
        return respond(HTTPStatus.OK, b"x" * 3000)

    async with (
        listening(answer, send_timeout=0.1) as listener,
        Browser.open(listener) as browser,
    ):
        browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (connection,) = listener.connections
        while connection.waiting <= listener.settings.write_buffer:
            browser.send(GET, KEEP, b"\r\n")
            await until(partial(listener.connections.isdisjoint, {connection}))
            (connection,) = listener.connections
        browser.send(GET.replace(b"/a", b"/stream"), b"\r\n")
        recorder = await streams.next()
        assert not recorder.body.writable
        await recorder.gone.wait()
        assert 'why="does not read"} 1.0' in reason(listener)


async def test_slow_reader_gets_rest_of_body_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsserver.sockets.streaming.LINGER", 0.3)
    streams = Streams()
    async with (
        listening(streams, max_unsent=2**24) as listener,
        Browser.open(listener) as browser,
    ):
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        recorder.body.write(b"x" * 10_000_000)
        recorder.body.end()
        await browser.head()
        size = int(await browser.reader.readuntil(b"\r\n"), 16)
        while size:
            size -= len(await browser.reader.readexactly(min(size, 100_000)))
            await asyncio.sleep(0.01)
        assert await browser.reader.read() == b"\r\n0\r\n\r\n"


@both
@pytest.mark.parametrize("turns", range(4))
async def test_stream_ends_while_client_sends(tls: bool, turns: int) -> None:
    streams = Streams()
    async with listening(streams, tls=tls) as listener, Browser.open(listener) as browser:
        browser.send(GET, b"Content-Length: 60000\r\n\r\n", b"x" * 60_000)
        recorder = await streams.next()
        for _ in range(turns):
            await asyncio.sleep(0)
        recorder.body.end()
        await recorder.gone.wait()


async def test_client_over_max_unsent_is_aborted_at_once() -> None:
    streams = Streams()
    async with (
        listening(streams, max_unsent=2**20) as listener,
        Browser.open(listener) as browser,
    ):
        browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        for _ in range(2000):
            recorder.body.write(b"x" * 10_000)
        await recorder.gone.wait()
        assert 'why="too much unsent"} 1.0' in reason(listener)


async def test_client_sending_endlessly_is_aborted() -> None:
    streams = Streams()
    async with listening(streams) as listener, Browser.open(listener) as browser:
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        browser.send(b"x" * 4 * READ_SIZE)
        await recorder.gone.wait()


async def test_aborted_body_is_incomplete_response() -> None:
    streams = Streams()
    async with listening(streams) as listener, Browser.open(listener) as browser:
        browser.send(GET + b"\r\n")
        recorder = await streams.next()
        recorder.body.write(b"one")
        await browser.head()
        assert await browser.chunk() == b"one"
        recorder.body.abort()
        await recorder.gone.wait()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await browser.chunk()


async def test_failing_producer_leaves_incomplete_response(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Recorder):
        def open(self, body: BodyWriter) -> None:
            raise LookupError("a fault")

    recorder = Failing()

    async def answer(_: Request, __: Visitor) -> Answer:
        return Stream(HTTPStatus.OK, EVENTS, recorder)

    async with listening(answer) as listener, Browser.open(listener) as browser:
        browser.send(GET, KEEP, b"\r\n")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await browser.response()
        await recorder.gone.wait()
    assert "response failed" in caplog.text


@pytest.mark.parametrize(
    "test",
    [
        partial(test_stream_is_written_in_chunks, tls=False),
        partial(test_stream_is_written_in_chunks, tls=True),
        partial(test_http_1_0_stream_ends_with_connection, tls=False),
        partial(test_http_1_0_stream_ends_with_connection, tls=True),
        partial(test_connection_is_kept_after_stream, tls=False),
        partial(test_connection_is_kept_after_stream, tls=True),
        partial(test_producer_learns_of_disconnect_at_once, tls=False, how="close"),
        partial(test_producer_learns_of_disconnect_at_once, tls=True, how="close"),
        partial(test_producer_learns_of_disconnect_at_once, tls=False, how="abort"),
        partial(test_producer_learns_of_disconnect_at_once, tls=False, how="half-close"),
        test_slow_reader_pauses_and_wakes_producer,
        test_client_not_reading_is_aborted_after_send_timeout,
        test_client_not_reading_earlier_response_is_aborted_after_send_timeout,
        test_client_over_max_unsent_is_aborted_at_once,
        test_client_sending_endlessly_is_aborted,
        test_aborted_body_is_incomplete_response,
    ],
    ids=name_of,
)
def test_streams_work_on_uvloop(test: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())
