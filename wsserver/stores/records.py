"""The records that stores keep of a generation, and their conversion from and to other types.

A record has a version of its own: a change of the protocol changes no record. A reader takes the
records of all versions, a writer writes the latest.
"""

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self, get_args

from wsserver.content import Block, Text
from wsserver.pieces import TEXT, Kind, Pieces

__all__ = ["Packed", "dump_batch", "load_batch"]

_KINDS = frozenset(get_args(Kind))


@dataclass(frozen=True, slots=True)
class Packed:
    """The pieces of an ended generation.

    Attributes:
        text: the data of all pieces of text, joined.
        other: the data of all other pieces, joined.
        lengths: a JSON list with the number of characters of each piece.
        runs: a JSON list with the kind, the block and the number of pieces of each run. None in the
            first version, which had text and thinking alone: there the length of a piece of
            thinking is its bitwise complement (-1 for 0, -2 for 1, …).
    """

    text: str
    other: str
    lengths: str
    runs: str | None

    @classmethod
    def of(cls, pieces: Pieces) -> Self:
        """Pack pieces."""
        text: list[str] = []
        other: list[str] = []
        runs: list[tuple[Kind, int, int]] = []
        for kind, block, data in pieces.runs():
            (text if kind == TEXT else other).extend(data)
            runs.append((kind, block, len(data)))
        lengths = list(map(len, pieces.data))
        return cls("".join(text), "".join(other), _dump(lengths), _dump(runs))

    def pieces(self) -> Pieces:
        """Unpack the pieces.

        Raises:
            ValueError: the parts do not belong together.
        """
        lengths = json.loads(self.lengths)
        if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
            raise ValueError("lengths that are no list of numbers")
        pieces = Pieces()
        number = said = told = 0
        for kind, block, count in self._runs(lengths):
            data = []
            for length in lengths[number : number + count]:
                size = ~length if length < 0 else length
                if kind == TEXT:
                    data.append(self.text[said : said + size])
                    said += size
                else:
                    data.append(self.other[told : told + size])
                    told += size
            pieces.extend(kind, block, data)
            number += count
        if (number, said, told) != (len(lengths), len(self.text), len(self.other)):
            raise ValueError("lengths that do not fit the text")
        return pieces

    def _runs(self, lengths: list[int]) -> Iterable[tuple[Kind, int, int]]:
        if self.runs is None:
            kinds = groupby(lengths, lambda length: length < 0)
            return [
                ("thinking" if thought else TEXT, block, len(list(run)))
                for block, (thought, run) in enumerate(kinds)
            ]
        return [_run(*run) for run in json.loads(self.runs)]

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks that the pieces make.

        Raises:
            ValueError: the parts do not belong together.
        """
        if not self.other and (self.runs is None or self.runs.count("[") == 2):  # noqa: PLR2004
            return (Text(self.text),) if self.text else ()  # without a look at each piece
        return self.pieces().blocks()


def dump_batch(pieces: Pieces) -> str:
    """Return the record of some consecutive pieces of a generation that still runs."""
    return _dump({"v": 2, "runs": list(pieces.runs())})


def load_batch(record: str, pieces: Pieces, after: int) -> None:
    """Add the pieces of such a record to those before them.

    Args:
        record: the record.
        pieces: the pieces of the records before.
        after: the number of pieces that come before those of the record.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        value = json.loads(record)
        if isinstance(value, list):
            batch = _old_batch(value, pieces)
        else:
            batch = Pieces()
            for kind, block, data in value["runs"]:
                batch.extend(*_run(kind, block, 0)[:2], _texts(data))
        pieces.replace(operator.index(after), batch)
    except (LookupError, TypeError, ValueError):
        raise ValueError("a batch of pieces that is none") from None


def _old_batch(value: list[Any], before: Pieces) -> Pieces:
    """Return the pieces of a record of version 1: a text as it is, thinking in a list."""
    batch = Pieces()
    last, number = before.kind, before.block
    for item in value:
        kind: Kind = TEXT if isinstance(item, str) else "thinking"
        if kind != last and (len(before) or len(batch)):
            number += 1
        last = kind
        (text,) = (item,) if kind == TEXT else item
        batch.extend(kind, number, _texts([text]))
    return batch


def _run(kind: Any, block: Any, count: Any) -> tuple[Kind, int, int]:
    if kind not in _KINDS or type(block) is not int or type(count) is not int:
        raise ValueError("a run that is none")
    return kind, block, count


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("pieces that are no list of texts")
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
