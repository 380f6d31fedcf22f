"""Pieces: kept as columns, read as runs, and folded into blocks."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.pieces import Thinking as Thought
from tests.support.pieces import heard, said
from wsserver.content import Block, Other, RedactedThinking, Text, Thinking, ToolUse
from wsserver.pieces import Kind, Piece, Pieces, pieces_of

KINDS: tuple[Kind, ...] = ("text", "thinking", "signature", "block")
PIECES = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.text(max_size=5)).map(
        lambda given: Piece(given[0], given[1], given[2])
    ),
    max_size=20,
)


def test_run_has_one_kind() -> None:
    pieces = said(Thought("a"), Thought("b"), "c", "d", Thought("e"))
    assert pieces.read(0, 100) == (2, "thinking", 0, "ab")
    assert pieces.read(1, 100) == (2, "thinking", 0, "b")
    assert pieces.read(2, 100) == (4, "text", 1, "cd")
    assert pieces.read(4, 100) == (5, "thinking", 2, "e")
    assert (pieces.text, pieces.joined("thinking")) == ("cd", "abe")


def test_run_has_one_block() -> None:
    pieces = Pieces([Piece("text", 0, "a"), Piece("text", 1, "b"), Piece("text", 1, "c")])
    assert pieces.read(0, 100) == (1, "text", 0, "a")
    assert pieces.read(1, 100) == (3, "text", 1, "bc")


def test_run_ends_with_piece_reaching_limit() -> None:
    pieces = said("aaa", "bbb", "ccc")
    assert pieces.read(0, 4) == (2, "text", 0, "aaabbb")
    assert pieces.read(0, 3) == (1, "text", 0, "aaa")
    assert pieces.read(0, 1) == (1, "text", 0, "aaa")


def test_citations_are_not_merged() -> None:
    pieces = Pieces([Piece("citation", 0, "{}"), Piece("citation", 0, "{}")])
    assert pieces.read(0, 100) == (1, "citation", 0, "{}")


@given(PIECES, st.integers(0, 20), st.integers(1, 8))
def test_content_after_any_cursor_is_same_for_any_limit(
    given_pieces: list[Piece], after: int, limit: int
) -> None:
    pieces = Pieces(given_pieces)
    assert list(pieces) == given_pieces
    after = cursor = min(after, len(pieces))
    read: list[tuple[Kind, int, str]] = []
    while cursor < len(pieces):
        run = pieces.read(cursor, limit)
        assert run.seq > cursor
        cursor = run.seq
        read += [(run.kind, run.block, character) for character in run.data]
    rest = given_pieces[after:]
    assert read == [(piece.kind, piece.block, char) for piece in rest for char in piece.data]
    assert list(pieces.after(after)) == rest


@given(PIECES, st.integers(0, 20), st.integers(0, 20))
def test_replace_overwrites_pieces_after_position(
    given_pieces: list[Piece], first: int, again: int
) -> None:
    """Batches may overlap. An earlier batch does not remove pieces of a later one."""
    first, again = sorted((min(first, len(given_pieces)), min(again, len(given_pieces))))
    pieces = Pieces(given_pieces[:again])
    pieces.replace(first, Pieces(given_pieces[first:]))
    assert list(pieces) == given_pieces
    pieces.replace(first, Pieces(given_pieces[first:again]))
    assert list(pieces) == given_pieces


CITATION: dict[str, Any] = {"type": "char_location", "cited_text": "x"}


@pytest.mark.parametrize(
    ("pieces", "blocks"),
    [
        ([], ()),
        ([("text", 0, "a"), ("text", 0, "b")], (Text("ab"),)),
        ([("text", 0, "a"), ("text", 1, "b")], (Text("a"), Text("b"))),
        (
            [("thinking", 0, "a"), ("signature", 0, "s"), ("signature", 0, "t"), ("text", 1, "b")],
            (Thinking("a", "st"), Text("b")),
        ),
        ([("signature", 0, "s")], (Thinking("", "s"),)),
        (
            [("text", 0, "a"), ("citation", 0, json.dumps(CITATION)), ("text", 0, "b")],
            (Text("ab", {"citations": [CITATION]}),),
        ),
        (
            [
                ("text", 0, "a"),
                ("block", 1, '{"type":"tool_use","id":'),
                ("block", 1, '"t",'),
                ("block", 1, '"name":"n","input":{}}'),
            ],
            (Text("a"), ToolUse("t", "n", {})),
        ),
    ],
)
def test_pieces_make_blocks(pieces: list[tuple[Kind, int, str]], blocks: tuple[Block, ...]) -> None:
    assert Pieces(Piece(*piece) for piece in pieces).blocks() == blocks


@pytest.mark.parametrize(
    "block",
    [
        Thinking("a", "s"),
        RedactedThinking("x"),
        ToolUse("t", "n", {"a": [1, "é"]}),
        Other("web_search_tool_result", {"content": [{"x": None}]}),
        Text("a", {"citations": [CITATION, CITATION]}),
    ],
    ids=lambda block: block.type,
)
def test_block_survives_split_into_pieces(block: Block) -> None:
    pieces = Pieces(Piece(kind, 0, data) for kind, data in pieces_of(block))
    assert pieces.blocks() == (block,)


TEXTS = st.lists(
    st.builds(lambda kind, text: kind(text), st.sampled_from([str, Thought]), st.text())
)


@given(TEXTS)
def test_text_joins_text_pieces(texts: list[str]) -> None:
    assert heard(said(*texts)) == texts
    assert said(*texts).text == "".join(text for text in texts if type(text) is str)
