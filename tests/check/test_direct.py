"""Checks of a server without a proxy."""

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

import wsserver
from tests.asgi.servers import SERVERS, serving
from tests.check.conftest import BRIEF, PACE, RATE, Behind, checked
from tests.support.puppet import Puppet
from wsserver.doctor import frames, handshakes
from wsserver.doctor.deployment import Deployment
from wsserver.doctor.findings import Finding, Status
from wsserver.doctor.handshakes import Unreachable
from wsserver.doctor.line import parse_target
from wsserver.errors import ConfigError
from wsserver.models.demo import Demo

pytestmark = pytest.mark.slow


@asynccontextmanager
async def own(**settings: Any) -> AsyncIterator[wsserver.Server]:
    """Serve programs of this machine, without tokens."""
    async with wsserver.serve(Demo(RATE), port=0, drain_timeout=0, **settings) as server:
        yield server


async def test_server_with_token_holds(behind: Behind) -> None:
    found = await checked(behind.server.url, behind.token)
    assert found.of(Status.OK) == found.findings.keys() - {"tls", "idle"}
    assert found.deployment.proxy is None


async def test_local_server_without_tokens_holds() -> None:
    async with own() as server:
        found = await checked(server.url, None)
    assert found.of(Status.OK) == found.findings.keys() - {"tls", "idle"}


async def test_missing_token_fails_and_skips_replies(behind: Behind) -> None:
    found = await checked(behind.server.url, None)
    assert found.failed() == {"authentication"}
    assert "WSSERVER_CHAT_TOKEN" in found.mend("authentication")
    assert {"origin", "foreign_origin", "host", "ping", "large_frame"} <= found.of(Status.OK)
    assert {"http", "tokens", "stop", "sse", "resume"} <= found.of(Status.SKIPPED)


async def test_size_of_messages_is_that_of_server() -> None:
    async with own(message_size=40_000) as server:
        found = await checked(server.url, None, BRIEF)
    assert found.failed() == set(), found.findings
    assert "40000 bytes" in found.findings["large_frame"].seen


async def test_wrong_token_fails(behind: Behind) -> None:
    found = await checked(behind.server.url, "wrong", BRIEF)
    assert found.failed() == {"authentication"}
    assert found.findings["authentication"].seen == "the server refuses the token"


async def test_token_that_nobody_asks_for_holds() -> None:
    async with own() as server:
        found = await checked(server.url, "any", BRIEF)
    assert found.failed() == set(), found.findings


