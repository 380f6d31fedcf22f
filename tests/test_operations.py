"""Health, readiness and metrics for operators."""

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import client
from tests.support.puppet import Puppet, until
from tests.test_http import ask
from wsserver import Code, ConfigError, ModelError
from wsserver.errors import StoreError
from wsserver.hub import journal
from wsserver.sockets.listener import Listener
from wsserver.stores import MemoryStore


async def ready(server: wsserver.Server, port: int | None = None) -> tuple[int, dict[str, bool]]:
    status, headers, body = await ask(server, "GET /readyz HTTP/1.1\nHost: x\n\n", port)
    assert headers["content-type"] == "application/json"
    return status, json.loads(body)


READY = {"ready": True, "store": True, "serving": True, "upstream": True}


async def test_probes_answer_for_any_host(server: wsserver.Server) -> None:
    assert await ready(server) == (200, READY)
    for host in ("10.1.2.3:3001", "probe.internal"):
        assert (await ask(server, f"GET /healthz HTTP/1.1\nHost: {host}\n\n"))[0] == 200


async def test_exception_in_readyz_is_logged(
    server: wsserver.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(MemoryStore, "probe", broken)
    status, _, body = await ask(server, "GET /readyz HTTP/1.1\nHost: x\n\n")
    assert (status, body) == (500, b"A fault of the server's own\n")
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


async def test_metrics_need_token_with_allow_anonymous(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, allow_anonymous=True) as server:
        status, _, body = await ask(server, "GET /metrics HTTP/1.1\nHost: localhost\n\n")
        assert (status, b"metrics_token" in body) == (401, True)


async def test_operators_port_checks_token_and_method(
    puppet: Puppet,
) -> None:
    async with wsserver.serve(puppet, port=0, operations_port=0, metrics_token="sesame") as server:
        request = "GET /metrics HTTP/1.1\nHost: localhost\n"
        port = server.operations_port
        assert (await ask(server, request + "\n", port))[0] == 401
        token = "Authorization: Bearer sesame\n"
        assert (await ask(server, request + token + "\n", port))[0] == 200
        assert (await ask(server, "PUT /readyz HTTP/1.1\nHost: x\n\n", port))[0] in {405, 400}


@pytest.mark.parametrize("failure", [StoreError("disk"), None])
async def test_readyz_fails_while_store_fails_or_hangs(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    monkeypatch.setattr(journal, "PROBE_EVERY", 0.0)
    gate = asyncio.Event()
    async with wsserver.serve(puppet, port=0, open_timeout=0.2) as server:

        async def broken(*_: object) -> None:
            if failure is not None:
                raise failure
            await gate.wait()

        monkeypatch.setattr(MemoryStore, "probe", broken)
        assert await ready(server) == (503, READY | {"ready": False, "store": False})
        assert (await ask(server, "GET /healthz HTTP/1.1\nHost: x\n\n"))[0] == 200
        gate.set()
        failure = None
        assert await ready(server) == (200, READY)


async def test_readyz_fails_while_replies_cannot_be_saved(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = True
    commit = MemoryStore.commit

    async def broken(self: MemoryStore, entries: Any) -> None:
        if failing:
            raise StoreError("disk full")
        await commit(self, entries)

    monkeypatch.setattr(MemoryStore, "commit", broken)
    async with (
        wsserver.serve(puppet, port=0, save_interval=0.001) as server,
        client(server) as chat,
    ):
        assert await ready(server) == (200, READY)
        start = await chat.prompt()
        (await puppet.reply()).say("x").end()
        assert (await chat.text(start["id"]))[1]["saved"] is False
        assert await ready(server) == (503, READY | {"ready": False, "store": False})
        failing = False
        await until(lambda: not server.app.hub.journal.unsaved)
        assert await ready(server) == (200, READY)


async def test_readyz_fails_while_database_file_is_missing(
    puppet: Puppet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(journal, "PROBE_EVERY", 0.0)
    path = tmp_path / "chat.db"
    async with (
        wsserver.serve(puppet, port=0, store=f"sqlite:///{path}") as server,
        client(server) as chat,
    ):
        assert await ready(server) == (200, READY)
        path.rename(tmp_path / "elsewhere")
        assert await ready(server) == (503, READY | {"ready": False, "store": False})
        start = await chat.prompt()
        (await puppet.reply()).say("x").end()
        assert (await chat.text(start["id"]))[1]["saved"] is False
        assert "was deleted or replaced" in caplog.text
        (tmp_path / "elsewhere").rename(path)
        await until(lambda: not server.app.hub.journal.unsaved)
        assert await ready(server) == (200, READY)


async def test_readyz_fails_while_model_api_fails(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0) as server, client(server) as chat:
        for number in range(5):
            assert (await ready(server))[0] == 200
            start = await chat.prompt()
            (await puppet.reply(number)).fail(ModelError(Code.OVERLOADED))
            await chat.text(start["id"])
        assert await ready(server) == (503, READY | {"ready": False, "upstream": False})
        start = await chat.prompt()
        (await puppet.reply(5)).say("x").end()
        await chat.text(start["id"])
        assert (await ready(server))[0] == 200


async def test_readyz_fails_while_server_drains(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, operations_port=0) as server,
        client(server) as chat,
    ):
        start = await chat.prompt()
        reply = await puppet.reply()
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0)
        port = server.operations_port
        assert await ready(server, port) == (503, READY | {"ready": False, "serving": False})
        reply.say("x").end()
        await chat.text(start["id"])
        await closing


async def test_metrics_count_connections(server: wsserver.Server) -> None:
    async with client(server) as chat:
        await chat.quiet()
        status, headers, body = await ask(server, "GET /metrics HTTP/1.1\nHost: localhost\n\n")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"\nwsserver_connections_open 1.0\n" in body
    assert b"\nprocess_open_fds " in body


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("", 200),
        ("X-Forwarded-For: 127.0.0.1\n", 401),  # a client behind a proxy
        ("Forwarded: for=203.0.113.1\n", 401),
        ("Authorization: Bearer anything\n", 200),
    ],
)
async def test_metrics_without_token_are_served_to_local_clients(
    server: wsserver.Server, headers: str, status: int
) -> None:
    got, *_ = await ask(server, f"GET /metrics HTTP/1.1\nHost: localhost\n{headers}\n")
    assert got == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("", 401),
        ("Authorization: Bearer sesame\n", 200),
        ("Authorization: Bearer sesam\n", 401),
        ("Authorization: Bearer \n", 401),
        ("Authorization: Basic sesame\n", 401),
        ("Authorization: Bearer sesame\nX-Forwarded-For: 203.0.113.1\n", 200),
        ("Authorization: Bearer \u00e9\n", 401),
    ],
)
async def test_metrics_with_token_need_token_in_request(
    puppet: Puppet, headers: str, status: int
) -> None:
    async with wsserver.serve(puppet, port=0, metrics_token="sesame") as server:
        got, answer, body = await ask(
            server, f"GET /metrics HTTP/1.1\nHost: localhost\n{headers}\n"
        )
        assert got == status
        if status == 401:
            assert answer["www-authenticate"] == "bearer"
            assert b"wsserver_connections" not in body


