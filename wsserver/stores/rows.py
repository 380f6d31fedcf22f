"""Saves generations in SQLite: one row per batch of pieces while it runs, one row after its end."""

import sqlite3

from wsserver.pieces import Pieces
from wsserver.prices import Prices
from wsserver.protocol import Terminal
from wsserver.stores.base import Entry, Header, day_of, title_of
from wsserver.stores.reads import read_pieces
from wsserver.stores.records import Packed, dump_batch, dump_prompt, dump_terminal

ROW = 256  # bytes of a generation without its ids and content, about
KEYS = 3  # copies of the ids of a generation in tables and indexes

COUNT = "INSERT INTO counted VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (owner, id, began) DO NOTHING"

# The columns that the end of a generation sets, as parameters of the statements below.
_Ending = dict[str, str | int | float | None]
_NO_ENDING: _Ending = dict.fromkeys(("text", "lengths", "thinking", "runs", "terminal", "ended"))
_NO_ENDING |= {"content_size": 0, "rest": 0}

_INSERT = """
    INSERT INTO generation (
        owner, id, began, prompt, model, retry_of, conversation, turn,
        text, lengths, thinking, runs, terminal, ended, size, rest
    ) VALUES (
        :owner, :id, :began, :prompt, :model, :retry_of, :conversation,
        CASE WHEN :conversation IS NOT NULL THEN (SELECT coalesce(max(turn), 0) + 1
            FROM generation WHERE owner = :owner AND conversation = :conversation) END,
        :text, :lengths, :thinking, :runs, :terminal, :ended,
        :prompt_size + :content_size, :ids_size + :rest
    ) ON CONFLICT (owner, id, began) DO NOTHING
"""
_END = """
    UPDATE generation SET text = :text, lengths = :lengths, thinking = :thinking, runs = :runs,
        terminal = :terminal, ended = :ended, hidden = coalesce(:hidden, hidden),
        size = length(CAST(prompt AS BLOB)) + :content_size,
        rest = rest + :rest - coalesce(length(lengths) + coalesce(length(runs), 0), 0)
    WHERE number = :number
"""


def save(database: sqlite3.Connection, entry: Entry, now: float, prices: Prices) -> None:
    """Save an entry, unless its generation was deleted or has ended."""
    header, terminal = entry.header, entry.terminal
    if terminal is not None:
        spent = prices.of(header.model).spent(terminal.usage)
        database.execute(COUNT, (*_key(header), day_of(now), *spent))
    if entry.new:
        ending = _NO_ENDING
        if terminal is not None and not entry.withdrawn:
            ending = _ending(entry.pieces, terminal, now)
        if _begin(database, header, ending, now) and ending is not _NO_ENDING:
            return
    elif terminal is not None and header.conversation is not None:
        database.execute(
            "UPDATE conversation SET updated = max(updated, ?), place = (SELECT "
            "max(place) + 1 FROM conversation WHERE owner = ?) WHERE owner = ? AND id = ?",
            (now, header.owner, header.owner, header.conversation),
        )
    _add(database, entry, now)


def _begin(database: sqlite3.Connection, header: Header, ending: _Ending, now: float) -> bool:
    """Insert the row of a generation. Return False if the row is there."""
    owner, conversation = header.owner, header.conversation
    if conversation is not None:
        database.execute(
            "INSERT INTO conversation VALUES (?, ?, ?, ?, ?, (SELECT coalesce(max(place), 0) + 1 "
            "FROM conversation WHERE owner = ?)) ON CONFLICT (owner, id) DO UPDATE "
            "SET updated = max(updated, excluded.updated), place = excluded.place",
            (owner, conversation, title_of(header.prompt), now, now, owner),
        )
    prompt = dump_prompt(header.prompt)
    added = database.execute(
        _INSERT,
        {
            "owner": owner,
            "id": header.id,
            "began": header.began,
            "prompt": prompt,
            "model": header.model,
            "retry_of": header.retry_of,
            "conversation": conversation,
            "prompt_size": len(prompt.encode()),
            "ids_size": ROW + KEYS * len("".join((owner, header.id, conversation or "")).encode()),
            **ending,
        },
    )
    if not added.rowcount:
        return False
    if conversation is not None:
        # If an earlier delete failed half-way, it must not delete this new turn.
        database.execute("DELETE FROM deleting WHERE owner = ? AND id = ?", (owner, conversation))
        if header.retry_of is not None:
            # The plus makes SQLite use the index of ids, instead of scanning the conversation.
            database.execute(
                "UPDATE generation SET hidden = 'replaced' WHERE owner = ? AND id = ? "
                "AND +conversation = ? AND number <> ? AND hidden IS NULL",
                (owner, header.retry_of, conversation, added.lastrowid),
            )
    return True


def _add(database: sqlite3.Connection, entry: Entry, now: float) -> None:
    """Save the pieces and the terminal of a generation that has a row."""
    header, terminal = entry.header, entry.terminal
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
    pieces = entry.pieces
    if entry.after or terminal is None or terminal.seq != len(pieces):  # not the whole reply
        pieces = read_pieces(database, number)
        pieces.replace(entry.after, entry.pieces)
    if terminal is None:
        pack(database, number, pieces)
        return
    hidden = "unsaid" if entry.withdrawn else None
    ending = _ending(pieces, terminal, now)
    database.execute(_END, {**ending, "hidden": hidden, "number": number})
    database.execute("DELETE FROM piece WHERE generation = ?", (number,))
    if entry.withdrawn and header.retry_of is not None:
        database.execute(
            "UPDATE generation SET hidden = NULL WHERE owner = ? AND id = ? "
            "AND +conversation = ? AND hidden = 'replaced'",
            (header.owner, header.retry_of, header.conversation),
        )


def _ending(pieces: Pieces, terminal: Terminal, now: float) -> _Ending:
    packed, end = Packed.of(pieces), dump_terminal(terminal)
    assert packed.runs is not None
    return {
        "text": packed.text,
        "lengths": packed.lengths,
        "thinking": packed.other,
        "runs": packed.runs,
        "terminal": end,
        "ended": now,
        "content_size": len(packed.text.encode()) + len(packed.other.encode()),
        "rest": len(packed.lengths) + len(packed.runs) + len(end.encode()),
    }


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
