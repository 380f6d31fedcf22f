"""A chat mounted in FastAPI: its user, its page, its lifespan, and clients that leave."""

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

import wsserver
from tests.asgi.servers import SERVERS, serving
from tests.support.client import Client
from tests.support.npm import agent
from tests.support.puppet import BOUND, Puppet, until
from tests.support.tools import ROOT

pytestmark = pytest.mark.slow

ONE = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def mounted(
    puppet: Puppet, server: str, **given: Any
) -> AsyncIterator[tuple[int, wsserver.Asgi]]:
    chat = wsserver.asgi(puppet, **{"allow_anonymous": True, "drain_timeout": 0, **given})
    app = FastAPI(lifespan=chat.lifespan)
    app.mount("/chat", chat)
    async with serving(app, server) as port:
        yield port, chat


async def test_socket_and_page_are_below_the_mount(puppet: Puppet, server: str) -> None:
    async with mounted(puppet, server) as (port, _):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            page = await http.get("/chat/")
            assert (page.status_code, "wsserver" in page.text) == (200, True)
            assert (await http.get("/chat/client.js")).status_code == 200
            assert (await http.get("/chat/manifest.webmanifest")).status_code == 200
            assert (await http.get("/chat/healthz")).text == "ok\n"
            assert (await http.get("/healthz")).status_code == 404
        protocols = [Subprotocol("wsserver.v1")]
        async with connect(
            f"ws://127.0.0.1:{port}/chat/ws", proxy=None, subprotocols=protocols
        ) as ws:
            assert ws.subprotocol == "wsserver.v1"
            client = Client(ws)
            assert (await client.receive())["type"] == "hello"
            start = await client.prompt()
            (await puppet.reply()).say("Hel", "lo").end()
            assert (await client.text(start["id"]))[0] == "Hello"


async def test_events_stream_and_abort_stops_the_model(puppet: Puppet, server: str) -> None:
    async with mounted(puppet, server) as (port, chat):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/chat") as http:
            async with http.stream("POST", "/api/chat", json=ONE) as response:
                reply = (await puppet.reply()).say("Hel")
                async for line in response.aiter_lines():
                    if '"text":"Hel"' in line:
                        break
            async with asyncio.timeout(BOUND):
                await reply.closed.wait()
        assert chat.app is not None
        await until(lambda: chat.app is not None and not chat.app.hub.live)


async def test_agent_of_ag_ui_runs_connects_and_stops(puppet: Puppet, server: str) -> None:
    async with mounted(puppet, server) as (port, _):
        async with agent(f"http://127.0.0.1:{port}/chat", "thread-of-the-test-1") as client:
            client.send("say", text="Hello?")
            (await puppet.reply()).say("one").end()
            messages = await client.contents()
            client.send("reload")
            client.send("connect")
            assert await client.contents() == messages == [("user", "Hello?"), ("assistant", "one")]
            client.send("say", text="Go on")
            reply = (await puppet.reply(1)).say("half")
            await client.sees("half")
            client.send("stop")
            assert await client.next("outcome") == "cancelled"
            assert reply.closed.is_set()


async def test_too_large_body_and_wrong_token_are_refused(puppet: Puppet, server: str) -> None:
    async def nobody(_: str | None, __: wsserver.Handshake) -> None:
        return None

    async with mounted(puppet, server, authenticate=nobody, allow_anonymous=False) as (port, _):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/chat") as http:
            assert (await http.post("/api/chat", json=ONE)).status_code == 401
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            async with connect(f"ws://127.0.0.1:{port}/chat/ws", proxy=None):
                pass
    async with mounted(puppet, server) as (port, _):
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}/chat") as http:
            answer = await http.post("/api/chat", json={"prompt": "x" * 2_000_000})
            assert (answer.status_code, answer.json()["code"]) == (413, "too_long")


async def test_message_over_the_limit_closes_the_socket(puppet: Puppet, server: str) -> None:
    async with mounted(puppet, server) as (port, _):
        async with connect(f"ws://127.0.0.1:{port}/chat/ws", proxy=None) as ws:
            await ws.send("x" * 70_000)
            closed = await Client(ws).closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1009


def test_strangers_are_refused_at_the_start(puppet: Puppet) -> None:
    async def enter() -> None:
        async with wsserver.asgi(puppet).lifespan():
            pass

    with pytest.raises(wsserver.ConfigError, match="strangers"):
        asyncio.run(enter())


def fastapi_app(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("WSSERVER_STORE", "memory:")
    spec = importlib.util.spec_from_file_location("fastapi_app", ROOT / "examples/fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastapi_app", module)
    spec.loader.exec_module(module)
    return module


async def test_user_of_the_program_is_the_principal(
    monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    program = fastapi_app(monkeypatch)
    async with serving(program.app, server) as port:
        address = f"127.0.0.1:{port}"
        async with httpx2.AsyncClient(base_url=f"http://{address}") as http:
            login = await http.get("/login/ada")
            cookie = login.headers["set-cookie"].partition(";")[0]
        headers, protocols = {"cookie": cookie}, [Subprotocol("wsserver.v1")]
        async with connect(
            f"ws://{address}/chat/ws",
            proxy=None,
            additional_headers=headers,
            subprotocols=protocols,
        ) as ws:
            assert json.loads(await ws.recv())["principal"] == "ada"
        with pytest.raises((InvalidStatus, ConnectionClosed)):
            async with connect(f"ws://{address}/chat/ws", proxy=None) as ws:
                await ws.recv()
