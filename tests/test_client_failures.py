"""The Python client against servers that refuse, close, or break the protocol."""

import asyncio
import json
from http import HTTPStatus

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

import wsserver
from tests.support.puppet import BOUND, until
from tests.support.replies import end_of, url_of
from wsserver.client import (
    ConnectionFailed,
    ReplyError,
    State,
    Usage,
    connect,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


# HTTP statuses and close codes.


@pytest.mark.parametrize("status", [400, 401, 403, 404, 421])
async def test_final_status_is_not_retried(status: int) -> None:
    tried = 0

    def refuse(connection: ServerConnection, _: Request) -> Response:
        nonlocal tried
        tried += 1
        return connection.respond(HTTPStatus(status), "Not you.")

    async with serve(wait_until_closed, "127.0.0.1", 0, process_request=refuse) as server:
        with pytest.raises(ConnectionFailed, match=r"Not you\.") as raised:
            await connect(url_of(server)).__aenter__()
    assert (raised.value.status, raised.value.final, tried) == (status, True, 1)


@pytest.mark.parametrize(("status", "after"), [(429, "0"), (503, "0.01"), (500, ""), (502, "x")])
async def test_temporary_status_is_retried(
    status: int, after: str, server: wsserver.Server
) -> None:
    tried = 0

    def refuse(connection: ServerConnection, _: Request) -> Response | None:
        nonlocal tried
        tried += 1
        response = connection.respond(HTTPStatus(status), "Later.")
        if after:
            response.headers["Retry-After"] = after
        return response if tried < 4 else None

    async with serve(wait_until_closed, "127.0.0.1", 0, process_request=refuse) as listener:
        async with connect(url_of(listener)):
            assert tried == 4


async def test_retry_after_beyond_timeout_fails_at_once() -> None:
    def refuse(connection: ServerConnection, _: Request) -> Response:
        response = connection.respond(HTTPStatus(503), "Later.")
        response.headers["Retry-After"] = "3600"
        return response

    async with serve(wait_until_closed, "127.0.0.1", 0, process_request=refuse) as server:
        # An hour is over the timeout, so that the client fails without a wait.
        with pytest.raises(ConnectionFailed, match=r"Later\.") as raised:
            await connect(url_of(server)).__aenter__()
    assert (raised.value.status, raised.value.final) == (503, False)


@pytest.mark.parametrize("code", [1002, 1007, 1008])
async def test_final_close_code_closes_chat(code: int) -> None:
    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(code, "so it is")

    async with serve(close, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        reply = chat.prompt("Hi")
        with pytest.raises(ConnectionFailed, match="so it is") as raised:
            await end_of(reply)
        assert (raised.value.close_code, raised.value.final) == (code, True)
        assert chat.state is State.CLOSED


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 4000])
async def test_other_close_codes_reconnect(code: int) -> None:
    came = 0

    async def close(socket: ServerConnection) -> None:
        nonlocal came
        came += 1
        await socket.recv()
        await socket.close(code)

    async with serve(close, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        chat.prompt("Hi")
        await until(lambda: came == 3)


async def test_client_gives_up_closing_server_after_patience() -> None:
    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(1011, "no")

    async with (
        serve(close, "127.0.0.1", 0) as server,
        connect(url_of(server), patience=0.5) as chat,
    ):
        with pytest.raises(ConnectionFailed, match="no") as failure:
            await end_of(chat.prompt("Hi"))
        assert not failure.value.final
        await until(lambda: chat.state is State.IDLE)


async def test_negative_retry_after_is_not_retried_at_once() -> None:
    asked = 0

    async def refuse(socket: ServerConnection) -> None:
        nonlocal asked
        async for message in socket:
            asked += 1
            about = json.loads(message)["id"]
            error = {"type": "error", "about": about, "code": "overloaded"}
            await socket.send(json.dumps({**error, "retryable": True, "retry_after": -1}))

    async with (
        serve(refuse, "127.0.0.1", 0) as server,
        connect(url_of(server), patience=0.5) as chat,
    ):
        with pytest.raises(ReplyError):
            await end_of(chat.prompt("Hi"))
    assert asked <= 11


@pytest.mark.parametrize("url", ["http://localhost/", "ws://", "localhost:3001", "ws://["])
async def test_invalid_address_is_final_failure(url: str) -> None:
    with pytest.raises(ConnectionFailed, match="not the address"):
        await connect(url, open_timeout=1).__aenter__()


# Frames that break the protocol.


@pytest.mark.parametrize("said", ["no JSON", "[]", "1", '{"type": "start", "id": 1}', '{"id": []}'])
async def test_invalid_frame_closes_chat(said: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        await socket.send(said.replace('"id": 1', f'"id": "{name}"'))
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        with pytest.raises(ConnectionFailed, match="violates the protocol"):
            await end_of(chat.prompt("Hi"))


@pytest.mark.parametrize(
    "said",
    [
        '{"type": "history", "title": "T", "running": []}',
        '{"type": "history", "title": "T", "messages": [1], "running": []}',
        '{"type": "history", "title": "T", "messages": [], "running": [], "before": 9}',
        '{"type": "error", "code": "overloaded", "retryable": true, "retry_after": "1"}',
        '{"type": "error", "code": "overloaded", "retryable": true, "retry_after": NaN}',
    ],
)
async def test_invalid_answer_fails_query(said: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        async for _ in socket:
            await socket.send(said)

    async with serve(talk, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        with pytest.raises(ConnectionFailed, match="violates the protocol"):
            await asyncio.wait_for(chat.history(), BOUND)


@pytest.mark.parametrize("seq", ["NaN", "1.5", '"1"', "true", "null"])
async def test_token_frame_with_invalid_seq_closes_chat(seq: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        for _ in range(2):
            await socket.send(f'{{"type":"token","id":"{name}","seq":{seq},"text":"x"}}')
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        reply = chat.prompt("Hi")
        with pytest.raises(ConnectionFailed, match="violates the protocol"):
            await end_of(reply)
        assert reply.text == ""


@pytest.mark.parametrize(
    "piece",
    [
        '"type": "block", "partial_json": 1',
        '"type": "block"',
        '"type": "thinking", "text": "", "signature": []',
        '"type": "token", "text": "x", "block": "1"',
    ],
)
async def test_invalid_content_frame_closes_chat(piece: str) -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        await socket.send(f'{{"id": "{name}", "seq": 1, {piece}}}')
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        with pytest.raises(ConnectionFailed, match="violates the protocol"):
            await end_of(chat.prompt("Hi"))


async def test_list_ends_at_empty_page() -> None:
    async def talk(socket: ServerConnection) -> None:
        async for _ in socket:
            await socket.send('{"type": "conversations", "items": [], "next": "x"}')

    async with serve(talk, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        assert await asyncio.wait_for(chat.conversations(), BOUND) == []


async def test_unknown_frames_and_keys_are_ignored() -> None:
    async def talk(socket: ServerConnection) -> None:
        name = str(await socket.recv()).partition('"id":"')[2].partition('"')[0]
        for frame in (
            '{"type": "fanfare"}',
            '{"type": "start", "id": "%s", "conversation": "C", "model": "m", "new": 1}',
            '{"type": "picture", "id": "%s", "seq": 1}',
            '{"type": "token", "id": "%s", "seq": 2, "text": "x", "new": 1}',
            '{"type": "done", "id": "%s", "seq": 2, "reason": "new", "usage": {"new": 3}}',
        ):
            await socket.send(frame.replace("%s", name))
        await socket.wait_closed()

    async with serve(talk, "127.0.0.1", 0) as server, connect(url_of(server)) as chat:
        end = await end_of(chat.prompt("Hi"))
    assert (end.text, end.reason, end.usage) == ("x", "new", Usage())


async def wait_until_closed(socket: ServerConnection) -> None:
    await socket.wait_closed()
