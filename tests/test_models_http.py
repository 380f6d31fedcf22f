"""Bodies by callback: all of what aiohttp would have said, however it is cut, and nothing more."""

import asyncio
import gzip
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import httpx2
import pytest
from aiohttp.client_proto import ResponseHandler
from hypothesis import given, settings
from hypothesis import strategies as st

from wsserver.models.http import Body, Transport, _Tap

SECONDS = 5  # that any wait may take at most
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"
LAST = b"0\r\n\r\n"
TIMEOUT = {"connect": 1.0, "pool": 1.0, "read": None, "write": None}

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Ear:
    """Keeps what it is given, and says how much it has been given."""

    def __init__(self, *, enough: bool = False) -> None:
        self.said: list[bytes] = []
        self.heard = asyncio.Semaphore(0)
        self._enough = enough

    def __call__(self, data: bytes) -> bool:
        self.said.append(data)
        self.heard.release()
        return self._enough

    @property
    def text(self) -> bytes:
        return b"".join(self.said)


# Cut anywhere


class Wire(asyncio.Transport):
    """What aiohttp thinks is its connection: reads are cut here, which no socket would promise."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        protocol.connection_made(self)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def read(self, data: bytes) -> None:
        assert isinstance(self.protocol, asyncio.Protocol)
        self.protocol.data_received(data)


async def tapped(first: bytes, ear: Ear) -> tuple[Wire, _Tap, aiohttp.StreamReader]:
    handler = ResponseHandler(asyncio.get_running_loop())
    wire = Wire(handler)
    handler.set_response_params(read_until_eof=True)
    wire.read(HEAD + b"\r\n" + first)
    _, content = await handler.read()
    tap = _Tap(content, ear, plain=True)
    tap.put_on(wire)
    tap.read()
    return wire, tap, content


# What could be taken for the framing of chunks, or is cut within it.
PAYLOADS = st.lists(
    st.binary(min_size=1, max_size=20)
    | st.sampled_from(
        [b"\r\n", b"0\r\n\r\n", b"5\r\n", chunk(b"hello"), b"a" * 300, b"5\r\nhello"]
    ),
    max_size=12,
)


@given(payloads=PAYLOADS, cuts=st.sets(st.integers(0, 400), max_size=12))
@settings(max_examples=300, deadline=None)
async def test_all_is_said_however_it_is_cut(payloads: list[bytes], cuts: set[int]) -> None:
    body = b"".join(map(chunk, payloads)) + LAST
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    parts = [body[a:b] for a, b in itertools.pairwise(edges)]
    ear = Ear()
    wire, tap, content = await tapped(parts[0], ear)
    for part in parts[1:]:
        assert not tap.over.done()
        if part:
            wire.read(part)
    assert await asyncio.wait_for(tap.over, SECONDS) is True
    assert ear.text == b"".join(payloads)
    assert content.is_eof()
    assert isinstance(wire.protocol, ResponseHandler), "which serves the next request"


async def test_what_comes_in_whole_chunks_goes_past_aiohttp() -> None:
    ear = Ear()
    wire, tap, content = await tapped(b"", ear)
    for number in range(100):
        wire.read(chunk(b"%d" % number) + chunk(b"x"))
    wire.read(b"2")  # cut: aiohttp's again, and then ours
    wire.read(b"\r\nyy\r\n")
    for _ in range(100):
        wire.read(chunk(b"z"))
    wire.read(LAST)
    assert await asyncio.wait_for(tap.over, SECONDS) is True
    assert ear.text == b"".join(b"%dx" % n for n in range(100)) + b"yy" + b"z" * 100
    assert content.total_bytes < 10, "the first read, the one that was cut, and the one after it"


@pytest.mark.parametrize(
    "damage", [b"zz\r\nhello\r\n", b"-5\r\nhello\r\n", b"5\r\nhelloXX", b"0x5\r\nhello\r\n"]
)
async def test_damaged_framing_is_an_error(damage: bytes) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + chunk(b"one"))
        await ear.heard.acquire()
        writer.write(damage + LAST)
        writer.write_eof()

    ear = Ear()
    async with asking(answer) as ask:
        body = await ask()
        with pytest.raises(httpx2.ReadError):
            await body.pour(ear)
        await body.aclose()
    assert ear.text in {b"one", b"onehello"}


# Over real connections


@asynccontextmanager
async def asking(answer: Answer) -> AsyncIterator[Callable[[], Awaitable[Body]]]:
    """Serve that answer to each request, and give what sends one and returns the body."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await answer(reader, writer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
            serving.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    transport = Transport(10)

    async def ask() -> Body:
        request = httpx2.Request("GET", url, extensions={"timeout": TIMEOUT})
        response = await transport.handle_async_request(request)
        body = response.extensions["body"]
        assert isinstance(body, Body)
        return body

    async with asyncio.timeout(2 * SECONDS):
        try:
            yield ask
        finally:
            await transport.aclose()
            server.close()
            if serving:
                await asyncio.wait(serving)


