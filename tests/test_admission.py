"""Admission by host, origin, proxy, user and token."""

import contextlib
import ipaddress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import client
from tests.support.puppet import Puppet, until
from tests.test_http import ask
from wsserver import ConfigError, Principal, Settings
from wsserver.addresses import networks
from wsserver.admission import Admission
from wsserver.denials import Denied

HANDSHAKE = (
    "Upgrade: websocket\nConnection: Upgrade\nSec-WebSocket-Version: 13\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n"
)


async def ada(token: str | None, _: object) -> Principal | None:
    return Principal("ada") if token == "good" else None


async def status_of(
    settings: dict[str, Any],
    headers: dict[str, str],
    *,
    peer: str = "127.0.0.1",
    loopback: bool = True,
    secure: bool = False,
    asked: bool = False,
) -> int:
    """Return the status of a WebSocket handshake."""
    settings = {"allow_anonymous": not (loopback or asked), **settings}
    admission = Admission(Settings.load(**settings), ada if asked else None)
    admission.loopback, admission.secure = loopback, secure
    try:
        visitor = admission.arrive(peer)
        visitor.introduce(headers)
        admission.names.check_host(headers)
        await visitor.check_admission("/", headers)
    except Denied as denied:
        assert denied.message
        return denied.status
    return 101


@pytest.mark.parametrize(
    ("host", "hosts", "status"),
    [
        ("localhost:3001", (), 101),
        ("LOCALHOST", (), 101),
        ("localhost.", (), 101),
        ("app.localhost:3001", (), 101),
        ("127.0.0.1:3001", (), 101),
        ("127.9.9.9", (), 101),
        ("[::1]:3001", (), 101),
        ("192.168.1.7:3001", (), 101),  # DNS rebinding cannot use an IP address
        ("[2001:db8::1]", (), 101),
        ("evil.example:3001", (), 421),
        ("localhost.evil.example", (), 421),
        ("evil-localhost", (), 421),
        ("127.0.0.1.evil.example", (), 421),
        ("2130706433", (), 421),  # a form of 127.0.0.1 that browsers never send
        ("chat.example.com", ("chat.example.com",), 101),
        ("Chat.Example.COM:443", ("chat.example.com",), 101),
        ("chat.example.com.evil", ("chat.example.com",), 421),
        ("a.b.example.com", ("*.example.com",), 101),
        ("example.com", ("*.example.com",), 421),
        ("evilexample.com", ("*.example.com",), 421),
        ("chatXexample.com", ("chat.example.com",), 421),
        ("anything.example", ("*",), 101),
        ("", (), 421),
        ("", ("*",), 421),
        ("user@localhost", (), 421),
        ("localhost:3001, evil.example", (), 421),
        ("localhost/", (), 421),
        ("localhost\t", (), 421),
        ("\uff4cocalhost", (), 421),
    ],
)
async def test_host_of_unknown_name_is_refused(
    host: str, hosts: tuple[str, ...], status: int
) -> None:
    assert await status_of({"hosts": hosts}, {"host": host}) == status


