"""Sockets whose token changes, ends or is removed."""

import asyncio
import time
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.auth.login import digest, entered, serving
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from wsserver import Handshake, Principal, Unavailable


async def test_reload_closes_only_sockets_of_removed_tokens(puppet: Puppet, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    ada, bob = (f"{name} sha256:{digest(name + '-token')}\n" for name in ("ada", "bob"))
    path.write_text(ada + bob)
    async with (
        serving(puppet, tokens="", token_file=str(path)) as server,
        entered(server, "ada-token") as stays,
        entered(server, "bob-token") as goes,
        client(server) as undecided,
    ):
        start = await stays.prompt()
        path.write_text(ada + f"carol sha256:{digest('carol-token')}\n")
        assert await server.reload()
        closed = await goes.closed()
        assert closed.rcvd is not None
        assert (closed.rcvd.code, goes.frames[-1]["code"]) == (1008, "unauthenticated")
        (await puppet.reply()).say("on and on").end()
        assert (await stays.text(start["id"]))[0] == "on and on"
        await undecided.send({"type": "auth", "token": "carol-token"})
        assert (await undecided.next("authenticated"))["principal"] == "carol"
        path.write_text("broken")
        assert not await server.reload()
        await stays.quiet()
        assert len(server.app.connections) == 2
        await until(lambda: len(server.listener.connections) == 2)


async def test_reload_can_shorten_token_lifetime(puppet: Puppet) -> None:
    seconds: list[float | None] = [None]

    async def lasting(token: str | None, _: Handshake) -> Principal | None:
        ends = None if seconds[0] is None else time.time() + seconds[0]
        return None if token is None else Principal(token, ends)

    async with (
        wsserver.serve(puppet, authenticate=lasting, port=0) as server,
        entered(server, "ada") as chat,
        client(server) as undecided,
    ):
        seconds[0] = 0.05
        assert await server.reload()
        assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]
        assert "expired" in chat.frames[-1]["message"]
        await undecided.quiet()


async def test_authentication_during_reload_is_repeated(puppet: Puppet) -> None:
    good = {"ada"}
    asked: asyncio.Queue[str] = asyncio.Queue()
    answer = asyncio.Event()

    async def slow(token: str | None, _: Handshake) -> Principal | None:
        if token is None:
            return None
        found = Principal(token) if token in good else None
        asked.put_nowait(token)
        await answer.wait()
        return found

    async with wsserver.serve(puppet, authenticate=slow, port=0) as server:
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            headers = {"Authorization": "Bearer ada"}
            shaking = asyncio.create_task(
                connect(server.url, proxy=None, additional_headers=headers).__aenter__()
            )
            for _ in range(2):
                await asyncio.wait_for(asked.get(), BOUND)
            good.clear()
            assert await server.reload()
            answer.set()
            assert (await chat.next())["code"] == "unauthenticated"
            with pytest.raises(InvalidStatus, match="401"):
                await shaking


async def test_token_renewed_during_reload_is_kept(puppet: Puppet) -> None:
    good = {"ada old"}
    asked, answer = asyncio.Event(), asyncio.Event()

    async def by_name(token: str | None, _: Handshake) -> Principal | None:
        if token is None or token not in good:
            if not good:
                asked.set()
                await answer.wait()
            return None
        return Principal(token.split()[0])

    async with wsserver.serve(puppet, authenticate=by_name, port=0) as server:
        async with entered(server, "ada old") as chat:
            good.clear()
            reloading = asyncio.create_task(server.reload())
            await asyncio.wait_for(asked.wait(), BOUND)
            good.add("ada new")
            await chat.send({"type": "auth", "token": "ada new"})
            await chat.next("authenticated")
            answer.set()
            await reloading
            await chat.quiet()


@pytest.mark.parametrize("expires", [0, 0.0, -1.0])
async def test_principal_expired_long_ago_is_refused(puppet: Puppet, expires: float) -> None:
    async def ended(_: str | None, __: Handshake) -> Principal | None:
        return Principal("ada", expires)

    async with wsserver.serve(puppet, authenticate=ended, port=0) as server:
        with pytest.raises(InvalidStatus, match="401"):
            async with client(server, additional_headers={"Authorization": "Bearer x"}):
                raise AssertionError


async def test_removed_token_stops_replies_of_principal(puppet: Puppet, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"ada sha256:{digest('one')}\nada sha256:{digest('two')}\n")
    async with (
        serving(puppet, tokens="", token_file=str(path)) as server,
        entered(server, "one") as goes,
        entered(server, "two") as stays,
    ):
        await goes.prompt("Alone", conversation="conversation-one")
        both = await goes.prompt("Both", conversation="conversation-two")
        await stays.send({"type": "resume", "id": both["id"]})
        await stays.next("start")
        alone, other = [await puppet.reply(number) for number in range(2)]
        path.write_text(f"ada sha256:{digest('two')}\n")
        await server.reload()
        await asyncio.wait_for(alone.closed.wait(), BOUND)
        other.say("x").end()
        assert (await stays.text(both["id"]))[0] == "x"


async def test_hanging_check_on_reload_delays_no_other_socket(puppet: Puppet) -> None:
    hanging = False

    async def some(token: str | None, _: Handshake) -> Principal | None:
        if hanging and token == "slow":
            await asyncio.Event().wait()
        return Principal(token) if token and not (hanging and token == "gone") else None

    async with (
        wsserver.serve(puppet, authenticate=some, port=0, open_timeout=1) as server,
        entered(server, "slow") as slow,
        entered(server, "gone") as gone,
    ):
        hanging = True
        reloading = asyncio.create_task(server.reload())
        assert (await gone.closed()).rcvd.code == 1008  # type: ignore[union-attr]
        async with asyncio.timeout(BOUND):
            await reloading
        await slow.quiet()


async def test_anonymous_clients_are_limited_by_address(puppet: Puppet) -> None:
    async def guests(_: str | None, __: Handshake) -> Principal | None:
        return wsserver.ANONYMOUS

    async with wsserver.serve(
        puppet, authenticate=guests, port=0, connections_per_principal=1
    ) as server:
        async with client(server) as one, client(server) as two:
            await one.quiet()
            await two.quiet()


async def test_unavailable_authenticator_on_reload_closes_no_socket(puppet: Puppet) -> None:
    down = False

    async def shaky(token: str | None, _: Handshake) -> Principal | None:
        if down:
            raise Unavailable
        return None if token is None else Principal(token)

    async with wsserver.serve(puppet, authenticate=shaky, port=0) as server:
        async with entered(server, "ada") as chat:
            down = True
            assert await server.reload()
            await chat.quiet()
