"""Proxies of the environment: their choice, and requests through them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import wsserver
from tests.support.client import client
from tests.support.http_proxy import HttpProxy
from tests.support.raw import Raw
from tests.support.upstream import Upstream, certificate, refused_url, tls_server
from wsserver.errors import ConfigError
from wsserver.models.proxy import Proxy, proxy_for

PROXY = "http://proxy.example:3128"


# Choice of the proxy


@pytest.mark.parametrize(
    ("environment", "scheme", "expected"),
    [
        ({}, "http", None),
        ({"http": PROXY}, "http", ("proxy.example", 3128, False)),
        ({"http": PROXY}, "https", None),
        ({"https": PROXY}, "https", ("proxy.example", 3128, False)),
        ({"all": PROXY}, "https", ("proxy.example", 3128, False)),
        ({"all": PROXY, "https": "http://other.example:1"}, "https", ("other.example", 1, False)),
        ({"all": "proxy.example"}, "http", ("proxy.example", 80, False)),
        ({"all": "proxy.example:8080"}, "http", ("proxy.example", 8080, False)),
        ({"all": "https://proxy.example"}, "http", ("proxy.example", 443, True)),
        ({"all": "http://[::1]:3128"}, "http", ("::1", 3128, False)),
        ({"http": ""}, "http", None),
    ],
)
def test_proxy_of_scheme_or_all_proxy_is_used(
    environment: dict[str, str], scheme: str, expected: tuple[str, int, bool] | None
) -> None:
    found = proxy_for(scheme, "api.example", 443, environment)
    assert found == (None if expected is None else Proxy(*expected, authorization=None))


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "exempt"),
    [
        ("api.example", "api.example", 443, True),
        ("API.Example", "api.example", 443, True),
        ("example", "api.example", 443, True),
        ("ample", "api.example", 443, False),
        (".example", "api.example", 443, True),
        (".api.example", "api.example", 443, False),
        ("*.example", "api.example", 443, True),
        ("*.api.example", "api.example", 443, False),
        ("*", "api.example", 443, True),
        ("other.test, api.example", "api.example", 443, True),
        ("api.example:443", "api.example", 443, True),
        ("api.example:444", "api.example", 443, False),
        ("localhost", "localhost", 443, True),
        ("localhost", "api.localhost", 443, False),
        ("127.0.0.1", "127.0.0.1", 443, True),
        ("127.0.0.1", "127.0.0.2", 443, False),
        ("127.0.0.0/8", "127.1.2.3", 443, True),
        ("127.0.0.0/8", "128.1.2.3", 443, False),
        ("127.0.0.0/8", "api.example", 443, False),
        ("::1", "::1", 443, True),
        ("[::1]", "::1", 443, True),
        ("[::1]:443", "::1", 443, True),
        ("[::1]:444", "::1", 443, False),
        ("fd00::/8", "fd00::1", 443, True),
        ("https://api.example", "api.example", 443, True),
        ("http://api.example", "api.example", 443, False),
        ("all://*example", "api.example", 443, True),
        ("https://example", "api.example", 443, False),
        ("", "api.example", 443, False),
        (",,", "api.example", 443, False),
    ],
)
def test_no_proxy_exempts_names_addresses_networks_and_ports(
    no_proxy: str, host: str, port: int, exempt: bool
) -> None:
    found = proxy_for("https", host, port, {"all": PROXY, "no": no_proxy})
    assert (found is None) is exempt


def test_proxy_credentials_are_percent_decoded() -> None:
    proxy = proxy_for("http", "api.example", 80, {"all": "http://us%40er:pa%3Ass@proxy.example"})
    assert proxy is not None
    assert proxy.authorization == b"Basic dXNAZXI6cGE6c3M="


@pytest.mark.parametrize("address", ["socks5://proxy.example", "http://", "http://[", "ftp://x"])
def test_proxy_address_of_other_scheme_is_error(address: str) -> None:
    with pytest.raises(ConfigError):
        proxy_for("http", "api.example", 80, {"all": address})


# Requests through a proxy


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as made:
        yield made


async def ask(monkeypatch: pytest.MonkeyPatch, url: str) -> dict[str, object]:
    """Send two prompts to the model at an address; return the terminal of the second."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    async with wsserver.serve(port=0, drain_timeout=0, retries=0) as server:
        async with client(server) as chat:
            await chat.text((await chat.prompt())["id"])
            return (await chat.text((await chat.prompt())["id"]))[1]


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "certificate.pem").write_text(certificate())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))


