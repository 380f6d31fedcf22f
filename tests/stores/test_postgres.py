"""The store in a real PostgreSQL server: faults, several servers, and the cost of its calls."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

import wsserver
from tests.stores.support import (
    SECONDS,
    done,
    entry,
    found,
    header,
    load,
    loaded,
    names,
    whole,
)
from tests.support.client import client
from tests.support.postgres import Postgres
from tests.support.puppet import Puppet, until
from tests.support.talk import ID, ONE, exchange, opened
from wsserver.errors import ConfigError, StoreError
from wsserver.stores.base import Unsavable
from wsserver.stores.postgres.rows import FIND, LOAD
from wsserver.stores.postgres.schema import MIGRATIONS
from wsserver.stores.postgres.store import PostgresStore

pytestmark = pytest.mark.slow


@pytest.fixture
async def tables(url: str) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(url)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def mortal() -> Iterator[Postgres]:
    """A server that the test may end."""
    server = Postgres.create()
    yield server
    server.remove()


async def ask(url: str, statement: str, *values: object) -> list[Any]:
    """Run a statement on the tables of a store."""
    schema = urlsplit(url).query.partition("search_path=")[2]
    connection = await asyncpg.connect(url, server_settings={"search_path": schema})
    try:
        return [tuple(row) for row in await connection.fetch(statement, *values)]
    finally:
        await connection.close()


async def saves_again(store: PostgresStore) -> None:
    """Wait until the store works after an outage."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await store.probe()
            except StoreError:
                await asyncio.sleep(0.05)


# Opening.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("127.0.0.1:", "nobody.invalid:"), "nobody.invalid/postgres"),
        (("geheim", "falsch"), "password"),
        (("/postgres?", "/nothing?"), "database"),
        (("/postgres?", "/postgres?sslmode=require&"), "no TLS"),
        (("/postgres?", "/postgres?color=red&"), "parameter"),
    ],
)
async def test_unusable_address_is_one_line_error_without_password(
    url: str, change: tuple[str, str], reason: str
) -> None:
    store = PostgresStore(url.replace(*change))
    with pytest.raises(ConfigError, match=r"^store: ") as raised:
        await store.open()
    message = str(raised.value)
    assert reason in message
    assert "\n" not in message
    assert not {"geheim", "falsch"} & set(message.replace(":", " ").split())


@pytest.mark.parametrize(
    "address",
    ["postgresql://me:geheim/geheim@127.0.0.1/db", "postgresql://me:geheim℀geheim@127.0.0.1/db"],
)
async def test_malformed_address_is_one_line_error_without_password(address: str) -> None:
    settings = wsserver.Settings(store=address)
    with pytest.raises(ConfigError, match=r"^store: .*malformed") as raised:
        await wsserver.stores.make(settings, wsserver.limits.Memory(10**9)).open()
    assert "geheim" not in str(raised.value)


def test_error_of_another_kind_of_store_has_no_password() -> None:
    settings = wsserver.Settings(store="mysql://me:geheim@127.0.0.1/db")
    with pytest.raises(ConfigError, match=r"^store: '…@127.0.0.1/db' is none of") as raised:
        wsserver.stores.make(settings, wsserver.limits.Memory(10**9))
    assert "geheim" not in str(raised.value)


async def test_refused_connection_is_error(mortal: Postgres) -> None:
    url = mortal.url()
    mortal.stop()
    with pytest.raises(ConfigError, match=r"^store: .*refused"):
        await PostgresStore(url).open()


@pytest.mark.parametrize("query", ["search_path=a.b", "search_path=A", "search_path=%22x%22"])
def test_unusable_schema_is_error(query: str) -> None:
    settings = wsserver.Settings(store=f"postgresql://host/db?{query}")
    with pytest.raises(ConfigError, match=r"^store: .*search_path"):
        wsserver.stores.make(settings, wsserver.limits.Memory(10**9))


async def test_tables_of_later_version_are_refused(url: str) -> None:
    store = PostgresStore(url)
    await store.open()
    await store.close()
    await ask(url, "UPDATE version SET number = $1", len(MIGRATIONS) + 1)
    with pytest.raises(ConfigError, match="later version"):
        await store.open()


async def test_role_without_right_to_make_schema_is_told(postgres: Postgres, url: str) -> None:
    await ask(url, "DROP ROLE IF EXISTS poor")
    await ask(url, "CREATE ROLE poor LOGIN PASSWORD 'arm'")
    with pytest.raises(ConfigError, match=r"^store: .*may not create"):
        await PostgresStore(url.replace("tester:geheim", "poor:arm")).open()


