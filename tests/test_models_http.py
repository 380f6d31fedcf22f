"""The HTTP client for a model's API: connections, requests and redirects."""

import asyncio
import contextlib
import socket
import threading
import tracemalloc
from typing import Any

import pytest

from tests.support.http_client import (
    CHUNKED,
    LAST,
    OK,
    SECONDS,
    Reader,
    answering,
    pool,
    template,
    whole,
)
from tests.support.puppet import until
from tests.support.raw import Raw, chunk, head_of
from wsserver.models.dial import CannotConnect, ConnectTimeout, Origin, dial
from wsserver.models.h1 import Connection
from wsserver.models.http import InvalidRequest, Redirected, Template
from wsserver.models.response import NoResponse

# Connections of requests


@pytest.mark.parametrize(
    "unasked",
    [b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n", b"\r\n", b"x"],
    ids=["a response", "an empty line", "a byte"],
)
@pytest.mark.parametrize("when", ["with the body", "later"])
async def test_unsolicited_bytes_close_idle_connection(unasked: bytes, when: str) -> None:
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


async def test_closed_idle_connection_is_noticed_before_reuse() -> None:
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
                # The event loop has not run since, and has not seen the end of the connection.
                gone.wait(SECONDS)
                gone.clear()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join(SECONDS)


async def test_connection_closed_at_once_is_error() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with Raw(handle) as raw, pool(limit=1) as client:
        for _ in range(5):
            with pytest.raises(NoResponse):
                await client.post(template(raw.port), b"{}")
        await client.warm(template(raw.port).origin)


async def test_request_is_not_resent_when_kept_connection_closes() -> None:
    requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await head_of(reader)
        requests += 1
        writer.write(OK + b"content-length: 5\r\n\r\nhello")
        await head_of(reader)
        requests += 1  # the server may have begun to answer

    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
        with pytest.raises(NoResponse):
            await client.post(template(raw.port), b"{}")
        assert (requests, raw.accepted) == (2, 1)


@pytest.mark.parametrize("value", [b"timeout=1", b"max=100, timeout=1", b"Timeout=0"])
async def test_idle_connection_is_closed_before_keep_alive_timeout(value: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(OK + b"content-length: 5\r\nkeep-alive: %b\r\n\r\nhello" % value)
        assert await reader.read() == b""
        closed.set()

    closed = asyncio.Event()
    async with Raw(handle) as raw, pool() as client:
        assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
        await closed.wait()


@pytest.mark.parametrize("value", [b"timeout=100", b"timeout=x", b"max=1"])
async def test_other_keep_alive_hints_keep_connection(value: bytes) -> None:
    answer = OK + b"content-length: 5\r\nkeep-alive: %b\r\n\r\nhello" % value
    async with answering(answer) as (raw, _), pool() as client:
        for _ in range(2):
            assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"
        assert raw.accepted == 1


async def test_idle_connections_are_closed_after_idle_time(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_connections_are_limited_and_wait_is_bounded() -> None:
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


async def test_cancelled_waiting_request_passes_turn_on() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _):
        async with pool(limit=1) as client:
            ask = template(raw.port)
            held = asyncio.create_task(client.post(ask, b"{}"))
            waiting = [asyncio.create_task(client.post(ask, b"{}")) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            for task in (held, *waiting[1:]):
                assert await whole(await task) == b"hello"


async def test_request_cancelled_at_its_turn_passes_turn_on() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head_of(reader)
            writer.write(CHUNKED)
            await go.wait()
            writer.write(LAST)

    go = asyncio.Event()
    async with Raw(handle) as raw, pool(limit=1) as client:
        ask = template(raw.port)
        response = await client.post(ask, b"{}")
        waiting = [asyncio.create_task(client.post(ask, b"{}")) for _ in range(2)]
        await asyncio.sleep(0)
        go.set()
        await response.read_body(Reader())
        waiting[0].cancel()  # woken in the same turn of the loop
        assert await whole(await waiting[1]) == b""
        assert raw.accepted == 1


async def test_idle_connection_to_other_server_is_closed_for_room() -> None:
    answer = OK + b"content-length: 5\r\n\r\nhello"
    async with answering(answer) as (one, _), answering(answer) as (other, _):
        async with pool(limit=1) as client:
            for raw in (one, other, one):
                assert await whole(await client.post(template(raw.port), b"{}")) == b"hello"


# Requests


async def test_large_upload_waits_for_server_to_read() -> None:
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
async def test_response_before_end_of_upload_is_read(status: int) -> None:
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


async def test_connection_with_partial_request_is_not_reused() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if raw.accepted > 1:
            writer.write(OK + b"content-length: 0\r\n\r\n")
            await reader.read()
            return
        writer.write(b"HTTP/1.1 413 No\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(TimeoutError):
            while True:  # until the client has sent everything
                async with asyncio.timeout(0.1):
                    await reader.read(65536)
        writer.write(LAST)
        await reader.read()

    async with Raw(handle) as raw, pool() as client:
        response = await client.post(template(raw.port), bytes(20_000_000))
        assert (response.status, await whole(response)) == (413, b"")
        assert (await client.post(template(raw.port), b"{}")).status == 200
        assert raw.accepted == 2


async def test_closed_connection_sends_nothing() -> None:
    class Owner:
        def on_free(self, connection: Connection) -> None: ...

        def on_lost(self, connection: Connection) -> None: ...

    connection = Connection(Owner())
    connection.connection_made(asyncio.Transport())
    connection.connection_lost(None)
    with pytest.raises(NoResponse):
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", b"")


async def test_cancelled_request_closes_connection() -> None:
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
def test_malformed_header_is_refused(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(InvalidRequest):
        Template.make(Origin("http", "api.example", 80, "api.example"), b"/", [header])


async def test_given_framing_headers_are_ignored() -> None:
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
async def test_redirects_within_origin_are_followed(location: bytes, target: bytes) -> None:
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


async def test_endless_redirects_are_refused() -> None:
    answer = b"HTTP/1.1 308 There\r\nlocation: /\r\ncontent-length: 0\r\n\r\n"
    async with answering(answer) as (raw, heads), pool() as client:
        with pytest.raises(Redirected):
            await client.post(template(raw.port), b"{}")
        assert len(heads) < 30


async def test_redirect_without_location_is_response() -> None:
    async with answering(b"HTTP/1.1 307 There\r\ncontent-length: 0\r\n\r\n") as (raw, _):
        async with pool() as client:
            assert (await client.post(template(raw.port), b"{}")).status == 307


# Connecting


async def test_refused_connection_is_error_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        async with pool() as client:
            with pytest.raises(CannotConnect):
                await client.post(template(held.getsockname()[1]), b"{}")


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "x" * 70 + ".example"])
async def test_name_without_address_is_error(host: str) -> None:
    async with pool() as client:
        with pytest.raises(CannotConnect):
            await client.post(template(80, host), b"{}")


async def test_connect_timeout_is_error() -> None:
    with socket.socket() as held, socket.socket() as first, socket.socket() as second:
        held.bind(("127.0.0.1", 0))
        held.listen(0)  # without accepting, so the backlog fills
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(held.getsockname())
        async with pool(connect_timeout=0.1) as client:
            with pytest.raises(ConnectTimeout):
                await client.post(template(held.getsockname()[1]), b"{}")


async def test_next_address_is_tried_after_refusal_or_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve = asyncio.get_running_loop().getaddrinfo

    async def addresses(host: str, port: int, **given: int) -> list[tuple[Any, ...]]:
        if host != "api.test":
            return await resolve(host, port, **given)
        return [
            (
                socket.AF_INET6,
                socket.SOCK_STREAM,
                0,
                "",
                ("::1", raw.port, 0, 0),
            ),  # refuses connections
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


async def test_name_is_resolved_once_for_many_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve = asyncio.get_running_loop().getaddrinfo

    async def addresses(host: str, port: int, **given: int) -> list[tuple[Any, ...]]:
        if host != "api.test":
            return await resolve(host, port, **given)
        lookups.append(host)
        await asyncio.sleep(0)
        if len(lookups) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    lookups: list[str] = []
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        ask = template(raw.port, "api.test")
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "getaddrinfo", addresses)
            with pytest.raises(CannotConnect):
                await client.post(ask, b"{}")
            posts = await asyncio.gather(*(client.post(ask, b"{}") for _ in range(5)))
        assert [await whole(response) for response in posts] == [b"hello"] * 5
        assert raw.accepted == 5
    assert lookups == ["api.test"] * 2, "a failure is not kept"


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


# Warm connections


async def test_next_request_uses_warm_connection() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        for _ in range(3):
            await client.warm(template(raw.port).origin)
        assert raw.accepted == 1, "one is ready"
        await whole(await client.post(template(raw.port), b"{}"))
        assert raw.accepted == 1


async def test_request_waits_for_pending_warm_connection() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        warming = asyncio.create_task(client.warm(template(raw.port).origin))
        await asyncio.sleep(0)
        await whole(await client.post(template(raw.port), b"{}"))
        await warming
        assert raw.accepted == 1


async def test_request_connects_itself_when_warm_connection_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialed: list[asyncio.Future[None]] = []

    async def fail_at_first(*arguments: Any) -> None:
        dialed.append(asyncio.get_running_loop().create_future())
        if len(dialed) == 1:
            await dialed[0]
        await dial(*arguments)

    monkeypatch.setattr("wsserver.models.http.dial", fail_at_first)
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        warming = asyncio.create_task(client.warm(template(raw.port).origin))
        await until(lambda: dialed)
        posting = asyncio.create_task(client.post(template(raw.port), b"{}"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(dialed) == 1, "the request waits for the connection made ahead"
        dialed[0].set_exception(CannotConnect("reset"))
        await warming
        assert await whole(await posting) == b"hello"
        assert (len(dialed), raw.accepted) == (2, 1)


async def test_warm_does_nothing_while_request_connects() -> None:
    async with answering(OK + b"content-length: 5\r\n\r\nhello") as (raw, _), pool() as client:
        posting = asyncio.create_task(client.post(template(raw.port), b"{}"))
        await asyncio.sleep(0)
        await client.warm(template(raw.port).origin)
        assert await whole(await posting) == b"hello"
        assert raw.accepted == 1


async def test_failed_warm_connection_is_left_to_request() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        ask = template(held.getsockname()[1])
        async with pool() as client:
            await client.warm(ask.origin)
            with pytest.raises(CannotConnect):
                await client.post(ask, b"{}")


async def test_warm_does_nothing_at_connection_limit() -> None:
    async with answering(CHUNKED + chunk(b"one")) as (raw, _), pool(limit=1) as client:
        response = await client.post(template(raw.port), b"{}")
        await client.warm(template(raw.port).origin)
        assert raw.accepted == 1
        await response.aclose()