@pytest.mark.parametrize("credentials", [None, "user:pass word"])
@pytest.mark.parametrize("proxy_tls", [False, True])
@pytest.mark.parametrize("api_tls", [False, True])
@pytest.mark.usefixtures("trusted")
async def test_prompts_use_proxy(
    monkeypatch: pytest.MonkeyPatch,
    stack: AsyncExitStack,
    credentials: str | None,
    proxy_tls: bool,
    api_tls: bool,
) -> None:
    upstream = await stack.enter_async_context(Upstream(tls=api_tls))
    port = int(upstream.url.rpartition(":")[2])
    proxy = await stack.enter_async_context(
        HttpProxy(port, credentials, tls_server() if proxy_tls else None)
    )
    scheme, _, address = proxy.url.partition("://")
    login = "" if credentials is None else credentials.replace(" ", "%20") + "@"
    monkeypatch.setenv("HTTPS_PROXY" if api_tls else "HTTP_PROXY", f"{scheme}://{login}{address}")
    done = await ask(monkeypatch, f"{'https' if api_tls else 'http'}://api.example")
    assert done["type"] == "done"
    assert proxy.accepted == 1, "one connection for both prompts"
    assert [request.method for request in upstream.requests] == ["POST", "POST"]
    (first,) = proxy.requests
    if api_tls:
        assert first == "CONNECT api.example:443 HTTP/1.1"
        assert "proxy-authorization" not in upstream.requests[0].headers
        assert upstream.requests[0].path == "/v1/messages"
    else:
        assert first == "POST http://api.example/v1/messages HTTP/1.1"
    assert upstream.requests[0].headers["host"] == "api.example"


async def test_untrusted_certificate_behind_proxy_is_refused(
    monkeypatch: pytest.MonkeyPatch, stack: AsyncExitStack
) -> None:
    upstream = await stack.enter_async_context(Upstream(tls=True))
    proxy = await stack.enter_async_context(HttpProxy(int(upstream.url.rpartition(":")[2])))
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    assert (await ask(monkeypatch, "https://api.example"))["code"] == "untrusted"
    assert upstream.requests == []


@pytest.mark.usefixtures("trusted")
async def test_certificate_of_other_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, stack: AsyncExitStack
) -> None:
    upstream = await stack.enter_async_context(Upstream(tls=True))
    proxy = await stack.enter_async_context(HttpProxy(int(upstream.url.rpartition(":")[2])))
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    assert (await ask(monkeypatch, "https://other.example"))["code"] == "untrusted"
    assert upstream.requests == []


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", [407, 502])
async def test_proxy_refusal_is_error(
    monkeypatch: pytest.MonkeyPatch, scheme: str, status: int
) -> None:
    async with HttpProxy(1, refuse=status) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        failed = await ask(monkeypatch, f"{scheme}://api.example")
    passed_on = (scheme, status) == ("http", 502)
    assert failed["code"] == ("upstream_error" if passed_on else "unreachable")


async def test_unreachable_proxy_is_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused_url() as url:
        monkeypatch.setenv("ALL_PROXY", url)
        assert (await ask(monkeypatch, "https://api.example"))["code"] == "unreachable"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nbytes before the TLS handshake",
        b"HTTP/1.1 200 OK\r\nname: " + b"x" * 70_000,
    ],
    ids=lambda answer: repr(answer[:50]),
)
async def test_malformed_proxy_response_is_error(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer:
            writer.write(answer)
            await reader.read()

    async with Raw(handle) as raw:
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{raw.port}")
        assert (await ask(monkeypatch, "https://api.example"))["code"] == "unreachable"


async def test_socks_proxy_is_named_in_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    assert (await ask(monkeypatch, "https://api.example"))["code"] == "internal"
    assert "socks5" in caplog.text


@pytest.mark.usefixtures("trusted")
async def test_ssl_cert_file_of_environment_is_trusted(
    monkeypatch: pytest.MonkeyPatch, stack: AsyncExitStack
) -> None:
    upstream = await stack.enter_async_context(Upstream(tls=True))
    assert (await ask(monkeypatch, upstream.url))["type"] == "done"
    assert len({received.peer for received in upstream.requests}) == 1
