"""Converts entries to arguments of the SQL function `save`, and rows to what a store returns."""

from collections.abc import Sequence
from typing import Any

from wsserver.pieces import Pieces
from wsserver.prices import Prices
from wsserver.stores.base import (
    Entry,
    Header,
    StoredConversation,
    StoredGeneration,
    day_of,
    title_of,
    turn_of,
)
from wsserver.stores.records import (
    Packed,
    content_in,
    dump_batch,
    dump_prompt,
    dump_terminal,
    parse_batch,
    parse_prompt,
    parse_terminal,
)

ROW = 256  # bytes of a generation without its ids and content, about
KEYS = 3  # copies of the ids of a generation in tables and indexes

# The arguments of `save`, each with its type.
_ARGUMENTS = {
    "owner": "text",
    "id": "text",
    "began": "float8",
    "conversation": "text",
    "retry_of": "text",
    "model": "text",
    "title": "bytea",
    "prompt": "text",
    "keys": "int",
    "after": "int",
    "batch": "text",
    "text": "bytea",
    "other": "bytea",
    "lengths": "text",
    "runs": "text",
    "terminal": "text",
    "tokens": "bigint",
    "microdollars": "bigint",
    "withdrawn": "boolean",
}
Row = tuple[Any, ...]

# A save changes counts of its owners. Nodes that lock the owners in one order cannot wait for each
# other. The array of owners is the first argument.
LOCK_OWNERS = """
    SELECT pg_advisory_xact_lock(hashtext('wsserver owner ' || current_schema()), key)
    FROM (SELECT DISTINCT hashtext(owner) AS key FROM unnest($1::text[]) AS owner ORDER BY key) AS k
"""
_COUNT = len(_ARGUMENTS)
SAVE = (
    f"WITH fence AS MATERIALIZED (SELECT may_write(${_COUNT + 3}) AS open), "
    f"locked AS MATERIALIZED ({LOCK_OWNERS}) "
    f"SELECT save({', '.join(_ARGUMENTS)}, ${_COUNT + 1}, ${_COUNT + 2}, ${_COUNT + 3}) "
    "FROM unnest("
    + ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_ARGUMENTS.values(), start=1))
    + f") AS entry({', '.join(_ARGUMENTS)}), fence, (SELECT count(*) FROM locked) AS owners "
    "WHERE open"
)
"""Saves entries in order, if the node may write. For its arguments see :func:`columns_of`."""


def columns_of(rows: Sequence[Row], now: float, node: str | None) -> list[Any]:
    """Return the arguments of :data:`SAVE`."""
    return [*(list(column) for column in zip(*rows, strict=True)), now, day_of(now), node]


def row_of(entry: Entry, prices: Prices) -> Row:
    """Return the arguments of `save` for an entry.

    The entry has no terminal, or all pieces of its reply.

    Raises:
        ValueError: PostgreSQL cannot store the entry.
    """
    header, terminal, pieces = entry.header, entry.terminal, entry.pieces
    keys = (header.owner, header.id, header.conversation or "", header.model)
    if any("\0" in key for key in keys):
        raise ValueError("a name has the character U+0000")
    prompt = title = size = batch = text = other = lengths = runs = end = None
    tokens = microdollars = 0
    if entry.new:
        prompt, title = dump_prompt(header.prompt), title_of(header.prompt).encode()
        size = ROW + KEYS * len("".join(keys[:3]).encode())
    if terminal is not None:
        packed, end = Packed.of(pieces), dump_terminal(terminal)
        text, other = packed.text.encode(), packed.other.encode()
        lengths, runs = packed.lengths, packed.runs
        tokens, microdollars = prices.of(header.model).spent(terminal.usage)
    elif len(pieces):
        batch = dump_batch(pieces)
    return (
        header.owner,
        header.id,
        header.began,
        header.conversation,
        header.retry_of,
        header.model,
        title,
        prompt,
        size,
        entry.after,
        batch,
        text,
        other,
        lengths,
        runs,
        end,
        tokens,
        microdollars,
        entry.withdrawn,
    )


