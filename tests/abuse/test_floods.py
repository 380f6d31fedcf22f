"""Floods of frames, slow readers and bad messages affect only their sender."""

from collections.abc import Iterable

import pytest
from websockets.frames import Opcode

from tests.abuse.limits import (
    FRAMES,
    PING,
    each,
    flat,
)
from tests.support.abuse import (
    Peer,
    Served,
    frame,
    meanwhile,
    served,
)

pytestmark = pytest.mark.slow


# Floods.


async def test_ping_flood_closes_socket() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            peer.write(frame(opcode=Opcode.PING) * 1000)
            assert await peer.close_code() == 1008
            await peer.flood(frame(opcode=Opcode.PING) * 1000)

    limits = (*FRAMES, "--send-timeout", "1")
    async with served(*limits) as server, flat(server):
        await meanwhile(server, each(20, abuse, server), most=15)
        await server.said("connection", code=1008)


async def test_ping_flood_without_reading_aborts_connection() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server, narrow=True) as peer:
            await peer.flood(frame(b"x" * 125, Opcode.PING) * 100)

    async with served() as server, flat(server):
        await meanwhile(server, each(5, abuse, server))
        await server.said("reader aborted", reason="too much unsent")
        assert (await server.metrics())[
            'wsserver_readers_aborted_total{why="too much unsent"}'
        ] == 5


async def test_frame_flood_gets_limit_errors_then_close_1008() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            peer.write(frame('{"prompt": "hang", "id": "0123456789abcdef"}'.replace("0", "a")))
            peer.write(frame(PING) * 50 + frame('{"type": "stop", "id": "a123456789abcdef"}'))
            frames = []
            async for message in peer.texts():
                frames.append(message)
                if message["type"] == "done":
                    break
            assert (frames[-1]["reason"], frames[-1]["by"]) == ("stopped", "client")
            limits = [message for message in frames if message["type"] == "error"]
            assert {message["code"] for message in limits} == {"limit"}
            assert all(message["retry_after"] > 0 for message in limits)
            assert 5 <= len(limits) <= 11
            peer.write(frame(PING) * 100)
            assert await peer.close_code() == 1008

    async with served(*FRAMES, "--grace", "0") as server, flat(server):
        await meanwhile(server, abuse(server), most=15)
        await server.said("generation", id="a123456789abcdef", reason="stopped", by="client")
        await server.said("connection", code=1008)


async def test_frame_flood_without_reading_aborts_connection() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server, narrow=True) as peer:
            await peer.flood(frame(PING) * 100)

    limits = (*FRAMES, "--send-timeout", "1")
    async with served(*limits) as server, flat(server):
        await meanwhile(server, each(5, abuse, server), most=15)


# Readers.


async def test_client_not_reading_is_aborted_and_delays_no_other() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server, narrow=True) as peer:
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
            peer.write(frame('{"prompt": "talk 50000", "id": "0123456789abcdef"}'))
            async with server.client() as other:
                await other.send({"prompt": "talk 50000", "id": "0123456789abcdef"})
                text, done = await other.text("0123456789abcdef")
                assert len(text) == 50_000 * 16 + 4
                assert done["reason"] == "end_turn"
            await server.said("reader aborted", reason="does not read")

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, abuse(server))


# Messages.


def oversize() -> dict[str, Iterable[bytes]]:
    fragment = frame("x" * 8192, Opcode.CONT, fin=False)
    return {
        "whole": [frame("x" * 70_000)],
        "announced": [b"\x81\xff" + (2**62).to_bytes(8) + b"mask", b"x" * 65_536] * 100,
        "in fragments without end": [frame("x", fin=False), *[fragment] * 1000],
        "in tiny fragments without end": [
            frame("x", fin=False),
            frame("x", Opcode.CONT, fin=False) * 50_000,
        ],
    }


@pytest.mark.parametrize("parts", oversize().values(), ids=oversize().keys())
async def test_message_over_message_size_closes_with_1009(parts: Iterable[bytes]) -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            for part in parts:
                peer.write(part)
            assert await peer.close_code() == 1009

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, each(10, abuse, server))
        await server.said("connection", code=1009)


async def test_client_ignoring_close_1009_is_aborted() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.websocket(server) as peer:
            peer.write(frame("x" * 70_000))
            assert await peer.close_code() == 1009
            await server.reaches(connections_open=1)

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, each(10, abuse, server))


async def test_compressed_message_closes_with_1002() -> None:
    async def abuse(server: Served) -> None:
        async with Peer.open(server) as peer:
            answer = await peer.upgrade(b"Sec-WebSocket-Extensions: permessage-deflate")
            assert b"101" in answer.split(b"\r\n")[0]
            assert b"extensions" not in answer.lower()
            first, *others = frame(b"\x00" * 60_000, Opcode.BINARY)
            peer.write(bytes([first | 0x40, *others]))  # RSV1: the message is compressed
            assert await peer.close_code() == 1002

    async with served("--send-timeout", "1") as server, flat(server):
        await meanwhile(server, each(10, abuse, server))
        await server.said("connection", code=1002)
