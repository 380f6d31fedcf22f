"""Request bodies, read on demand and within bounds, and kept connections."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import pytest
import uvloop

from tests.listening.answering import Browser, listening, name_of
from tests.support.puppet import until
from wsserver.admission import Visitor
from wsserver.responses import BadRequest, Request, Response, respond
from wsserver.sockets.exchange import HEADER_COST, REQUEST_COST
from wsserver.sockets.tcp import READ_SIZE

POST = b"POST /a HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
KEEP = b"Connection: keep-alive\r\n"
GET = b"GET /a HTTP/1.1\r\nHost: localhost\r\n"
LIMIT = 50_000


def length(size: int) -> bytes:
    return POST + b"Content-Length: %d\r\n" % size


async def echo(request: Request, _: Visitor) -> Response:
    return respond(HTTPStatus.OK, await request.read_body(LIMIT))


async def no_body(request: Request, _: Visitor) -> Response:
    return respond(HTTPStatus.OK, request.path)


Answer = Callable[[Request, Visitor], Awaitable[Response]]

both = pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])


@both
@pytest.mark.parametrize(
    "sent",
    [
        [length(5), b"\r\nhello"],
        [length(5), b"\r\nhe", b"llo"],
        [CHUNKED, b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n", b"\r\n"],
    ],
)
async def test_body_reaches_application_whole(tls: bool, sent: list[bytes]) -> None:
    async with listening(echo, tls=tls) as listener, Browser.open(listener) as browser:
        for part in sent:
            browser.send(part)
            await browser.writer.drain()
        assert await browser.response() == (200, b"hello")
        browser.writer.close()


@pytest.mark.parametrize("size", [0, 1, READ_SIZE, LIMIT])
async def test_body_up_to_limit_is_read(size: int) -> None:
    async with listening(echo) as listener, Browser.open(listener) as browser:
        browser.send(length(size), b"\r\n", b"x" * size)
        assert await browser.response() == (200, b"x" * size)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([POST, b"\r\n"], 411),
        ([length(LIMIT + 1), b"\r\n"], 413),
        ([length(LIMIT + 1), b"Expect: 100-continue\r\n\r\n"], 413),
        ([length(LIMIT + 1), b"\r\n", b"x" * (LIMIT + 1)], 413),
        ([CHUNKED, *([b"1000\r\n" + b"x" * 4096 + b"\r\n"] * 13)], 413),
        ([CHUNKED, b"hello"], 400),
        ([CHUNKED, b"2\r\nhe\r\n", b"hello"], 400),
    ],
)
async def test_invalid_body_is_refused_with_status(sent: list[bytes], status: int) -> None:
    async with listening(echo) as listener, Browser.open(listener) as browser:
        for part in sent:
            browser.send(part)
            await asyncio.sleep(0)
        assert (await browser.response())[0] == status
        assert await browser.ended()


async def test_rest_of_refused_body_does_not_reset_response() -> None:
    async with listening(echo) as listener, Browser.open(listener) as browser:
        size = 20 * LIMIT
        browser.send(length(size), b"\r\n", b"x" * size)
        await browser.writer.drain()
        assert (await browser.response())[0] == 413
        assert await browser.ended()


async def test_slow_body_gets_408_and_raises_in_application() -> None:
    told: list[int] = []

    async def read(request: Request, _: Visitor) -> Response:
        try:
            return respond(HTTPStatus.OK, await request.read_body(LIMIT))
        except BadRequest as bad:
            told.append(bad.response.status)
            raise

    async with (
        listening(read, open_timeout=0.2) as listener,
        Browser.open(listener) as browser,
    ):
        browser.send(length(5), b"\r\nhel")
        assert (await browser.response())[0] == 408
        assert await browser.ended()
    assert told == [408]


async def test_body_received_steadily_has_more_time_than_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsserver.sockets.exchange.BODY_RATE", 2)  # bytes for each second
    async with (
        listening(echo, open_timeout=0.5) as listener,
        Browser.open(listener) as browser,
    ):
        loop = asyncio.get_running_loop()
        browser.send(length(6), b"\r\n")
        for byte in b"slowly":
            later = loop.create_future()
            loop.call_later(0.15, later.set_result, None)
            await later
            browser.send(bytes([byte]))
        assert await browser.response() == (200, b"slowly")


async def test_expect_100_gets_continue() -> None:
    async with listening(echo) as listener, Browser.open(listener) as browser:
        browser.send(length(5), b"Expect: 100-Continue\r\n\r\n")
        assert await browser.head() == (100, {})
        browser.send(b"hello")
        assert await browser.response() == (200, b"hello")


async def test_expect_100_with_early_body_gets_no_continue() -> None:
    async with listening(echo) as listener, Browser.open(listener) as browser:
        browser.send(length(5), b"Expect: 100-continue\r\n\r\nhello")
        assert await browser.response() == (200, b"hello")


async def test_expect_100_of_http_1_0_is_ignored() -> None:
    async with listening(echo) as listener, Browser.open(listener) as browser:
        browser.send(length(5).replace(b"1.1", b"1.0"), b"Expect: 100-continue\r\n\r\n")
        await until(lambda: bool(listener.answering))
        browser.send(b"hello")
        assert await browser.response() == (200, b"hello")


async def test_unread_body_is_bounded_in_memory() -> None:
    asked = asyncio.Event()
    go = asyncio.Event()

    async def late(request: Request, _: Visitor) -> Response:
        asked.set()
        await go.wait()
        return respond(HTTPStatus.OK, await request.read_body(2**22))

    async with listening(late) as listener, Browser.open(listener) as browser:
        size = 2**22
        browser.send(length(size), b"\r\n", b"x" * size)
        await asked.wait()
        (exchange,) = listener.connections
        await until(lambda: not exchange.transport.is_reading())
        most = REQUEST_COST + 10 * HEADER_COST + 3 * READ_SIZE
        assert READ_SIZE <= listener.memory.used < most
        go.set()
        status, body = await browser.response()
        assert (status, len(body)) == (200, size)


async def test_body_counts_for_memory_until_response() -> None:
    read = asyncio.Event()
    go = asyncio.Event()

    async def hold(request: Request, _: Visitor) -> Response:
        await request.read_body(LIMIT)
        read.set()
        await go.wait()
        return respond(HTTPStatus.OK, "read")

    async with listening(hold) as listener, Browser.open(listener) as browser:
        browser.send(length(LIMIT), b"\r\n", b"x" * LIMIT)
        await read.wait()
        assert LIMIT < listener.memory.used < LIMIT + REQUEST_COST + 20 * HEADER_COST
        go.set()
        assert await browser.response() == (200, b"read\n")
        await until(lambda: listener.memory.used == 0)


async def test_body_without_memory_gets_503() -> None:
    given: dict[str, Any] = {"memory": 2**21, "history_size": 1000}

    async def large(request: Request, _: Visitor) -> Response:
        return respond(HTTPStatus.OK, await request.read_body(2**21))

    async with listening(large, **given) as listener, Browser.open(listener) as browser:
        browser.send(length(2**20), b"\r\n", b"x" * 2**20)
        status, headers = await browser.head()
        assert (status, "retry-after" in headers) == (503, True)


def collected(kept: "weakref.ref[Any]") -> bool:
    """Whether an object is not in memory any more, nor in a reference cycle."""
    gc.collect()
    return kept() is None


@pytest.mark.parametrize("reading", [True, False])
async def test_disconnect_during_body_ends_wait(reading: bool) -> None:
    asked = asyncio.Event()
    ended = asyncio.Event()
    go = asyncio.Event()

    async def wait(request: Request, _: Visitor) -> Response:
        asked.set()
        if not reading:
            await go.wait()
        with pytest.raises(BadRequest):
            await request.read_body(LIMIT)
        ended.set()
        return respond(HTTPStatus.OK, "nobody reads this")

    async with listening(wait) as listener:
        async with Browser.open(listener) as browser:
            browser.send(length(5), b"\r\nhel")
            await asked.wait()
            (exchange,) = map(weakref.ref, listener.connections)
        await until(lambda: not listener.connections)
        go.set()
        await ended.wait()
        await until(lambda: not listener.answering)
        await until(lambda: collected(exchange))


async def test_complete_body_can_be_read_later() -> None:
    async def late(request: Request, __: Visitor) -> Response:
        for _ in range(100):
            await asyncio.sleep(0)
        return respond(HTTPStatus.OK, await request.read_body(LIMIT))

    async with listening(late) as listener, Browser.open(listener) as browser:
        browser.send(length(5), b"\r\nhello")
        assert await browser.response() == (200, b"hello")


# Kept connections.


@both
async def test_keep_alive_connection_serves_next_request(tls: bool) -> None:
    visitors: list[Visitor] = []

    async def note(request: Request, visitor: Visitor) -> Response:
        visitors.append(visitor)
        return respond(HTTPStatus.OK, await request.read_body(LIMIT))

    async with listening(note, tls=tls) as listener, Browser.open(listener) as browser:
        for number in range(3):
            body = b"%d" % number
            browser.send(length(1), KEEP, b"\r\n", body)
            status, headers = await browser.head()
            assert (status, headers["connection"]) == (200, "keep-alive")
            assert await browser.reader.readexactly(1) == body
        assert len(set(visitors)) == 3, "each request is a visitor of its own"
        assert [visitor.gone for visitor in visitors] == [True] * 3
        assert len(listener.connections) == 1
        browser.send(length(1), b"\r\n3")
        status, headers = await browser.head()
        assert (status, headers["connection"]) == (200, "close")
        browser.writer.close()


@pytest.mark.parametrize(
    "head",
    [
        GET + b"\r\n",
        GET + b"Connection: keep-alive, close\r\n\r\n",
        b"GET /a HTTP/1.0\r\nHost: localhost\r\n\r\n",
        GET + KEEP + b"\r\n" + GET + KEEP + b"\r\n",
        length(5) + KEEP + b"\r\nhel",
        GET + b"Connection: keep-alive, upgrade\r\nUpgrade: h2c\r\n\r\n" + GET,
    ],
    ids=["not asked", "asked both", "HTTP/1.0", "pipelined", "body unread", "after upgrade"],
)
async def test_connection_is_closed_if_next_request_is_unsafe(head: bytes) -> None:
    async with listening(no_body) as listener, Browser.open(listener) as browser:
        browser.send(head)
        status, headers = await browser.head()
        assert (status, headers["connection"]) == (200, "close")
        assert await browser.reader.read() == b"/a\n"


async def test_kept_connection_is_read_after_large_unread_body() -> None:
    async def late(request: Request, _: Visitor) -> Response:
        (exchange,) = listener.connections
        await until(lambda: not exchange.transport.is_reading())
        return respond(HTTPStatus.OK, request.path)

    async with listening(late) as listener, Browser.open(listener) as browser:
        for _ in range(2):
            browser.send(length(READ_SIZE), KEEP, b"\r\n", b"x" * READ_SIZE)
            status, headers = await browser.head()
            assert (status, headers["connection"]) == (200, "keep-alive")
            assert await browser.reader.readexactly(3) == b"/a\n"


async def test_connection_is_closed_after_error() -> None:
    async def refuse(_: Request, __: Visitor) -> Response:
        return respond(HTTPStatus.FORBIDDEN, "no")

    async with listening(refuse) as listener, Browser.open(listener) as browser:
        browser.send(GET + KEEP + b"\r\n")
        status, headers = await browser.head()
        assert (status, headers["connection"]) == (403, "close")
        assert await browser.reader.read() == b"no\n"


async def test_idle_kept_connection_is_closed_after_keep_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsserver.sockets.exchange.KEEP_ALIVE", 0.1)
    async with listening(no_body) as listener, Browser.open(listener) as browser:
        browser.send(GET + KEEP + b"\r\n")
        assert await browser.response() == (200, b"/a\n")
        assert await browser.ended()


async def test_idle_kept_connection_does_not_count_for_address() -> None:
    async with listening(no_body, connections_per_address=1) as listener:
        async with Browser.open(listener) as browser:
            for _ in range(3):
                browser.send(GET + KEEP + b"\r\n")
                assert await browser.response() == (200, b"/a\n")
            async with Browser.open(listener) as other:
                other.send(GET[:5])
                await until(lambda: listener.memory.used > 0)
                browser.send(GET + KEEP + b"\r\n")
                assert (await browser.response())[0] == 429
                assert await browser.ended()
                other.send(GET[5:] + b"\r\n")
                assert await other.response() == (200, b"/a\n")
        await until(lambda: not listener.connections)
        async with Browser.open(listener) as browser:
            browser.send(GET + b"\r\n")
            assert await browser.response() == (200, b"/a\n")


async def test_oldest_of_too_many_kept_connections_is_closed() -> None:
    async with contextlib.AsyncExitStack() as stack:
        listener = await stack.enter_async_context(listening(no_body, connections=128))
        browsers = []
        for _ in range(9):  # a sixteenth of 128, plus one
            browser = await stack.enter_async_context(Browser.open(listener))
            browser.send(GET + KEEP + b"\r\n")
            assert await browser.response() == (200, b"/a\n")
            browsers.append(browser)
        assert await browsers[0].ended()
        browsers[1].send(GET + KEEP + b"\r\n")
        assert await browsers[1].response() == (200, b"/a\n")


async def test_connections_are_closed_after_listener_stops() -> None:
    async with listening(no_body) as listener, Browser.open(listener) as browser:
        browser.send(GET[:5])
        await until(lambda: bool(listener.connections))
        listener.stop_listening()
        browser.send(GET[5:] + KEEP + b"\r\n")
        status, headers = await browser.head()
        assert (status, headers["connection"]) == (200, "close")


@both
async def test_client_not_reading_gets_no_second_response(tls: bool) -> None:
    async def large(_: Request, __: Visitor) -> Response:
        return respond(HTTPStatus.OK, b"x" * 10_000_000)

    async with listening(large, tls=tls) as listener, Browser.open(listener) as browser:
        browser.writer.transport.pause_reading()  # type: ignore[attr-defined]
        browser.send(GET + KEEP + b"\r\n")
        await until(lambda: bool(listener.answering))
        await until(lambda: not listener.answering)
        browser.send(GET + KEEP + b"\r\n")
        browser.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert (await browser.response())[0] == 200
        browser.writer.close()
        assert await browser.ended()


@pytest.mark.parametrize(
    "test",
    [
        partial(test_body_reaches_application_whole, tls=False, sent=[length(5), b"\r\nhello"]),
        partial(test_body_reaches_application_whole, tls=True, sent=[length(5), b"\r\nhello"]),
        partial(test_disconnect_during_body_ends_wait, reading=True),
        partial(test_disconnect_during_body_ends_wait, reading=False),
        test_rest_of_refused_body_does_not_reset_response,
        test_unread_body_is_bounded_in_memory,
        partial(test_keep_alive_connection_serves_next_request, tls=False),
        partial(test_keep_alive_connection_serves_next_request, tls=True),
        partial(test_client_not_reading_gets_no_second_response, tls=False),
        partial(test_client_not_reading_gets_no_second_response, tls=True),
    ],
    ids=name_of,
)
def test_bodies_and_kept_connections_work_on_uvloop(test: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())