_BATCHES = """
    LEFT JOIN LATERAL (
        SELECT array_agg(after ORDER BY after) AS afters, array_agg(batch ORDER BY after) AS batches
        FROM piece WHERE generation = number AND lengths IS NULL
    ) AS unpacked ON true
"""

FIND = f"""
    SELECT id, conversation, model, began, retry_of, terminal, prompt, ended, node,
        text, other, lengths, runs, afters, batches
    FROM generation {_BATCHES} WHERE owner = $1 AND id = $2 ORDER BY number DESC LIMIT 1
"""

PIECES = f"""
    SELECT text, other, lengths, runs, afters, batches
    FROM generation {_BATCHES} WHERE owner = $1 AND id = $2 AND began = $3
"""

# The newest turns of a history, until a limit is reached.
LOAD = f"""
    WITH shown AS MATERIALIZED (
        SELECT number, turn FROM (
            SELECT number, turn, row_number() OVER w AS place, sum(size) OVER w AS total FROM (
                SELECT number, turn, size FROM generation
                WHERE owner = $1 AND conversation = $2 AND turn < $3 AND hidden IS NULL
                ORDER BY turn DESC LIMIT $4
            ) AS newest WINDOW w AS (ORDER BY turn DESC ROWS UNBOUNDED PRECEDING)
        ) AS summed WHERE place = 1 OR total <= $5
    )
    SELECT c.title, EXISTS (
            SELECT FROM generation WHERE owner = $1 AND conversation = $2 AND hidden IS NULL
            AND turn < coalesce((SELECT min(turn) FROM shown), $3)
        ) AS older,
        g.turn, g.id, began, ended, model, terminal, prompt, text, other, runs, afters, batches,
        -- Long, and rarely needed.
        CASE WHEN other <> '' OR runs LIKE '%],[%' THEN lengths END AS lengths
    FROM conversation AS c
    LEFT JOIN (shown JOIN generation AS g USING (number) {_BATCHES}) ON true
    WHERE c.owner = $1 AND c.id = $2 ORDER BY g.turn
"""


def found(row: Any, owner: str) -> StoredGeneration:
    """Convert a row of :data:`FIND`.

    Raises:
        ValueError: a record is damaged.
    """
    name, terminal = row["id"], row["terminal"]
    header = Header(
        name,
        owner,
        row["conversation"],
        parse_prompt(row["prompt"]),
        row["model"],
        row["began"],
        row["retry_of"],
    )
    end = None if terminal is None else parse_terminal(terminal, name)
    node = row["node"] if row["ended"] is None else None
    return StoredGeneration(header, pieces_of(row), end, node)


def pieces_of(row: Any) -> Pieces:
    """Return the pieces of a generation in a row of :data:`FIND` or :data:`PIECES`.

    Raises:
        ValueError: a record is damaged.
    """
    return _unpacked(row) if row["lengths"] is None else _packed(row).pieces()


def loaded(rows: Sequence[Any], owner: str, conversation: str) -> StoredConversation:
    """Convert the rows of :data:`LOAD`.

    Raises:
        ValueError: a record is damaged.
    """
    turns = []
    for row in rows:
        name, terminal = row["id"], row["terminal"]
        if name is None:  # a conversation without turns has one row
            continue
        blocks = _unpacked(row).blocks() if row["text"] is None else _packed(row).blocks()
        turn = turn_of(
            row["turn"],
            name,
            (content_in(row["prompt"]), blocks),
            None if terminal is None else parse_terminal(terminal, name),
            model=row["model"],
            began=row["began"],
            ended=row["ended"],
        )
        turns.append(turn)
    title, older = rows[0]["title"].decode(), rows[0]["older"]
    return StoredConversation(conversation, owner, title, turns, older)


def _packed(row: Any) -> Packed:
    return Packed(row["text"].decode(), row["other"].decode(), row["lengths"] or "[]", row["runs"])


def _unpacked(row: Any) -> Pieces:
    pieces = Pieces()
    for after, batch in zip(row["afters"] or (), row["batches"] or (), strict=True):
        parse_batch(batch, pieces, after)
    return pieces