async def test_host_setting_is_known_host_name() -> None:
    assert await status_of({"host": "chat.internal"}, {"host": "chat.internal:3001"}) == 101


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 101),
        ("http://localhost:3001", 101),
        ("http://localhost:5173", 101),
        ("https://app.localhost", 101),
        ("http://127.0.0.1:8000", 101),
        ("http://[::1]:8000", 101),
        ("https://evil.example", 403),
        ("http://localhost.evil.example:3001", 403),
        ("https://localhost@evil.example", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
        ("http://192.168.1.7", 403),
        ("chrome-extension://abcdef", 403),
        ("http://localhost:3001, https://evil.example", 403),
        ("HTTP://LocalHost:5173", 101),
        ("http://localhost:80", 101),
        ("http://[::ffff:7f00:1]:8000", 101),
        ("https://localhost.", 403),  # forms that no browser sends
        ("http://localhost.:3001", 403),
        ("http://.localhost", 403),
        ("http://a..localhost", 403),
        ("https://evil.com#.localhost", 403),
        ("https://evil.com?.localhost", 403),
        ("https://evil.com\\.localhost", 403),
        ("https://evil.com/.localhost", 403),
        ("https://evil.com%00.localhost", 403),
        ("https://evil.com;.localhost", 403),
        ("https://evil.com,.localhost", 403),
        ("https://evil.com:80.localhost", 403),
        ("https://evil.com@localhost", 403),
        ("https://user:password@localhost", 403),
        ("https://localhost:80@evil.com", 403),
        ("http://localhost/", 403),
        ("http://localhost?", 403),
        ("http://localhost#", 403),
        ("http://localhost:", 403),
        ("http://localhost:0", 403),
        ("http://localhost:080", 403),
        ("http://localhost:99999", 403),
        ("http://localhost:+80", 403),
        ("http://localhost:\u00b2", 403),
        ("http://localhost ", 403),
        ("http://localhost\t", 403),
        ("http://local\u00a0host", 403),
        ("http://l\u00f6calhost", 403),
        ("http://xn--lcalhost-n4a", 403),
        ("http://[localhost]", 403),
        ("http://[::1", 403),
        ("http://[::1%25lo]", 403),
        ("http://::1", 403),
        ("http://127.1", 403),
        ("http://0x7f000001", 403),
        ("http:localhost", 403),
        ("http:/localhost", 403),
        ("http:///localhost", 403),
        ("//localhost", 403),
        ("localhost", 403),
        ("ws://localhost", 403),
        ("ftp://localhost", 403),
        ("blob:http://localhost", 403),
        ("NULL", 403),
    ],
)
async def test_local_origins_are_accepted_on_loopback(origin: str | None, status: int) -> None:
    headers = {"host": "localhost:3001"} | ({} if origin is None else {"origin": origin})
    assert await status_of({}, headers) == status


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://chat.example.com", "chat.example.com", 101),
        ("http://chat.example.com", "chat.example.com", 101),  # TLS may end before
        ("https://chat.example.com", "chat.example.com:443", 101),
        ("https://chat.example.com:8443", "chat.example.com:8443", 101),
        ("https://chat.example.com:8443", "chat.example.com", 403),
        ("http://chat.example.com", "chat.example.com:443", 403),
        ("https://other.example.com", "chat.example.com", 403),
        ("http://localhost:3001", "chat.example.com", 403),
        ("http://localhost:3001", "localhost:3001", 101),
    ],
)
async def test_only_own_origin_is_accepted_off_loopback(
    origin: str, host: str, status: int
) -> None:
    settings = {"hosts": ("*.example.com",), "allow_anonymous": True}
    headers = {"host": host, "origin": origin}
    assert await status_of(settings, headers, loopback=False) == status


@pytest.mark.parametrize(
    ("listed", "origin", "status"),
    [
        ("https://app.example.com", "https://app.example.com", 101),
        ("https://app.example.com", "https://APP.example.com", 101),
        ("https://app.example.com", "http://app.example.com", 403),
        ("https://app.example.com", "https://app.example.com:8443", 403),
        ("https://app.example.com", "https://app.example.com.evil", 403),
        ("https://app.example.com", "https://appXexample.com", 403),
        ("https://*.example.com", "https://a.b.example.com", 101),
        ("https://*.example.com", "https://example.com", 403),
        ("https://*.example.com", "https://evil.test/.example.com", 403),
        ("https://*.example.com", "https://evil.test?.example.com", 403),
        ("http://10.0.0.1:*", "http://10.0.0.1:8080", 101),
        ("https://*.example.com:*", "https://app.example.com:8443", 101),
        ("https://*", "https://anything.example", 101),
        ("http://[::1]:8000", "http://[::1]:8000", 101),
        ("chrome-extension://abcdef", "chrome-extension://abcdef", 101),
        ("null", "null", 101),
        ("*", "https://anything.example", 101),
        ("*", "null", 101),
    ],
)
async def test_listed_origins_are_accepted(listed: str, origin: str, status: int) -> None:
    headers = {"host": "localhost", "origin": origin}
    assert await status_of({"origins": (listed,)}, headers, loopback=False) == status


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://*.example.com", "https://evil.test#.example.com"),
        ("https://*.example.com", "https://evil.test\\.example.com"),
        ("https://*.example.com", "https://.example.com"),
        ("https://*.example.com", "https://a..example.com"),
        ("https://*.example.com", "https://a.example.com."),
        ("https://*.example.com:*", "https://a.example.com:b"),
        ("https://*.example.com:*", "https://a.example.com:80.evil.test"),
        ("https://*", "https://evil.test#"),
        ("null", "nullx"),
    ],
)
async def test_malformed_origin_matches_no_wildcard(listed: str, origin: str) -> None:
    headers = {"host": "localhost", "origin": origin}
    assert await status_of({"origins": (listed,)}, headers, loopback=False) == 403


