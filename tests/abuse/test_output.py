"""Secrets of clients and of the API do not leak into logs, metrics or errors."""

import asyncio
import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from tests.abuse.limits import (
    KEY,
    NASTY,
    SECRET,
    Listener,
    lines,
)
from tests.support.abuse import (
    Peer,
    Served,
    frame,
    meanwhile,
    served,
)
from tests.support.upstream import Answer, Hang, Script, reply

pytestmark = pytest.mark.slow


async def test_log_event_is_one_json_line_for_any_client_input(tmp_path: Path) -> None:
    names = {"al\x1b[31mice": "token-1", "b\u202eob\u200b": "token-2"}
    file = tmp_path / "tokens"
    file.write_text(
        "".join(
            f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"
            for name, token in names.items()
        )
    )

    async def frames(server: Served, name: str, token: str) -> None:
        options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {token}"}}
        async with server.client(**options) as chat:
            await chat.send({"type": "auth", "token": token})
            assert (await chat.receive())["principal"] == name
            for sent in (
                {"prompt": NASTY, "id": "0123456789" + NASTY},
                {"type": NASTY},
                {NASTY: NASTY},
                {"type": "rename", "conversation": "0123456789abcdef", "title": NASTY},
                {"type": "list", "before": NASTY},
                {"prompt": "x", "model": NASTY},
            ):
                await chat.send(json.dumps(sent))
                assert (await chat.receive())["type"] == "error"
            start = await chat.prompt(NASTY)
            await chat.text(start["id"])
            for raw in (NASTY, f'{{"type": "{NASTY}', '{"type": "\ud83d"}'):
                await chat.send(raw.encode(errors="replace").decode())
                assert (await chat.receive())["type"] == "error"

    async def requests(server: Served) -> None:
        for header in (b"Host: ", b"Host: localhost\r\nOrigin: ", b"User-Agent: "):
            for nasty in (
                NASTY.encode(),
                b"http://x\xe2\x80\xa8\x9b2J\x85\xe2\x80\xae",
                b"\x1b[2J\x00",
                b'"}\\u000a{"event": "forged"}',
            ):
                async with Peer.open(server) as peer:
                    peer.write(Peer.HANDSHAKE.replace(b"Host: localhost", header + nasty))
                    peer.write(b"\r\n")
                    answer = await peer.rest()
                    assert not answer.startswith(b"HTTP/1.1 101")

    async def abuse(server: Served) -> None:
        await asyncio.gather(*(frames(server, *one) for one in names.items()), requests(server))

    bearer: dict[str, Any] = {"additional_headers": {"Authorization": "Bearer token-1"}}
    async with served("--token-file", str(file), bearer="token-1") as server:
        await meanwhile(server, abuse(server), **bearer)
        await server.reaches(connections_open=0)
        principals = {event.get("principal") for event in lines(server)}
        assert principals >= {r"al\x1b[31mice", r"b\u202eob\u200b"}
        assert {event["event"] for event in lines(server)} == {
            "connection",
            "connection refused",
            "generation",
        }


async def test_jwt_with_unprintable_name_is_refused() -> None:
    secret = secrets.token_hex()

    def token(name: str) -> str:
        return jwt.encode({"sub": name, "exp": time.time() + 600}, secret, "HS256")

    async def abuse(server: Served) -> None:
        for name in (NASTY, "alice\n", "\u202ealice", "\x1b]0;alice\x07", "a\u2028lice"):
            async with Peer.open(server) as peer:
                answer = await peer.upgrade(f"Authorization: Bearer {token(name)}".encode())
                assert b" 401 " in answer
            async with Peer.websocket(server) as peer:
                peer.write(frame(json.dumps({"type": "auth", "token": token(name)})))
                assert [message["code"] async for message in peer.texts()] == ["unauthenticated"]
                assert peer.code == 1008

    alice = token("alice")
    async with served(WSSERVER_JWT_SECRET=secret, bearer=alice) as server:
        options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {alice}"}}
        await meanwhile(server, abuse(server), **options)
        await server.reaches(connections_open=0)
        principals = {event.get("principal") for event in lines(server)}
        assert principals == {"alice", None}


@pytest.mark.parametrize("where", ["body", "header", "event"])
async def test_api_error_text_reaches_neither_client_nor_log(where: str) -> None:
    body = json.dumps({"type": "error", "error": {"type": SECRET, "message": SECRET}})
    script: Script | Answer
    if where == "body":
        script = Answer(400, "application/json", body)
    elif where == "header":
        script = Answer(500, "text/html", "x", {"request-id": SECRET, "x-why": SECRET})
    else:
        script = reply(f"event: error\ndata: {body}\n\n".encode(), Hang())
    seen: list[str] = []
    ids: list[str] = []

    async def abuse(server: Served) -> None:
        async with server.client() as chat:
            await chat.prompt("leak")
            await chat.next("error")
            ids.append(chat.frames[0]["id"])
            seen.append(str(chat.frames))

    async with Listener() as upstream:
        upstream.default = script if isinstance(script, Script) else Script((script,))
        environment = {"ANTHROPIC_BASE_URL": upstream.url, "ANTHROPIC_API_KEY": KEY}
        model = "anthropic:claude-sonnet-4-6"
        async with served("--retries", "0", model=model, **environment) as server:
            await meanwhile(server, abuse(server))
            await server.said("generation", id=ids[0])
            seen += await told(server)
    assert SECRET not in "".join(seen)


async def told(server: Served) -> list[str]:
    """Return the log and the metrics."""
    pages = [(await server.get(path))[1] for path in ("/metrics", "/readyz", "/healthz", "/")]
    return [*pages, *server.log, server.process.output]


async def test_tokens_and_exception_texts_reach_neither_client_nor_log(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    good = "good-" + SECRET
    file.write_text(f"alice sha256:{hashlib.sha256(good.encode()).hexdigest()}\n")
    options: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {good}"}}
    seen: list[str] = []

    async def abuse(server: Served) -> None:
        async with server.client(**options) as chat:
            await chat.send({"type": "auth", "token": good})
            await chat.next("authenticated")
            failed = await chat.prompt("fail " + SECRET)
            assert (await chat.next("error", id=failed["id"]))["code"] == "internal"
            await chat.send({"type": "auth", "token": "bad-" + SECRET})
            assert (await chat.next("error"))["code"] == "unauthenticated"
            await chat.send({"type": "auth", "token": SECRET, "more": SECRET})
            await chat.next("error")
            seen.append(str(chat.frames).replace(f"more: {SECRET}", ""))
        async with server.client() as chat:
            await chat.send({"type": "auth", "token": "bad-" + SECRET})
            seen.append(str(await chat.closed()) + str(chat.frames))
        query = f"/?token={SECRET}&access_token={SECRET}".encode()
        for token in (b"", f"Authorization: Bearer bad-{SECRET}\r\n".encode()):
            for path in (query, b"/nowhere" + query, b"/metrics" + query):
                async with Peer.open(server) as peer:
                    peer.write(Peer.HANDSHAKE.replace(b"GET /", b"GET " + path) + token)
                    peer.write(b"Origin: http://evil.example\r\n\r\n")
                    answer = await peer.rest()
                    assert not answer.startswith(b"HTTP/1.1 101")
                    seen.append(answer.decode())

    async with served("--token-file", str(file), bearer=good) as server:
        await meanwhile(server, abuse(server), **options)
        await server.reaches(connections_open=0)
        seen += await told(server)
        await server.said("generation", error="internal", failure="RuntimeError")
    assert SECRET not in "".join(seen)
