"""The application without sockets: requests, responses, and clients over in-memory transports."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import pytest

from tests.support.puppet import BOUND, Puppet
from tests.support.stand import Port
from wsserver import Model, Settings
from wsserver.admission import Visitor
from wsserver.app import App
from wsserver.connections.connection import Connection
from wsserver.limits import Memory
from wsserver.protocol import SUBPROTOCOL, Close
from wsserver.responses import Request, Response, Upgrade
from wsserver.telemetry import Metrics

HANDSHAKE = {"host": "localhost", "upgrade": "websocket", "connection": "Upgrade"}


class Line(Port):
    """An in-memory transport, in place of a listener's."""

    def __init__(self, subprotocol: str | None) -> None:
        super().__init__()
        self.subprotocol = subprotocol
        self.began = asyncio.get_running_loop().time()
        self.closed_by_client = False
        self._id = uuid4()
        self._closed = asyncio.Event()

    @property
    def id(self) -> UUID:
        return self._id

    @property
    def open(self) -> bool:
        return self.ended is None

    @property
    def ended_with(self) -> int:
        return 1006 if self.ended is None else int(self.ended)

    def end(self, code: Close, reason: str) -> None:
        super().end(code, reason)
        self._closed.set()

    async def wait_closed(self) -> None:
        await self._closed.wait()


@asynccontextmanager
async def running(model: Model, **given: object) -> AsyncIterator[App]:
    settings = Settings.load(**given)
    app = App(settings, model, None, Metrics(), Memory(settings.memory))
    try:
        await app.start()
        app.admission.loopback = True
        app.ready()
        yield app
        app.stop()
        async with asyncio.timeout(BOUND):
            await app.drain()
        await app.close(BOUND)
    finally:
        await app.release(BOUND)


def arrival(app: App) -> Visitor:
    return app.admission.arrive("127.0.0.1")


async def connect(app: App, subprotocol: str | None = None) -> tuple[Connection, Line, Visitor]:
    """Open a transport, as after a WebSocket handshake."""
    visitor = arrival(app)
    answer = await app.respond(Request("GET", "/", HANDSHAKE), visitor)
    assert isinstance(answer, Upgrade)
    line = Line(subprotocol)
    return app.opened(line, visitor), line, visitor


async def test_reply_streams_to_in_memory_transport(puppet: Puppet) -> None:
    async with running(puppet) as app:
        connection, line, visitor = await connect(app)
        connection.receive(json.dumps({"prompt": "Hello?"}))
        reply = await puppet.reply()
        reply.say("Hel", "lo").end()
        await line.next("done")
        assert "".join(frame["text"] for frame in line.of("token")) == "Hello"
        app.closed(line, visitor)
        assert not app.connections


async def test_only_subprotocol_client_gets_hello(puppet: Puppet) -> None:
    async with running(puppet) as app:
        _, plain, _ = await connect(app)
        _, line, _ = await connect(app, SUBPROTOCOL)
        assert [frame["type"] for frame in line.frames] == ["hello"]
        assert not plain.frames


async def test_upgrade_response_names_subprotocol(puppet: Puppet) -> None:
    async with running(puppet) as app:
        answer = await app.respond(Request("GET", "/ws?x=1", HANDSHAKE), arrival(app))
        assert answer == Upgrade((SUBPROTOCOL,))


@pytest.mark.parametrize(
    ("method", "target", "host", "status"),
    [
        ("GET", "/", "localhost", 200),
        ("GET", "/page.js?v=2", "localhost", 200),
        ("GET", "/", "elsewhere.example", 421),
        ("GET", "/nothing", "localhost", 404),
        ("PUT", "/", "localhost", 405),
        ("GET", "/ws", "localhost", 426),
        ("GET", "/readyz", "elsewhere.example", 200),
    ],
)
async def test_head_response_equals_get_without_body(
    puppet: Puppet, method: str, target: str, host: str, status: int
) -> None:
    async with running(puppet) as app:
        answer = await app.respond(Request(method, target, {"host": host}), arrival(app))
        assert isinstance(answer, Response)
        assert (answer.status, bool(answer.body)) == (status, True)
        if method == "GET":
            head = await app.respond(Request("HEAD", target, {"host": host}), arrival(app))
            assert isinstance(head, Response)
            assert head.body == b""
            assert (head.status, head.headers) == (status, answer.headers)


async def test_stopping_application_is_not_ready(puppet: Puppet) -> None:
    async with running(puppet) as app:
        app.stop()
        answer = await app.respond(Request("GET", "/readyz", {}), arrival(app))
        assert isinstance(answer, Response)
        assert answer.status == 503
        assert json.loads(answer.body)["serving"] is False


async def test_drain_finishes_replies_and_closes_clients_with_1012(puppet: Puppet) -> None:
    async with running(puppet) as app:
        connection, line, _ = await connect(app)
        connection.receive(json.dumps({"prompt": "Hello?"}))
        reply = await puppet.reply()
        reply.say("Hello")
        await line.next("token")
        app.stop()
        draining = asyncio.create_task(app.drain())
        await asyncio.sleep(0)  # the drain begins, and waits for the reply
        assert line.open
        assert not draining.done()
        reply.end()
        async with asyncio.timeout(BOUND):
            await draining
        assert (line.frames[-1]["type"], line.ended) == ("done", Close.SERVICE_RESTART)


async def test_exception_in_route_is_500_without_exception_text(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(puppet) as app:

        def fail(_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(app.admission.names, "check_host", fail)
        answer = await app.respond(Request("GET", "/", {"host": "localhost"}), arrival(app))
        assert isinstance(answer, Response)
        assert answer.status == 500
        assert b"secret" not in answer.body
