"""A generation as rows of a SQLite file: one per batch of pieces while it runs, one afterwards."""

import sqlite3

from wsserver.pieces import Pieces
from wsserver.prices import Prices
from wsserver.stores.base import Entry, Header, day_of, title_of
from wsserver.stores.records import Packed, dump_batch, dump_prompt, dump_terminal, parse_batch

ROW = 256  # bytes of a generation besides its ids and content, about
KEYS = 3  # copies of the ids of a generation in tables and indexes

COUNT = "INSERT INTO counted VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (owner, id, began) DO NOTHING"


def begin(database: sqlite3.Connection, header: Header, now: float) -> None:
    """Save the header of a generation, unless it is there."""
    owner, conversation = header.owner, header.conversation
    if conversation is not None:
        database.execute(
            "INSERT INTO conversation VALUES (?, ?, ?, ?, ?, (SELECT coalesce(max(place), 0) + 1 "
            "FROM conversation WHERE owner = ?)) ON CONFLICT (owner, id) DO NOTHING",
            (owner, conversation, title_of(header.prompt), now, now, owner),
        )
    prompt = dump_prompt(header.prompt)
    added = database.execute(
        "INSERT INTO generation (owner, id, began, prompt, model, retry_of, size, rest, "
        "conversation, turn) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, CASE WHEN ? THEN (SELECT "
        "coalesce(max(turn), 0) + 1 FROM generation WHERE owner = ? AND conversation = ?) END) "
        "ON CONFLICT (owner, id, began) DO NOTHING",
        (
            *_key(header),
            prompt,
            header.model,
            header.retry_of,
            len(prompt.encode()),
            ROW + KEYS * len("".join((owner, header.id, conversation or "")).encode()),
            conversation,
            conversation is not None,
            owner,
            conversation,
        ),
    )
    if added.rowcount and conversation is not None:
        # A delete failed half-way before this turn was accepted. The turn must not be deleted.
        database.execute("DELETE FROM deleting WHERE owner = ? AND id = ?", (owner, conversation))
    if added.rowcount and header.retry_of is not None and conversation is not None:
        # The plus makes SQLite use the index of ids, and not scan the conversation.
        database.execute(
            "UPDATE generation SET hidden = 'replaced' WHERE owner = ? AND id = ? "
            "AND +conversation = ? AND number <> ? AND hidden IS NULL",
            (owner, header.retry_of, conversation, added.lastrowid),
        )


def add(database: sqlite3.Connection, entry: Entry, now: float, prices: Prices) -> None:
    """Save the pieces of a generation and its terminal, unless it was deleted or has ended."""
    header, terminal = entry.header, entry.terminal
    if terminal is not None:
        spent = prices.of(header.model).spent(terminal.usage)
        database.execute(COUNT, (*_key(header), day_of(now), *spent))
    row = database.execute(
        "SELECT number, terminal IS NOT NULL, lengths IS NOT NULL FROM generation "
        "WHERE owner = ? AND id = ? AND began = ?",
        _key(header),
    ).fetchone()
    if row is None or row[1]:
        return
    number, _, packed = row
    if terminal is None and not packed:
        if len(entry.pieces):
            database.execute(
                "INSERT INTO piece VALUES (?, ?, ?) ON CONFLICT (generation, after) "
                "DO UPDATE SET texts = excluded.texts WHERE length(excluded.texts) > length(texts)",
                (number, entry.after, dump_batch(entry.pieces)),
            )
        return
    pieces = read_pieces(database, number)
    pieces.replace(entry.after, entry.pieces)
    pack(database, number, pieces)
    if terminal is None:
        return
    database.execute(
        "UPDATE generation SET terminal = ?, ended = ?, hidden = coalesce(?, hidden), "
        "rest = rest + ? WHERE number = ?",
        (
            end := dump_terminal(terminal),
            now,
            "unsaid" if entry.withdrawn else None,
            len(end.encode()),
            number,
        ),
    )
    if entry.withdrawn and header.retry_of is not None:
        database.execute(
            "UPDATE generation SET hidden = NULL WHERE owner = ? AND id = ? "
            "AND +conversation = ? AND hidden = 'replaced'",
            (header.owner, header.retry_of, header.conversation),
        )


def read_pieces(database: sqlite3.Connection, number: int) -> Pieces:
    """Return the pieces of a generation, packed or not."""
    ((text, lengths, other, runs),) = database.execute(
        "SELECT text, lengths, thinking, runs FROM generation WHERE number = ?", (number,)
    )
    if lengths is None:
        return read_batches(database, number)
    return Packed(text, other, lengths, runs).pieces()


def read_batches(database: sqlite3.Connection, number: int) -> Pieces:
    """Return the pieces of a generation that are in rows."""
    pieces = Pieces()
    for after, batch in database.execute(
        "SELECT after, texts FROM piece WHERE generation = ? ORDER BY after", (number,)
    ).fetchall():
        parse_batch(batch, pieces, after)
    return pieces


def pack(database: sqlite3.Connection, number: int, pieces: Pieces) -> None:
    """Put the pieces of a generation into its row."""
    packed = Packed.of(pieces)
    assert packed.runs is not None
    database.execute(
        "UPDATE generation SET text = ?, lengths = ?, thinking = ?, runs = ?, "
        "size = length(CAST(prompt AS BLOB)) + ?, "
        "rest = rest + ? - coalesce(length(lengths) + coalesce(length(runs), 0), 0) "
        "WHERE number = ?",
        (
            packed.text,
            packed.lengths,
            packed.other,
            packed.runs,
            len(packed.text.encode()) + len(packed.other.encode()),
            len(packed.lengths) + len(packed.runs),
            number,
        ),
    )
    database.execute("DELETE FROM piece WHERE generation = ?", (number,))


def _key(header: Header) -> tuple[str, str, float]:
    return header.owner, header.id, header.began
