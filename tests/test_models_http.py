"""The HTTP client for a model's API, over real sockets and whatever a server may send."""

import asyncio
import gzip
import itertools
import socket
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.raw import Raw, chunk, head_of
from wsserver.models.dial import CannotConnect, ConnectTimeout, Origin
from wsserver.models.http import InvalidRequest, Pool, Redirected, Template
from wsserver.models.response import (
    ClosedEarly,
    DamagedBody,
    MalformedResponse,
    NoResponse,
    Response,
)

SECONDS = 5  # that any wait may take at most
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"

Post = Callable[..., Awaitable[Response]]


class Reader:
    """Keeps what it is given, and can wait for it."""

    def __init__(self, *, enough: bool = False) -> None:
        self.reads: list[bytes] = []
        self.read = asyncio.Semaphore(0)
        self._enough = enough

    def __call__(self, data: bytes) -> bool:
        self.reads.append(data)
        self.read.release()
        return self._enough

    @property
    def text(self) -> bytes:
        return b"".join(self.reads)


def template(port: int, host: str = "127.0.0.1", path: bytes = b"/v1/messages") -> Template:
    return Template.make(Origin("http", host, port, host), path, [(b"Host", b"api.example")])


def no_tls() -> ssl.SSLContext:
    raise AssertionError("no TLS here")


@asynccontextmanager
async def pool(limit: int = 10, connect_timeout: float = SECONDS) -> AsyncIterator[Pool]:
    made = Pool(limit, connect_timeout, no_tls)
    async with asyncio.timeout(2 * SECONDS):
        try:
            yield made
        finally:
            await made.aclose()


async def whole(response: Response) -> bytes:
    reader = Reader()
    try:
        await response.read_body(reader)
    finally:
        await response.aclose()
    return reader.text


@asynccontextmanager
async def answering(*answers: bytes, close: bool = False) -> AsyncIterator[tuple[Raw, list[bytes]]]:
    """Answer each request with the next of these bytes, on whatever connection it comes."""
    left = list(answers)
    heads: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heads.append(await head_of(reader))
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
            if close:
                return

    async with Raw(handle) as raw:
        yield raw, heads


# Bodies, whatever their framing


BODIES = {
    "chunked": CHUNKED + chunk(b"hel") + chunk(b"lo") + LAST,
    "chunk extensions": CHUNKED + b"5;name=value\r\nhello\r\n" + LAST,
    "trailers": CHUNKED + chunk(b"hello") + b"0\r\nx-sum: 1\r\nx-two: 2\r\n\r\n",
    "content length": OK + b"content-length: 5\r\n\r\nhello",
    "interim responses": b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 103 Early Hints\r\nlink: x\r\ncontent-length: 7\r\n\r\n"
    + OK
    + b"content-length: 5\r\n\r\nhello",
    "upper case": b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:   5\r\nEmpty:\r\n\r\nhello",
}


@pytest.mark.parametrize("answer", BODIES.values(), ids=BODIES.keys())
async def test_bodies_are_read_and_the_connection_serves_the_next_request(answer: bytes) -> None:
    async with answering(answer) as (raw, _), pool() as client:
        for _ in range(3):
            response = await client.post(template(raw.port), b"{}")
            assert response.status == 200
            assert await whole(response) == b"hello"
        assert raw.accepted == 1


