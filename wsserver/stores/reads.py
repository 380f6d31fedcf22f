"""Reads generations and histories from SQLite."""

import sqlite3
from typing import Any

from wsserver.content import Text
from wsserver.pieces import Pieces
from wsserver.stores.base import (
    Forgotten,
    Header,
    StoredConversation,
    StoredGeneration,
    Turn,
    turn_of,
)
from wsserver.stores.records import (
    Packed,
    content_in,
    parse_batch,
    parse_prompt,
    parse_terminal,
)

# The newest turns of a history, until a limit is reached.
_TURNS = """
    SELECT number, turn, id, began, ended, model, terminal, prompt, text, thinking, runs,
        CASE WHEN thinking <> '' OR runs LIKE '%],[%' THEN lengths END -- long, and rarely needed
    FROM generation WHERE number IN (
        SELECT number FROM (
            SELECT number, row_number() OVER w AS place, sum(size) OVER w AS total FROM (
                SELECT number, turn, size FROM generation
                WHERE owner = ? AND conversation = ? AND turn < ? AND hidden IS NULL
                ORDER BY turn DESC LIMIT ?
            ) WINDOW w AS (ORDER BY turn DESC ROWS UNBOUNDED PRECEDING)
        ) WHERE place = 1 OR total <= ?
    ) ORDER BY turn
"""


def find(
    database: sqlite3.Connection, owner: str, generation: str
) -> StoredGeneration | Forgotten | None:
    """Return an owner's latest generation of an id, or its trace; None if there is neither."""
    for number, conversation, model, began, retry_of, terminal, prompt in database.execute(
        "SELECT number, conversation, model, began, retry_of, terminal, prompt "
        "FROM generation WHERE owner = ? AND id = ? ORDER BY number DESC LIMIT 1",
        (owner, generation),
    ):
        parsed = parse_prompt(prompt)
        header = Header(generation, owner, conversation, parsed, model, began, retry_of)
        end = None if terminal is None else parse_terminal(terminal, generation)
        return StoredGeneration(header, read_pieces(database, number), end)
    for (when,) in database.execute(
        "SELECT at FROM forgotten WHERE owner = ? AND id = ?", (owner, generation)
    ):
        return Forgotten(when)
    return None


def load(
    database: sqlite3.Connection, owner: str, conversation: str, bounds: tuple[int, int, int]
) -> StoredConversation | None:
    """Return a part of an owner's conversation; None if the owner has no such conversation."""
    limit, size, end = bounds  # turns, bytes, and the number of the turn before which they end
    for (title,) in database.execute(
        "SELECT title FROM conversation WHERE owner = ? AND id = ? AND (owner, id) NOT IN deleting",
        (owner, conversation),
    ):
        turns = [
            _turn(database, row)
            for row in database.execute(_TURNS, (owner, conversation, end, limit, size))
        ]
        first = turns[0].number if turns else end
        older = database.execute(
            "SELECT 1 FROM generation WHERE owner = ? AND conversation = ? AND turn < ? "
            "AND hidden IS NULL LIMIT 1",
            (owner, conversation, first),
        ).fetchone()
        return StoredConversation(conversation, owner, title, turns, older is not None)
    return None


def _turn(database: sqlite3.Connection, row: tuple[Any, ...]) -> Turn:
    """Return a row of :data:`_TURNS` as a turn."""
    number, turn, name, began, ended, model, terminal, prompt, text, other, runs, lengths = row
    if text is not None and other is not None:
        blocks = Packed(text, other, lengths or "[]", runs).blocks()
    else:
        try:
            blocks = read_batches(database, number).blocks()
        except ValueError:
            if text is None:
                raise
            blocks = (Text(text),)  # an older version stored the text of an ended reply separately
    end = None if terminal is None else parse_terminal(terminal, name)
    contents = content_in(prompt), blocks
    return turn_of(turn, name, contents, end, model=model, began=began, ended=ended)


def read_pieces(database: sqlite3.Connection, number: int) -> Pieces:
    """Return the pieces of a generation, packed or not."""
    ((text, lengths, other, runs),) = database.execute(
        "SELECT text, lengths, thinking, runs FROM generation WHERE number = ?", (number,)
    )
    if lengths is None:
        return read_batches(database, number)
    return Packed(text, other, lengths, runs).pieces()


def read_batches(database: sqlite3.Connection, number: int) -> Pieces:
    """Return the pieces of a generation that are not packed."""
    pieces = Pieces()
    for after, batch in database.execute(
        "SELECT after, texts FROM piece WHERE generation = ? ORDER BY after", (number,)
    ).fetchall():
        parse_batch(batch, pieces, after)
    return pieces
