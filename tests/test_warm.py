"""Connections to the model's API that are opened before the first prompt."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.client import client
from tests.support.delay import Delay
from tests.support.puppet import until
from tests.support.upstream import Upstream, certificate, refused_url
from wsserver.models.base import Request


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(tls=True) as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "certificate.pem").write_text(certificate())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", upstream.url)


async def test_prompt_uses_connection_opened_when_client_connected(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    async with Delay(int(upstream.url.rpartition(":")[2]), 0.005) as distance:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", f"https://127.0.0.1:{distance.port}")
        async with wsserver.serve(port=0, drain_timeout=0) as server, client(server) as chat:
            await until(lambda: len(upstream.connections) == 1)
            assert upstream.requests == []
            text, _ = await chat.text((await chat.prompt())["id"])
    assert (text, distance.accepted) == ("Hello world", 1)


async def test_prompt_opens_connection_with_warm_connections_off(upstream: Upstream) -> None:
    async with wsserver.serve(port=0, drain_timeout=0, warm_connections=False) as server:
        async with client(server) as chat:
            await server.prepared()
            assert await chat.quiet() == []
            assert not upstream.connections
            assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"


async def test_prompt_as_first_frame_opens_one_connection(
    upstream: Upstream,
) -> None:
    async with Delay(int(upstream.url.rpartition(":")[2]), 0.005) as distance:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ANTHROPIC_BASE_URL", f"https://127.0.0.1:{distance.port}")
            async with wsserver.serve(port=0, drain_timeout=0) as server:
                async with client(server) as chat:
                    await chat.text((await chat.prompt())["id"])
                    assert await chat.quiet() == []
        assert distance.accepted == 1


async def test_many_clients_open_one_warm_connection(upstream: Upstream) -> None:
    async with Delay(int(upstream.url.rpartition(":")[2]), 0.005) as distance:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ANTHROPIC_BASE_URL", f"https://127.0.0.1:{distance.port}")
            async with wsserver.serve(port=0, drain_timeout=0) as server:
                chats = [client(server) for _ in range(5)]
                for chat in chats:
                    await chat.__aenter__()
                await until(lambda: len(upstream.connections) == 1)
                for chat in chats:
                    await chat.__aexit__(None, None, None)
        assert distance.accepted == 1


async def test_server_without_clients_opens_no_connection(upstream: Upstream) -> None:
    async with wsserver.serve(port=0, drain_timeout=0) as server:
        await server.prepared()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not upstream.connections


async def test_idle_warm_connection_is_closed_and_not_reopened(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> None:
    monkeypatch.setattr("wsserver.models.http.IDLE_TIME", 0.05)
    async with wsserver.serve(port=0, drain_timeout=0) as server, client(server) as chat:
        await until(lambda: len(upstream.connections) == 1)
        await until(lambda: not upstream.connections)
        assert await chat.quiet() == []
        assert not upstream.connections
        assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello world"


async def test_unreachable_api_does_not_close_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refused_url() as url:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        async with wsserver.serve(port=0, drain_timeout=0, retries=0) as server:
            async with client(server) as chat:
                assert await chat.quiet() == []
                await chat.prompt()
                assert (await chat.next("error"))["code"] == "unreachable"


class Warmed:
    """A custom model that notes its calls of ``prepare`` and ``warm``."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.calls: list[str] = []
        self._failure = failure

    async def prepare(self) -> None:
        self.calls.append("prepare")

    async def warm(self) -> None:
        self.calls.append("warm")
        if self._failure is not None:
            raise self._failure

    async def __call__(self, request: Request, /) -> AsyncIterator[Any]:
        self.calls.append("prompt")
        yield "Hello"


async def test_custom_model_is_warmed_at_connection_and_first_frame() -> None:
    model = Warmed()
    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        await until(lambda: model.calls == ["prepare", "warm"])
        await chat.send({"type": "ping"})
        await until(lambda: model.calls == ["prepare", "warm", "warm"])
        await chat.send({"type": "ping"})
        assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello"
    assert model.calls == ["prepare", "warm", "warm", "prompt"]


async def test_failed_warm_is_only_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with wsserver.serve(Warmed(LookupError("cold")), port=0) as server:
        async with client(server) as chat:
            assert (await chat.text((await chat.prompt())["id"]))[0] == "Hello"
    assert "model not ready" in caplog.text
