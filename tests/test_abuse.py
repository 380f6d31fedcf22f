"""Whoever abuses the server hurts nobody but themselves.

The server is a process of its own. In each test somebody else chats meanwhile, from another
address, and is served as if nothing were; see :func:`tests.support.abuse.meanwhile`.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import jwt
import pytest
from websockets.frames import Opcode

import wsserver
from tests.support.abuse import (
    HERE,
    MEBIBYTE,
    MODEL,
    ROOT,
    Peer,
    Served,
    certificate,
    exchange,
    frame,
    meanwhile,
    served,
)
from tests.support.client import Client, client
from tests.support.process import run
from tests.support.puppet import BOUND, until
from tests.support.upstream import Answer, Hang, Received, Script, Upstream, reply
from wsserver.limits import SWEEP, Budget, Rates, Shares
from wsserver.logs import MAX_LINES, WINDOW
from wsserver.prices import NOTHING

pytestmark = pytest.mark.slow

GROWTH = 20 * MEBIBYTE  # that the server may take of memory for any abuse
# Descriptors beyond the limit: a hundred who are turned away, who have just been accepted, and who
# are about to be closed, and a few others.
AT_THE_DOOR = 350
FRAMES = ("--frame-rate", "5", "--frame-burst", "40")
NOBODY = 65534  # a user who can be another
PING = '{"type": "ping"}'
SECRET = "hunter2-planted"
NASTY = "a\x1b[2Jb\r\nc\x00\x85\u2028\u2029\u202e\u200bé\x9b31m end"
KEY = "sk-ant-" + SECRET
KEPT = 2  # connections to the API that one client leaves idle: of its replies, and a warm one


@contextlib.asynccontextmanager
async def flat(server: Served, growth: int = GROWTH, kept: int = 0) -> AsyncIterator[None]:
    """Nothing is left of what happens in the block, and it takes little memory at its peak.

    Args:
        server: which.
        growth: bytes of memory at its peak.
        kept: connections to the model's API that may be idle in the end.
    """
    memory, descriptors = server.memory, server.descriptors
    yield
    await server.reaches(connections_open=0, generations_running=0)
    await until(lambda: server.descriptors <= descriptors + kept)
    assert server.peak - memory < growth


async def each(count: int, abuse: Any, *arguments: Any) -> list[Any]:
    """Do it so many times at once; return what came of each."""
    return await asyncio.gather(*(abuse(*arguments) for _ in range(count)))


# Floods.


async def test_a_flood_of_pings_closes_the_socket() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            peer.write(frame(opcode=Opcode.PING) * 1000)
            assert await peer.close_code() == 1008
            await peer.flood(frame(opcode=Opcode.PING) * 1000)

    limits = (*FRAMES, "--send-timeout", "1")
    async with served(*limits) as server, flat(server):
        await meanwhile(server, each(20, abuse, server), most=15)
        await server.said("connection", code=1008)


async def test_a_flood_of_pings_from_one_that_never_reads_ends_in_an_abort() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server, narrow=True) as peer:
            await peer.flood(frame(b"x" * 125, Opcode.PING) * 100)

    async with served() as server, flat(server):
        await meanwhile(server, each(5, abuse, server))
        await server.said("reader aborted", reason="too much unsent")
        assert (await server.metrics())[
            'wsserver_readers_aborted_total{why="too much unsent"}'
        ] == 5


async def test_a_flood_of_frames_gets_limit_and_then_1008() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            peer.write(frame('{"prompt": "hang", "id": "0123456789abcdef"}'.replace("0", "a")))
            peer.write(frame(PING) * 50 + frame('{"type": "stop", "id": "a123456789abcdef"}'))
            frames = []
            async for message in peer.texts():
                frames.append(message)
                if message["type"] == "done":
                    break
            assert (frames[-1]["reason"], frames[-1]["by"]) == ("stopped", "client")
            limits = [message for message in frames if message["type"] == "error"]
            assert {message["code"] for message in limits} == {"limit"}
            assert all(message["retry_after"] > 0 for message in limits)
            assert 5 <= len(limits) <= 11
            peer.write(frame(PING) * 100)
            assert await peer.close_code() == 1008

    async with served(*FRAMES, "--grace", "0") as server, flat(server):
        await meanwhile(server, abuse(server), most=15)
        await server.said("generation", id="a123456789abcdef", reason="stopped", by="client")
        await server.said("connection", code=1008)


async def test_a_flood_of_frames_from_one_that_never_reads_ends_too() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server, narrow=True) as peer:
            await peer.flood(frame(PING) * 100)

    limits = (*FRAMES, "--send-timeout", "1")
    async with served(*limits) as server, flat(server):
        await meanwhile(server, each(5, abuse, server), most=15)


# Readers.


async def test_one_that_stops_reading_is_aborted_and_holds_up_nobody() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server, narrow=True) as peer:
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            peer.write(frame('{"prompt": "talk 50000", "id": "0123456789abcdef"}'))
            async with server.client() as other:
                await other.send({"prompt": "talk 50000", "id": "0123456789abcdef"})
                text, done = await other.text("0123456789abcdef")
                assert len(text) == 50_000 * 16 + 4
                assert done["reason"] == "end_turn"
            await server.said("reader aborted", reason="does not read")

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, abuse(server))


# Handshakes.


async def test_slow_handshakes_are_cut_and_no_more_than_the_limits_are_taken() -> None:
    async def nothing(peer: Peer) -> bytes:
        return await peer.rest()

    async def a_byte_at_a_time(peer: Peer) -> bytes:
        with contextlib.suppress(ConnectionError):
            for byte in Peer.HANDSHAKE * 10:
                peer.write(bytes([byte]))
                await peer.writer.drain()
                await asyncio.sleep(0.02)  # which is the abuse
        return await peer.rest()

    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server)) for _ in range(150)]
            slow = [
                asyncio.ensure_future((nothing if number % 2 else a_byte_at_a_time)(peer))
                for number, peer in enumerate(peers)
            ]
            async with Peer.open(server) as one_too_many:
                answer = await one_too_many.rest()
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nRetry-After: 10\r\n" in answer
            elsewhere = [
                await stack.enter_async_context(Peer.open(server, "127.0.0.4")) for _ in range(49)
            ]
            async with Peer.open(server, "127.0.0.5") as one_too_many:
                answer = await one_too_many.upgrade()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert (await server.get("/healthz"))[0] == 200
            assert b"\r\nRetry-After: 10\r\n" in answer
            assert set(await asyncio.gather(*slow)) == {b""}
            assert {await peer.rest() for peer in elsewhere} == {b""}

    limits = ("--connections-per-address", "150", "--connections", "200", "--open-timeout", "2")
    async with served(*limits) as server, flat(server):
        await meanwhile(server, abuse(server))
        await server.said("connection refused", why="limit", address=HERE)
        await exchange(server)


async def test_handshakes_of_tls_count_and_are_cut(tmp_path: Path) -> None:
    file = await certificate(tmp_path)

    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server)) for _ in range(600)]
            assert server.descriptors < before + 50 + AT_THE_DOOR
            async with Peer.open(server, tls=server.tls) as one_too_many:
                answer = await one_too_many.upgrade()
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nRetry-After: 10\r\n" in answer
            assert {await peer.rest() for peer in peers} == {b""}

    limits = ("--connections-per-address", "50", "--open-timeout", "2", "--cert", str(file))
    async with served(*limits) as server, flat(server, 2 * GROWTH):
        before = server.descriptors
        await meanwhile(server, abuse(server))
        await server.said("connection refused", why="limit", address=HERE)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_strangers_leave_descriptors_for_everybody_else(loop: str) -> None:
    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for number in range(400):
                source = f"127.0.1.{number % 8 + 1}"
                peer = await stack.enter_async_context(Peer.open(server, source))
                if number % 2:
                    peer.write(Peer.HANDSHAKE + b"\r\n")
            assert (await server.get("/healthz"))[0] == 200
            assert server.descriptors < 256 - 40  # which replies would take

    options = ("--event-loop", loop, "--connections-per-address", "100")
    model = "anthropic:claude-sonnet-4-6"
    async with Upstream() as upstream:
        upstream.default = reply("fine")
        environment = {"ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": KEY}
        async with served(*options, model=model, descriptors="256", **environment) as server:
            async with flat(server, kept=KEPT):
                lines = len(server.log)
                await meanwhile(server, abuse(server))
            # Besides those of the replies of who chats meanwhile.
            others = [line for line in server.log[lines:] if '"event": "generation"' not in line]
            assert len(others) <= 2 * MAX_LINES + 20
            assert all('"level": "info"' in line for line in others)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_a_server_out_of_memory_ends_with_one_line(loop: str) -> None:
    command = ("-m", "wsserver", "serve", "--port", "0", "--store", "memory:", "--model", MODEL)
    limits = ("--event-loop", loop, "--grace", "60", "--grace-tokens", "1000000")
    async with run(*command, *limits, cwd=ROOT) as process:
        server = Served(process, (await process.line(r"(ws://\S+)"))[1])
        async with server.client() as chat:
            await exchange(server, chat)
        size = server._status("VmSize") * 1024 + 8 * MEBIBYTE
        resource.prlimit(server.pid, resource.RLIMIT_AS, (size, size))
        async with contextlib.AsyncExitStack() as stack:
            # Not a reply is read, and each grows up to four million characters.
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                while process.process.returncode is None:
                    peer = await stack.enter_async_context(Peer.websocket(server))
                    peer.write(frame('{"prompt": "talk 250000"}'))
            assert await process.end() == 1
    words = [line for line in process.output.splitlines() if "out of memory" in line]
    assert len(words) == 1
    assert len(process.output) < 100_000


async def test_those_turned_away_who_do_not_go_take_no_descriptors() -> None:
    async def abuse(server: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(1000):
                await stack.enter_async_context(Peer.open(server))
            assert server.descriptors < before + 10 + AT_THE_DOOR

    async with served("--connections-per-address", "10") as server, flat(server):
        before = server.descriptors
        await meanwhile(server, abuse(server))


async def test_sockets_that_are_half_closed_are_closed() -> None:
    async def before_the_handshake(peer: Peer) -> None:
        peer.shut()

    async def within_it(peer: Peer) -> None:
        peer.write(Peer.HANDSHAKE)
        peer.shut()

    async def with_its_end(peer: Peer) -> None:
        peer.write(Peer.HANDSHAKE + b"\r\n")
        peer.shut()

    async def after_it(peer: Peer) -> None:
        await peer.upgrade()
        peer.shut()

    async def within_a_frame(peer: Peer) -> None:
        await peer.upgrade()
        peer.write(frame(PING)[:-3])
        peer.shut()

    async def mid_stream(peer: Peer) -> None:
        await peer.upgrade()
        peer.write(frame('{"prompt": "hang"}'))
        async for message in peer.texts():
            if message["type"] == "token":
                break
        peer.shut()

    async def abuse(server: Served, how: Any) -> None:
        async with Peer.open(server) as peer:
            await how(peer)
            await peer.rest()

    async with served("--grace", "0") as server, flat(server):
        ways = (
            before_the_handshake,
            within_it,
            with_its_end,
            after_it,
            within_a_frame,
            mid_stream,
        )
        await meanwhile(server, asyncio.gather(*(each(20, abuse, server, way) for way in ways)))
        await server.said("generation", reason="stopped", by="disconnect")
        await server.said("connection", code=1006)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nCookie: " + b"x" * 100_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"Sec-WebSocket-Protocol: " + b"a," * 4000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + (b"Connection: " + b"a," * 4000 + b"\r\n") * 118, b"431"),
        (b"\x16\x03\x01\x02\x00\n" * 1000, b"400"),
    ],
    ids=["request line", "header", "many headers", "list", "lists", "noise"],
)
async def test_a_huge_request_is_refused(head: bytes, status: bytes) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.open(server) as peer:
            peer.write(head)
            answer = await peer.rest()
            assert answer.split(b" ")[1] == status
        async with Peer.open(server) as peer:  # and one that goes on and on
            await peer.flood(head, 20 * MEBIBYTE // len(head))

    async with served("--open-timeout", "1") as server, flat(server):
        await meanwhile(server, each(5, abuse, server))


# Messages.


def oversize() -> dict[str, Iterable[bytes]]:
    fragment = frame("x" * 8192, Opcode.CONT, fin=False)
    return {
        "whole": [frame("x" * 70_000)],
        "announced": [b"\x81\xff" + (2**62).to_bytes(8) + b"mask", b"x" * 65_536] * 100,
        "in fragments without end": [frame("x", fin=False), *[fragment] * 1000],
        "in tiny fragments without end": [
            frame("x", fin=False),
            frame("x", Opcode.CONT, fin=False) * 50_000,
        ],
    }


@pytest.mark.parametrize("parts", oversize().values(), ids=oversize().keys())
async def test_an_oversize_message_closes_with_1009(parts: Iterable[bytes]) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            for part in parts:
                peer.write(part)
            assert await peer.close_code() == 1009

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, each(10, abuse, server))
        await server.said("connection", code=1009)


async def test_one_that_stays_after_1009_is_cut() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            peer.write(frame("x" * 70_000))
            assert await peer.close_code() == 1009
            await server.reaches(connections_open=1)

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, each(10, abuse, server))


async def test_a_compressed_bomb_closes_with_1002() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.open(server) as peer:
            answer = await peer.upgrade(b"Sec-WebSocket-Extensions: permessage-deflate")
            assert b"101" in answer.split(b"\r\n")[0]
            assert b"extensions" not in answer.lower()
            first, *others = frame(b"\x00" * 60_000, Opcode.BINARY)
            peer.write(bytes([first | 0x40, *others]))  # RSV1, which says that it is compressed
            assert await peer.close_code() == 1002

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, each(10, abuse, server))
        await server.said("connection", code=1002)


# Storms.


async def test_a_storm_of_reconnects_is_served_or_told_when_to_come_back() -> None:
    clients = [
        (f"127.0.1.{1 + n % 3 // 2}", f"storm-{n:04}-{secrets.token_hex(4)}") for n in range(360)
    ]
    statuses: Counter[int] = Counter()

    async def enter(peer: Peer) -> bool:
        answer = await peer.upgrade()
        status = int(answer.split()[1])
        statuses[status] += 1
        assert status == 101 or b"\r\nRetry-After: 10\r\n" in answer, answer
        return status == 101

    async def cut_off(server: Served, source: str, name: str) -> None:
        async with Peer.open(server, source) as peer:
            if await enter(peer):
                peer.write(frame(json.dumps({"prompt": "talk 5", "id": name})))

    async def come_back(
        server: Served, source: str, name: str, all_here: asyncio.Barrier | None
    ) -> bool:
        async with Peer.open(server, source) as peer:
            welcome = await enter(peer)
            if all_here is not None:
                async with asyncio.timeout(BOUND):
                    await all_here.wait()
            if not welcome:
                return False
            peer.write(frame(json.dumps({"type": "resume", "id": name})))
            async for message in peer.texts():
                if message.get("code") == "not_found":  # it was cut off before it could ask
                    peer.write(frame(json.dumps({"prompt": "talk 5", "id": name})))
                elif message["type"] == "done":
                    assert message["reason"] == "end_turn"
                    return True
                else:
                    assert message["type"] in {"start", "token"}, message
            raise AssertionError("the connection ended")

    async def abuse(server: Served) -> None:
        for _ in range(3):
            await asyncio.gather(*(cut_off(server, *one) for one in clients))
        await server.reaches(connections_open=1)
        statuses.clear()
        all_here = asyncio.Barrier(len(clients))
        back = await asyncio.gather(*(come_back(server, *one, all_here) for one in clients))
        assert statuses == {101: 199, 429: statuses[429], 503: statuses[503]}
        assert statuses[429]
        assert statuses[503]
        for one, done in zip(clients, back, strict=True):
            assert done or await come_back(server, *one, None)

    limits = ("--connections", "200", "--connections-per-address", "100")
    async with served(*limits) as server, flat(server, 2 * GROWTH):
        await meanwhile(server, abuse(server))


class Listener(Upstream):
    """An API that answers one who behaves, and is still at it when the others stop."""

    def receive(self, received: Received) -> Script:
        script = super().receive(received)
        said = received.body["messages"][-1]["content"]
        return reply("fine") if "speak" in json.dumps(said) else script


async def stop_at_once(chat: Client, count: int) -> None:
    """Have so many replies stopped as they start."""
    for _ in range(count):
        name = secrets.token_hex(8)
        await chat.send({"prompt": "hang", "id": name})
        await chat.send({"type": "stop", "id": name})
        done = await chat.next("done", "error")
        assert (done["id"], done.get("reason"), done.get("by")) == (name, "stopped", "client")


async def test_prompts_that_are_stopped_at_once_leave_nothing() -> None:
    async def abuse(server: Served) -> None:
        async with server.client() as chat:
            await stop_at_once(chat, 50)

    async with Listener() as upstream:
        upstream.default = reply("Hello ", Hang())
        environment = {"ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": "sk-key"}
        model = "anthropic:claude-sonnet-4-6"
        async with served(model=model, **environment) as server:
            await meanwhile(server, each(6, abuse, server))
            await server.reaches(generations_running=0, connections_open=0)
            await until(lambda: upstream.open == 0)
            await until(lambda: len(upstream.connections) <= KEPT)
            assert len(upstream.requests) > 10
            settings = wsserver.Settings(tokens_per_day=10_000_000, generations_per_principal=10)
        await stopped_within(upstream, settings)


async def stopped_within(upstream: Upstream, settings: wsserver.Settings) -> None:
    """Do the same in this process, to look into the books."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTHROPIC_BASE_URL", upstream.url)
        patch.setenv("ANTHROPIC_API_KEY", "sk-key")
        given = settings.model_dump() | {"port": 0, "model": "anthropic:claude-sonnet-4-6"}
        given |= {"drain_timeout": 0, "store": "memory:"}
        tasks = asyncio.all_tasks()
        async with wsserver.serve(**given) as server:
            hub = server.app.hub
            async with client(server) as chat:
                await stop_at_once(chat, 100)
            await until(lambda: not server.app.connections)
            assert hub.live == hub.tasks == len(hub.accounts) == 0
            assert hub.accounts.reserved("anonymous") == NOTHING
        await until(lambda: upstream.open == 0)
        await until(lambda: len(asyncio.all_tasks() - tasks) == 0)