@pytest.mark.parametrize(
    ("site", "origins", "status"),
    [
        ("cross-site", (), 403),
        ("same-site", (), 403),
        ("same-origin, cross-site", (), 403),
        ("", (), 403),
        ("same-origin", (), 101),
        ("none", (), 101),
        ("cross-site", ("https://app.example.com",), 403),
        ("cross-site", ("*",), 101),
    ],
)
@pytest.mark.parametrize("loopback", [True, False])
async def test_sec_fetch_site_decides_without_origin(
    site: str, origins: tuple[str, ...], status: int, loopback: bool
) -> None:
    headers = {"host": "localhost", "sec-fetch-site": site}
    assert await status_of({"origins": origins}, headers, loopback=loopback) == status


async def test_http_origin_is_refused_by_tls_server() -> None:
    headers = {"host": "localhost:3001", "origin": "http://localhost:3001"}
    assert await status_of({}, headers, loopback=False, secure=True) == 403
    headers["origin"] = "https://localhost:3001"
    assert await status_of({}, headers, loopback=False, secure=True) == 101


@pytest.mark.parametrize(("proxies", "status"), [((), 101), (("10.0.0.1",), 403)])
async def test_x_forwarded_proto_counts_from_listed_proxy_only(
    proxies: tuple[str, ...], status: int
) -> None:
    headers = {
        "host": "10.0.0.9",
        "origin": "http://10.0.0.9",
        "x-forwarded-proto": "https",
    }
    assert await status_of({"proxies": proxies}, headers, peer="10.0.0.1", loopback=False) == status


