"""Connections without sockets: the effects of one client on itself and on others."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.support.puppet import BOUND, until
from tests.support.stand import ONE, OWNER, Stand
from wsserver.connections.cursor import Cursor
from wsserver.connections.requests import REQUESTS
from wsserver.hub.live import Generation
from wsserver.pieces import Run
from wsserver.protocol import Close, Terminal

ID = "0123456789abcdef"


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    yield stand
    await stand.hub.close(BOUND)


async def test_piece_is_written_in_same_call_as_append(stand: Stand) -> None:
    connection, port = stand.client()
    connection.receive(json.dumps({"prompt": "Hello?"}))
    start = await port.next("start")
    generation = stand.hub.known(OWNER, start["id"])
    assert generation is not None
    generation.log.append("at once")
    assert [frame["text"] for frame in port.of("token")] == ["at once"]


async def test_prompt_in_known_conversation_is_answered_in_same_call(stand: Stand) -> None:
    connection, port = stand.client()
    connection.receive(json.dumps({"prompt": "Hello?"}))
    (await stand.puppet.reply()).end()
    await port.next("done")
    connection.receive(json.dumps({"prompt": "And now?", "request": "r"}))
    assert port.of("start")[1]["request"] == "r"
    connection.receive(json.dumps({"prompt": "And now?"}))
    assert port.of("error")[0]["code"] == "busy"


class Lines:
    """A dialect of plain lines."""

    @staticmethod
    def start(generation: Generation, *, after: int, shown: bool, request: str | None) -> bytes:
        return b"start\n"

    @staticmethod
    def run(generation: Generation, run: Run) -> bytes:
        return f"{run.seq} {run.data}\n".encode()

    @staticmethod
    def terminal(terminal: Terminal) -> bytes:
        return b"end\n"


class LineReader:
    """A follower of one generation that writes lines."""

    writable = True

    def __init__(self, generation: Generation) -> None:
        self.lines: list[bytes] = []
        self.cursor = Cursor(generation, self, Lines(), self, 1000)

    def write(self, frame: bytes) -> None:
        self.lines.append(frame)

    def merged(self, pieces: int) -> None: ...

    def leave(self, cursor: Cursor) -> None:
        cursor.generation.log.followers.remove(cursor)

    def fail(self, error: Exception) -> None:
        raise error


async def test_two_dialects_read_one_log(stand: Stand) -> None:
    connection, port = stand.client()
    connection.receive(json.dumps({"prompt": "Hello?", "id": ID}))
    reply = await stand.puppet.reply()
    generation = stand.hub.known(OWNER, ID)
    assert generation is not None
    reader = LineReader(generation)
    stand.hub.follow(generation, reader.cursor)
    reader.cursor.begin(0, 1000, shown=True, request=None)
    reply.say("one ")
    await port.next("token")
    reply.say("two").end()
    await port.next("done")
    assert reader.lines == [b"start\n", b"1 one \n", b"2 two\n", b"end\n"]
    assert [frame["text"] for frame in port.of("token")] == ["one ", "two"]


async def test_failing_transport_closes_only_its_client(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    connection, port = stand.client()
    other, good = stand.client()
    for one in (connection, other):
        one.receive(json.dumps({"prompt": "Hello?", "id": ID}))
    reply = await stand.puppet.reply()
    reply.say("one ")
    await port.next("token")
    await good.next("token")
    port.failure = ZeroDivisionError("secret")
    reply.say("two ").say("three").end()
    await good.next("done")
    assert "".join(frame["text"] for frame in good.of("token")) == "one two three"
    assert port.ended is Close.INTERNAL_ERROR
    assert caplog.text.count("cursor failed") == 1
    assert "secret" not in caplog.text
    connection.detach()
    assert stand.hub.live == 0


async def test_titles_sent_to_others_count_for_read_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wsserver.hub.accounts.READ_BURST", 20_000)
    monkeypatch.setattr("wsserver.hub.accounts.READ_RATE", 0.001)
    stand = Stand()
    connection, port = stand.client()
    connection.receive(json.dumps({"prompt": "Hello?", "conversation": ONE}))
    (await stand.puppet.reply()).end()
    await port.next("done")
    others = [stand.client() for _ in range(20)]
    for other, _ in others:
        other.receive(json.dumps({"type": "open", "conversation": ONE}))
    for _, seen in others:
        await seen.next("history")
    rename = json.dumps({"type": "rename", "conversation": ONE, "title": "x" * 100})
    for _ in range(10):
        connection.receive(rename)
    assert (await port.next("error"))["code"] == "limit"
    assert len(others[0][1].of("renamed")) == len(port.of("renamed")) < 10
    await stand.hub.close(BOUND)


async def test_repeated_stops_add_bounded_followers(stand: Stand) -> None:
    connection, port = stand.client()
    connection.receive(json.dumps({"prompt": "Hello?", "id": ID, "conversation": ONE}))
    reply = await stand.puppet.reply()
    reply.hold = asyncio.Event()
    await port.next("start")
    generation = stand.hub.known(OWNER, ID)
    assert generation is not None
    for number in range(10 * REQUESTS):
        connection.receive(json.dumps({"type": "stop", "id": ID, "request": f"r{number}"}))
    assert len(generation.log.followers) <= REQUESTS + 4
    refused = port.of("error")
    assert {frame["code"] for frame in refused} == {"not_running"}
    assert len(refused) == 9 * REQUESTS
    reply.hold.set()
    await port.next("stopped", REQUESTS)
    await until(lambda: not generation.log.followers)
    connection.receive(json.dumps({"prompt": "Again?", "conversation": ONE}))
    await stand.puppet.reply(1)
    connection.receive(json.dumps({"type": "stop", "request": "last"}))
    assert (await port.next("stopped", REQUESTS + 1))["request"] == "last"
