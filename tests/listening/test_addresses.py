"""Addresses as text, and loopback addresses."""

import socket

import pytest
from websockets.asyncio.client import connect

import wsserver
from tests.chats.events import Chat
from tests.support.client import Client, client
from tests.support.puppet import Puppet
from wsserver.sockets import listening

pytestmark = pytest.mark.slow


class Bound:
    def __init__(self, family: int, name: object) -> None:
        self.family = family
        self.name = name

    def getsockname(self) -> object:
        return self.name


def ip(host: str) -> Bound:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return Bound(family, (host, 80, 0, 0) if ":" in host else (host, 80))


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1"], True),
        (["127.8.9.1", "::1"], True),
        (["::1", "192.0.2.1"], False),
        (["0.0.0.0"], False),
        (["::"], False),
        (["::ffff:127.0.0.1"], False),
        (["fe80::1%eth0"], False),
        ([], False),
    ],
)
def test_loopback_needs_all_addresses_on_loopback(hosts: list[str], expected: bool) -> None:
    assert listening.loopback(map(ip, hosts)) is expected
    assert not listening.loopback([*map(ip, hosts), Bound(socket.AF_UNIX, "/run/s")])


def test_addresses_are_written_as_in_urls() -> None:
    assert listening.name_of(ip("192.0.2.1")) == "192.0.2.1:80"
    assert listening.name_of(ip("::1")) == "[::1]:80"
    assert listening.name_of(Bound(socket.AF_UNIX, b"\0name")) == "@name"
    assert listening.tcp_address([Bound(socket.AF_UNIX, "/s"), ip("::1")]) == ("::1", 80)


async def test_server_knows_all_bound_addresses(puppet: Puppet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        second = socket.create_server(("127.0.0.2", 0))
        async with wsserver.serve(puppet, sockets=[first, second], allow_anonymous=True) as server:
            assert server.bound == tuple(listening.name_of(sock) for sock in (first, second))
            assert server.port == first.getsockname()[1]
            assert listening.loopback(server.listener.bound)
            for name in server.bound:
                async with connect(f"ws://{name}/", proxy=None) as socket_:
                    await Client(socket_).quiet()


async def test_tokens_of_a_given_socket_are_not_held_back(puppet: Puppet) -> None:
    """Nagle's algorithm would hold back each token until the client acknowledges the one before."""
    given = socket.create_server(("127.0.0.1", 0))
    async with wsserver.serve(puppet, sockets=[given], drain_timeout=0) as server:
        async with client(server), Chat.open(server) as chat:
            await chat.prompt({"prompt": "Hello?"})
            sockets = [c.transport.get_extra_info("socket") for c in server.listener.connections]
            options = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in sockets]
            assert options == [1, 1]
