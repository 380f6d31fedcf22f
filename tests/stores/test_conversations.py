"""Conversations: what is loaded, paged, listed and renamed."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stores.support import (
    Clock,
    done,
    entry,
    failed,
    found,
    header,
    listed,
    load,
    loaded,
    names,
    texts,
    tokens_spent,
    whole,
)
from tests.support.pieces import Thinking, heard
from wsserver.content import Image, Message, Text, ToolUse, Usage
from wsserver.content import Thinking as Thought
from wsserver.errors import Code
from wsserver.pieces import Piece, Pieces
from wsserver.protocol import Prompt, Terminal
from wsserver.stores import Store
from wsserver.stores.base import (
    Entry,
    Header,
    StoredGeneration,
    day_of,
    title_of,
)
from wsserver.stores.sqlite import SqliteStore

pytestmark = pytest.mark.slow


async def test_retry_replaces_turn_in_history_and_both_are_found(
    store: Store,
) -> None:
    await store.commit([whole(header("1"), "one")])
    await store.commit([whole(header("2"), "half", terminal=failed(Code.OVERLOADED))])
    retry = replace(header("3"), retry_of="2")
    await store.commit([entry(retry, new=True)])
    assert [name for _, name in await texts(store)] == ["one", ""]
    await store.commit(
        [entry(retry, True, 0, ["whole"], done())]
    )  # because the first commit was not confirmed
    assert await texts(store) == [(1, "one"), (3, "whole")]
    assert [await found(store, name) for name in "123"] == [["one"], ["half"], ["whole"]]
    stored = await store.find("me", "3")
    assert isinstance(stored, StoredGeneration)
    assert stored.header == retry
    page = await load(store, "c", "me", 1)
    assert page is not None
    assert page.older
    page = await load(store, "c", "me", 10, page.turns[0].number)
    assert page is not None
    assert ([turn.text for turn in page.turns], page.older) == (["one"], False)


@pytest.mark.parametrize("retry_of", ["2", "unknown", "y", "o"])
async def test_retry_replaces_only_turn_of_own_conversation(store: Store, retry_of: str) -> None:
    await store.commit(
        [
            whole(header("1"), "one"),
            whole(header("2", "d"), "two"),
            whole(header("y", "c", owner="you"), "yours"),
            whole(header("o", None), "outside"),
        ]
    )
    await store.commit([whole(replace(header("3"), retry_of=retry_of), "three")])
    assert await texts(store) == [(1, "one"), (2, "three")]
    assert [turn.text for turn in (await loaded(store, "d")).turns] == ["two"]
    assert [turn.text for turn in (await loaded(store, "c", "you")).turns] == ["yours"]


async def test_unsaid_prompt_is_found_but_not_in_history(store: Store) -> None:
    queued = header("2")
    await store.commit([whole(header("1"), "one"), entry(queued, new=True)])
    await store.commit([whole(header("3"), "three")])
    assert await texts(store) == [(1, "one"), (2, ""), (3, "three")]
    end = done("stopped", "client").model_copy(update={"id": "2", "seq": 0})
    for _ in range(2):
        await store.commit([entry(queued, terminal=end, withdrawn=True)])
        assert await texts(store) == [(1, "one"), (3, "three")]
    stored = await store.find("me", "2")
    assert isinstance(stored, StoredGeneration)
    assert (heard(stored.pieces), stored.terminal) == ([], end)
    page = await load(store, "c", "me", 10, 3)
    assert page is not None
    assert ([turn.number for turn in page.turns], page.older) == ([1], False)


async def test_replaced_turn_returns_when_retry_is_unsaid(
    store: Store,
) -> None:
    await store.commit([whole(header("1"), "half", terminal=failed(Code.OVERLOADED))])
    retry = replace(header("2"), retry_of="1")
    await store.commit([entry(retry, new=True)])
    assert [number for number, _ in await texts(store)] == [2]
    await store.commit([entry(retry, terminal=done("stopped", "client"), withdrawn=True)])
    assert await texts(store) == [(1, "half")]


async def test_queued_prompt_of_dead_process_is_interrupted_and_free(
    path: Path,
) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.commit([entry(header("queued"), new=True), entry(header("o", None), new=True)])
    await store.close()
    await store.open()
    (turn,) = (await loaded(store)).turns
    assert (turn.id, turn.prompt.text, turn.text, turn.partial) == (
        "queued",
        "Hello?",
        "",
        "interrupted",
    )
    assert await tokens_spent(store, "me", day_of(time.time())) == 0
    assert await found(store, "o") == []
    await store.close()


async def test_load_returns_turns_oldest_first_with_prompt_and_reply(store: Store) -> None:
    for number in range(3):
        asked = header(f"g{number}", prompt=f"Question {number}?")
        await store.commit([whole(asked, Thinking("hm"), f"Answer {number}", ".")])
    stored = await loaded(store)
    assert (stored.id, stored.owner, stored.title) == ("c", "me", "Question 0?")
    assert [(turn.id, turn.prompt.text, turn.text, turn.partial) for turn in stored.turns] == [
        (f"g{number}", f"Question {number}?", f"Answer {number}.", None) for number in range(3)
    ]
    assert [turn.number for turn in stored.turns] == [1, 2, 3]


async def test_load_of_unknown_conversation_is_none(store: Store) -> None:
    assert await load(store, "c", "me", 10) is None
    assert await load(store, "c", "me", 10, 5) is None


async def test_load_returns_newest_turns_up_to_limit(store: Store) -> None:
    await store.commit([whole(header(f"g{number}")) for number in range(5)])
    for limit, expected in [(0, ""), (1, "4"), (3, "234"), (5, "01234"), (100, "01234")]:
        stored = await load(store, "c", "me", limit)
        assert stored is not None
        assert "".join(turn.id for turn in stored.turns) == "".join(f"g{n}" for n in expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
async def test_pages_cover_whole_history(store: Store, size: int) -> None:
    # Turns of other conversations leave no gaps in the numbers, which would reveal their count.
    await store.commit(
        [
            batch
            for number in range(7)
            for batch in (
                whole(header(f"x{number}", "other")),
                whole(header(f"o{number}", None)),
                whole(header(f"g{number}", owner="you")),
                entry(header(f"g{number}"), True, 0, ["a"]),
                entry(header(f"g{number}"), False, 1, ["b", str(number)]),
            )
        ]
    )
    pages: list[list[tuple[str, str]]] = []
    numbers: list[int] = []
    before: int | None = None
    while (stored := await load(store, "c", "me", size, before)) is not None and stored.turns:
        pages.insert(0, [(turn.id, turn.text) for turn in stored.turns])
        numbers = [turn.number for turn in stored.turns] + numbers
        before = stored.turns[0].number
    assert list(itertools.chain(*pages)) == [(f"g{n}", f"ab{n}") for n in range(7)]
    assert all(len(page) == size for page in pages[1:])
    assert numbers == [1, 2, 3, 4, 5, 6, 7]


async def test_load_returns_newest_turns_up_to_size(store: Store) -> None:
    sizes = [10, 1000, 20, 30, 40]
    for number, size in enumerate(sizes, start=1):
        prompt = "é" * (size // 4)  # of two bytes each
        await store.commit(
            [
                whole(
                    header(f"g{number}", prompt=prompt),
                    Thinking("x" * (size // 4)),
                    "x" * (size // 4),
                )
            ]
        )

    async def read(size: int, before: int | None = None) -> tuple[list[int], bool]:
        stored = await store.load("me", "c", limit=100, size=size, before=before)
        assert stored is not None
        return [turn.number for turn in stored.turns], stored.older

    # A prompt counts with the keys of its record, which differ between stores.
    assert await read(1) == ([5], True)
    assert await read(10, 3) == ([2], True)
    assert await read(10, 2) == ([1], False)
    assert await read(900) == ([3, 4, 5], True)
    assert await read(100_000) == ([1, 2, 3, 4, 5], False)
    assert await read(0, 1) == ([], False)


async def test_load_tells_whether_older_turns_exist(store: Store) -> None:
    await store.commit([whole(header(f"g{number}")) for number in range(3)])
    for limit, before, older in [(3, None, False), (2, None, True), (2, 3, False), (1, 2, False)]:
        stored = await load(store, "c", "me", limit, before)
        assert stored is not None
        assert stored.older is older


@pytest.mark.parametrize("before", [0, 1, -1, -(10**30)])
async def test_load_before_first_turn_returns_no_turns(store: Store, before: int) -> None:
    await store.commit([whole(header("g1")), whole(header("g2"))])
    stored = await load(store, "c", "me", 10, before)
    assert stored is not None
    assert stored.turns == []
    assert stored.title == "Hello?"


@pytest.mark.parametrize("before", [1000, 2**63 - 1, 2**63, 10**30])
async def test_load_before_larger_number_returns_all_turns(store: Store, before: int) -> None:
    await store.commit([whole(header("g1")), whole(header("g2"))])
    stored = await load(store, "c", "me", 10, before)
    assert stored is not None
    assert [turn.id for turn in stored.turns] == ["g1", "g2"]


@pytest.mark.parametrize(
    ("terminal", "why"),
    [
        (done(), None),
        (done("max_tokens"), None),
        (done("stopped", "client"), "client"),
        (done("stopped", "disconnect"), "disconnect"),
        (failed(Code.OVERLOADED), "overloaded"),
        (failed(Code.REFUSAL), "refusal"),
        (None, "interrupted"),
    ],
)
async def test_partial_turn_has_reason(
    store: Store, terminal: Terminal | None, why: str | None
) -> None:
    await store.commit([entry(header(), True, 0, ["Hi"], terminal)])
    (turn,) = (await loaded(store)).turns
    assert turn.partial == why
    assert type(turn.partial) in {str, type(None)}
    assert turn.text == "Hi"


async def test_turn_without_pieces_has_no_text(store: Store) -> None:
    await store.commit([entry(header(), new=True), whole(header("h"), Thinking("hm"))])
    assert [turn.text for turn in (await loaded(store)).turns] == ["", ""]


async def test_conversation_of_other_owner_is_not_found(store: Store) -> None:
    await store.commit([whole(header())])
    assert await load(store, "c", "you", 10) is None
    assert await load(store, "c", "", 10, 5) is None
    assert await names(store, "you") == []


async def test_two_owners_may_use_same_conversation_id(store: Store, clock: Clock) -> None:
    await store.commit([whole(header("1", prompt="Mine?"), "a")])
    clock.now = 2000.0
    await store.commit(  # of the same id, and even of the same time
        [
            whole(header("1", prompt="Yours?", owner="you"), "b"),
            whole(header("2"), "c"),
            whole(header("2", owner="you"), "d"),
            whole(header("3", owner="you"), "e"),
        ]
    )
    mine, yours = await loaded(store), await loaded(store, owner="you")
    assert (mine.owner, mine.title) == ("me", "Mine?")
    assert (yours.owner, yours.title) == ("you", "Yours?")
    assert [(t.number, t.id, t.text) for t in mine.turns] == [(1, "1", "a"), (2, "2", "c")]
    assert [(t.number, t.id, t.text) for t in yours.turns] == [
        (1, "1", "b"),
        (2, "2", "d"),
        (3, "3", "e"),
    ]
    page = await load(store, "c", "you", 10, 3)
    assert page is not None
    assert [turn.text for turn in page.turns] == ["b", "d"]
    assert (await found(store, "1"), await found(store, "1", "you")) == (["a"], ["b"])
    assert await listed(store) == [("c", "Mine?", 1000.0, 2000.0)]
    assert await listed(store, "you") == [("c", "Yours?", 2000.0, 2000.0)]


async def test_changes_of_one_owner_do_not_affect_other_with_same_id(
    store: Store, clock: Clock
) -> None:
    running = header("running")
    await store.commit([whole(header("1")), entry(running, True, 0, ["a"])])
    await store.commit([whole(header("1", owner="you")), whole(header("2", owner="you"))])
    yours, listed = await loaded(store, owner="you"), await store.list("you", 10, None)

    async def unchanged() -> bool:
        return (await loaded(store, owner="you"), await store.list("you", 10, None)) == (
            yours,
            listed,
        )

    clock.now = 2000.0
    await store.commit([whole(header("2"))])
    assert await store.rename("me", "c", "New")
    assert (await loaded(store)).title == "New"
    assert await unchanged()
    await store.purge(1e12)
    assert await unchanged()
    assert await store.delete("me", "c")
    assert await load(store, "c", "me", 10) is None
    assert not await store.rename("me", "c", "Back")
    assert not await store.delete("me", "c")
    assert (await found(store, "1"), await found(store, "1", "you")) == (None, ["Hi."])
    await store.commit([entry(running, False, 1, ["b"], done())])  # too late
    assert await names(store) == []
    assert await unchanged()
    await store.commit([whole(header("3", prompt="Anew?"), "c")])
    anew = await loaded(store)
    assert (anew.title, [(turn.number, turn.text) for turn in anew.turns]) == ("Anew?", [(1, "c")])
    assert await unchanged()


@pytest.mark.parametrize(
    ("prompt", "title"),
    [
        ("Hello?", "Hello?"),
        ("  Hello,\n\n\tworld \r\n", "Hello, world"),
        ("one\u2028two\u00a0three\u3000four\x85five", "one two three four five"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
        ("字" * 500, "字" * 59 + "…"),
        ("a " * 30, "a " * 29 + "a"),
        ("word " * 12 + "word", "word " * 11 + "word…"),
        ("word " * 1000, "word " * 11 + "word…"),
        ("x" * 59 + " y", "x" * 59 + "…"),
        ("See " + "https://example.org/" * 10, ("See " + "https://example.org/" * 3)[:59] + "…"),
        ("🎈" * 100, "🎈" * 59 + "…"),
        (".\n" * 3, ". . ."),
    ],
)
def test_title_is_prompt_as_one_line_of_60_characters(prompt: str, title: str) -> None:
    assert title_of(Prompt(prompt=prompt)) == title
    assert 0 < len(title) <= 60


async def test_title_comes_from_first_prompt(store: Store) -> None:
    await store.commit([whole(header(prompt="Tell me of\n\n" + "字" * 500))])
    await store.commit([whole(header("h", prompt="Another?"))])
    title = "Tell me of " + "字" * 48 + "…"
    assert (await loaded(store)).title == title
    assert [summary.title for summary in await store.list("me", 1, None)] == [title]


def test_prompt_with_messages_has_no_title() -> None:
    assert title_of(Prompt(messages=[Message("user", "Hi")])) == ""


async def test_history_messages_have_blocks_model_usage_and_times(store: Store) -> None:
    image = Image({"type": "base64", "media_type": "image/png", "data": "aGk="})
    prompt = (Text("What is this?"), image)
    pieces = Pieces(
        [
            Piece("thinking", 0, "Hm"),
            Piece("signature", 0, "s"),
            Piece("text", 1, "A "),
            Piece("text", 1, "duck"),
            Piece("citation", 1, '{"cited_text":"é"}'),
            Piece("block", 2, '{"type":"tool_use","id":"t","name":"n",'),
            Piece("block", 2, '"input":{"a":[null]}}'),
        ]
    )
    asked = Header("g", "me", "c", Prompt(prompt=prompt), "claude", 500.0)
    for batch in (Entry(asked, True, 0, pieces), Entry(asked, False, 7, terminal=done())):
        await store.commit([batch])
        (turn,) = (await loaded(store)).turns
        assert turn.reply.blocks == (
            Thought("Hm", "s"),
            Text("A duck", {"citations": [{"cited_text": "é"}]}),
            ToolUse("t", "n", {"a": [None]}),
        )
    assert turn.prompt == Message("user", prompt, id="g", began=500.0)
    assert turn.reply.ended is not None
    assert turn.reply == Message(
        "assistant",
        turn.reply.blocks,
        id="g",
        model="claude",
        usage=Usage(3, 5),
        began=500.0,
        ended=turn.reply.ended,
    )
    assert (await loaded(store)).title == "What is this?"
    stored = await store.find("me", "g")
    assert isinstance(stored, StoredGeneration)
    assert (stored.header, stored.pieces) == (asked, pieces)
