"""A file of schema 6, which the version before content blocks wrote, opens and is whole."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.stores.support import check, query
from tests.support.pieces import Thinking, heard
from wsserver.content import Message, Text, Usage
from wsserver.content import Thinking as Thought
from wsserver.errors import Code
from wsserver.protocol import Done, Error, Prompt
from wsserver.stores.base import StoredConversation, StoredGeneration, Turn
from wsserver.stores.migrations import MIGRATIONS
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow

OLD = Path(__file__).with_name("schema6.sql")
USAGE = Usage(8, 9, cache_read_input_tokens=100)
BEGAN = 1790000000.25


@pytest.fixture
def old(path: Path) -> Path:
    database = sqlite3.connect(path)
    database.executescript(OLD.read_text())
    database.close()
    return path


async def load(store: SqliteStore, conversation: str = "conversation-one") -> StoredConversation:
    stored = await store.load("ann", conversation, limit=100, size=10**6)
    assert stored is not None
    return stored


async def find(store: SqliteStore, name: str) -> StoredGeneration:
    stored = await store.find("ann", f"{name}-generation")
    assert isinstance(stored, StoredGeneration)
    return stored


def told(turn: Turn) -> tuple[Any, ...]:
    return turn.number, turn.id.removesuffix("-generation"), turn.reply.blocks, turn.partial


async def test_old_file_keeps_conversations(old: Path) -> None:
    assert query(old, "PRAGMA user_version") == [(6,)]
    store = SqliteStore(old)
    for _ in range(2):
        await store.open()
        stored = await load(store)
        assert stored.title == "Was ist das? ☃"
        assert [told(turn) for turn in stored.turns] == [
            (1, "whole", (Text("Ein Schneemann. ☃"),), None),
            (2, "stopped", (Text("Hi the"),), "client"),
            (3, "failed", (Text("Half"),), "overloaded"),
            (5, "replacing", (Thought("Hm, better: "), Text("Right.")), None),
            (
                7,
                "thinking",
                (Thought("One. "), Text("Two. "), Thought("Three. "), Text("Four.")),
                None,
            ),
            (8, "running", (Text("So "), Thought("far not "), Text("done")), "interrupted"),
        ]
        assert stored.turns[0].prompt == Message(
            "user", "Was ist das? ☃", id="whole-generation", began=BEGAN
        )
        replies = [turn.reply for turn in stored.turns[:-1]]
        assert {(reply.model, reply.began) for reply in replies} == {("claude-sonnet-4-6", BEGAN)}
        assert all(reply.ended is not None and reply.ended > BEGAN for reply in replies)
        assert [reply.usage for reply in replies] == [
            USAGE,
            Usage(8, 2, estimated=True),
            Usage(8, 2, estimated=True),
            USAGE,
            USAGE,
        ]
        assert [turn.text for turn in (await load(store, "conversation-two")).turns] == ["Other."]
        await store.close()
    assert query(old, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    check(old)


async def test_old_file_keeps_generations(old: Path) -> None:
    store = SqliteStore(old)
    await store.open()
    whole = await find(store, "whole")
    assert whole.header.prompt == Prompt(
        prompt="Was ist das? ☃",
        id="whole-generation",
        conversation="conversation-one",
        system="Be brief.",
        max_tokens=100,
        temperature=0.5,
    )
    assert heard(whole.pieces) == ["Ein ", "Schneemann. ", "☃"]
    assert isinstance(whole.terminal, Done)
    assert (whole.terminal.id, whole.terminal.seq, whole.terminal.reason) == (
        "whole-generation",
        3,
        "end_turn",
    )
    thinking = await find(store, "thinking")
    assert list(thinking.pieces) == [
        ("thinking", 0, "One. "),
        ("text", 1, "Two. "),
        ("thinking", 2, "Three. "),
        ("text", 3, "Four."),
    ]
    running = await find(store, "running")
    assert heard(running.pieces) == ["So ", Thinking("far "), Thinking("not "), "done"]
    assert running.terminal is None
    failed = (await find(store, "failed")).terminal
    assert isinstance(failed, Error)
    assert (failed.code, failed.retryable, failed.ref) == (Code.OVERLOADED, True, "0badcafe")
    assert (await find(store, "replacing")).header.retry_of == "replaced-generation"
    assert (await find(store, "replaced")).pieces.text == "Wrong."
    withdrawn = (await find(store, "unsaid")).terminal
    assert isinstance(withdrawn, Done)
    assert (withdrawn.reason, withdrawn.by) == ("stopped", "client")
    outside = await find(store, "outside")
    assert outside.header.prompt.new_messages == (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Who?"),
    )
    assert heard(outside.pieces) == ["A ", Thinking("model"), "model."]
    await store.close()


async def test_old_file_keeps_held_bytes_and_costs(old: Path) -> None:
    store = SqliteStore(old)
    await store.open()
    ((bytes_, sizes),) = query(
        old, "SELECT bytes, (SELECT sum(size + rest) FROM generation) FROM held"
    )
    assert bytes_ == sizes > 6405  # and the pieces of the interrupted generation
    assert (await store.amounts("ann")).conversations == 2
    assert (await store.spent("ann", 20784)).tokens >= 182
    ((tokens,),) = query(old, "SELECT sum(tokens) FROM spent WHERE owner = 'ann'")
    assert tokens > 182  # the cost of the interrupted generation counts today
    assert await store.delete("ann", "conversation-one")
    assert await store.delete("ann", "conversation-two")
    await store.purge(2e9)
    assert (await store.amounts("ann")).bytes == 0
    await store.close()
    check(old)


@pytest.mark.parametrize("table", ["generation", "conversation"])
async def test_migrated_file_has_columns_of_new_file(old: Path, tmp_path: Path, table: str) -> None:
    store = SqliteStore(old)
    await store.open()
    await store.close()
    new = tmp_path / "new.db"
    store = SqliteStore(new)
    await store.open()
    await store.close()
    columns = f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{table}')"
    assert query(old, columns) == query(new, columns)


async def test_record_of_later_version_is_refused(old: Path) -> None:
    store = SqliteStore(old)
    await store.open()
    query(old, 'UPDATE generation SET prompt = \'{"v": 3, "secret": 1}\' WHERE number = 1')
    with pytest.raises(Exception, match="later version"):
        await find(store, "whole")
    with pytest.raises(Exception, match="later version"):
        await load(store)
    await store.close()