@pytest.mark.parametrize("answer", BODIES.values(), ids=BODIES.keys())
async def test_responses_are_read_when_split_at_every_byte(answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            await head_of(reader)
            for place in range(len(answer)):
                writer.write(answer[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0)

    async with Raw(handle) as raw, pool() as client:
        for _ in range(2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
        assert raw.accepted == 1


# What could be taken for the framing of chunks, or is cut within it.
PAYLOADS = st.lists(
    st.binary(min_size=1, max_size=20)
    | st.sampled_from(
        [b"\r\n", b"0\r\n\r\n", b"5\r\n", chunk(b"hello"), b"a" * 300, b"5\r\nhello", OK]
    ),
    max_size=12,
)


@given(payloads=PAYLOADS, cuts=st.sets(st.integers(0, 600), max_size=12))
@settings(max_examples=100, deadline=None)
async def test_chunks_are_read_wherever_reads_cut_them(
    payloads: list[bytes], cuts: set[int]
) -> None:
    answer = CHUNKED + b"".join(map(chunk, payloads)) + LAST
    edges = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        for first, last in itertools.pairwise(edges):
            writer.write(answer[first:last])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"".join(payloads)


@pytest.mark.parametrize(
    "head",
    [OK, b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nconnection: close\r\n"],
    ids=["HTTP/1.1", "HTTP/1.0", "Connection: close"],
)
async def test_body_may_last_until_the_connection_closes(head: bytes) -> None:
    async with answering(head + b"\r\nhello", close=True) as (raw, _), pool() as client:
        for number in (1, 2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
            assert raw.accepted == number


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: Close\r\n"]
)
async def test_connection_close_and_http_1_0_close_after_the_body(head: bytes) -> None:
    answer = head + b"content-length: 5\r\n\r\nhello"
    async with answering(answer) as (raw, _), pool() as client:
        for number in (1, 2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
            assert raw.accepted == number


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_statuses_without_a_body_have_none(status: bytes) -> None:
    answer = b"HTTP/1.1 %b\r\ncontent-length: 5\r\n\r\n" % status
    async with answering(answer) as (raw, _), pool() as client:
        for _ in range(2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b""
        assert raw.accepted == 1


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data)


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


def bare(data: bytes) -> bytes:
    return zlib.compress(data, wbits=-zlib.MAX_WBITS)


@pytest.mark.parametrize(
    ("coding", "pack"), [(b"gzip", gzipped), (b"deflate", deflated), (b"deflate", bare)]
)
@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
async def test_compressed_bodies_are_decompressed_though_not_asked_for(
    coding: bytes, pack: Callable[[bytes], bytes], size: int
) -> None:
    packed = pack(b"hello " * 50_000)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"content-encoding: %b\r\ntransfer-encoding: chunked\r\n\r\n" % coding)
        for start in range(0, len(packed), size):
            writer.write(chunk(packed[start : start + size]))
            if start < 10:
                await asyncio.sleep(0.001)  # the first bytes, each in a read of its own
        writer.write(LAST)
        await reader.read()

    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello " * 50_000


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br"])
@pytest.mark.parametrize("body", [b"hello", gzip.compress(b"hello" * 99, mtime=0)[:25]])
async def test_damaged_compression_is_an_error(coding: bytes, body: bytes) -> None:
    answer = OK + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (coding, len(body))
    async with answering(answer + body) as (raw, _), pool() as client:
        with pytest.raises(DamagedBody):
            await whole(await client.post(template(raw.port), b"{}"))


async def test_compressed_body_that_grows_without_end_is_an_error() -> None:
    packed = gzip.compress(bytes(50_000_000))
    answer = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with answering(answer + packed) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        with pytest.raises(DamagedBody):
            await whole(response)


# By callback


async def test_each_read_is_handed_on_at_once() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(CHUNKED + chunk(b"one"))
        await some.read.acquire()
        writer.write(chunk(b"two") + chunk(b"three"))
        await some.read.acquire()
        writer.write(LAST)

    some = Reader()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        assert await response.read_body(some) is True
        assert some.reads == [b"one", b"twothree"]


async def test_reader_that_has_enough_can_read_on() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(CHUNKED + chunk(b"one"))
        await more.wait()
        writer.write(chunk(b"two") + LAST)

    more = asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        some, rest = Reader(enough=True), Reader()
        assert await response.read_body(some) is False
        more.set()
        assert await response.read_body(rest) is True
        assert (some.text, rest.text) == (b"one", b"two")


async def test_exception_of_the_callback_ends_the_reading() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(CHUNKED)
        await go.wait()
        writer.write(chunk(b"one"))
        assert await reader.read() == b""
        closed.set()

    def take(data: bytes) -> bool:
        raise LookupError(data)

    go, closed = asyncio.Event(), asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        go.set()
        with pytest.raises(LookupError, match="one"):
            await response.read_body(take)
        await response.aclose()
        await closed.wait()


async def test_body_that_nobody_reads_stops_the_socket() -> None:
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await head_of(reader)
        writer.write(CHUNKED)
        while sent < 50_000_000:
            writer.write(chunk(bytes(100_000)))
            sent += 100_000
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                stuck.set()
                await writer.drain()
        writer.write(LAST)
        await writer.drain()

    stuck = asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        await stuck.wait()
        assert sent < 20_000_000, "what the kernel holds, and little more"
        read = 0

        def take(data: bytes) -> bool:
            nonlocal read
            read += len(data)
            return False

        assert await response.read_body(take) is True
        assert read == 50_000_000


async def test_to_close_a_response_closes_its_connection_at_once() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(CHUNKED + chunk(b"one"))
        closed.set_result(await reader.read())

    closed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        some = Reader()
        reading = asyncio.create_task(response.read_body(some))
        await some.read.acquire()
        reading.cancel()
        await asyncio.wait({reading})
        await response.aclose()
        assert await closed == b""


# The rest of a body


async def test_released_response_gives_its_connection_to_the_next_request() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_of(reader)
            writer.write(CHUNKED + chunk(b"one"))
            await more.wait()
            writer.write(chunk(b"two") + LAST)

    more = asyncio.Event()
    async with Raw(handle) as raw, pool(limit=1) as client:
        for _ in range(2):
            more.clear()
            response = await client.post(template(raw.port), b"{}")
            assert await response.read_body(Reader(enough=True)) is False
            response.release()
            await response.aclose()
            more.set()
        assert raw.accepted == 1


@pytest.mark.parametrize("rest", [b"", chunk(bytes(200_000))], ids=["silent", "long"])
async def test_released_response_that_does_not_end_closes_its_connection(
    monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    monkeypatch.setattr("wsserver.models.h1.DRAIN_TIME", 0.01 if not rest else SECONDS)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(CHUNKED + chunk(b"one"))
        await released.wait()
        writer.write(rest)
        try:
            await reader.read()
        finally:
            closed.set()

    released, closed = asyncio.Event(), asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        await response.read_body(Reader(enough=True))
        response.release()
        released.set()
        await closed.wait()


# What is no response


@pytest.mark.parametrize(
    "answer",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        OK + b"content-length: -5\r\n\r\nhello",
        OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n" + chunk(b"hello") + LAST,
        OK + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n" + LAST,
        OK + b"transfer-encoding: gzip\r\n\r\nhello",
        OK + b"name\r\n\r\n",
        OK + b"na me: value\r\n\r\n",
        OK + b"name: val\x00ue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        OK + b"name: " + b"x" * 70_000 + b"\r\n\r\n",
        OK + b"name: " + b"x" * 70_000,
        OK + b"name: value\r\n" * 7000 + b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
        b"HTTP/1.1 200 " + b"x" * 70_000,
    ],
    ids=lambda answer: repr(answer[:60]),
)
async def test_malformed_responses_are_an_error(answer: bytes) -> None:
    async with answering(answer) as (raw, _), pool() as client:
        with pytest.raises(MalformedResponse):
            await client.post(template(raw.port), b"{}")


async def test_headers_of_nearly_64_kib_are_accepted() -> None:
    answer = OK + b"".join(b"x-%d: %b\r\n" % (number, b"y" * 1000) for number in range(60))
    async with answering(answer + b"content-length: 2\r\n\r\nok") as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        assert response.header(b"x-59") == b"y" * 1000
        assert await whole(response) == b"ok"


async def test_repeated_headers_are_one_list() -> None:
    answer = OK + b"X-One: 1\r\nx-one: 2\r\ncontent-length: 0\r\n\r\n"
    async with answering(answer) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        assert response.header(b"x-one") == b"1, 2"
        assert response.header(b"x-two") is None


@pytest.mark.parametrize(
    "damage", [b"zz\r\nhello\r\n", b"-5\r\nhello\r\n", b"5\r\nhelloXX", b"0x5\r\nhello\r\n"]
)
@pytest.mark.parametrize("together", [True, False])
async def test_damaged_chunks_are_an_error_after_the_text_before_them(
    damage: bytes, together: bool
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        if together:
            writer.write(CHUNKED + chunk(b"one") + damage + LAST)
        else:
            writer.write(CHUNKED + chunk(b"one"))
            await some.read.acquire()
            writer.write(damage + LAST)
        await reader.read()

    some = Reader()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        with pytest.raises(MalformedResponse):
            await response.read_body(some)
        assert some.text in {b"one", b"onehello"}


@pytest.mark.parametrize("framing", [b"transfer-encoding: chunked", b"content-length: 99"])
async def test_body_that_is_cut_is_an_error_after_the_text_before_it(framing: bytes) -> None:
    answer = OK + framing + b"\r\n\r\n" + chunk(b"one")
    async with answering(answer, close=True) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        some = Reader()
        with pytest.raises(ClosedEarly):
            await response.read_body(some)
        assert b"one" in some.text


# Which connection a request gets


@pytest.mark.parametrize(
    "unasked",
    [b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n", b"\r\n", b"x"],
    ids=["a response", "an empty line", "a byte"],
)
@pytest.mark.parametrize("when", ["with the body", "later"])
async def test_bytes_that_nobody_asked_for_close_an_idle_connection(
    unasked: bytes, when: str
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        answer = OK + b"content-length: 5\r\n\r\nhello"
        if when == "later":
            writer.write(answer)
            await read.wait()
            writer.write(unasked)
        else:
            writer.write(answer + unasked)
        await reader.read()
        closed.release()

    closed, read = asyncio.Semaphore(0), asyncio.Event()
    if (when, unasked) == ("with the body", b"\r\n"):
        pytest.skip("RFC 9112 section 2.2 has an empty line between messages ignored")
    async with Raw(handle) as raw, pool() as client:
        for number in (1, 2):
            read.clear()
            response = await client.post(template(raw.port), b"{}")
            assert await whole(response) == b"hello"
            read.set()
            await closed.acquire()
            assert raw.accepted == number


async def test_connection_that_the_server_closed_is_noticed_before_its_use() -> None:
    def serve() -> None:
        while True:
            connection, _ = listening.accept()
            with connection:
                if not connection.recv(65536):
                    return
                connection.sendall(OK + b"content-length: 5\r\n\r\nhello")
            gone.set()

    gone = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        port = listening.getsockname()[1]
        async with pool() as client:
            for _ in range(20):
                assert await whole(await client.post(template(port), b"{}")) == b"hello"
                # The event loop does not run until the next request, and has not seen the end.
                gone.wait(SECONDS)
                gone.clear()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join(SECONDS)


async def test_connection_that_closes_at_once_is_an_error() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with Raw(handle) as raw, pool(limit=1) as client:
        for _ in range(5):
            with pytest.raises(NoResponse):
                await client.post(template(raw.port), b"{}")
        await client.warm(template(raw.port).origin)


async def test_request_is_not_sent_twice_when_a_kept_connection_ends_without_an_answer() -> None:
    requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await head_of(reader)
        requests += 1
        writer.write(OK + b"content-length: 5\r\n\r\nhello")
        await head_of(reader)
        requests += 1  # received, and perhaps begun

    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
        with pytest.raises(NoResponse):
            await client.post(template(raw.port), b"{}")
        assert (requests, raw.accepted) == (2, 1)


async def test_idle_connections_are_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.models.http.IDLE_TIME", 0.01)
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"content-length: 5\r\n\r\nhello")
        await reader.read()
        closed.set()

    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
        await closed.wait()


async def test_no_more_connections_than_the_limit_and_waiting_takes_no_longer_than_connecting() -> (
    None
):
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_of(reader)
            writer.write(CHUNKED)
            await go.wait()
            writer.write(LAST)

    go = asyncio.Event()
    async with Raw(handle) as raw, pool(limit=2, connect_timeout=0.2) as client:
        ask = template(raw.port)
        first = [await client.post(ask, b"{}") for _ in range(2)]
        with pytest.raises(ConnectTimeout):
            await client.post(ask, b"{}")
        waiting = asyncio.create_task(client.post(ask, b"{}"))
        await asyncio.sleep(0)
        go.set()
        for response in (*first, await waiting):
            assert await whole(response) == b""
        assert raw.accepted == 2


async def test_request_that_is_cancelled_while_it_waits_passes_its_turn_on() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _):
        async with pool(limit=1) as client:
            ask = template(raw.port)
            held = asyncio.create_task(client.post(ask, b"{}"))
            waiting = [asyncio.create_task(client.post(ask, b"{}")) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            for task in (held, *waiting[1:]):
                assert await whole(await task) == b"hello"


async def test_room_is_made_by_closing_an_idle_connection_to_another_server() -> None:
    answer = OK + b"content-length: 5\r\n\r\nhello"
    async with answering(answer) as (one, _), answering(answer) as (other, _):
        async with pool(limit=1) as client:
            for raw in (one, other, one):
                assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"


# Requests


async def test_large_upload_waits_for_the_server_to_read() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 20000000\r\n" in head
        come.set()
        await go.wait()
        received.set_result(await reader.readexactly(20_000_000))
        writer.write(OK + b"content-length: 0\r\n\r\n")
        await reader.read()

    come, go = asyncio.Event(), asyncio.Event()
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    body = b"0123456789" * 2_000_000
    async with Raw(handle) as raw, pool() as client:
        tracemalloc.start()
        posting = asyncio.create_task(client.post(template(raw.port), body))
        await come.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5_000_000, "no copy of what the kernel does not take"
        go.set()
        await whole(await posting)
        assert await received == body


@pytest.mark.parametrize("status", [413, 401])
async def test_answer_before_the_end_of_an_upload_is_read(status: int) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 5\r\n\r\nsorry" % status)
        await writer.drain()
        await read.wait()

    read = asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), bytes(20_000_000))
        assert response.status == status
        assert await whole(response) == b"sorry"
        read.set()
        await (await client.post(template(raw.port), b"{}")).aclose()
        assert raw.accepted == 2, "half a request is on the first"


async def test_request_that_is_cancelled_closes_its_connection() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        came.set()
        assert await reader.read() == b""
        closed.set()

    came, closed = asyncio.Event(), asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        posting = asyncio.create_task(client.post(template(raw.port), b"{}"))
        await came.wait()
        posting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await posting
        await closed.wait()


@pytest.mark.parametrize(
    "header",
    [
        (b"x-key", b"one\r\nx-two: 2"),
        (b"x-key", b"one\n"),
        (b"x-key", b"one\x00"),
        (b"x key", b"one"),
        (b"x-key\r\n", b"one"),
        (b"", b"one"),
    ],
)
def test_headers_that_would_be_more_than_one_are_refused(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(InvalidRequest):
        Template.make(Origin("http", "api.example", 80, "api.example"), b"/", [header])


async def test_framing_is_never_that_of_the_headers_given() -> None:
    given_headers = [(b"Host", b"a"), (b"Content-Length", b"99"), (b"Transfer-Encoding", b"x")]
    async with answering(OK + b"content-length: 0\r\n\r\n") as (raw, heads), pool() as client:
        origin = Origin("http", "127.0.0.1", raw.port, "127.0.0.1")
        await whole(await client.post(Template.make(origin, b"/a?b", given_headers), b"{}"))
    assert heads == [b"POST /a?b HTTP/1.1\r\nHost: a\r\ncontent-length: 2\r\n\r\n"]


# Redirects


@pytest.mark.parametrize(
    ("location", "target"),
    [
        (b"/other?a=b", b"/other?a=b"),
        (b"?a=b", b"/v1/messages?a=b"),
        (b"other", b"/v1/other"),
        (b"/a b\xc3\xa9%20", b"/a%20b%C3%A9%20"),
        (b"//127.0.0.1:{port}/x", b"/x"),
    ],
)
async def test_redirects_within_the_origin_are_followed(location: bytes, target: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        to = location.replace(b"{port}", b"%d" % raw.port)
        writer.write(b"HTTP/1.1 307 There\r\nlocation: " + to + b"\r\ncontent-length: 3\r\n\r\nabc")
        heads.append(await head_of(reader))
        writer.write(OK + b"content-length: 5\r\n\r\nhello")
        await reader.read()

    heads: list[bytes] = []
    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
    assert heads[0].split(b" ")[1] == target


@pytest.mark.parametrize(
    ("status", "location"),
    [
        (307, b"http://127.0.0.1:1/"),
        (308, b"https://127.0.0.1:{port}/"),
        (307, b"//localhost:{port}/"),
        (307, b"http://[/"),
        (307, b"http://127.0.0.1:99999999/"),
        (301, b"/"),
        (302, b"/"),
        (303, b"/"),
    ],
)
async def test_other_redirects_are_refused(status: int, location: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        to = location.replace(b"{port}", b"%d" % raw.port)
        writer.write(b"HTTP/1.1 %d There\r\nlocation: %b\r\n\r\n" % (status, to))
        await reader.read()

    async with Raw(handle) as raw, pool() as client:
        with pytest.raises(Redirected):
            await client.post(template(raw.port), b"{}")
        assert raw.accepted == 1


async def test_redirects_without_end_are_refused() -> None:
    answer = b"HTTP/1.1 308 There\r\nlocation: /\r\ncontent-length: 0\r\n\r\n"
    async with answering(answer) as (raw, heads), pool() as client:
        with pytest.raises(Redirected):
            await client.post(template(raw.port), b"{}")
        assert len(heads) < 30


async def test_redirect_without_a_location_is_a_response() -> None:
    async with answering(b"HTTP/1.1 307 There\r\ncontent-length: 0\r\n\r\n") as (raw, _):
        async with pool() as client:
            assert (await client.post(template(raw.port), b"{}")).status == 307


# Connecting


async def test_nothing_that_listens_is_an_error_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with pool() as client:
            with pytest.raises(CannotConnect):
                await client.post(template(held.getsockname()[1]), b"{}")


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "x" * 70 + ".example"])
async def test_name_without_an_address_is_an_error(host: str) -> None:
    async with pool() as client:
        with pytest.raises(CannotConnect):
            await client.post(template(80, host), b"{}")


async def test_server_that_does_not_accept_is_an_error_in_time() -> None:
    with socket.socket() as held, socket.socket() as first, socket.socket() as second:
        held.bind(("127.0.0.1", 0))
        held.listen(0)  # and nobody accepts: the backlog fills
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(held.getsockname())
        async with pool(connect_timeout=0.1) as client:
            with pytest.raises(ConnectTimeout):
                await client.post(template(held.getsockname()[1]), b"{}")


async def test_next_address_is_tried_when_one_refuses_or_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve = asyncio.get_running_loop().getaddrinfo

    async def addresses(host: str, port: int, **given: int) -> list[tuple[Any, ...]]:
        if host != "api.test":
            return await resolve(host, port, **given)
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", raw.port, 0, 0)),  # refuses
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", silent.getsockname()),
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", raw.port)),
        ]

    monkeypatch.setattr("wsserver.models.dial.ATTEMPT_DELAY", 0.02)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", addresses)
    answer = OK + b"content-length: 5\r\n\r\nhello"
    with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(silent.getsockname())
        async with answering(answer) as (raw, heads), pool() as client:
            assert await whole(await client.post(template(raw.port, "api.test"), b"{}")) == b"hello"
            assert len(heads) == 1


async def test_ipv6_address_is_reached() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"content-length: 5\r\n\r\nhello")
        writer.close()

    try:
        server = await asyncio.start_server(handle, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    async with server, pool() as client:
        port = server.sockets[0].getsockname()[1]
        assert await whole(await client.post(template(port, "::1"), b"{}")) == b"hello"


# Connections made ahead


async def test_warm_connection_is_the_one_that_the_next_request_uses() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        for _ in range(3):
            await client.warm(template(raw.port).origin)
        assert raw.accepted == 1, "one is ready"
        await whole(await client.post(template(raw.port), b"{}"))
        assert raw.accepted == 1


async def test_request_waits_for_the_connection_that_is_being_made_ahead() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        warming = asyncio.create_task(client.warm(template(raw.port).origin))
        await asyncio.sleep(0)
        await whole(await client.post(template(raw.port), b"{}"))
        await warming
        assert raw.accepted == 1


async def test_failure_to_connect_ahead_is_left_to_the_request() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        ask = template(held.getsockname()[1])
        async with pool() as client:
            await client.warm(ask.origin)
            with pytest.raises(CannotConnect):
                await client.post(ask, b"{}")


async def test_no_connection_is_made_ahead_beyond_the_limit() -> None:
    async with answering(CHUNKED + chunk(b"one")) as (raw, _), pool(limit=1) as client:
        response = await client.post(template(raw.port), b"{}")
        await client.warm(template(raw.port).origin)
        assert raw.accepted == 1
        await response.aclose()
