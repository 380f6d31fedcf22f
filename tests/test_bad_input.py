"""Bad input gets an error frame or a close code that explains it."""

import asyncio
import json
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet, until
from wsserver import parsing
from wsserver.connections import connection
from wsserver.protocol import ClientFrame

ID = "0123456789abcdef"

BAD = {
    "not JSON": ("hello", "invalid_json", "Send an object such as"),
    "nothing": ("", "invalid_json", "character 1"),
    "half of JSON": ('{"prompt": "x"', "invalid_json", "character 15"),
    "not an object": ('["prompt"]', "invalid_frame", "JSON object"),
    "null": ("null", "invalid_frame", "JSON object"),
    "no type": ("{}", "invalid_frame", "type: missing"),
    "unknown type": ('{"type": "shout"}', "unknown_type", '"shout"'),
    "type of a wrong type": ('{"type": {}}', "unknown_type", "{}"),
    "unknown key": ('{"prompt": "x", "colour": 1}', "invalid_frame", "colour: no such key"),
    "wrong type": ('{"prompt": 5}', "invalid_frame", "prompt: must be a text"),
    "wrong type deep": (
        '{"messages": [{"role": "user", "content": 5}]}',
        "invalid_frame",
        "messages.0.content: must be",
    ),
    "empty prompt": ('{"prompt": ""}', "invalid_frame", "prompt: empty"),
    "blank prompt": ('{"prompt": " \\n\\t"}', "invalid_frame", "prompt: empty"),
    "null prompt": ('{"prompt": null}', "invalid_frame", "type: missing"),
    "both": (
        '{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
        "invalid_frame",
        "either",
    ),
    "messages and conversation": (
        f'{{"messages": [{{"role": "user", "content": "x"}}], "conversation": "{ID}"}}',
        "invalid_frame",
        "with `conversation`",
    ),
    "no messages": ('{"messages": []}', "invalid_frame", "messages: the last"),
    "last message not the user's": (
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        "invalid_frame",
        "messages: the last",
    ),
    "a role there is not": (
        '{"messages": [{"role": "system", "content": "x"}]}',
        "invalid_frame",
        "messages.0.role",
    ),
    "short id": ('{"prompt": "x", "id": "short"}', "invalid_frame", "id: 16 to 64"),
    "id with a line break": (
        '{"prompt": "x", "id": "0123456789abcdef\\n"}',
        "invalid_frame",
        "id: 16 to 64",
    ),
    "wrong policy": ('{"prompt": "x", "on_busy": "wait"}', "invalid_frame", "on_busy: must be"),
    "no tokens": ('{"prompt": "x", "max_tokens": 0}', "invalid_frame", "max_tokens: must be"),
    "true for a number": ('{"prompt": "x", "max_tokens": true}', "invalid_frame", "max_tokens"),
    "text for a number": ('{"prompt": "x", "temperature": "1"}', "invalid_frame", "temperature:"),
    "too hot": ('{"prompt": "x", "temperature": 3}', "invalid_frame", "temperature: must be"),
    "NaN": ('{"prompt": "x", "temperature": NaN}', "invalid_json", "NaN"),
    "endless number": ('{"prompt": ' + "9" * 5000 + "}", "invalid_frame", "prompt: must be"),
    "key twice": ('{"prompt": "x", "prompt": "y"}', "invalid_frame", "prompt: given twice"),
    "key twice deep": (
        '{"messages": [{"role": "user", "role": "user", "content": "x"}]}',
        "invalid_frame",
        "role: given twice",
    ),
    "nesting bomb": ("[" * 60_000, "invalid_json", "nested too deeply"),
    "nesting bomb of objects": ('{"a":' * 12_000, "invalid_json", "nested too deeply"),
    "lone surrogate": ('{"prompt": "\\ud83d"}', "invalid_frame", "prompt: has half"),
    "lone surrogate deep": (
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        "invalid_frame",
        "messages.0.content: has half",
    ),
    "lone surrogate in a key": ('{"prompt": "x", "\\ud83d": 1}', "invalid_frame", "half"),
    "lone surrogate in the type": ('{"type": "\\ud83d"}', "unknown_type", "\\ud83d"),
    "control characters": ('{"type": "a\\u0000\\u001b[2J"}', "unknown_type", "a\\x00\\x1b[2J"),
    "binary": (b'{"prompt": "x"}', "invalid_frame", "text frames"),
    "prompt too long": (
        json.dumps({"prompt": "é" * 20_000}, ensure_ascii=False),
        "too_long",
        "40,000 bytes",
    ),
    "system too long": (
        json.dumps({"prompt": "x", "system": "y" * 40_000}),
        "too_long",
        "40,001 bytes",
    ),
    "model not on the list": ('{"prompt": "x", "model": "gpt"}', "model_not_allowed", ""),
}