# What is said.


def lines(server: Served) -> list[dict[str, Any]]:
    """Return the events of the log, each of them a line that nothing can disguise."""
    text = "".join(server.log)
    assert all(line.isprintable() for line in text.rstrip("\n").split("\n")), text
    found = [line for line in server.log if not line.startswith(("wsserver ", "  "))]
    return [json.loads(line) for line in found]


async def test_whatever_it_is_told_of_an_event_is_one_line_of_json(tmp_path: Path) -> None:
    names = {"al\x1b[31mice": "token-1", "b\u202eob\u200b": "token-2"}
    file = tmp_path / "tokens"
    file.write_text(
        "".join(
            f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"
            for name, token in names.items()
        )
    )

    async def frames(server: Served, name: str, token: str) -> None:
        options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {token}"}}
        async with server.client(**options) as chat:
            await chat.send({"type": "auth", "token": token})
            assert (await chat.receive())["principal"] == name
            for sent in (
                {"prompt": NASTY, "id": "0123456789" + NASTY},
                {"type": NASTY},
                {NASTY: NASTY},
                {"type": "rename", "conversation": "0123456789abcdef", "title": NASTY},
                {"type": "list", "before": NASTY},
                {"prompt": "x", "model": NASTY},
            ):
                await chat.send(json.dumps(sent))
                assert (await chat.receive())["type"] == "error"
            start = await chat.prompt(NASTY)
            await chat.text(start["id"])
            for raw in (NASTY, f'{{"type": "{NASTY}', '{"type": "\ud83d"}'):
                await chat.send(raw.encode(errors="replace").decode())
                assert (await chat.receive())["type"] == "error"

    async def requests(server: Served) -> None:
        for header in (b"Host: ", b"Host: localhost\r\nOrigin: ", b"User-Agent: "):
            for nasty in (
                NASTY.encode(),
                b"http://x\xe2\x80\xa8\x9b2J\x85\xe2\x80\xae",
                b"\x1b[2J\x00",
                b'"}\\u000a{"event": "forged"}',
            ):
                async with Peer.open(server) as peer:
                    peer.write(Peer.HANDSHAKE.replace(b"Host: localhost", header + nasty))
                    peer.write(b"\r\n")
                    answer = await peer.rest()
                    assert not answer.startswith(b"HTTP/1.1 101")

    async def abuse(server: Served) -> None:
        await asyncio.gather(*(frames(server, *one) for one in names.items()), requests(server))

    bearer: dict[str, Any] = {"additional_headers": {"Authorization": "Bearer token-1"}}
    async with served("--token-file", str(file), bearer="token-1") as server:
        await meanwhile(server, abuse(server), **bearer)
        await server.reaches(connections_open=0)
        principals = {event.get("principal") for event in lines(server)}
        assert principals >= {r"al\x1b[31mice", r"b\u202eob\u200b"}
        assert {event["event"] for event in lines(server)} == {
            "connection",
            "connection refused",
            "generation",
        }