async def test_a_connection_serves_the_next_request_after_a_whole_body() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername"))
        writer.write(HEAD + b"\r\n" + chunk(b"one"))
        await ear.heard.acquire()
        writer.write(chunk(b"two"))
        await ear.heard.acquire()
        writer.write(LAST)

    peers: set[object] = set()
    ear = Ear()
    async with asking(answer) as ask:
        for _ in range(3):
            body = await ask()
            assert await body.pour(ear) is True
            await body.aclose()
    assert ear.said == 3 * [b"one", b"two"]
    assert len(peers) == 1


@pytest.mark.parametrize("packed", [True, False])
async def test_compressed_and_counted_bodies_are_read_too(packed: bool) -> None:
    text = b"hello " * 50_000
    sent = gzip.compress(text) if packed else text
    encoding = b"content-encoding: gzip\r\n" if packed else b""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = b"content-length: %d\r\n" % len(sent)
        writer.write(b"HTTP/1.1 200 OK\r\n" + encoding + length + b"\r\n" + sent)

    ear = Ear()
    async with asking(answer) as ask:
        body = await ask()
        assert await body.pour(ear) is True
        await body.aclose()
    assert ear.text == text


async def test_enough_is_enough_and_the_rest_can_be_had() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + chunk(b"one"))
        await more.wait()
        writer.write(chunk(b"two") + LAST)

    more = asyncio.Event()
    some, rest = Ear(enough=True), Ear()
    async with asking(answer) as ask:
        body = await ask()
        assert await body.pour(some) is False
        more.set()
        assert await body.pour(rest) is True
        await body.aclose()
    assert (some.text, rest.text) == (b"one", b"two")


async def test_what_the_callback_raises_comes_out() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + chunk(b"one"))

    def take(data: bytes) -> bool:
        raise LookupError(data)

    async with asking(answer) as ask:
        body = await ask()
        with pytest.raises(LookupError, match="one"):
            await body.pour(take)
        await body.aclose()


async def test_a_body_that_is_cut_says_so_after_what_came_before() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + chunk(b"one"))
        await ear.heard.acquire()
        writer.close()

    ear = Ear()
    async with asking(answer) as ask:
        body = await ask()
        with pytest.raises(httpx2.ReadError):
            await body.pour(ear)
        await body.aclose()
    assert ear.said == [b"one"]


async def test_to_close_early_closes_the_connection() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + chunk(b"one"))
        closed.set_result(await reader.read())

    closed: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    ear = Ear()
    async with asking(answer) as ask:
        body = await ask()
        pouring = asyncio.create_task(body.pour(ear))
        await ear.heard.acquire()
        pouring.cancel()
        await asyncio.wait({pouring})
        await body.aclose()
        assert await closed == b""
