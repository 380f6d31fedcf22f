"""How a socket authenticates, and which data its principal owns."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.auth.login import ID, digest, entered, serving
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Handshake, Principal, Unavailable


async def test_token_in_handshake_authenticates(puppet: Puppet) -> None:
    async with serving(puppet) as server:
        async with client(server, additional_headers={"Authorization": "Bearer ada-token"}) as chat:
            assert (await chat.prompt())["type"] == "start"
        with pytest.raises(InvalidStatus) as raised:
            async with connect(
                server.url, proxy=None, additional_headers={"Authorization": "Bearer x"}
            ):
                raise AssertionError
        assert raised.value.response.status_code == 401


async def test_token_in_first_frame_authenticates(puppet: Puppet) -> None:
    async with serving(puppet) as server, client(server) as chat:
        await chat.send({"type": "auth", "token": "ada-token"})
        assert await chat.receive() == {
            "type": "authenticated",
            "principal": "ada",
            "models": ["puppet"],
        }
        assert (await chat.prompt())["type"] == "start"


async def test_frames_right_after_auth_wait_for_answer(puppet: Puppet) -> None:
    asked: asyncio.Queue[str | None] = asyncio.Queue()
    answer = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        asked.put_nowait(token)
        await answer.wait()
        return Principal(token)

    async with wsserver.serve(puppet, authenticate=slow, port=0, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            await chat.send({"prompt": "One", "id": ID})
            await chat.send({"type": "list"})
            await asyncio.wait_for(asked.get(), BOUND)
            assert await chat.quiet() == []
            answer.set()
            types = [(await chat.receive())["type"] for _ in range(3)]
            assert types == ["authenticated", "start", "conversations"]


async def test_stop_right_after_auth_does_not_wait(puppet: Puppet) -> None:
    answer = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        await answer.wait()
        return Principal(token)

    async with wsserver.serve(puppet, authenticate=slow, port=0, drain_timeout=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            await chat.send({"prompt": "One", "id": ID})
            await chat.send({"type": "stop"})
            await chat.quiet()
            answer.set()
            assert (await chat.text(ID))[1]["reason"] == "stopped"


@pytest.mark.parametrize(
    "frame",
    [
        {"prompt": "Hello"},
        {"type": "resume", "id": ID},
        {"type": "open", "conversation": ID},
        {"type": "list"},
        {"type": "rename", "conversation": ID, "title": "x"},
        {"type": "delete", "conversation": ID},
    ],
)
async def test_frames_before_auth_are_refused(puppet: Puppet, frame: dict[str, Any]) -> None:
    async with serving(puppet) as server, client(server) as chat:
        await chat.send(frame)
        error = await chat.next("error")
        assert (error["code"], error["retryable"]) == ("unauthenticated", False)
        assert '"auth"' in error["message"]
        await chat.send({"type": "stop", "id": ID})
        assert (await chat.next("error"))["code"] == "unauthenticated"
        assert puppet.replies == []
        await chat.send({"type": "auth", "token": "ada-token"})
        await chat.next("authenticated")


@pytest.mark.parametrize("token", ["bad", "ada-token ", "x" * 8192])
async def test_invalid_token_closes_socket(puppet: Puppet, token: str) -> None:
    async with serving(puppet) as server, client(server) as chat:
        await chat.send({"type": "auth", "token": token})
        await chat.send({"prompt": "Hello"})
        assert (await chat.next())["code"] == "unauthenticated"
        closed = await chat.closed()
        assert closed.rcvd is not None
        assert (closed.rcvd.code, closed.rcvd.reason) == (1008, "unauthenticated")
        assert len(chat.frames) == 1
        assert token not in json.dumps(chat.frames)
        assert puppet.replies == []


async def test_socket_without_auth_is_closed_after_auth_timeout(puppet: Puppet) -> None:
    async with serving(puppet, auth_timeout=0.05) as server:
        async with client(server) as chat, entered(server, "ada-token") as other:
            closed = await chat.closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1008
            assert chat.frames[-1]["code"] == "unauthenticated"
            await other.quiet()


async def test_expired_token_closes_socket_unless_renewed(
    puppet: Puppet,
) -> None:
    async def until_then(token: str | None, _: Handshake) -> Principal | None:
        name, seconds = (token or "x 0").split()
        return Principal(name, time.time() + float(seconds)) if float(seconds) else None

    async with (
        wsserver.serve(puppet, authenticate=until_then, port=0, drain_timeout=0) as server,
        entered(server, "ada 1") as short,
        entered(server, "ada 1") as renewed,
    ):
        await renewed.send({"type": "auth", "token": "ada 1000"})
        answer = await renewed.next("authenticated")
        assert answer["expires"] > time.time() + 900
        start = await short.prompt()
        closed = await short.closed()
        assert closed.rcvd is not None
        assert (closed.rcvd.code, closed.rcvd.reason) == (1008, "unauthenticated")
        assert short.frames[-1]["code"] == "unauthenticated"
        await renewed.send({"type": "resume", "id": start["id"]})
        assert (await renewed.next("start"))["id"] == start["id"]


async def test_socket_cannot_change_principal(puppet: Puppet) -> None:
    async with serving(puppet) as server, entered(server, "ada-token") as chat:
        for token in ("bob-token", "nonsense"):
            await chat.send({"type": "auth", "token": token})
            assert (await chat.next("error"))["code"] == "unauthenticated"
        await chat.send({"type": "auth", "token": "ada-token"})
        assert (await chat.next("authenticated"))["principal"] == "ada"


async def test_server_without_authenticator_accepts_any_auth_frame(
    server: wsserver.Server, chat: Client
) -> None:
    await chat.send({"type": "auth", "token": "whatever"})
    answer = await chat.receive()
    assert (answer["type"], answer["principal"]) == ("authenticated", "anonymous")


async def test_client_learns_models_with_its_principal(puppet: Puppet) -> None:
    """A stranger does not learn them."""
    names = ["puppet", "claude-a", "claude-b"]  # the default first, each once
    async with serving(puppet, models="claude-a, puppet, claude-b") as server:
        async with client(server, subprotocols=["wsserver.v1"]) as chat:
            hello = await chat.receive()
            assert (hello["auth"], "models" in hello) == (True, False)
            await chat.send({"type": "auth", "token": "ada-token"})
            assert (await chat.next("authenticated"))["models"] == names
        header = {"Authorization": "Bearer ada-token"}
        async with client(server, subprotocols=["wsserver.v1"], additional_headers=header) as chat:
            assert (await chat.receive())["models"] == names
            for name in names:
                await chat.prompt(model=name)
                reply = await puppet.reply(len(puppet.replies) - 1)
                reply.end()


async def test_principal_named_anonymous_is_refused(puppet: Puppet) -> None:
    async with serving(puppet, tokens=f"anonymous sha256:{digest('x')}") as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "x"})
            assert (await chat.next())["code"] == "unauthenticated"


@pytest.mark.parametrize("failure", [Unavailable(), ValueError("secret")])
async def test_unavailable_authenticator_is_retryable_error(
    puppet: Puppet, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        raise failure

    async with wsserver.serve(puppet, authenticate=failing, port=0) as server:
        with pytest.raises(InvalidStatus) as raised:
            async with client(server, additional_headers={"Authorization": "Bearer x"}):
                raise AssertionError
        assert raised.value.response.status_code == 503
        assert int(raised.value.response.headers["Retry-After"]) > 0
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "x"})
            error = await chat.next("error")
            assert (error["code"], error["retryable"]) == ("auth_unavailable", True)
            assert (await chat.closed()).rcvd.code == 1013  # type: ignore[union-attr]
    assert "secret" not in caplog.text


async def test_disconnect_during_authentication_releases_limits(puppet: Puppet) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()
    answered = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        asked.set()
        await answer.wait()
        answered.set()
        return Principal("ada")

    async with wsserver.serve(puppet, authenticate=slow, port=0, open_timeout=30) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await asyncio.wait_for(asked.wait(), BOUND)
        writer.transport.abort()
        await until(lambda: not server.listener.connections)
        answer.set()
        await asyncio.wait_for(answered.wait(), BOUND)
        await until(lambda: not server.listener.answering)
        await asyncio.sleep(0)
        assert len(server.app.admission.principals) == 0
        assert server.app.admission.connections == 0
    del reader


async def test_custom_authenticator_gets_handshake(puppet: Puppet) -> None:
    seen: list[Handshake] = []

    async def by_cookie(token: str | None, handshake: Handshake) -> Principal | None:
        seen.append(handshake)
        return Principal(handshake.headers.get("cookie", "").removeprefix("session="))

    async with wsserver.serve(puppet, authenticate=by_cookie, port=0, drain_timeout=0) as server:
        async with connect(
            server.url + "ws?room=7", proxy=None, additional_headers={"Cookie": "session=ada"}
        ) as socket:
            chat = Client(socket)
            assert (await chat.prompt())["type"] == "start"
            assert {generation.owner for generation in server.app.hub.retention} == {"ada"}
    assert seen[0].address == "127.0.0.1"
    assert seen[0].path == "/ws?room=7"


@pytest.mark.parametrize(
    "answer",
    [lambda: "ada", lambda: Principal(42), lambda: Principal("")],  # type: ignore[arg-type]
)
async def test_wrong_type_from_authenticator_is_logged(
    puppet: Puppet, answer: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def wrong(token: str | None, _: Handshake) -> Any:
        return answer()

    async with wsserver.serve(puppet, authenticate=wrong, port=0) as server:
        with pytest.raises(InvalidStatus) as raised:
            async with client(server):
                raise AssertionError
        assert raised.value.response.status_code == 503
    assert "authenticator failed failure=TypeError" in caplog.text


async def test_principal_with_expiry_zero_is_expired(puppet: Puppet) -> None:
    async def ended(token: str | None, _: Handshake) -> Principal | None:
        return Principal("ada", expires=0)

    async with wsserver.serve(puppet, authenticate=ended, port=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "x"})
            assert (await chat.next())["code"] == "unauthenticated"


@pytest.mark.parametrize("hangs", [True, False])
async def test_failing_aclose_does_not_block_shutdown(puppet: Puppet, *, hangs: bool) -> None:
    class Stubborn:
        async def __call__(self, token: str | None, _: Handshake, /) -> Principal | None:
            return None

        async def aclose(self) -> None:
            if hangs:
                await asyncio.Event().wait()
            raise RuntimeError

    async with asyncio.timeout(BOUND):
        async with wsserver.serve(puppet, authenticate=Stubborn(), port=0, stop_timeout=0.05):
            pass


# Data of a principal.


async def test_other_principal_finds_no_data(puppet: Puppet) -> None:
    async with (
        serving(puppet) as server,
        entered(server, "ada-token") as ada,
        entered(server, "bob-token") as bob,
    ):
        start = await ada.prompt("Mine", id=ID)
        name = start["conversation"]
        (await puppet.reply()).say("secret")
        await ada.next("token")
        for frame in (
            {"type": "resume", "id": ID},
            {"type": "open", "conversation": name},
            {"type": "rename", "conversation": name, "title": "x"},
            {"type": "delete", "conversation": name},
        ):
            await bob.send(frame)
            foreign = await bob.next("error")
            absent = {k: "x" * len(v) if v in {ID, name} else v for k, v in frame.items()}
            await bob.send(absent)
            other = await bob.next("error")
            assert foreign["code"] == other["code"] == "not_found"
            assert foreign["message"] == other["message"]
        for frame in ({"type": "stop", "id": ID}, {"type": "stop"}):
            await bob.send(frame)
            assert (await bob.next("error"))["code"] == "not_running"
        # Another principal may use the same ids.
        theirs = await bob.prompt("Theirs", id=ID, conversation=name)
        assert theirs["type"] == "start"
        (await puppet.reply(1)).say("fine").end()
        assert (await bob.text(ID))[0] == "fine"
        await bob.send({"type": "list"})
        assert [item["title"] for item in (await bob.next("conversations"))["items"]] == ["Theirs"]
        await bob.send({"type": "delete", "conversation": name})
        await bob.next("deleted")
        (await puppet.reply(0)).say(" indeed").end()
        assert (await ada.text(ID))[0] == "secret indeed"
        assert "secret" not in json.dumps(bob.frames)


async def test_sockets_of_one_principal_share_conversations(puppet: Puppet) -> None:
    async with (
        serving(puppet) as server,
        entered(server, "ada-token") as one,
        entered(server, "ada-token") as two,
    ):
        start = await one.prompt(id=ID)
        await two.send({"type": "open", "conversation": start["conversation"]})
        assert (await two.next("start"))["id"] == ID
        await two.send({"type": "stop"})
        assert (await one.text(ID))[1]["by"] == "client"