@pytest.mark.parametrize(("message", "code", "says"), BAD.values(), ids=BAD.keys())
async def test_bad_frame_gets_explanation_and_socket_stays_open(
    chat: Client, puppet: Puppet, message: str | bytes, code: str, says: str
) -> None:
    await chat.send(message)
    error = await chat.receive()
    assert (error["type"], error["code"]) == ("error", code)
    assert says in error["message"]
    assert len(error["message"]) < 200
    assert "id" not in error
    assert error["ref"]
    start = await chat.prompt()
    (await puppet.reply()).say("fine").end()
    assert (await chat.text(start["id"]))[0] == "fine"


async def test_error_of_unusable_frame_has_readable_id(chat: Client) -> None:
    for id_, about in ((ID, ID), ("short", None), (5, None)):
        await chat.send({"prompt": "", "id": id_})
        assert (await chat.receive()).get("about") == about


async def test_repeated_bad_frames_close_only_their_socket_with_1008(
    server: wsserver.Server, chat: Client, puppet: Puppet
) -> None:
    start = await chat.prompt()
    async with client(server) as abuser:
        for _ in range(server.settings.bad_frames):
            await abuser.send("nonsense")
        await abuser.send({"prompt": "one more"})
        closed = await abuser.closed()
        assert len(abuser.frames) == server.settings.bad_frames
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1008
        assert "unusable" in closed.rcvd.reason
    assert len(puppet.replies) <= 1, "what came after the last bad frame was not read"
    (await puppet.reply()).say("undisturbed").end()
    assert (await chat.text(start["id"]))[0] == "undisturbed"


async def test_good_frame_resets_count_of_bad_frames(server: wsserver.Server, chat: Client) -> None:
    for _ in range(2):
        for _ in range(server.settings.bad_frames - 1):
            await chat.send("nonsense")
        await chat.send({"type": "list"})
        await chat.next("conversations")


async def test_ping_does_not_reset_count_of_bad_frames(
    server: wsserver.Server, chat: Client
) -> None:
    for _ in range(server.settings.bad_frames):
        await chat.send("nonsense")
        await chat.send({"type": "ping"})
    assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]


async def test_unusable_frames_count_for_frame_rate(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, frame_rate=0.001, frame_burst=3) as server:
        async with client(server) as chat:
            for _ in range(server.settings.bad_frames):
                await chat.send("nonsense" * 100)
            assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]
    codes = [frame["code"] for frame in chat.frames]
    assert codes == ["invalid_json"] * 3 + ["limit"] * (server.settings.bad_frames - 3)


async def test_flood_of_stops_for_waiting_prompt_keeps_one_stop(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def list_(*_: object) -> list[object]:
        await go_on.wait()
        return []

    rates: dict[str, Any] = {"frame_rate": 0.001, "frame_burst": 2}
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **rates) as server:
        monkeypatch.setattr(server.app.store, "list", list_)
        async with client(server) as chat:
            await chat.send({"type": "list"})
            await chat.send({"prompt": "x", "id": ID})
            for _ in range(server.settings.bad_frames):
                await chat.send({"type": "stop", "id": ID})
            (open_,) = server.app.connections.values()
            await until(lambda: open_.frames == 2 + server.settings.bad_frames)
            go_on.set()
            assert (await chat.next("done", id=ID))["by"] == "client"
            await chat.send({"type": "ping"})  # one frame too many
            assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]
            errors = [frame["code"] for frame in chat.frames if frame["type"] == "error"]
            assert errors == ["not_running"] * (server.settings.bad_frames - 1) + ["limit"]


