"""Copies of SQLite files in PostgreSQL."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.stores.support import (
    PIECES,
    SECONDS,
    entry,
    found,
    header,
    listed,
    load,
    query,
    tokens_spent,
    whole,
)
from tests.support.pieces import said
from tests.support.postgres import PASSWORD, USER, Postgres, require_postgres
from tests.support.process import run
from tests.support.tools import ROOT
from wsserver.errors import ConfigError, StoreError
from wsserver.protocol import Prompt
from wsserver.stores import Store
from wsserver.stores.base import Entry, Header, StoredGeneration, day_of
from wsserver.stores.copying import copy
from wsserver.stores.postgres.store import PostgresStore
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow
OWNERS = ("me", "you", "ünïcode", "o'; DROP TABLE spent; --")


async def fill(store: Store, conversations: int = 30) -> None:
    """Save replies of all kinds."""
    for owner in OWNERS:
        await store.commit(
            [
                whole(header(f"{c}-{n}", f"c{c}", owner=owner, prompt=f"Q{n} of {c}"), f"A{n}")
                for c in range(conversations)
                for n in range(3)
            ]
        )
        retry = Header("retry", owner, "c1", Prompt(prompt="Again?"), "m", 501.0, "1-2")
        await store.commit([whole(retry, "B")])
        await store.commit([whole(header("taken-back", "c2", owner=owner))])
        odd = said(*PIECES)
        await store.commit([Entry(header("odd", "c3", owner=owner), True, 0, odd)])
        await store.commit([entry(header("running", "c4", owner=owner), True, 0, ["Half a"])])
        await store.commit([whole(header("outside", None, owner=owner), "x")])
        await store.rename(owner, "c5", "A title \0 with all ☃")
        await store.delete(owner, "c6")


async def seen(store: Store, conversations: int = 30) -> list[Any]:
    """Return what a store has."""
    content: list[Any] = []
    for owner in OWNERS:
        content += [await listed(store, owner), await store.amounts(owner)]
        content += [await tokens_spent(store, owner, day_of(time.time()))]
        for number in range(conversations):
            content.append(await load(store, f"c{number}", owner, 1000))
        for name in ("0-0", "retry", "1-2", "odd", "running", "outside", "6-1", "nothing"):
            generation = await store.find(owner, name)
            content.append(generation)
            if isinstance(generation, StoredGeneration):
                content.append(list(generation.pieces))
    return content


async def test_copy_has_everything_of_the_file(path: Path, url: str) -> None:
    file, tables = SqliteStore(path), PostgresStore(url, copying=True)
    await file.open()
    await fill(file)
    await file.close()
    await file.open()  # ends the running reply, as the command does
    await tables.open()
    steps: list[tuple[int, int]] = []
    assert await copy(file, tables, lambda *step: steps.append(step)) == []
    assert steps[-1][0] == steps[-1][1]
    assert await seen(tables) == await seen(file)
    # The copy can be used: new turns come after the copied ones.
    await tables.commit([whole(header("new", "c1"), "C")])
    conversation = await load(tables, "c1", "me", 1000)
    assert conversation is not None
    assert conversation.turns[-1].text == "C"
    assert (await listed(tables))[0][0] == "c1"
    with pytest.raises(ConfigError, match="has conversations already"):
        await copy(file, tables, lambda *_: None)
    await file.close()
    await tables.close()


async def test_copy_goes_on_after_any_interruption(path: Path, url: str) -> None:
    file = SqliteStore(path)
    await file.open()
    await fill(file, 70)
    await file.close()
    await file.open()

    class Broken(Exception):
        pass

    last = -1
    for attempt in range(1000):
        tables = PostgresStore(url, copying=True)
        await tables.open()
        left = 1 + attempt % 2

        def step(copied: int, total: int) -> None:
            nonlocal last, left
            assert copied > last  # no row twice
            last, left = copied, left - 1
            if not left and copied < total:
                raise Broken

        try:
            assert await copy(file, tables, step) == []
            break
        except Broken:
            with pytest.raises(ConfigError, match="not complete"):
                await tables.close()
                await PostgresStore(url).open()
    assert attempt > 5
    assert await seen(tables, 70) == await seen(file, 70)
    await tables.close()
    await file.close()


async def test_damaged_reply_is_told_and_others_are_copied(path: Path, url: str) -> None:
    file, tables = SqliteStore(path), PostgresStore(url, copying=True)
    await file.open()
    await file.commit([whole(header("1")), whole(header("2")), whole(header("3", owner="m\0e"))])
    query(path, "UPDATE generation SET lengths = '[\"secret' , runs = NULL WHERE id = '1'")
    await tables.open()
    problems = await copy(file, tables, lambda *_: None)
    assert problems == [
        "everything of the name 'm\\x00e', because it has U+0000",
        "the reply '1' of 'me': ValidationError",
    ]
    assert not any("secret" in problem for problem in problems)
    assert await found(tables, "2") == ["Hi."]
    assert await found(tables, "1") is None
    await file.close()
    await tables.close()


async def test_command_copies_and_tells_how_much(path: Path, url: str) -> None:
    file = SqliteStore(path)
    await file.open()
    await fill(file)
    command = [sys.executable, "-m", "wsserver", "store", "copy", f"sqlite:///{path}", url]

    async def run() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *command, stderr=asyncio.subprocess.PIPE, env={**os.environ}
        )
        _, said = await asyncio.wait_for(process.communicate(), SECONDS)
        return process.returncode, said.decode()

    code, message = await run()
    assert (code, message.count("\n")) == (2, 1)
    assert "another server uses" in message
    await file.close()
    code, message = await run()
    assert (code, message.split()[::2]) == (0, ["copied", "rows"])
    code, message = await run()
    assert (code, "has conversations already" in message) == (2, True)
    tables = PostgresStore(url)
    await tables.open()
    await file.open()
    assert await seen(tables) == await seen(file)
    await tables.close()
    await file.close()


@pytest.mark.parametrize(
    ("source", "target"),
    [("memory:", "postgresql:///x"), ("sqlite:///none", "postgresql:///x"), ("sqlite:///x", "y")],
)
async def test_wrong_addresses_are_one_line_errors(source: str, target: str) -> None:
    from wsserver.stores.copying import run

    with pytest.raises((ConfigError, StoreError), match=r"^store: "):
        await asyncio.to_thread(run, source, target)


async def test_commands_of_the_document_run(path: Path, postgres: Postgres) -> None:
    file = SqliteStore(path)
    await file.open()
    await fill(file)
    await file.close()
    document = (ROOT / "examples/deploy/README.md").read_text()
    snippet = document.partition("## PostgreSQL\n\n```\n")[2].partition("```")[0]
    _, create, copying, serve = snippet.splitlines()
    copying = copying.replace("/var/lib/wsserver/conversations.sqlite", str(path))
    folders = [str(require_postgres()), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {
        **os.environ,
        "PATH": ":".join(folders),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGPASSWORD": PASSWORD,
        "WSSERVER_PORT": "0",
    }

    async def succeed(command: str, **more: str) -> None:
        command = command.replace("@HOST/", "@127.0.0.1/")
        process = await asyncio.create_subprocess_shell(command, env={**env, **more})
        assert await asyncio.wait_for(process.wait(), SECONDS) == 0

    await succeed(create, PGUSER=USER)
    await succeed(f"psql -qc \"ALTER ROLE wsserver PASSWORD '{PASSWORD}'\" postgres", PGUSER=USER)
    await succeed(copying)
    assignment, *command = serve.replace("@HOST/", "@127.0.0.1/").split()
    name, _, address = assignment.partition("=")
    assert command == ["wsserver", "serve"]
    assert name == "WSSERVER_STORE"
    async with run(
        *("-m", "wsserver", *command[1:]),
        PGPASSWORD=PASSWORD,
        PGPORT=str(postgres.port),
        WSSERVER_PORT="0",
        WSSERVER_STORE=address,
    ) as process:
        await process.line("websocket")
    await succeed("dropdb wsserver && dropuser wsserver", PGUSER=USER)
