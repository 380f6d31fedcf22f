"""The application called as a server of ASGI would: scopes and events by hand."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.support.clock import ClockLoop
from tests.support.puppet import BOUND, Puppet, until
from wsserver import ConfigError, Settings

ID = "0123456789abcdef0123"


class Server:
    """One connection of a server of ASGI, whose events the test decides."""

    def __init__(self, chat: wsserver.Asgi, kind: str, path: str, **keys: Any) -> None:
        self.sent: list[Any] = []
        self.room = asyncio.Event()  # cleared: `send` waits
        self.room.set()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._wrote = asyncio.Event()
        scope = {
            "type": kind,
            "path": path,
            "headers": [(b"host", b"localhost"), *keys.pop("headers", [])],
            "client": ("127.0.0.1", 5),
            **keys,
        }
        self.task = asyncio.create_task(chat(scope, self._events.get, self._send))

    async def _send(self, event: Any) -> None:
        await self.room.wait()
        self.sent.append(event)
        self._wrote.set()

    def receive(self, kind: str, **keys: Any) -> None:
        self._events.put_nowait({"type": kind, **keys})

    def post(self, body: bytes, *, more: bool = False) -> None:
        self.receive("http.request", body=body, more_body=more)

    async def reaches(self, part: bytes) -> None:
        """Wait until the body has a part."""
        while part not in self.body:
            self._wrote.clear()
            await self._wrote.wait()

    async def done(self) -> None:
        async with asyncio.timeout(BOUND):
            await self.task

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(event.get("body", b"") for event in self.sent[1:])


JSON = [(b"content-type", b"application/json")]


@asynccontextmanager
async def running(puppet: Puppet, **given: Any) -> AsyncIterator[wsserver.Asgi]:
    chat = wsserver.asgi(puppet, allow_anonymous=True, drain_timeout=0, **given)
    async with chat.lifespan():
        yield chat


def post(chat: wsserver.Asgi) -> Server:
    return Server(chat, "http", "/api/chat", method="POST", headers=JSON)


async def test_settings_are_given_once(puppet: Puppet) -> None:
    settings = Settings.load(allow_anonymous=True)
    with pytest.raises(TypeError):
        wsserver.asgi(puppet, settings=settings, port=5)
    chat = wsserver.asgi("demo", allow_anonymous=True)
    async with chat.lifespan():
        assert chat.app is not None
        assert chat.app.model_name == "demo"
    with pytest.raises(RuntimeError, match="once"):
        async with chat.lifespan():
            pass


async def test_request_without_lifespan_is_named(puppet: Puppet) -> None:
    chat = wsserver.asgi(puppet, allow_anonymous=True)
    with pytest.raises(RuntimeError, match=r"lifespan=chat\.lifespan"):
        await Server(chat, "http", "/healthz", method="GET").done()


async def test_lifespan_that_fails_tells_the_server(puppet: Puppet) -> None:
    chat = wsserver.asgi(puppet)
    server = Server(chat, "lifespan", "")
    server.receive("lifespan.startup")
    with pytest.raises(ConfigError):
        await server.done()
    (failed,) = server.sent
    assert failed["type"] == "lifespan.startup.failed"
    assert "strangers" in failed["message"]


async def test_connections_over_the_limit_get_429(puppet: Puppet) -> None:
    async with running(puppet, connections_per_address=1) as chat:
        first = Server(chat, "websocket", "/ws")
        first.receive("websocket.connect")
        await until(lambda: bool(first.sent))
        second = Server(chat, "http", "/", method="GET")
        await second.done()
        assert second.status == 429
        third = Server(chat, "websocket", "/ws", extensions={"websocket.http.response": {}})
        await third.done()
        assert third.sent[0]["type"] == "websocket.http.response.start"
        first.receive("websocket.disconnect", code=1000)
        await first.done()


async def test_refused_socket_is_closed_where_the_server_sends_no_response(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = Server(chat, "websocket", "/ws", headers=[(b"origin", b"https://evil.example")])
        server.receive("websocket.connect")
        await server.done()
        assert server.sent == [{"type": "websocket.close", "code": 1008}]


async def test_body_in_parts_is_read_and_one_that_breaks_off_is_not(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = post(chat)
        server.post(b'{"prompt": ', more=True)
        server.post(b'"Hello?"}')
        (await puppet.reply()).say("Hello").end()
        await server.done()
        assert server.status == 200
        assert b'"text":"Hello"' in server.body
        server = post(chat)
        server.post(b'{"prompt": ', more=True)
        server.receive("http.disconnect")
        await server.done()
        assert server.status == 400
    assert len(puppet.replies) == 1


async def test_slow_body_gets_408(puppet: Puppet) -> None:
    async with running(puppet, open_timeout=0.05) as chat:
        server = post(chat)
        server.post(b"{", more=True)
        await server.done()
        assert server.status == 408


async def test_client_that_leaves_stops_its_reply(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = post(chat)
        server.post(b'{"prompt": "Hello?"}')
        reply = await puppet.reply()
        server.receive("http.request", body=b"", more_body=False)  # some servers repeat it
        server.receive("http.disconnect")
        await server.done()
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()


async def test_websocket_at_address_of_a_stream_is_refused(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = post(chat)
        server.post(b'{"prompt": "Hello?", "id": "%b"}' % ID.encode())
        await puppet.reply()
        socket = Server(chat, "websocket", f"/api/chat/{ID}")
        socket.receive("websocket.connect")
        await socket.done()
        assert socket.sent == [{"type": "websocket.close", "code": 1008}]
        server.receive("http.disconnect")
        await server.done()


async def test_question_mark_that_the_server_decoded_belongs_to_the_path(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = Server(chat, "http", "/healthz?", method="GET")
        await server.done()
        assert server.status == 404


async def test_name_of_a_chat_is_decoded_once(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = post(chat)
        message = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hello?"}]}
        server.post(json.dumps({"id": "50%25?", "messages": [message]}).encode())
        await puppet.reply()
        stop = Server(chat, "http", "/api/chat/50%25?/stop", method="POST")
        await stop.done()
        assert stop.status == 200
        await server.done()


@pytest.mark.parametrize("path", ["/api/chat", "/healthz"])
async def test_client_that_does_not_read_the_head_is_aborted(puppet: Puppet, path: str) -> None:
    async with running(puppet, send_timeout=0.1) as chat:
        server = Server(
            chat, "http", path, method="POST" if "chat" in path else "GET", headers=JSON
        )
        server.room.clear()
        server.post(b'{"prompt": "Hello?"}')
        await server.done()
        assert server.sent == []
        assert chat.app is not None
        await until(lambda: not chat.app.hub.live)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_server_without_room_aborts_the_client(puppet: Puppet, kind: str) -> None:
    async with running(puppet, send_timeout=0.1) as chat:
        if kind == "http":
            server = post(chat)
            server.post(b'{"prompt": "Hello?"}')
        else:
            server = Server(chat, "websocket", "/ws")
            server.receive("websocket.connect")
            server.receive("websocket.receive", text='{"prompt": "Hello?"}')
        reply = await puppet.reply()
        await until(lambda: len(server.sent) > 1)
        server.room.clear()
        reply.say("Hello")
        await server.done()
        assert b'why="does not read"} 1.0' in chat.metrics.exposition()


async def test_socket_with_too_much_unsent_is_aborted(puppet: Puppet) -> None:
    async with running(puppet, max_unsent=2**18) as chat:
        server = Server(chat, "websocket", "/ws")
        server.receive("websocket.connect")
        await until(lambda: bool(server.sent))
        server.room.clear()
        for _ in range(4000):
            server.receive("websocket.receive", text='{"type": "ping"}')
        assert chat.app is not None
        (transport,) = chat.app.connections
        for _ in range(100):
            transport.write(b"x" * 10_000)
        server.room.set()
        await server.done()
        assert b'why="too much unsent"} 1.0' in chat.metrics.exposition()


async def test_binary_message_is_refused_and_the_close_is_answered(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        server = Server(chat, "websocket", "/ws", client=None)
        server.receive("websocket.connect")
        server.receive("websocket.receive", bytes=b"x")
        await until(lambda: len(server.sent) > 1)
        assert "invalid_frame" in server.sent[1]["text"]
        assert chat.app is not None
        (transport,) = chat.app.connections
        transport.end(1000, "enough")  # type: ignore[arg-type]
        transport.write(b"too late")
        server.receive("websocket.disconnect", code=1000)
        await transport.wait_closed()
        await server.done()
        assert server.sent[-1] == {"type": "websocket.close", "code": 1000, "reason": "enough"}


async def test_failure_of_a_message_closes_the_socket(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a fault")

    monkeypatch.setattr("wsserver.connections.connection.Connection.receive", fail)
    async with running(puppet) as chat:
        server = Server(chat, "websocket", "/ws")
        server.receive("websocket.connect")
        server.receive("websocket.receive", text="x")
        await until(lambda: server.sent[-1:] and server.sent[-1]["type"] == "websocket.close")
        assert server.sent[-1]["code"] == 1011
        server.receive("websocket.disconnect", code=1011)
        await server.done()


def test_comment_comes_one_ping_interval_after_the_last_event(puppet: Puppet) -> None:
    async def chat() -> float:
        loop = asyncio.get_running_loop()
        async with running(puppet, ping_interval=20, idle_timeout=0) as chat:
            server = post(chat)
            server.post(b'{"prompt": "Hello?"}')
            reply = await puppet.reply()
            await asyncio.sleep(15)
            reply.say("Hello")
            await server.reaches(b"Hello")
            said = loop.time()
            await server.reaches(b":\n\n")
            waited = loop.time() - said
            server.receive("http.disconnect")
            await server.done()
            return waited

    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        assert 19 < runner.run(chat()) < 21


async def test_bytes_of_requests_and_of_slow_readers_count_for_their_client(
    puppet: Puppet,
) -> None:
    async with running(puppet, write_buffer=2**14, frame_size=2**14) as chat:
        server = post(chat)
        server.post(b'{"prompt": "', more=True)
        server.post(b"x" * 9000, more=True)
        await until(lambda: chat.memory.used > 9000)
        server.post(b'"}')
        reply = await puppet.reply()
        await until(lambda: bool(server.sent))
        before = chat.memory.used
        server.room.clear()
        reply.say("y" * 2**14)
        await until(lambda: chat.memory.used > before + 2**15)  # in the log, and unsent
        server.room.set()
        reply.end()
        await server.done()
        assert b"y" * 2**14 in server.body
        assert chat.memory.used == chat.memory.cached


async def test_body_without_memory_for_it_gets_503(puppet: Puppet) -> None:
    async with running(puppet) as chat:
        taken = chat.memory.limit - chat.memory.used - 1000
        chat.memory.used += taken
        server = post(chat)
        server.post(b'{"prompt": "' + b"x" * 9000, more=True)
        await server.done()
        assert server.status == 503
        chat.memory.used -= taken
    assert not puppet.replies