async def test_frame_of_many_parts_before_auth_is_not_parsed(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    def parse(text: str) -> ClientFrame:
        parsed.append(text)
        return parsing.parse(text)

    async def named(token: str | None, _: wsserver.Handshake) -> wsserver.Principal | None:
        return None if token is None else wsserver.Principal(token)

    monkeypatch.setattr(connection, "parse", parse)
    origin = {"origin": "http://localhost"}
    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        async with client(server, **origin) as chat:
            messages = [{"role": "user", "content": "x"}] * 100
            await chat.send({"request": "early", "messages": messages})
            error = await chat.next("error")
            assert (error["code"], error["request"]) == ("unauthenticated", "early")
            assert not parsed
            await chat.send({"type": "auth", "token": "ada"})
            await chat.send({"messages": messages})  # without waiting for the answer
            await chat.next("start")
        async with client(server, **origin) as chat:
            for _ in range(server.settings.bad_frames):
                await chat.send("nonsense")
                await chat.send({"type": "list"})
            assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]


async def test_refused_stops_do_not_count_as_bad_frames(
    server: wsserver.Server, chat: Client
) -> None:
    for _ in range(2 * server.settings.bad_frames):
        await chat.send({"type": "stop"})
    assert len(await chat.quiet()) == 2 * server.settings.bad_frames


async def test_prompt_in_fragments_is_joined(chat: Client, puppet: Puppet) -> None:
    await chat.socket.send(['{"pro', 'mpt": "in ', 'pieces"}'])
    await chat.next("start")
    assert (await puppet.reply()).request.prompt == "in pieces"


async def write(chat: Client, *frames: Frame) -> None:
    """Write WebSocket frames that the client library would not send."""
    for frame in frames:
        chat.socket.transport.write(frame.serialize(mask=True, extensions=[]))


async def test_invalid_utf8_closes_with_1007(chat: Client) -> None:
    await write(chat, Frame(Opcode.TEXT, b'{"prompt": "\xff"}'))
    closed = await chat.closed()
    assert closed.rcvd is not None
    assert closed.rcvd.code == 1007


async def test_message_over_message_size_closes_with_1009(chat: Client) -> None:
    await chat.send(json.dumps({"prompt": "x" * 70_000}))
    closed = await chat.closed()
    assert closed.rcvd is not None
    assert closed.rcvd.code == 1009


async def test_fragments_over_message_size_close_with_1009(chat: Client) -> None:
    await chat.socket.send(["x" * 40_000, "x" * 40_000])
    closed = await chat.closed()
    assert closed.rcvd is not None
    assert closed.rcvd.code == 1009


async def test_thousands_of_empty_fragments_close_with_1009(chat: Client) -> None:
    await write(chat, Frame(Opcode.TEXT, b"", fin=False))
    await write(chat, *[Frame(Opcode.CONT, b"", fin=False)] * 5000)
    closed = await chat.closed()
    assert closed.rcvd is not None
    assert closed.rcvd.code == 1009


async def test_unmasked_frame_closes_with_1002(server: wsserver.Server) -> None:
    async with client(server) as one:
        one.socket.transport.write(Frame(Opcode.TEXT, b"{}").serialize(mask=False, extensions=[]))
        closed = await one.closed()
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1002


async def test_client_lost_within_frame_is_forgotten(
    server: wsserver.Server,
) -> None:
    async with client(server) as one:
        await one.quiet()
        assert len(server.app.connections) == 1
        one.socket.transport.write(b"\x81\xfe\x10\x00half")
        one.socket.transport.abort()
        await one.socket.wait_closed()
    async with client(server) as two:
        await two.quiet()
        await until(lambda: len(server.app.connections) == 1)


@pytest.mark.parametrize(
    "message",
    [
        json.dumps({"request": "R", "prompt": "x" * 300}),
        '{ "request" : "R" , "messages": ' + "[" * 2000 + "]" * 2000 + "}",
    ],
    ids=["over the frame rate", "nested too deeply"],
)
async def test_error_of_unparsed_frame_has_request_of_first_key(
    puppet: Puppet, message: str
) -> None:
    async with wsserver.serve(puppet, port=0, frame_burst=2, frame_rate=0.001) as server:
        async with client(server) as chat:
            if "prompt" in message:
                await chat.quiet()
                await chat.quiet()
            await chat.send(message)
            error = await chat.next("error")
            assert (error["request"], error["code"]) == (
                ("R", "limit") if "prompt" in message else ("R", "invalid_json")
            )
