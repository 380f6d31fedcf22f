"""Limits as plain data, and as clients see them."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet, until
from wsserver import End, Principal, Usage
from wsserver.limits import (
    CACHE,
    SECONDS_PER_DAY,
    Bucket,
    Budget,
    Memory,
    Rates,
    Shares,
    account_of,
    memory_size,
)

# Plain data.


def test_bucket_gives_burst_then_rate() -> None:
    bucket = Bucket(rate=2, burst=3, now=0)
    assert [bucket.consume(0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert bucket.consume(0.25) == 0.25
    assert bucket.consume(0.5) == 0
    assert bucket.consume(0.5) == 0.5
    assert [bucket.consume(1000) for _ in range(4)] == [0, 0, 0, 0.5]


def test_refused_take_leaves_bucket_unchanged() -> None:
    bucket = Bucket(rate=1, burst=1, now=0)
    assert bucket.consume(0) == 0
    for step in range(1, 10):
        assert bucket.consume(step / 10) > 0
    assert bucket.consume(1.0) == 0


def test_keys_have_own_rates_and_full_keys_are_forgotten() -> None:
    rates = Rates(rate=1, burst=1)
    assert rates.consume(("a",), 0) == 0
    assert rates.consume(("a",), 0) == 1
    assert rates.consume(("b",), 0) == 0
    for number in range(100_000):
        rates.consume((f"stranger {number}",), number / 100)
    assert len(rates) < 3000


def test_wider_network_has_higher_rate() -> None:
    rates = Rates(rate=1, burst=2)
    assert [rates.consume((name, "wide"), 0) for name in ("a", "a", "b", "b")] == [0, 0, 0, 0]
    assert rates.consume(("c", "wide"), 0) == 0.5
    assert [rates.consume(("c",), 0) for _ in range(3)] == [0, 0, 1]


def test_returned_share_forgets_key() -> None:
    shares = Shares(2)
    a, b = ("a",), ("b",)
    assert shares.acquire(a)
    assert shares.acquire(a)
    assert not shares.acquire(a)
    assert shares.acquire(b)
    shares.release(a)
    assert shares.acquire(a)
    for account in (a, a, b):
        shares.release(account)
    assert len(shares) == 0


def test_wider_network_has_larger_share() -> None:
    shares = Shares(2)
    accounts = [(f"64 {n}", f"56 {n // 10}", f"48 {n // 100}") for n in range(1000)]
    taken = [account for account in accounts for _ in range(3) if shares.acquire(account)]
    assert len(taken) == 10 * 8  # per /48, and at most 4 per /56
    assert sum(account[1] == "56 0" for account in taken) == 4
    assert not shares.acquire(accounts[99])
    for account in taken:
        shares.release(account)
    assert len(shares) == 0


# Memory.


def test_memory_over_account_share_is_refused() -> None:
    memory = Memory(900, share=1 / 8)
    a, b = ("a",), ("b",)
    assert memory.acquire(a, 100)
    assert not memory.acquire(a, 1)
    assert memory.acquire(b, 100)
    assert memory.used == 200
    memory.release(a, 100)
    assert not memory.acquire(a, 101)
    assert memory.acquire(a, 100)
    for account in (a, b):
        memory.release(account, 100)
    assert (memory.used, len(memory)) == (0, 0)


def test_new_account_gets_memory_beside_many_others() -> None:
    memory = Memory(2**20)
    for number in range(1000):
        while memory.acquire((str(number),), 64):
            pass
    assert memory.used < memory.limit
    assert memory.acquire(("newcomer",), 64) or memory.limit - memory.used < 64 * 8


def test_wider_network_has_larger_but_bounded_memory_share() -> None:
    memory = Memory(10_000, share=1 / 8)
    for number in range(256):
        while memory.acquire((f"64 {number}", "56", "48"), 10):
            pass
    assert memory.used <= 10_000 * (2 / 8) / (1 + 2 / 8)


def test_caches_are_shed_before_memory_in_use_is_refused() -> None:
    memory = Memory(1000, share=1)
    cached = [100] * 9

    def shed(size: int) -> None:
        asked.append(size)
        while size > 0 and cached:
            size -= cached[0]
            memory.release(CACHE, cached.pop(0))

    asked: list[int] = []
    memory.shed_by(asked.append)  # a cache with nothing to drop
    memory.shed_by(shed)
    for size in cached:
        assert memory.acquire(CACHE, size)
    assert memory.acquire(("a",), 250)
    assert (len(cached), asked) == (7, [150, 150])
    assert memory.used == 950
    assert memory.acquire(("a",), 120)
    assert memory.acquire(CACHE, 100)  # an older entry is dropped for it
    assert memory.used == 970 == memory.cached + 370
    assert not memory.acquire(CACHE, 631)  # too large beside the bytes in use
    assert memory.cached == 600, "nothing is dropped for a request that cannot fit"


def test_memory_is_refused_if_caches_shed_too_little() -> None:
    memory = Memory(1000, share=1)
    memory.shed_by(lambda size: None)
    assert memory.acquire(CACHE, 900)
    assert not memory.acquire(("a",), 200)
    assert (memory.used, len(memory)) == (900, 0)


def test_texts_are_counted_by_size_in_memory() -> None:
    assert memory_size("x" * 1000) < 1100
    assert memory_size("x" * 999 + "\U0001f600") > 4000
    assert memory_size(b"x" * 1000) < 1100


def test_budget_reserves_settles_and_resets_daily() -> None:
    budget = Budget(100)
    assert not budget.knows("ada", 1)
    budget.learn("ada", 1, 30)
    budget.learn("ada", 1, 99)  # another request has learned it before
    assert budget.left("ada") == 70
    budget.reserve("ada", 50)
    assert budget.left("ada") == 20
    budget.settle("ada", 50, 65)
    assert budget.left("ada") == 5
    budget.settle("ada", 0, 65)
    assert budget.left("ada") == 0
    assert not budget.knows("ada", 2)
    assert len(budget) == 0


def test_reservations_count_after_midnight() -> None:
    budget = Budget(100)
    budget.learn("ada", 1, 90)
    budget.reserve("ada", 10)
    assert budget.knows("ada", 2)
    assert budget.left("ada") == 90
    budget.settle("ada", 10, 25)
    assert budget.left("ada") == 75


def test_clock_set_back_over_midnight_restores_no_budget() -> None:
    budget = Budget(100)
    budget.learn("ada", 2, 60)
    budget.reserve("ada", 10)
    assert budget.knows("ada", 1)
    assert budget.left("ada") == 30
    budget.settle("ada", 10, 40)
    assert budget.knows("ada", 1)
    assert budget.left("ada") == 0
    assert budget.knows("ada", 2)
    assert budget.left("ada") == 0


def test_budget_without_limit_counts_nothing() -> None:
    budget = Budget(0)
    assert budget.knows("ada", 1)
    assert budget.left("ada") is None
    budget.reserve("ada", 10)
    budget.settle("ada", 10, 10)
    assert len(budget) == 0


# Limits as clients see them.


async def named(token: str | None, _: object) -> Principal | None:
    """Take the token as the name of the principal."""
    return None if token is None else Principal(token)


@asynccontextmanager
async def acting_for(server: wsserver.Server, name: str) -> AsyncIterator[Client]:
    async with client(server, additional_headers={"Authorization": f"Bearer {name}"}) as chat:
        yield chat


async def test_frames_over_rate_are_refused_with_retry_after(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, frame_rate=0.001, frame_burst=2) as server:
        async with client(server) as chat:
            for _ in range(3):
                await chat.send({"type": "ping"})
            await chat.next("pong")
            await chat.next("pong")
            error = await chat.next("error")
            assert error["code"] == "limit"
            assert error["retryable"]
            assert 900 < error["retry_after"] <= 1000


async def test_stop_over_frame_rate_is_obeyed(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, frame_rate=0.001, frame_burst=1) as server:
        async with client(server) as chat:
            start = await chat.prompt()
            await chat.send({"type": "ping"})
            assert (await chat.next("error"))["code"] == "limit"
            await chat.send({"type": "stop"})
            assert (await chat.text(start["id"]))[1]["reason"] == "stopped"


async def test_client_constantly_over_frame_rate_is_closed(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, frame_rate=0.001, frame_burst=1, bad_frames=5
    ) as server:
        async with client(server) as chat:
            for _ in range(10):
                await chat.send({"type": "ping"})
            assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]
            assert [frame["type"] for frame in chat.frames] == ["pong", *["error"] * 5]


async def test_flood_of_stops_without_reply_closes_socket(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, frame_rate=0.001, frame_burst=50, bad_frames=5
    ) as server:
        async with client(server) as chat:
            for _ in range(60):
                await chat.send({"type": "stop"})
            assert (await chat.closed()).rcvd.code == 1008  # type: ignore[union-attr]
            assert [frame["code"] for frame in chat.frames] == ["not_running"] * 55


async def test_prompt_rate_counts_all_sockets_of_principal(puppet: Puppet) -> None:
    async with (
        wsserver.serve(
            puppet, authenticate=named, port=0, prompts_per_minute=3, drain_timeout=0
        ) as server,
        acting_for(server, "ada") as one,
        acting_for(server, "ada") as two,
        acting_for(server, "bob") as other,
    ):
        for chat in (one, two):
            assert (await chat.prompt())["type"] == "start"
        assert (await one.prompt())["code"] == "busy"  # a refusal takes nothing from the rate
        assert (await one.prompt(conversation="conversation-two"))["type"] == "start"
        error = await two.prompt(conversation="conversation-three")
        assert error["code"] == "limit"
        assert 0 < error["retry_after"] <= 30
        assert (await other.prompt())["type"] == "start"


async def test_repeated_prompt_does_not_count_for_prompt_rate(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, prompts_per_minute=1, drain_timeout=0) as server:
        async with client(server) as chat:
            for _ in range(3):
                assert (await chat.prompt(id="0123456789abcdef"))["type"] == "start"
            assert (await chat.prompt(conversation="conversation-two"))["code"] == "limit"


async def test_generation_limit_counts_all_sockets_of_principal(puppet: Puppet) -> None:
    async with (
        wsserver.serve(
            puppet, authenticate=named, port=0, generations_per_principal=2, drain_timeout=0
        ) as server,
        acting_for(server, "ada") as one,
        acting_for(server, "ada") as two,
        acting_for(server, "bob") as other,
    ):
        first = await one.prompt()
        await two.prompt()
        error = await two.prompt(conversation="conversation-two")
        assert (error["code"], error["retryable"]) == ("limit", True)
        assert (await other.prompt())["type"] == "start"
        (await puppet.reply(0)).say("x").end()
        await one.text(first["id"])
        assert (await two.prompt(conversation="conversation-two"))["type"] == "start"


async def test_anonymous_clients_are_limited_by_address(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet,
        port=0,
        proxies="127.0.0.1",
        allow_anonymous=True,
        generations_per_principal=1,
        drain_timeout=0,
    ) as server:

        def behind(address: str) -> Any:
            headers = {"X-Forwarded-For": address, "Origin": server.page.rstrip("/")}
            return client(server, additional_headers=headers)

        async with (
            behind("203.0.113.1") as one,
            behind("203.0.113.1") as neighbour,
            behind("203.0.113.2") as two,
            behind("2001:db8::1") as six,
            behind("2001:db8::ffff:2") as next_door,
            behind("2001:db8:0:1::1") as next_street,
        ):
            for chat, fits in (
                (one, True),
                (neighbour, False),
                (two, True),
                (six, True),
                (next_door, False),
                (next_street, True),
            ):
                answer = await chat.prompt(conversation="conversation-" + str(id(chat)))
                assert answer["type"] == ("start" if fits else "error")


async def spend(chat: Client, puppet: Puppet, number: int, usage: Usage) -> dict[str, Any]:
    start = await chat.prompt(conversation=f"conversation-{number:04}")
    assert start["type"] == "start", start
    (await puppet.reply(number)).say("x", End(usage=usage)).end()
    return (await chat.text(start["id"]))[1]


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_daily_tokens_survive_restart(puppet: Puppet, tmp_path: Any, kind: str) -> None:
    store = "memory:" if kind == "memory" else f"sqlite:///{tmp_path}/s.sqlite"
    options: dict[str, Any] = {"tokens_per_day": 1000, "port": 0, "store": store}
    numbers = itertools.count()
    async with wsserver.serve(puppet, authenticate=named, **options) as server:
        async with acting_for(server, "ada") as ada, acting_for(server, "bob") as bob:
            await spend(ada, puppet, next(numbers), Usage(input_tokens=500, output_tokens=400))
            await spend(
                ada, puppet, next(numbers), Usage(output_tokens=100, cache_read_input_tokens=9999)
            )
            error = await ada.prompt("More", conversation="conversation-last")
            assert (error["code"], error["retryable"]) == ("quota", True)
            assert 0 < error["retry_after"] <= SECONDS_PER_DAY
            await spend(bob, puppet, next(numbers), Usage(output_tokens=1))
    if kind == "sqlite":
        async with wsserver.serve(puppet, authenticate=named, **options) as server:
            async with acting_for(server, "ada") as ada:
                assert (await ada.prompt())["code"] == "quota"


async def test_remaining_daily_tokens_bound_next_replies(puppet: Puppet) -> None:
    async with (
        wsserver.serve(
            puppet, authenticate=named, port=0, tokens_per_day=1000, max_tokens=700, drain_timeout=0
        ) as server,
        acting_for(server, "ada") as ada,
    ):
        first = await ada.prompt(conversation="conversation-one")
        await ada.prompt(conversation="conversation-two")
        replies = [await puppet.reply(number) for number in range(2)]
        # The estimated cost of the prompts is reserved as well.
        assert [reply.request.max_tokens for reply in replies] == [700, 298]
        assert (await ada.prompt(conversation="conversation-three"))["code"] == "limit"
        await ada.send({"type": "stop", "id": first["id"]})
        await ada.text(first["id"])
        third = await ada.prompt(
            conversation="conversation-three"
        )  # the stop released its reservation
        assert third["type"] == "start"
        assert 690 < (await puppet.reply(2)).request.max_tokens <= 700


@pytest.mark.parametrize("messages", [False, True])
async def test_reserved_tokens_count_while_reply_runs(puppet: Puppet, messages: bool) -> None:
    async with (
        wsserver.serve(
            puppet, authenticate=named, port=0, tokens_per_day=1000, max_tokens=1, drain_timeout=0
        ) as server,
        acting_for(server, "ada") as ada,
    ):
        long: dict[str, Any]
        if messages:
            long = {"messages": [{"role": "user", "content": "x" * 4000}]}
        else:
            await ada.prompt("x" * 3600, conversation="conversation-one")
            (await puppet.reply()).say("y").say(Usage(input_tokens=1), End()).end()
            await ada.next("done")
            long = {"prompt": "x" * 400, "conversation": "conversation-one"}
        await ada.send(long)
        start = await ada.next("start")
        error = await ada.prompt(conversation="conversation-two")
        assert (error["code"], "tokens" in error["message"]) == ("limit", True)
        (await puppet.reply(len(puppet.replies) - 1)).say(Usage(input_tokens=1), End()).end()
        await ada.text(start["id"])
        assert (await ada.prompt(conversation="conversation-two"))["type"] == "start"


async def test_connections_per_address_are_limited_at_handshake(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, connections_per_address=2) as server:
        async with client(server), client(server):
            with pytest.raises(InvalidStatus) as raised:
                async with client(server):
                    raise AssertionError
            response = raised.value.response
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) > 0
        await until(lambda: not server.listener.connections)
        async with client(server) as chat:
            await chat.quiet()


async def test_client_address_behind_proxy_is_used(puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, allow_anonymous=True, connections_per_address=1, proxies="127.0.0.0/8"
    ) as server:

        def behind(addresses: str) -> Any:
            headers = {"X-Forwarded-For": addresses, "Origin": server.page.rstrip("/")}
            return client(server, additional_headers=headers)

        async with behind("203.0.113.1"), behind("203.0.113.2"):
            # The entry of the client itself is to the left of the entry of the proxy.
            for claim in ("203.0.113.1", "203.0.113.9, 203.0.113.1", "x, 203.0.113.1, 127.0.0.9"):
                with pytest.raises(InvalidStatus) as raised:
                    async with behind(claim):
                        raise AssertionError
                assert raised.value.response.status_code == 429


async def test_connections_of_server_are_limited(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, connections=2) as server:
        async with client(server) as chat, client(server):
            with pytest.raises(InvalidStatus) as raised:
                async with client(server):
                    raise AssertionError
            assert raised.value.response.status_code == 503
            assert int(raised.value.response.headers["Retry-After"]) > 0
            await chat.quiet()


async def test_connections_per_principal_are_limited_at_authentication(
    puppet: Puppet,
) -> None:
    async with (
        wsserver.serve(puppet, authenticate=named, port=0, connections_per_principal=2) as server,
        acting_for(server, "ada"),
        acting_for(server, "ada"),
        acting_for(server, "bob"),
    ):
        with pytest.raises(InvalidStatus) as raised:
            async with acting_for(server, "ada"):
                raise AssertionError
        assert raised.value.response.status_code == 429
        async with client(server) as chat:
            await chat.send({"type": "auth", "token": "ada"})
            assert (await chat.next("error"))["code"] == "limit"
            assert (await chat.closed()).rcvd.code == 1013  # type: ignore[union-attr]
        assert server.app.admission.principals.full(account_of("ada"))


async def test_idle_client_is_closed_after_idle_timeout(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, idle_timeout=0.5, drain_timeout=0) as server:
        async with client(server) as busy, client(server) as idle:
            await busy.prompt()
            await idle.send({"type": "ping"})
            closed = await idle.closed()
            assert closed.rcvd is not None
            assert (closed.rcvd.code, closed.rcvd.reason) == (1000, "idle")
            await busy.quiet()


async def test_refused_connections_are_counted_by_reason(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, connections_per_address=1) as server:
        async with client(server):
            with pytest.raises(InvalidStatus):
                async with connect(server.url, proxy=None):
                    raise AssertionError
        exposition = server.metrics.exposition().decode()
        assert 'wsserver_connections_total{outcome="limit"} 1.0' in exposition


async def test_limits_are_released_when_sockets_close(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, authenticate=named, port=0, grace=0) as server:
        for _ in range(20):
            async with acting_for(server, "ada") as chat:
                await chat.prompt()
        await until(lambda: server.app.hub.live == 0)
        await until(lambda: not server.listener.connections)
        assert len(server.app.admission.principals) == 0
        assert len(server.app.admission.addresses) == 0
        assert server.app.admission.connections == 0
        assert len(server.app.hub.accounts) == 0
