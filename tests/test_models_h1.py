"""HTTP/1.1 responses of a model's API, over real sockets."""

import asyncio
import contextlib
import gzip
import itertools
import socket
import zlib
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.http_client import (
    CHUNKED,
    LAST,
    OK,
    Reader,
    answering,
    pool,
    template,
    whole,
)
from tests.support.proxy import reset
from tests.support.puppet import until
from tests.support.raw import Raw, chunk, head_of
from wsserver.models.response import (
    ClosedEarly,
    DamagedBody,
    HttpError,
    MalformedResponse,
    NoResponse,
    Response,
)

# Bodies of each framing


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
async def test_body_is_read_and_connection_serves_next_request(answer: bytes) -> None:
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


# Data that looks like chunk framing, and cuts within chunk framing.
PAYLOADS = st.lists(
    st.binary(min_size=1, max_size=20)
    | st.sampled_from(
        [b"\r\n", b"0\r\n\r\n", b"5\r\n", chunk(b"hello"), b"a" * 300, b"5\r\nhello", OK]
    ),
    max_size=12,
)


@given(payloads=PAYLOADS, cuts=st.sets(st.integers(0, 600), max_size=12))
@settings(max_examples=100)
async def test_chunks_are_read_when_split_at_any_byte(
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
async def test_body_may_end_with_connection(head: bytes) -> None:
    async with answering(head + b"\r\nhello", close=True) as (raw, _), pool() as client:
        for number in (1, 2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
            assert raw.accepted == number


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: Close\r\n"]
)
async def test_connection_close_and_http_1_0_close_after_body(head: bytes) -> None:
    answer = head + b"content-length: 5\r\n\r\nhello"
    async with answering(answer) as (raw, _), pool() as client:
        for number in (1, 2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
            assert raw.accepted == number


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_status_204_and_304_have_no_body(status: bytes) -> None:
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
async def test_unrequested_compressed_body_is_decompressed(
    coding: bytes, pack: Callable[[bytes], bytes], size: int
) -> None:
    packed = pack(b"hello " * 50_000)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"content-encoding: %b\r\ntransfer-encoding: chunked\r\n\r\n" % coding)
        for start in range(0, len(packed), size):
            writer.write(chunk(packed[start : start + size]))
            if start < 10:
                await asyncio.sleep(0.001)  # each of the first bytes in a separate read
        writer.write(LAST)
        await reader.read()

    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello " * 50_000


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br"])
@pytest.mark.parametrize("body", [b"hello", gzip.compress(b"hello" * 99, mtime=0)[:25]])
async def test_damaged_compression_is_error(coding: bytes, body: bytes) -> None:
    answer = OK + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (coding, len(body))
    async with answering(answer + body) as (raw, _), pool() as client:
        with pytest.raises(DamagedBody):
            await whole(await client.post(template(raw.port), b"{}"))


async def test_compressed_body_over_size_limit_is_error() -> None:
    packed = gzip.compress(bytes(50_000_000))
    answer = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with answering(answer + packed) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        with pytest.raises(DamagedBody):
            await whole(response)


async def test_compressed_body_is_error_before_its_reader_gets_all_of_it() -> None:
    packed = gzip.compress(b":\n\n" * 6_000_000)
    answer = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    read = 0

    def take(data: bytes) -> bool:
        nonlocal read
        read += len(data)
        return False

    async with answering(answer + packed) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}", lambda _: take)
        with pytest.raises(DamagedBody):
            await response.read_body(take)
        await response.aclose()
    assert read < 4_000_000


# By callback


async def test_each_read_is_passed_on_at_once() -> None:
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


async def test_accepted_body_is_passed_on_before_post_returns() -> None:
    some = Reader()
    statuses: list[int] = []

    def accept(response: Response) -> Reader:
        statuses.append(response.status)
        return some

    async with answering(BODIES["chunked"]) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}", accept)
        assert (statuses, some.reads) == ([200], [b"hello"])
        assert await response.read_body(some) is True


async def test_failure_of_accepted_body_is_raised_once_it_is_read() -> None:
    def accept(_: Response) -> Callable[[bytes], bool]:
        return take

    def take(_: bytes) -> bool:
        raise ZeroDivisionError

    async with answering(BODIES["chunked"]) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}", accept)
        with pytest.raises(ZeroDivisionError):
            await response.read_body(take)