async def test_a_signed_token_with_a_name_that_cannot_be_shown_is_refused() -> None:
    secret = secrets.token_hex()

    def token(name: str) -> str:
        return jwt.encode({"sub": name, "exp": time.time() + 600}, secret, "HS256")

    async def abuse(server: Served) -> None:
        for name in (NASTY, "alice\n", "\u202ealice", "\x1b]0;alice\x07", "a\u2028lice"):
            async with Peer.open(server) as peer:
                answer = await peer.upgrade(f"Authorization: Bearer {token(name)}".encode())
                assert b" 401 " in answer
            async with Peer.websocket(server) as peer:
                peer.write(frame(json.dumps({"type": "auth", "token": token(name)})))
                assert [message["code"] async for message in peer.texts()] == ["unauthenticated"]
                assert peer.code == 1008

    alice = token("alice")
    async with served(WSSERVER_JWT_SECRET=secret, bearer=alice) as server:
        options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {alice}"}}
        await meanwhile(server, abuse(server), **options)
        await server.reaches(connections_open=0)
        principals = {event.get("principal") for event in lines(server)}
        assert principals == {"alice", None}


@pytest.mark.parametrize("where", ["body", "header", "event"])
async def test_no_secret_of_the_api_gets_out(where: str) -> None:
    body = json.dumps({"type": "error", "error": {"type": SECRET, "message": SECRET}})
    script: Script | Answer
    if where == "body":
        script = Answer(400, "application/json", body)
    elif where == "header":
        script = Answer(500, "text/html", "x", {"request-id": SECRET, "x-why": SECRET})
    else:
        script = reply(f"event: error\ndata: {body}\n\n".encode(), Hang())
    seen: list[str] = []
    ids: list[str] = []

    async def abuse(server: Served) -> None:
        async with server.client() as chat:
            await chat.prompt("leak")
            await chat.next("error")
            ids.append(chat.frames[0]["id"])
            seen.append(str(chat.frames))

    async with Listener() as upstream:
        upstream.default = script if isinstance(script, Script) else Script((script,))
        environment = {"ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": KEY}
        model = "anthropic:claude-sonnet-4-6"
        async with served("--retries", "0", model=model, **environment) as server:
            await meanwhile(server, abuse(server))
            await server.said("generation", id=ids[0])
            seen += await told(server)
    assert SECRET not in "".join(seen)