@pytest.mark.parametrize(
    ("loopback", "headers", "status"),
    [
        (True, {}, 101),
        (True, {"x-forwarded-for": "203.0.113.1"}, 401),  # an unlisted proxy
        (True, {"forwarded": "for=203.0.113.1"}, 401),
        (True, {"x-forwarded-proto": "https"}, 401),
        (True, {"cf-connecting-ip": "203.0.113.1"}, 401),
        (True, {"authorization": "Bearer good"}, 101),
        (True, {"authorization": "Bearer bad"}, 401),
        (False, {}, 401),
        (False, {"authorization": "Bearer good"}, 101),
        (False, {"authorization": "bearer good"}, 101),
        (False, {"authorization": "Basic good"}, 401),
        (False, {"origin": "http://localhost"}, 101),  # the page has to send `auth`
        (False, {"origin": "http://localhost", "authorization": "Bearer bad"}, 401),
    ],
)
async def test_clients_without_origin_need_token_off_loopback(
    loopback: bool, headers: dict[str, str], status: int
) -> None:
    headers = {"host": "localhost", **headers}
    assert await status_of({}, headers, loopback=loopback, asked=True) == status


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "address"),
    [
        ((), "10.0.0.1", "203.0.113.1", "10.0.0.1"),
        (("10.0.0.1",), "10.0.0.1", "203.0.113.1:5678", "203.0.113.1"),
        (("10.0.0.1",), "10.0.0.1", "[2001:db8::1]:5678", "2001:db8::1"),
        (("10.0.0.1",), "10.0.0.1", "203.0.113.1", "203.0.113.1"),
        (("10.0.0.0/8",), "10.0.0.1", "198.51.100.1, 203.0.113.1, 10.0.0.2", "203.0.113.1"),
        (("10.0.0.0/8",), "10.0.0.1", "203.0.113.1, nonsense", "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", "", "10.0.0.1"),
        (("10.0.0.0/8",), "10.0.0.1", "10.0.0.3", "10.0.0.3"),
        (("10.0.0.0/8",), "192.0.2.1", "203.0.113.1", "192.0.2.1"),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", "203.0.113.1", "203.0.113.1"),
        (("fd00::/8",), "fd00::1", "2001:db8::1", "2001:db8::1"),
        (("unix",), "unix", "203.0.113.1", "203.0.113.1"),
        (("127.0.0.1",), "unix", "203.0.113.1", "unix"),
    ],
)
async def test_x_forwarded_for_counts_from_listed_proxies_only(
    proxies: tuple[str, ...], peer: str, forwarded: str, address: str
) -> None:
    admission = Admission(Settings.load(proxies=proxies), None)
    visitor = admission.arrive(peer)
    visitor.introduce({"x-forwarded-for": forwarded})
    assert visitor.address == address
    admission.depart(visitor)
    assert len(admission.addresses) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"proxies": "proxy.example"},
        {"proxies": "10.0.0.0/99"},
        {"hosts": "https://chat.example.com"},
        {"hosts": "chat.example.com:443"},
        {"hosts": "*chat.example.com"},
        {"origins": "chat.example.com"},
        {"origins": "https://chat.example.com/"},
        {"origins": "https://chat.example.com/path"},
        {"origins": "https://*example.com"},
        {"origins": "https://chat.example.com*"},
        {"origins": "https://example.*"},
        {"origins": "http://192.168.1.*"},
        {"origins": "https://*.*.example.com"},
        {"origins": "https://example.com#"},
        {"origins": "https://example.com."},
        {"origins": "https://user@example.com"},
        {"origins": "https://example.com:http"},
    ],
)
async def test_malformed_list_setting_is_one_line_error(
    puppet: Puppet, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(given))}: "):
        async with wsserver.serve(puppet, port=0, **given):
            raise AssertionError


@pytest.mark.parametrize("bits", [64, 56, 48])
async def test_ipv6_network_gets_few_shares_of_connections(bits: int) -> None:
    admission = Admission(Settings.load(connections_per_address=8), None)
    network = ipaddress.IPv6Network(f"2001:db8::/{bits}")
    step = network.num_addresses // 256 or 1
    taken = 0
    for number in range(256):
        for _ in range(8):
            with contextlib.suppress(Denied):
                admission.arrive(str(network[number * step]))
                taken += 1
    assert taken == {64: 8, 56: 16, 48: 32}[bits]
    admission.arrive("2001:db9::1")


def test_networks_of_ipv6_address_are_64_56_and_48() -> None:
    assert networks("203.0.113.1") == networks("::ffff:203.0.113.1") == ("address 203.0.113.1",)
    assert networks("unix") == ("address unix",)
    assert networks("2001:db8:1:2:3::4") == (
        "address 2001:db8:1:2::/64",
        "address 2001:db8:1::/56",
        "address 2001:db8:1::/48",
    )