async def test_reader_may_stop_and_continue() -> None:
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


async def test_exception_of_callback_ends_reading() -> None:
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


async def test_unread_body_pauses_socket() -> None:
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


async def test_connection_of_large_unread_body_serves_next_request() -> None:
    body = gzip.compress(b"x" * 100_000)
    answer = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with answering(answer) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        await until(lambda: response.complete)
        await response.aclose()
        assert len(await whole(await client.post(template(raw.port), b"{}"))) == 100_000
        assert raw.accepted == 1


async def test_close_of_response_closes_connection_at_once() -> None:
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


@pytest.mark.parametrize("rest", [b"two", bytes(2000)], ids=["short", "long"])
async def test_released_response_returns_connection_to_pool(
    monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    monkeypatch.setattr("wsserver.models.h1.DRAIN_SIZE", 1000)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_of(reader)
            writer.write(CHUNKED + chunk(b"one"))
            await more.wait()
            writer.write(chunk(rest) + LAST)

    more = asyncio.Event()
    async with Raw(handle) as raw, pool(limit=1) as client:
        for _ in range(3):
            more.clear()
            response = await client.post(template(raw.port), b"{}")
            assert await response.read_body(Reader(enough=True)) is False
            response.release()
            await response.aclose()
            more.set()
        assert raw.accepted == 1


@pytest.mark.parametrize("rest", [b"", chunk(bytes(200_000))], ids=["silent", "long"])
async def test_released_unfinished_response_closes_connection(
    monkeypatch: pytest.MonkeyPatch, rest: bytes
) -> None:
    monkeypatch.setattr("wsserver.models.h1.DRAIN_TIME", 60 if rest else 0.01)

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


# Malformed responses


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
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        OK + b"name: " + b"x" * 70_000 + b"\r\n\r\n",
        OK + b"name: " + b"x" * 70_000,
        OK + b"name: value\r\n" * 7000 + b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 5000,
        b"HTTP/1.1 200 " + b"x" * 70_000,
    ],
    ids=lambda answer: repr(answer[:60]),
)
async def test_malformed_response_is_error(answer: bytes) -> None:
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
async def test_damaged_chunk_is_error_after_preceding_text(damage: bytes, together: bool) -> None:
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
async def test_truncated_body_is_error_after_preceding_text(framing: bytes) -> None:
    answer = OK + framing + b"\r\n\r\n" + chunk(b"one")
    async with answering(answer, close=True) as (raw, _), pool() as client:
        response = await client.post(template(raw.port), b"{}")
        some = Reader()
        with pytest.raises(ClosedEarly):
            await response.read_body(some)
        assert b"one" in some.text


async def test_body_ended_by_connection_is_truncated_by_reset() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"\r\nhel")
        await some.read.acquire()
        reset(writer.transport)

    some = Reader()
    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), b"{}")
        with pytest.raises(ClosedEarly):
            await response.read_body(some)
        assert some.text == b"hel"


# Random bytes after the start of a response.
ANYTHING = st.lists(
    st.binary(max_size=30)
    | st.sampled_from(
        [
            OK,
            CHUNKED,
            LAST,
            b"\r\n",
            b"\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.0 204 No Content\r\n\r\n",
            b"transfer-encoding: chunked\r\n",
            b"content-length: 3\r\n",
            b"content-encoding: gzip\r\n",
            b"connection: close\r\n",
            b"location: /\r\n",
            chunk(b"abc"),
            gzip.compress(b"abc"),
        ]
    ),
    max_size=8,
)


@given(parts=ANYTHING)
@example(parts=[CHUNKED, LAST, b"", b"HTTP/1.0 200\r\n", b"\r\n"])
@settings(max_examples=300)
async def test_any_bytes_are_response_or_error_and_pool_stays_usable(
    parts: list[bytes],
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if good:
            await head_of(reader)
            writer.write(OK + b"content-length: 5\r\n\r\nhello")
            await reader.read()
        await head_of(reader)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
        finally:
            said.set()

    good, said = False, asyncio.Event()
    async with Raw(handle) as raw, pool(limit=1) as client:
        with contextlib.suppress(HttpError):
            await whole(await client.post(template(raw.port), b"{}"))
        # Bytes that arrive after the next request are its response, for all that a client knows.
        await said.wait()
        good = True
        with contextlib.suppress(NoResponse):  # the server may be about to close the first
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