async def told(server: Served) -> list[str]:
    """Return all that the server says to its operator."""
    pages = [(await server.get(path))[1] for path in ("/metrics", "/readyz", "/healthz", "/")]
    return [*pages, *server.log, server.process.output]


async def test_no_token_and_no_exception_gets_out(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    good = "good-" + SECRET
    file.write_text(f"alice sha256:{hashlib.sha256(good.encode()).hexdigest()}\n")
    options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {good}"}}
    seen: list[str] = []

    async def abuse(server: Served) -> None:
        async with server.client(**options) as chat:
            await chat.send({"type": "auth", "token": good})
            await chat.next("authenticated")
            failed = await chat.prompt("fail " + SECRET)
            assert (await chat.next("error", id=failed["id"]))["code"] == "internal"
            await chat.send({"type": "auth", "token": "bad-" + SECRET})
            assert (await chat.next("error"))["code"] == "unauthenticated"
            await chat.send({"type": "auth", "token": SECRET, "more": SECRET})
            await chat.next("error")
            seen.append(str(chat.frames).replace(f"more: {SECRET}", ""))
        async with server.client() as chat:
            await chat.send({"type": "auth", "token": "bad-" + SECRET})
            seen.append(str(await chat.closed()) + str(chat.frames))
        query = f"/?token={SECRET}&access_token={SECRET}".encode()
        for token in (b"", f"Authorization: Bearer bad-{SECRET}\r\n".encode()):
            for path in (query, b"/nowhere" + query, b"/metrics" + query):
                async with Peer.open(server) as peer:
                    peer.write(Peer.HANDSHAKE.replace(b"GET /", b"GET " + path) + token)
                    peer.write(b"Origin: http://evil.example\r\n\r\n")
                    answer = await peer.rest()
                    assert not answer.startswith(b"HTTP/1.1 101")
                    seen.append(answer.decode())

    async with served("--token-file", str(file), bearer=good) as server:
        await meanwhile(server, abuse(server), **options)
        await server.reaches(connections_open=0)
        seen += await told(server)
        await server.said("generation", error="internal", failure="RuntimeError")
    assert SECRET not in "".join(seen)


# Strangers.


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"alice sha256:{hashlib.sha256(b'token').hexdigest()}\n")
    return file