async def test_role_needs_no_right_on_database_if_schema_exists(url: str) -> None:
    schema = urlsplit(url).query.partition("search_path=")[2]
    await ask(url, "DROP ROLE IF EXISTS modest")
    await ask(url, "CREATE ROLE modest LOGIN PASSWORD 'arm'")
    await ask(url, f"CREATE SCHEMA {schema} AUTHORIZATION modest")
    store = PostgresStore(url.replace("tester:geheim", "modest:arm"))
    await store.open()
    await store.commit([whole(header())])
    await store.close()


async def test_one_of_many_servers_that_start_at_once_gets_new_tables(url: str) -> None:
    stores = [PostgresStore(url) for _ in range(6)]
    outcomes = await asyncio.gather(*(store.open() for store in stores), return_exceptions=True)
    winners = [store for store, failure in zip(stores, outcomes, strict=True) if failure is None]
    losers = [str(failure) for failure in outcomes if failure is not None]
    assert len(winners) == 1
    assert all("another server uses" in failure for failure in losers)
    await winners[0].commit([whole(header())])
    for store in stores:
        await store.close()
    again = PostgresStore(url)
    await again.open()
    assert await found(again) == ["Hi."]
    await again.close()


async def test_reply_of_dead_server_is_interrupted_and_its_cost_counted(url: str) -> None:
    first = PostgresStore(url)
    await first.open()
    await first.commit([entry(header(), True, 0, ["Hello ", "you"])])
    await first.close()  # without a terminal: as after a crash
    second = PostgresStore(url)
    await second.open()
    assert await found(second) == ["Hello ", "you"]
    assert (await loaded(second)).turns[0].partial == "interrupted"
    (row,) = await ask(url, "SELECT tokens FROM spent")
    assert row[0] > 0
    await second.close()
    await second.open()  # not counted again
    assert await ask(url, "SELECT tokens FROM spent") == [row]
    await second.close()


# Faults.


async def test_store_works_again_after_restart_of_database(mortal: Postgres) -> None:
    store = PostgresStore(mortal.url())
    await store.open()
    await store.commit([whole(header("1", "a"))])
    for how in (signal.SIGINT, signal.SIGKILL):
        mortal.stop(how)
        with pytest.raises(StoreError):
            await store.commit([whole(header("2", "b"))])
        with pytest.raises(StoreError):
            await store.find("me", "1")
        mortal.start()
        await saves_again(store)
        await store.commit([whole(header("2", "b"))])
        assert await names(store) == ["b", "a"]
    await store.close()


async def test_replies_during_outage_are_saved_after_it(mortal: Postgres, puppet: Puppet) -> None:
    async with wsserver.serve(
        puppet, port=0, store=mortal.url(), store_timeout=1, drain_timeout=0
    ) as server:
        async with client(server) as chat:
            await chat.prompt("Hello?", conversation=ONE, id=ID)
            reply = (await puppet.reply()).say("One. ")
            await chat.next("token")
            mortal.stop(signal.SIGKILL)
            reply.say("Two.").end()
            text, terminal = await chat.text(ID)
            assert (text, terminal["saved"]) == ("One. Two.", False)
            mortal.start()
            async with asyncio.timeout(SECONDS):
                while (history := await opened(chat))["type"] == "error":
                    assert history["retryable"]
                    await asyncio.sleep(0.1)
            assert [m["content"] for m in history["messages"]] == ["Hello?", "One. Two."]
            await exchange(chat, puppet, "And?", "So.", conversation=ONE)


HOLDER = (  # the process of the database that has the lock for a server
    "pid FROM pg_locks WHERE locktype = 'advisory' AND granted "
    "AND objid = hashtext(current_setting('search_path'))::oid"
)


async def test_lost_lock_is_taken_again(url: str, tables: PostgresStore) -> None:
    ((holder,),) = await ask(url, f"SELECT {HOLDER}")
    await ask(url, "SELECT pg_terminate_backend($1)", holder)
    while not await ask(url, f"SELECT {HOLDER} AND pid <> $1", holder):
        pass
    await saves_again(tables)
    with pytest.raises(ConfigError, match="another server uses"):
        await PostgresStore(url).open()


