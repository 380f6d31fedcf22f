"""The Python client's bearer tokens: sending, renewal, expiry."""

import asyncio
import hashlib
import itertools
import json
import time
from types import SimpleNamespace

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.puppet import Puppet, until
from tests.support.replies import end_of, failure_of, read
from wsserver import Handshake, Principal
from wsserver.client import (
    ConnectionFailed,
    State,
    connect,
    credentials,
)
from wsserver.client.credentials import remaining_life

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_reconnect")]


class Issuer:
    """Issues tokens that expire after ``seconds``, and authenticates their pins as "ada"."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.given: dict[str, float] = {}
        self.bad = False

    async def token(self) -> str:
        name = f"token-{len(self.given)}"
        self.given[name] = time.time() + self.seconds
        return name

    async def __call__(self, token: str | None, _: Handshake, /) -> Principal | None:
        expires = self.given.get(token or "")
        return None if expires is None or self.bad else Principal("ada", expires)


async def test_token_is_renewed_before_expiry(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        credentials, "RENEW_AT", 0.001
    )  # long before the expiry, so that no renewal is late
    states: list[State] = []
    issuer = Issuer(60)
    async with (
        wsserver.serve(puppet, authenticate=issuer, port=0, drain_timeout=0) as server,
        connect(server.url, token=issuer.token, on_state=states.append) as chat,
    ):
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await until(lambda: len(issuer.given) == 3)
        assert chat.principal == "ada"
        said.say("upon").end()
        assert await read(reply) == "Once upon"
        assert states == [State.OPEN]


async def test_expired_token_is_replaced_on_new_connection(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "RENEW_AT", 1000.0)  # too late
    issuer = Issuer(1.0)
    async with (
        wsserver.serve(puppet, authenticate=issuer, port=0, drain_timeout=0) as server,
        connect(server.url, token=issuer.token) as chat,
    ):
        reply = chat.prompt("Tell me a story")
        said = (await puppet.reply()).say("Once ")
        await anext(aiter(reply))
        await until(lambda: len(issuer.given) == 2)
        said.say("upon").end()
        assert await read(reply) == "Once upon"


async def test_expired_constant_token_closes_chat(puppet: Puppet) -> None:
    issuer = Issuer(1.0)
    async with wsserver.serve(puppet, authenticate=issuer, port=0, drain_timeout=0) as server:
        async with connect(server.url, token=await issuer.token()) as chat:
            reply = chat.prompt("Tell me a story")
            with pytest.raises(ConnectionFailed, match="expired") as raised:
                await end_of(reply)
            assert (raised.value.close_code, raised.value.final) == (1008, True)
            with pytest.raises(ConnectionFailed, match="expired"):
                chat.prompt("More")


async def test_invalid_token_is_final_failure() -> None:
    async with wsserver.serve(
        port=0, tokens=f"ada sha256:{hashlib.sha256(b'good').hexdigest()}"
    ) as server:
        with pytest.raises(ConnectionFailed) as raised:
            await connect(server.url, token="bad").__aenter__()
        assert raised.value.status == 401
        async with connect(server.url, token="good") as chat:
            await until(lambda: chat.principal == "ada")
        with pytest.raises(ConnectionFailed, match="token"):
            await connect(server.url, token="a\r\nb").__aenter__()


async def test_failing_token_source_is_called_again(puppet: Puppet) -> None:
    issuer, failures = Issuer(60), [OSError("no network"), ValueError("no key")]

    async def token() -> str:
        if failures:
            raise failures.pop()
        return await issuer.token()

    async with wsserver.serve(puppet, authenticate=issuer, port=0) as server:
        async with connect(server.url, token=token) as chat:
            assert not failures
            await until(lambda: chat.principal == "ada")
        failures += [OSError("no network")] * 1000
        with pytest.raises(ConnectionFailed, match="no token: no network"):
            await connect(server.url, token=token, open_timeout=0.05).__aenter__()


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_renewal_does_not_depend_on_system_clock(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    given: list[str] = []

    async def token() -> str:
        given.append("good")
        return "good"

    async def authenticate(_: str | None, __: Handshake) -> Principal | None:
        return Principal("ada", time.time() + 600)

    waits: list[float] = []
    monkeypatch.setattr(credentials, "RENEW_AT", 0.5)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.Event().wait()

    monkeypatch.setattr(credentials, "sleep", sleep)
    clock = SimpleNamespace(time=lambda: time.time() + ahead)
    monkeypatch.setattr(credentials, "time", clock)
    async with wsserver.serve(puppet, authenticate=authenticate, port=0) as server:
        async with connect(server.url, token=token) as chat:
            await until(lambda: waits)
            await chat.conversations()
    assert waits == [pytest.approx(300, abs=5)]
    assert len(given) == 1


def test_token_lifetime_prefers_expires_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "time", SimpleNamespace(time=lambda: 1000.0))
    assert remaining_life({}) is None
    assert remaining_life({"expires": 5.0, "expires_in": 600}) == 600
    assert remaining_life({"expires": 1600.0}) == 600
    assert remaining_life({"expires": 900.0}) is None, "it holds: it is the clock that is wrong"
    for bad in ("1", float("nan")):
        with pytest.raises(ValueError, match="number"):
            remaining_life({"expires_in": bad})


async def test_failed_renewal_is_retried(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "RENEW_AT", 0.0001)
    monkeypatch.setattr(credentials, "SHORTEST_RENEWAL", 0.01)
    calls = itertools.count()

    async def token() -> str:
        if 0 < next(calls) < 4:
            raise OSError("no network")
        return "good"

    async def authenticate(_: str | None, __: Handshake) -> Principal | None:
        return Principal("ada", time.time() + 60)

    async with (
        wsserver.serve(puppet, authenticate=authenticate, port=0) as server,
        connect(server.url, token=token) as chat,
    ):
        await until(lambda: next(calls) > 5)
        assert chat.state is State.OPEN


async def test_close_failure_ignores_earlier_unrelated_error() -> None:
    async def talk(socket: ServerConnection) -> None:
        error = {"type": "error", "code": "limit", "message": "Old news.", "retryable": True}
        await socket.send(json.dumps(error))
        await socket.recv()
        await socket.close(1008, "too many pings")

    async with serve(talk, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with connect(url) as chat:
            error = await failure_of(chat.prompt("Hi"))
            assert str(error) == "the server closed the connection: too many pings"