BEARER: dict[str, Any] = {"additional_headers": {"Authorization": "Bearer token"}}


async def test_guessing_tokens_costs_a_connection_each(token_file: Path) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            guess = json.dumps({"type": "auth", "token": secrets.token_hex()})
            peer.write(frame(guess) * 3 + frame('{"type": "auth", "token": "token"}'))
            codes = [message["code"] async for message in peer.texts()]
            assert codes == ["unauthenticated"]
        async with Peer.open(server) as peer:
            answer = await peer.upgrade(b"Authorization: Bearer " + secrets.token_hex().encode())
            assert answer.startswith(b"HTTP/1.1 401 ")

    async with served("--token-file", str(token_file), bearer="token") as server, flat(server):
        await meanwhile(server, each(100, abuse, server), **BEARER)
        await server.said("connection", code=1008)
        await server.said("connection refused", why="unauthenticated")


def socket_of_another_user(server: Served) -> socket.socket:
    os.seteuid(NOBODY)  # a socket belongs to the user who makes it
    try:
        sock = socket.socket()
    finally:
        os.seteuid(0)
    sock.connect((HERE, server.port))
    return sock


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
async def test_another_user_of_the_machine_is_refused() -> None:
    served_ones = 'wsserver_connections_total{outcome="served"}'

    async def abuse(server: Served) -> None:
        before = (await server.metrics())[served_ones]
        async with contextlib.AsyncExitStack() as stack:
            statuses = Counter[bytes]()
            for _ in range(60):
                peer = Peer(*await asyncio.open_connection(sock=socket_of_another_user(server)))
                stack.callback(peer.drop)
                statuses[(await peer.upgrade())[9:12]] += 1
                assert b"list" not in await peer.rest()
            assert set(statuses) <= {b"403", b"429"}
            async with Peer.websocket(server):  # of the server's own user, from the same address
                pass
        for number in range(40):  # who leaves at once is nobody to the kernel
            with socket_of_another_user(server) as sock:
                if number % 2:
                    reset = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                sock.send(Peer.HANDSHAKE + b"\r\n" + frame('{"prompt": "hang"}'))
        assert (await server.metrics())[served_ones] == before + 1

    async with served("--connections-per-address", "50") as server, flat(server):
        await meanwhile(server, abuse(server))
        await server.said("connection refused", why="unauthenticated", address=HERE)