async def test_server_that_lost_its_lock_to_another_does_not_write(
    url: str, tables: PostgresStore, caplog: pytest.LogCaptureFixture
) -> None:
    await tables.commit([whole(header())])
    schema = urlsplit(url).query.partition("search_path=")[2]
    thief = await asyncpg.connect(url, server_settings={"search_path": schema})
    waiting = asyncio.create_task(
        thief.execute(
            "SELECT pg_advisory_lock(hashtext('wsserver'), "
            "hashtext(current_setting('search_path')))"
        )
    )
    while not await ask(url, "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
        pass
    ((holder,),) = await ask(url, f"SELECT {HOLDER}")
    await ask(url, "SELECT pg_terminate_backend($1)", holder)
    await waiting
    async with asyncio.timeout(SECONDS):
        with pytest.raises(StoreError, match="lock"):
            while True:  # the store notices the end of its connection soon
                await tables.find("me", "g")
    await until(lambda: "store used by another server" in caplog.text)
    with pytest.raises(StoreError, match="lock"):
        await tables.commit([whole(header("2"))])
    await thief.close()
    await saves_again(tables)
    await tables.commit([whole(header("2"))])


async def test_silent_database_fails_calls_in_time(url: str) -> None:
    store = PostgresStore(url, timeout=0.2)
    await store.open()
    await store.commit([entry(header(), new=True)])
    schema = urlsplit(url).query.partition("search_path=")[2]
    other = await asyncpg.connect(url, server_settings={"search_path": schema})
    async with other.transaction():
        await other.execute("LOCK TABLE generation, piece IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreError, match="Timeout"):
            await store.commit([entry(header(), after=0, pieces=["a"])])
        with pytest.raises(StoreError, match="Timeout"):
            await store.find("me", "g")
    await other.close()
    await store.commit([entry(header(), after=0, pieces=["a"])])
    assert await found(store) == ["a"]
    await store.close()


async def test_entry_that_cannot_be_saved_is_named_and_others_can_be(
    tables: PostgresStore,
) -> None:
    good, bad = whole(header("1", "a")), whole(header("2", "b", owner="m\0e"))
    with pytest.raises(Unsavable) as raised:
        await tables.commit([good, bad])
    assert raised.value.entry is bad
    assert await names(tables) == []
    await tables.commit([good])
    assert await names(tables) == ["a"]


async def test_many_owners_wait_in_turn(tables: PostgresStore) -> None:
    await tables.commit([whole(header(f"g{n}", f"c{n}", owner=f"o{n}")) for n in range(50)])
    found_ = await asyncio.gather(*(load(tables, f"c{n}", f"o{n}", 10) for n in range(50)))
    assert all(found_)


# The cost of calls.


async def read_blocks(url: str, statement: str, *values: object) -> int:
    """Return the number of 8 KiB blocks that a statement reads."""
    ((plan,),) = await ask(url, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *values)
    top = json.loads(plan)[0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


async def test_long_lists_and_histories_are_read_through_indexes(
    url: str, tables: PostgresStore
) -> None:
    await tables.commit([whole(header("first", "long"), "Hi.")])
    # A trigger for each row would take long here.
    await ask(url, "ALTER TABLE conversation DISABLE TRIGGER USER")
    await ask(url, "ALTER TABLE generation DISABLE TRIGGER USER")
    await ask(
        url,
        "INSERT INTO conversation "
        "SELECT 'me', 'c' || n, 'T', n, n FROM generate_series(1, 50000) AS n",
    )
    await ask(
        url,
        "INSERT INTO generation (owner, id, began, ended, conversation, turn, size, rest, model, "
        "prompt, terminal, text, other, lengths, runs) SELECT owner, id || n, began, ended, "
        "conversation, turn + n, size, rest, model, prompt, terminal, text, other, lengths, runs "
        "FROM generation, generate_series(1, 4999) n",
    )
    await ask(url, "ANALYZE")
    last = 2**63 - 1
    assert await read_blocks(url, LOAD, "me", "long", last, 20, 10**9) < 400
    assert await read_blocks(url, LOAD, "me", "long", 2500, 20, 10**9) < 400
    assert await read_blocks(url, FIND, "me", "first4000") < 40
    page = await tables.list("me", 100, None)
    again = await tables.list("me", 100, page[-1].place)
    assert len(page) == len(again) == 100
    listing = (
        "SELECT id FROM conversation WHERE owner = $1 AND place < $2 ORDER BY place DESC LIMIT 100"
    )
    assert await read_blocks(url, listing, "me", page[-1].place) < 120
    assert len((await load(tables, "long", "me", 5000)).turns) == 5000  # type: ignore[union-attr]


async def test_batch_of_any_size_is_one_statement(tables: PostgresStore) -> None:
    statements: list[str] = []
    await tables.commit([whole(header("first"))])  # asyncpg asks for the types of the arguments
    async with tables._pool.acquire() as connection:  # noqa: SLF001
        connection.add_query_logger(lambda query: statements.append(query.query))
    await tables.commit([whole(header(f"g{n}", f"c{n}")) for n in range(500)])
    running = [header(f"r{n}", f"c{n}") for n in range(500)]
    await tables.commit([entry(one, new=True) for one in running])
    await tables.commit([entry(one, pieces=["a"]) for one in running])
    await tables.commit([entry(one, pieces=["a"], terminal=done()) for one in running])
    assert len(statements) == 4
