"""Streams over HTTP for the operator: metrics, log events, shared work, and vanished clients."""

import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import pytest

import wsserver
from tests.chats.events import Chat
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.tools import ROOT
from tests.test_telemetry import value
from wsserver.dialects.sse import SSE
from wsserver.pieces import Run
from wsserver.sockets import peers
from wsserver.sockets.peers import Address

ID = "0123456789abcdef0123"
ONE = {"messages": [{"role": "user", "content": "Hello?"}]}


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    """Return the events of one name."""
    found = (getattr(record, "event", {}) for record in caplog.records)
    return [dict(event) for event in found if event.get("event") == name]


# Metrics and log events.


@pytest.mark.parametrize("end", ["complete", "disconnected", "failed"])
async def test_end_of_a_stream_is_counted_and_logged_once(
    server: wsserver.Server,
    puppet: Puppet,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    def fail(*_: object) -> bytes:
        raise LookupError("a fault")

    caplog.set_level(logging.INFO, "wsserver")
    assert value(server, "streams_open") == 0
    async with Chat.open(server) as chat:
        start = await chat.prompt(ONE)
        assert value(server, "streams_open") == 1
        assert value(server, "connections_open") == 0
        reply = await puppet.reply()
        reply.say("one ", "two ")
        await chat.next("token")
        await chat.next("token")
        if end == "complete":
            reply.end()
            await chat.text()
        elif end == "failed":
            monkeypatch.setattr("wsserver.dialects.sse.SSE.run", fail)
            reply.say("three")
            await chat.browser.ended()
    await until(lambda: value(server, "streams_open") == 0)
    assert value(server, "streams_total", end) == 1
    (event,) = events(caplog, "stream")
    assert event["id"] == start["id"]
    assert (event["principal"], event["address"]) == ("anonymous", "127.0.0.1")
    assert (event["end"], event["pieces"]) == (end, 2)
    assert event["bytes"] > len("one two ")
    assert event["seconds"] >= 0
    assert not events(caplog, "connection")


async def test_stream_that_goes_on_counts_its_own_pieces(
    server: wsserver.Server, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wsserver")
    async with Chat.open(server) as chat:
        await chat.prompt({**ONE, "id": ID})
        (await puppet.reply()).say("one ", "two ", "three").end()
        await chat.text()
    async with Chat.open(server) as chat:
        await chat.resume(f"/api/chat/{ID}?after=2")
        await chat.text()
    await until(lambda: value(server, "streams_open") == 0)
    assert [event["pieces"] for event in events(caplog, "stream")] == [3, 1]


async def test_head_and_refused_requests_are_no_streams(
    server: wsserver.Server, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wsserver")
    async with Chat.open(server) as chat:
        await chat.prompt({**ONE, "id": ID})
        for method, target in (("HEAD", f"/api/chat/{ID}"), ("GET", f"/api/chat/{ID}?after=9")):
            async with Chat.open(server) as other:
                other.send(method, target)
                await other.browser.head()
        assert value(server, "streams_open") == 1
        assert not events(caplog, "stream")


async def test_revoked_client_is_logged_as_unauthenticated(
    puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    async def brief(_: str | None, __: wsserver.Handshake) -> wsserver.Principal:
        return wsserver.Principal("ada", expires=time.time() + 0.1)

    caplog.set_level(logging.INFO, "wsserver")
    async with wsserver.serve(puppet, authenticate=brief, port=0) as server:
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
            await chat.next("error")
        await until(lambda: value(server, "streams_open") == 0)
    (event,) = events(caplog, "stream")
    assert (event["end"], event["principal"]) == ("unauthenticated", "ada")


async def test_shorter_login_of_a_reload_ends_the_stream_in_time(puppet: Puppet) -> None:
    expires: Iterable[float | None] = iter((None, time.time() + 0.3))

    async def changing(_: str | None, __: wsserver.Handshake) -> wsserver.Principal:
        return wsserver.Principal("ada", expires=next(iter(expires)))

    async with wsserver.serve(puppet, authenticate=changing, port=0) as server:
        async with Chat.open(server) as chat:
            await chat.prompt(ONE)
            await server.reload()
            assert (await chat.next("error"))["code"] == "unauthenticated"


# The work of the server.


async def test_followers_at_one_place_share_an_encoded_event(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    run = SSE.run

    def counted(generation: Any, part: Run) -> bytes:
        encoded.append(part.seq)
        return run(generation, part)

    monkeypatch.setattr(SSE, "run", staticmethod(counted))
    async with Chat.open(server) as chat, Chat.open(server) as other:
        await chat.prompt({**ONE, "id": ID})
        reply = await puppet.reply()
        await other.resume(f"/api/chat/{ID}")
        for number in range(1, 4):
            reply.say("word ")
            for each in (chat, other):
                assert (await each.next("token"))["seq"] == number
        assert encoded == [1, 2, 3]


async def test_user_of_a_kept_connection_is_looked_up_once(
    server: wsserver.Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    look_up = peers.user_at

    def counted(peer: Address, here: Address) -> int | None:
        asked.append(peer)
        return look_up(peer, here)

    monkeypatch.setattr("wsserver.sockets.exchange.user_at", counted)
    async with Chat.open(server) as chat:
        for number in range(3):
            await chat.prompt(ONE, headers={"connection": "keep-alive"})
            (await puppet.reply(number)).say("Hello").end()
            await chat.text()
    assert len(asked) == (server.app.admission.users is not None)


# Clients that vanish.


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such option")
async def test_kernel_is_told_how_long_to_wait_for_a_vanished_client(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, ping_timeout=12, drain_timeout=0) as server:
        async with Chat.open(server) as chat, client(server):
            await chat.prompt(ONE)
            found = {
                connection.transport.get_extra_info("socket").getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
                )
                for connection in server.listener.connections
            }
            assert found == {0, 12_000}, "a WebSocket has pings"


def test_vanished_client_stops_its_reply() -> None:
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    tools = all(map(shutil.which, ("unshare", "ip")))
    if not tools or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this machine lets no test have a network of its own")
    command = [*alone, sys.executable, "-m", "tests.chats.vanished"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=3 * BOUND
    )
    assert done.stdout == "the reply is stopped\n", done.stderr[-2000:]