def of_strangers(server: Served, name: str) -> list[dict[str, Any]]:
    return [event for event in server.events(name) if "principal" not in event]


def left_out(server: Served, name: str) -> int:
    return sum(event.get(name, 0) for event in server.events("lines left out"))


async def test_strangers_cannot_fill_the_log(token_file: Path) -> None:
    async def come_and_go(server: Served) -> None:
        for _ in range(MAX_LINES):
            async with Peer.websocket(server):
                pass
            async with Peer.open(server) as peer:
                answer = await peer.upgrade(b"Origin: http://" + 200 * b"\x9b")
                assert answer.startswith(b"HTTP/1.1 403 ")

    async with served("--token-file", str(token_file), bearer="token") as server, flat(server):
        lines, began = len(server.log), time.monotonic()
        await meanwhile(server, each(10, come_and_go, server), most=15, **BEARER)
        await server.reaches(connections_open=0)
        windows = 2 + (time.monotonic() - began) // WINDOW
        for name in ("connection", "connection refused"):
            written = len(of_strangers(server, name))
            assert MAX_LINES <= written <= windows * MAX_LINES, name
            async with asyncio.timeout(2 * BOUND):
                while written + left_out(server, name.replace(" ", "_")) < 10 * MAX_LINES:
                    await server.metrics()
        assert len(server.log) - lines <= 2 * windows * MAX_LINES + 50
        assert max(map(len, server.log[lines:])) < 1500
        # A flood of strangers takes no line of those who say who they are.
        assert any(event.get("principal") == "alice" for event in server.events("connection"))