# The server itself.


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
async def test_exposed_server_without_tokens_does_not_start(
    puppet: Puppet, host: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    given: dict[str, Any] = {"host": host} if host else {"unix_socket": str(path)}
    with pytest.raises(ConfigError, match=r"--token-file .* --allow-anonymous"):
        async with wsserver.serve(puppet, port=0, **given):
            raise AssertionError
    assert is_empty(tmp_path)


async def test_allow_anonymous_serves_everyone_and_logs_warning(
    puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsserver.serve(puppet, host="0.0.0.0", port=0, allow_anonymous=True) as server:
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "spend your money" in caplog.text
        async with client(server) as chat:
            await chat.quiet()


@pytest.mark.parametrize("given", [{"proxies": "127.0.0.1"}, {"hosts": "chat.example.com"}])
async def test_server_behind_proxy_needs_tokens_or_allow_anonymous(
    puppet: Puppet, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"hosts or proxies; .* --allow-anonymous"):
        async with wsserver.serve(puppet, port=0, **given):
            raise AssertionError
    async with wsserver.serve(puppet, port=0, allow_anonymous=True, **given):
        pass


async def test_client_of_unlisted_proxy_is_refused(
    server: wsserver.Server,
) -> None:
    for header in ("X-Forwarded-For: 203.0.113.1", "Forwarded: for=203.0.113.1", "Via: 1.1 x"):
        status, _, body = await ask(
            server, f"GET /ws HTTP/1.1\nHost: localhost\n{header}\n{HANDSHAKE}\n"
        )
        assert (status, b"its own machine" in body) == (403, True)
        status, _, body = await ask(server, f"GET / HTTP/1.1\nHost: localhost\n{header}\n\n")
        assert (status, b"its own machine" in body) == (403, True)


async def test_healthz_answers_while_server_is_full(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, connections=1) as server, client(server):
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/", 503), ("/ws", 503)):
            assert (await ask(server, f"GET {path} HTTP/1.1\nHost: localhost\n\n"))[0] == status


async def test_refused_connections_are_all_counted_and_few_logged(
    server: wsserver.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        for _ in range(200):
            await ask(server, "GET / HTTP/1.1\nHost: evil.example\n\n")
    assert 100 <= len(caplog.records) < 200
    exposition = server.metrics.exposition().decode()
    assert 'wsserver_connections_total{outcome="host"} 200.0' in exposition


async def test_allow_anonymous_with_tokens_is_refused(
    puppet: Puppet,
) -> None:
    with pytest.raises(ConfigError, match="contradicts"):
        async with wsserver.serve(puppet, authenticate=ada, port=0, allow_anonymous=True):
            raise AssertionError


async def test_server_with_tokens_serves_valid_tokens_off_loopback(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, authenticate=ada, host="0.0.0.0", port=0) as server:
        with pytest.raises(InvalidStatus) as raised:
            async with connect(server.url, proxy=None):
                raise AssertionError
        assert raised.value.response.status_code == 401
        assert raised.value.response.headers["WWW-Authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer good"}
        async with client(server, additional_headers=headers) as chat:
            await chat.quiet()


@pytest.mark.parametrize("path", ["/", "/ws", "/metrics", "/nowhere"])
async def test_request_for_rebound_name_gets_421(server: wsserver.Server, path: str) -> None:
    status, _, body = await ask(server, f"GET {path} HTTP/1.1\nHost: evil.example\n\n")
    assert status == 421
    assert b"WSSERVER_HOSTS" in body
    status, _, body = await ask(
        server,
        f"GET {path} HTTP/1.1\nHost: evil.example\nOrigin: http://evil.example\n{HANDSHAKE}\n",
    )
    assert status == 421


async def test_repeated_host_or_origin_is_refused(server: wsserver.Server) -> None:
    for twice in (
        "Host: localhost\nHost: evil.example\n",
        "Host: localhost\nOrigin: http://localhost\nOrigin: https://evil.example\n",
    ):
        status, *_ = await ask(server, f"GET / HTTP/1.1\n{twice}{HANDSHAKE}\n")
        assert status in {403, 421}


async def test_refused_origin_response_names_setting(server: wsserver.Server) -> None:
    status, _, body = await ask(
        server, f"GET /ws HTTP/1.1\nHost: localhost\nOrigin: https://evil.example\n{HANDSHAKE}\n"
    )
    assert (status, b"WSSERVER_ORIGINS" in body) == (403, True)


async def test_refused_client_leaves_no_connection(server: wsserver.Server) -> None:
    for _ in range(3):
        await ask(server, f"GET / HTTP/1.1\nHost: localhost\nOrigin: null\n{HANDSHAKE}\n")
    assert not server.app.connections
    await until(lambda: not server.listener.connections)
    assert len(server.app.admission.addresses) == 0
