"""The user of the program at the other end of a connection."""

import hashlib
import os
import socket
import struct

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import Client, client
from tests.support.process import run
from tests.support.puppet import Puppet
from tests.test_http import ask
from wsserver.sockets import listening, peers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_kernel_tells_user_of_peer(host: str) -> None:
    with socket.create_server((host, 0), family=listening.IP[":" in host]) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as own:
            end, peer = listener.accept()
            with end:
                assert peers.user_at(peer, end.getsockname()) == os.geteuid()
                own.shutdown(socket.SHUT_WR)
                assert peers.user_at(peer, end.getsockname()) == os.geteuid()
                own.close()
                assert peers.user_at(peer, end.getsockname()) == peers.NOBODY
                assert not peers.established(end)
        with socket.create_connection(listener.getsockname()[:2]) as own:
            end, peer = listener.accept()
            with end:
                assert peers.established(end)
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                own.close()  # with a RST
                assert peers.user_at(peer, end.getsockname()) == peers.ELSEWHERE
                assert not peers.established(end)


def test_sudo_user_is_own_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1234")
    assert peers.own_users() == frozenset({0, 1234, os.getuid(), peers.ELSEWHERE})


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_client_of_other_kernel_is_served(loop: str) -> None:
    # Such as a browser on Windows with a server in WSL.
    program = (
        "import sys\n"
        "from wsserver import cli\n"
        "from wsserver.sockets import exchange, peers\n"
        "exchange.user_at = lambda *_: peers.ELSEWHERE\n"
        "cli.main(sys.argv[1:])\n"
    )
    async with run("-c", program, "serve", "--port", "0", "--event-loop", loop) as process:
        url = (await process.line(r"(ws://\S+)"))[1]
        async with connect(url, proxy=None) as chat:
            assert (await Client(chat).prompt())["type"] == "start"


async def test_server_without_netlink_warns_about_other_users(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wsserver.serve(puppet, port=0) as server:
        assert not server.open_to_users
    monkeypatch.delattr(socket, "AF_NETLINK")
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server, client(server) as chat:
        assert (await chat.prompt())["type"] == "start"
        assert server.open_to_users
    tokens = f"ada sha256:{'0' * 64}"
    async with wsserver.serve(puppet, port=0, tokens=tokens) as server:
        assert not server.open_to_users
    program = "import socket, sys; del socket.AF_NETLINK; from wsserver.cli import main; main()"
    async with run("-c", program, "serve", "--port", "0", "--store", "memory:") as process:
        await process.line("EVERY USER of this machine")


async def test_other_user_is_refused_except_for_probes(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wsserver.serve(puppet, port=0) as server:
        monkeypatch.setattr("wsserver.sockets.exchange.user_at", lambda *_: 4321)
        for path, status in {"/": 403, "/metrics": 401, "/healthz": 200, "/readyz": 200}.items():
            assert (await ask(server, f"GET {path} HTTP/1.1\nHost: localhost\n\n"))[0] == status
        with pytest.raises(InvalidStatus):
            async with client(server):
                raise AssertionError
    tokens = f"ada sha256:{hashlib.sha256(b'good').hexdigest()}"
    async with wsserver.serve(puppet, port=0, tokens=tokens, drain_timeout=0) as server:
        bearer = {"Authorization": "Bearer good"}
        async with client(server, additional_headers=bearer) as chat:
            assert (await chat.prompt())["type"] == "start"