async def test_one_that_never_says_who_it_is_is_cut(token_file: Path) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            codes = [message["code"] async for message in peer.texts()]
            assert codes == ["unauthenticated"]

    timeout = ("--auth-timeout", "1")
    options = ("--token-file", str(token_file), *timeout)
    async with served(*options, bearer="token") as server, flat(server):
        await meanwhile(server, each(100, abuse, server), **BEARER)


async def test_frames_before_auth_are_refused_and_too_many_close_the_socket(
    token_file: Path,
) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            for kind in ('"prompt": "hang"', '"type": "list"', '"type": "stop"', '"type": "ping"'):
                peer.write(frame(f"{{{kind}}}") * 100)
            texts = [message async for message in peer.texts()]
            codes = {message["code"] for message in texts if message["type"] == "error"}
            assert codes <= {"unauthenticated", "limit", "not_running"}
            assert len(texts) < 40 + 40

    options = ("--token-file", str(token_file), *FRAMES)
    async with served(*options, bearer="token") as server, flat(server):
        await meanwhile(server, each(20, abuse, server), most=15, **BEARER)
        await server.said("connection", code=1008)
        assert not [e for e in server.events("generation") if e["principal"] != "alice"]


async def test_costly_frames_before_auth_are_not_parsed_and_close_the_socket(
    token_file: Path,
) -> None:
    costly = frame('{"messages": [' + ",".join(["{}"] * 21_000) + "]}")

    async def abuse(server: Served) -> None:
        for _ in range(10):
            async with Peer.websocket(server) as peer:
                for _ in range(10):
                    peer.write(costly * 2 + frame(PING))
                texts = [message async for message in peer.texts()]
                codes = Counter(message["code"] for message in texts if message["type"] == "error")
                assert peer.code == 1008
                assert codes["unauthenticated"] == 20

    options = ("--token-file", str(token_file), *FRAMES)
    async with served(*options, bearer="token") as server, flat(server):
        await meanwhile(server, each(10, abuse, server), most=15, **BEARER)
        await server.said("connection", code=1008)