async def test_reload_reads_metrics_token_file(
    puppet: Puppet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text("sesame\n")

    async def status(token: str) -> int:
        head = f"Host: localhost\nAuthorization: Bearer {token}\n\n"
        return (await ask(server, f"GET /metrics HTTP/1.1\n{head}"))[0]

    async with wsserver.serve(puppet, port=0, metrics_token_file=str(file)) as server:
        assert (await status("sesame"), await status("other")) == (200, 401)
        file.write_text("other")
        assert await server.reload()
        assert (await status("sesame"), await status("other")) == (401, 200)
        file.unlink()
        assert not await server.reload()
        assert await status("other") == 200
        assert "metrics token not reloaded" in caplog.text


async def test_operators_port_replaces_probes_and_metrics_of_main_port(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, operations_port=0) as server:
        assert server.operations_port not in {None, server.port}
        for path, own, other in (
            ("/metrics", 200, 404),
            ("/readyz", 200, 404),
            ("/healthz", 200, 200),
            ("/", 404, 200),
            ("/ws", 404, 426),
        ):
            request = f"GET {path} HTTP/1.1\nHost: localhost\n\n"
            assert (await ask(server, request, server.operations_port))[0] == own
            assert (await ask(server, request))[0] == other
        with pytest.raises(InvalidStatus) as raised:
            async with connect(f"ws://127.0.0.1:{server.operations_port}/ws", proxy=None):
                raise AssertionError
        assert raised.value.response.status_code == 404


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, 421),
        ({"hosts": "evil.example", "allow_anonymous": True}, 200),
        (
            {"operations_host": "0.0.0.0"},
            200,
        ),  # everyone who reaches this address may read the metrics
    ],
)
async def test_rebound_name_gets_no_metrics_from_operators_port(
    puppet: Puppet, given: dict[str, Any], status: int
) -> None:
    options: dict[str, Any] = {"port": 0, "operations_port": 0, **given}
    async with wsserver.serve(puppet, **options) as server:
        for method in ("GET", "HEAD"):
            request = f"{method} /metrics HTTP/1.1\nHost: evil.example\n\n"
            got, headers, body = await ask(server, request, server.operations_port)
            assert got == status
            assert int(headers["content-length"]) > 10
            assert bool(body) == (method == "GET")
        request = "GET /readyz HTTP/1.1\nHost: evil.example\n\n"
        assert (await ask(server, request, server.operations_port))[0] == 200


async def test_operators_port_in_use_is_one_line_error(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0) as server:
        with pytest.raises(ConfigError, match=r"operations_port: cannot listen on .*in use"):
            async with wsserver.serve(puppet, port=0, operations_port=server.port):
                raise AssertionError


async def test_failed_start_closes_operators_port(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(listener: Listener) -> None:
        if listener is server.listener:
            raise OSError(errno.EADDRINUSE, "taken")
        serve(listener)

    serve = Listener.serve
    server = wsserver.serve(puppet, port=0, operations_port=0)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="taken"):
        patch.setattr(Listener, "serve", taken)
        await server.__aenter__()
    with pytest.raises(ConnectionRefusedError):
        await ask(server, "GET /healthz HTTP/1.1\nHost: x\n\n", server.operations_port)


async def test_head_of_probes_and_metrics_has_no_body(server: wsserver.Server) -> None:
    for path in ("/readyz", "/metrics"):
        status, headers, body = await ask(server, f"HEAD {path} HTTP/1.1\nHost: localhost\n\n")
        assert (status, body) == (200, b"")
        assert int(headers["content-length"]) > 10
