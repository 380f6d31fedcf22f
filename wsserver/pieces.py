"""The pieces of a reply: their storage in a log, and the blocks that they form.

A piece has a kind, the number of its block within the reply, and data. Most pieces are text, and
consecutive pieces mostly belong to one block. So :class:`Pieces` keeps the data in one list, and
beside it a short list of where each run of one kind and block begins.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Literal, NamedTuple

from wsserver.content import Block, Text, Thinking, compact, dump_block, parse_block

Kind = Literal["text", "thinking", "signature", "citation", "block"]
"""The kind of a piece, which says what its data is.

``text`` and ``thinking``: a part of such a block. ``signature``: the signature of the thinking
block, or a part of it.
``citation``: the JSON of a citation of the text block. ``block``: the JSON of a block of any other
type.
"""

TEXT: Kind = "text"
_FIRST: tuple[int, Kind, int] = (0, TEXT, 0)


class Piece(NamedTuple):
    """The smallest part that is appended to a reply."""

    kind: Kind
    block: int
    """The index of the piece's block within the reply."""
    data: str


class Run(NamedTuple):
    """Consecutive pieces of one kind and block, merged: the content of one frame."""

    seq: int
    """The number of the last piece in it."""
    kind: Kind
    block: int
    data: str


class Pieces:
    """Pieces in order."""

    __slots__ = ("_runs", "block", "data", "kind")

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self.data: list[str] = []  # the data of each piece
        self.kind: Kind = TEXT  # the kind of the last piece
        self.block = 0  # the block of the last piece
        # For each run the index of its first piece, its kind and its block. The last run may have
        # no pieces yet.
        self._runs = [_FIRST]
        for kind, block, item in pieces:
            self.extend(kind, block, [item])

    def __len__(self) -> int:
        return len(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pieces) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Pieces({list(self)!r})"

    def __iter__(self) -> Iterator[Piece]:
        for kind, block, data in self.runs():
            for item in data:
                yield Piece(kind, block, item)

    def begin(self, kind: Kind, block: int) -> None:
        """Begin a run: pieces that are added to ``data`` from now on have this kind and block."""
        self.kind, self.block = kind, block
        if self._runs[-1][0] == len(self.data):
            self._runs.pop()
        self._runs.append((len(self.data), kind, block))

    def read(self, after: int, limit: int) -> Run:
        """Merge pieces of one kind and block, from the one after the first ``after`` pieces on.

        Args:
            after: the number of pieces, at least 0 and less than all.
            limit: characters after which the run is cut; the piece that crosses it is included. A
                citation is a run of its own.
        """
        data = self.data
        seq = after + 1
        if seq == len(data):  # caught up: the common case, and the one that must be cheap
            return Run(seq, self.kind, self.block, data[after])
        place = self._run_of(after)
        _, kind, block = self._runs[place]
        end = seq if kind == "citation" else self._end_of_run(place)
        size = len(data[after])
        while seq < end and size < limit:
            size += len(data[seq])
            seq += 1
        return Run(seq, kind, block, "".join(data[after:seq]))

    def runs(self, after: int = 0) -> Iterator[tuple[Kind, int, list[str]]]:
        """Yield the kind, the block and the data of each run after the first ``after`` pieces."""
        if after >= len(self.data):
            return
        for place in range(self._run_of(after), len(self._runs)):
            start, kind, block = self._runs[place]
            yield kind, block, self.data[max(after, start) : self._end_of_run(place)]

    def _run_of(self, index: int) -> int:
        """Return the index of the run that has a piece."""
        return bisect_right(self._runs, index, key=itemgetter(0)) - 1

    def _end_of_run(self, place: int) -> int:
        """Return the index after the last piece of a run."""
        return self._runs[place + 1][0] if place + 1 < len(self._runs) else len(self.data)

    def after(self, number: int) -> "Pieces":
        """Return the pieces after the first ``number`` ones."""
        found = Pieces()
        if number >= self._runs[-1][0]:  # in the last run: the common case
            found.extend(self.kind, self.block, self.data[number:])
            return found
        for kind, block, data in self.runs(number):
            found.extend(kind, block, data)
        return found

    def extend(self, kind: Kind, block: int, data: list[str]) -> None:
        """Add pieces of one kind and block."""
        if data:
            if kind != self.kind or block != self.block:
                self.begin(kind, block)
            self.data += data

    def replace(self, after: int, pieces: "Pieces") -> None:
        """Replace all pieces after the first ``after`` ones."""
        if len(self.data) > after + len(pieces):  # an older batch, saved again
            return
        if after < len(self.data):
            del self.data[after:]
            while len(self._runs) > 1 and self._runs[-1][0] >= after:
                self._runs.pop()
            _, self.kind, self.block = self._runs[-1]
        if len(pieces._runs) == 1:  # the common case  # noqa: SLF001
            self.extend(pieces.kind, pieces.block, pieces.data)
            return
        for kind, block, data in pieces.runs():
            self.extend(kind, block, data)

    @property
    def text(self) -> str:
        """The data of all text pieces."""
        return self.joined("text")

    def joined(self, wanted: Kind, after: int = 0) -> str:
        """Return the joined data of one kind of pieces, without the first ``after`` pieces."""
        return "".join("".join(data) for kind, _, data in self.runs(after) if kind == wanted)

    def blocks(self, *, unfinished: bool = False) -> tuple[Block, ...]:
        """Return the blocks that the pieces form.

        Args:
            unfinished: leave out blocks whose JSON is not complete, instead of raising.

        Raises:
            ValueError: the data of a block or of a citation is not its JSON.
        """
        found: dict[int, Block] = {}
        for kind, number, data in self.runs():
            joined = "".join(data)
            block = found.get(number)
            if kind == "text":
                text = block if isinstance(block, Text) else Text("")
                found[number] = Text(text.text + joined, text.extra)
            elif kind == "thinking":
                found[number] = Thinking(joined)
            elif kind == "signature":
                thought = block.thinking if isinstance(block, Thinking) else ""
                found[number] = Thinking(thought, joined)
            elif kind == "citation":
                text = block if isinstance(block, Text) else Text("")
                cited = [*text.extra.get("citations", ()), *map(json.loads, data)]
                found[number] = Text(text.text, {"citations": cited})
            else:
                try:
                    found[number] = parse_block(json.loads(joined))
                except ValueError:
                    if not unfinished:
                        raise
        return tuple(found.values())


def pieces_of(block: Block) -> list[tuple[Kind, str]]:
    """Return the kinds and data of the pieces of a whole block."""
    if isinstance(block, Thinking):
        return [("thinking", block.thinking), ("signature", block.signature)]
    if isinstance(block, Text):
        cited = block.extra.get("citations", ())
        return [("text", block.text), *(("citation", compact(one)) for one in cited)]
    return [("block", compact(dump_block(block)))]