async def test_unfinished_messages_before_auth_take_their_bytes_and_no_more(
    token_file: Path,
) -> None:
    empty = frame("{", fin=False) + frame(b"", Opcode.CONT, fin=False) * 4095
    unfinished = frame("x" * 60_000)[:-1]

    async def abuse(server: Served, source: str) -> None:
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server, source)) for _ in range(100)]
            for peer in peers:
                await peer.upgrade(b"Origin: http://localhost")
                peer.write(empty)
            assert [await peer.close_code() for peer in peers] == [1009] * len(peers)
        async with contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer.open(server, source)) for _ in range(100)]
            for peer in peers:
                await peer.upgrade(b"Origin: http://localhost")
                peer.write(unfinished)
            closed = Counter([await peer.close_code() for peer in peers])
            assert closed[1013] > 0  # at once, and
            assert closed[1008] > 0  # as none of them has said who it is

    options = ("--token-file", str(token_file), "--auth-timeout", "3", "--hosts", "chat.test")
    memory = ("--memory", str(16 * MEBIBYTE), "--history-size", "1000")
    async with served(*options, *memory, bearer="token") as server, flat(server):
        sources = (abuse(server, f"127.0.3.{number}") for number in range(1, 4))
        await meanwhile(server, asyncio.gather(*sources), **BEARER)
        await server.said("connection", code=1009)


async def test_many_addresses_do_not_fill_the_memory() -> None:
    async def abuse(server: Served) -> None:
        for number in range(1000):
            forwarded = f"X-Forwarded-For: 2001:db8:{number // 100:x}:{number % 100:x}::1"
            async with Peer.open(server, "127.0.0.1") as peer:
                assert b" 101 " in await peer.upgrade(forwarded.encode())
                peer.write(frame(json.dumps({"prompt": "speak"})))
                async for message in peer.texts():
                    if message["type"] == "done":
                        break

    options = (
        "--allow-anonymous",
        "--proxies",
        HERE,
        "--prompts-per-minute",
        "6000",
        "--replay",
        "0",
    )
    async with served(*options) as server, flat(server):
        await meanwhile(server, abuse(server))


def test_limits_forget_whom_they_need_not_know() -> None:
    rates, shares, budget = Rates(1.0, 60), Shares(4), Budget(1000)
    for number in range(100_000):
        now = number / 1000
        rates.take((str(number),), now)
        assert shares.take((str(number),))
        shares.give((str(number),))
        assert len(rates) <= SWEEP + 2 * 1000
        budget.learn(str(number), number // 1000, 1)
        assert len(budget) <= 1000
    assert not len(shares)