async def test_wrong_token_that_is_admitted_fails() -> None:
    async def gullible(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
        return wsserver.Principal("anybody") if token else None

    async with wsserver.serve(Demo(RATE), authenticate=gullible, port=0, drain_timeout=0) as server:
        found = await checked(server.url, "any", BRIEF)
    assert found.failed() == {"authentication"}
    assert found.findings["authentication"].seen == "the server admits a wrong token"


async def test_public_server_without_tokens_and_tls_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve, name = socket.getaddrinfo, "chat.example.com"

    def resolved(host: object, *args: Any, **options: Any) -> Any:
        own = host in {name, name.encode()}
        return resolve("127.0.0.1" if own else host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    async with own(hosts=[name], allow_anonymous=True) as server:
        found = await checked(f"ws://{name}:{server.port}/", None, BRIEF)
    assert found.of(Status.WARNING) == {"tls", "authentication"}
    assert found.failed() == set(), found.findings


async def test_missing_ping_of_server_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "EXPECTED_PING", 0.2)
    async with own() as server:
        found = await checked(server.url, None, replace(BRIEF, idle=0.3))
    assert found.of(Status.WARNING) == {"idle"}
    assert "`ping_interval`" in found.mend("idle")


async def test_slow_model_skips_replies_of_quick_check(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        found = await checked(server.url, None, replace(PACE, whole=1.0))
    assert found.failed() == set(), found.findings
    assert found.findings["resume"].seen == "no time left"


async def test_model_that_is_silent_skips_replies(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        found = await checked(server.url, None, replace(BRIEF, patience=0.2))
    assert found.failed() == set(), found.findings
    assert {"tokens", "sse", "resume"} <= found.of(Status.SKIPPED)


async def test_refused_prompt_fails_with_code() -> None:
    async with own(prompt_size=10) as server:
        found = await checked(server.url, None, BRIEF)
    assert found.failed() == {"tokens", "resume"}
    assert "too_long" in found.findings["tokens"].seen


async def test_short_reply_skips_resume(puppet: Puppet, server: wsserver.Server) -> None:
    checking = asyncio.create_task(checked(server.url, None, BRIEF))
    for number in range(2):
        (await puppet.reply(number)).say("one").end()
    found = await checking
    assert found.failed() == set(), found.findings
    assert {"tokens", "stop", "sse", "resume"} <= found.of(Status.SKIPPED)


async def test_proxy_without_http_1_1_fails_tls() -> None:
    async def alert(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Fatal alert no_application_protocol (RFC 7301 section 3.2).
        writer.write(bytes.fromhex("15030300020278"))
        writer.close()

    async with await asyncio.start_server(alert, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        found = await checked(f"wss://127.0.0.1:{port}/", None)
    assert found.failed() == {"tls"}
    assert "`alpn h2,http/1.1`" in found.mend("tls"), found.findings["tls"]


@pytest.mark.parametrize("subprotocol", ["wsserver.v1", "other"])
async def test_other_websocket_program_fails_upgrade(
    monkeypatch: pytest.MonkeyPatch, subprotocol: str
) -> None:
    monkeypatch.setattr(handshakes, "OPEN_TIMEOUT", 0.2)

    async def echo(chat: ServerConnection) -> None:
        await chat.send("hello")
        async for message in chat:
            await chat.send(message)

    def choose(*_: object) -> Subprotocol:
        return Subprotocol("wsserver.v1")

    select = choose if subprotocol == "wsserver.v1" else None
    async with serve(echo, "127.0.0.1", 0, select_subprotocol=select) as other:
        port = next(iter(other.sockets)).getsockname()[1]
        found = await checked(f"ws://127.0.0.1:{port}/", None)
    assert found.failed() == {"upgrade", "http"}


async def test_any_origin_and_any_host_are_warned_of() -> None:
    async with own(origins=["*"], hosts=["*"], allow_anonymous=True) as server:
        found = await checked(server.url, None)
    assert found.of(Status.WARNING) == {"foreign_origin", "host"}
    assert "`origins`" in found.mend("foreign_origin")
    assert "`hosts`" in found.mend("host")


async def test_ping_of_server_is_counted() -> None:
    pace = replace(BRIEF, idle=0.5)
    async with own(ping_interval=0.1) as server:
        found = await checked(server.url, None, pace)
    seen = found.findings["idle"].seen
    assert int(seen.split("with ")[1].split()[0]) >= 2, seen


async def test_timeout_of_server_fails_idle_with_its_code() -> None:
    pace = replace(BRIEF, idle=3.0)
    async with own(idle_timeout=0.5) as server:
        found = await checked(server.url, None, pace)
    assert found.failed() == {"idle"}
    assert "close code 1000" in found.findings["idle"].seen


async def test_slow_stop_is_warned_of() -> None:
    puppet = Puppet()
    async with wsserver.serve(puppet, port=0, drain_timeout=0, stop_timeout=1.2) as server:
        checking = asyncio.create_task(checked(server.url, None))
        hold = asyncio.Event()
        reply = await puppet.reply()
        reply.hold = hold
        reply.say("one ")
        (await puppet.reply(1)).say(*map(str, range(9)))
        found = await checking
        hold.set()
    assert found.of(Status.WARNING) == {"stop"}
    assert found.of(Status.SKIPPED) == {"tls", "tokens", "sse", "idle"}


async def test_failing_model_fails_with_code(puppet: Puppet, server: wsserver.Server) -> None:
    checking = asyncio.create_task(checked(server.url, None))
    for number in range(2):
        (await puppet.reply(number)).fail(wsserver.ModelError(wsserver.Code.OVERLOADED))
    found = await checking
    assert found.failed() == {"tokens", "resume"}
    assert "overloaded" in found.findings["tokens"].seen


@pytest.mark.parametrize("kind", SERVERS)
async def test_chat_mounted_in_fastapi_holds(kind: str) -> None:
    chat = wsserver.asgi(Demo(RATE), allow_anonymous=True)
    app = FastAPI(lifespan=chat.lifespan)
    app.mount("/chat", chat)
    async with serving(app, kind) as port:
        found = await checked(f"http://127.0.0.1:{port}/chat/", None)
    assert found.failed() == set(), found.findings


async def test_other_website_fails_upgrade() -> None:
    async with serving(FastAPI()) as port:
        found = await checked(f"http://127.0.0.1:{port}/", None)
    assert found.failed() == {"upgrade", "http"}
    assert found.of(Status.SKIPPED) == found.findings.keys() - found.failed()


async def test_closed_port_and_unknown_name_are_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="nothing listens"):
            await checked(f"ws://127.0.0.1:{unused.getsockname()[1]}/", None)
    with pytest.raises(Unreachable, match="the host name has no address"):
        await checked("ws://wsserver-check.invalid/", None)


async def test_silent_port_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsserver.doctor.line.OPEN_TIMEOUT", 0.2)
    monkeypatch.setattr("wsserver.doctor.deployment.OPEN_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(Unreachable, match="nothing answers"):
            await checked(f"ws://127.0.0.1:{silent.getsockname()[1]}/", None)


def make_certificate(
    folder: Path, *names: str, days: int = 90, cert: str = "cert.pem", key: str = "key.pem"
) -> dict[str, Any]:
    """Make a certificate for these names; return the settings of a server with it."""
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    more = ("-subj", "/CN=test", "-addext", f"subjectAltName={','.join(names)}", "-days", str(days))
    files = ("-keyout", str(folder / key), "-out", str(folder / cert))
    subprocess.run((*command.split(), *more, *files), check=True, capture_output=True)
    return {"cert": str(folder / cert), "key": str(folder / key)}


async def test_trusted_certificate_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_certificate(tmp_path, "IP:127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", settings["cert"])
    async with own(**settings) as server:
        found = await checked(f"https://127.0.0.1:{server.port}/", None)
        plain = await checked(f"http://127.0.0.1:{server.port}/", None)
    assert found.of(Status.OK) == found.findings.keys() - {"idle"}
    assert "TLSv1.3; the certificate is valid for 89 more days" in found.findings["tls"].seen
    assert "upgrade" in plain.failed()


async def test_certificate_that_expires_soon_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_certificate(tmp_path, "IP:127.0.0.1", days=2)
    monkeypatch.setenv("SSL_CERT_FILE", settings["cert"])
    async with own(**settings) as server:
        found = await checked(f"wss://127.0.0.1:{server.port}/", None)
    assert found.of(Status.WARNING) == {"tls"}


@pytest.mark.parametrize(("trusted", "seen"), [(False, "self-signed"), (True, "mismatch")])
async def test_wrong_certificate_fails_and_skips_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool, seen: str
) -> None:
    settings = make_certificate(tmp_path, "DNS:else.example" if trusted else "IP:127.0.0.1")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", settings["cert"])
    async with own(**settings) as server:
        found = await checked(f"wss://127.0.0.1:{server.port}/", None)
    assert found.failed() == {"tls"}
    assert found.of(Status.SKIPPED) == found.findings.keys() - {"tls"}
    assert seen in found.findings["tls"].seen
    assert found.mend("tls")


async def test_no_tls_to_another_machine_is_warned_of() -> None:
    reported: list[Finding] = []
    deployment = Deployment(parse_target("ws://192.0.2.1/"), None, PACE)
    await handshakes.tls(deployment, reported.append)
    assert [finding.status for finding in reported] == [Status.WARNING]


@pytest.mark.parametrize(
    ("url", "websocket", "http"),
    [
        ("ws://localhost:3001", "ws://localhost:3001/", "http://localhost:3001"),
        ("http://localhost:3001/ws", "ws://localhost:3001/ws", "http://localhost:3001"),
        ("https://a.example/chat/", "wss://a.example/chat/", "https://a.example/chat"),
        ("wss://a.example:443/chat/ws", "wss://a.example/chat/ws", "https://a.example/chat"),
        ("ws://[::1]:3001/", "ws://[::1]:3001/", "http://[::1]:3001"),
    ],
)
def test_addresses_follow_from_url(url: str, websocket: str, http: str) -> None:
    target = parse_target(url)
    assert (target.websocket, target.http) == (websocket, http)


@pytest.mark.parametrize(
    "url",
    ["localhost:3001", "ftp://a/", "ws://", "ws://u:p@a/", "ws://a/?token=x", "ws://a:99999/", ""],
)
def test_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="the address must be like"):
        parse_target(url)
