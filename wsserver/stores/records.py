"""Converts generations to the records that stores save, and back.

Records have their own versions: a change of the protocol changes no record. All versions can be
parsed, and only the latest is written.
"""

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self, get_args

from pydantic import BaseModel, TypeAdapter

from wsserver.content import Block, Message, Role, Text, compact, dump_content, parse_content
from wsserver.errors import Code
from wsserver.pieces import TEXT, Kind, Pieces
from wsserver.protocol import Done, Error, Prompt, Terminal
from wsserver.wire import dump_usage

VERSION = 2  # of all records; records of version 1 have no version

_LENGTHS = TypeAdapter(list[int])
_RUNS = TypeAdapter(list[tuple[Kind, int, int]])
_PROMPT_KEYS = (
    "id",
    "conversation",
    "on_busy",
    "retry_of",
    "model",
    "system",
    "max_tokens",
    "temperature",
)
_DONE_KEYS = ("seq", "reason", "by", "thought")
_ERROR_KEYS = ("code", "message", "seq", "retryable", "retry_after", "ref", "thought")


class _Batch(BaseModel):
    runs: list[tuple[Kind, int, list[str]]]


_BATCH: TypeAdapter[_Batch | list[str | tuple[str]]] = TypeAdapter(_Batch | list[str | tuple[str]])


@dataclass(frozen=True, slots=True)
class Packed:
    """The pieces of an ended generation."""

    text: str  # the data of all pieces of text, joined
    other: str  # the data of all other pieces, joined
    lengths: str  # a JSON list with the number of characters of each piece
    # A JSON list with the kind, the block and the number of pieces of each run. None in the first
    # version, which had text and thinking alone: there the length of a piece of thinking is its
    # bitwise complement (-1 for 0, -2 for 1, …).
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
        return cls("".join(text), "".join(other), compact(lengths), compact(runs))

    def pieces(self) -> Pieces:
        """Unpack the pieces.

        Raises:
            ValueError: the parts do not match.
        """
        lengths = _LENGTHS.validate_json(self.lengths, strict=True)
        pieces = Pieces()
        number = text_end = other_end = 0  # pieces, and characters of both texts, so far
        for kind, block, count in self._runs(lengths):
            data = []
            for length in lengths[number : number + count]:
                size = ~length if length < 0 else length
                if kind == TEXT:
                    data.append(self.text[text_end : text_end + size])
                    text_end += size
                else:
                    data.append(self.other[other_end : other_end + size])
                    other_end += size
            pieces.extend(kind, block, data)
            number += count
        ends = number, text_end, other_end
        if ends != (len(lengths), len(self.text), len(self.other)):
            raise ValueError("lengths do not fit the text")
        return pieces

    def _runs(self, lengths: list[int]) -> Iterable[tuple[Kind, int, int]]:
        if self.runs is None:
            kinds = groupby(lengths, lambda length: length < 0)
            return [
                ("thinking" if thought else TEXT, block, len(list(run)))
                for block, (thought, run) in enumerate(kinds)
            ]
        return _RUNS.validate_json(self.runs, strict=True)

    def blocks(self) -> tuple[Block, ...]:
        """Return the blocks that the pieces make.

        Raises:
            ValueError: the parts do not match.
        """
        if not self.other and (self.runs is None or self.runs.count("[") == 2):  # noqa: PLR2004
            return (Text(self.text),) if self.text else ()  # the lengths are not parsed
        return self.pieces().blocks()


def dump_prompt(prompt: Prompt) -> str:
    """Return the record of a prompt."""
    messages = None
    if prompt.messages is not None:
        messages = [
            {"role": m.role, "content": dump_content(m.blocks)} for m in prompt.new_messages
        ]
    record = {
        "v": VERSION,
        "prompt": None if prompt.prompt is None else dump_content(prompt.new_messages[0].blocks),
        "messages": messages,
        **{key: getattr(prompt, key) for key in _PROMPT_KEYS},
    }
    return compact({key: value for key, value in record.items() if value is not None})


def parse_prompt(record: str | bytes) -> Prompt:
    """Parse the record of a prompt. Version 1 had the same keys.

    Raises:
        ValueError: the record is damaged, or of a later version.
    """
    value = _parse(record)
    content, messages = value.get("prompt"), value.get("messages")
    return Prompt(
        prompt=None if content is None else parse_content(content),
        messages=None if messages is None else [_message(message) for message in messages],
        **{key: value[key] for key in _PROMPT_KEYS if key in value},
    )


def _message(value: Any) -> Message:
    if not isinstance(value, dict) or value.get("role") not in get_args(Role):
        raise ValueError("a message has no known role")
    return Message(value["role"], parse_content(value.get("content")))


def content_in(record: str | bytes) -> tuple[Block, ...]:
    """Parse only the content of a prompt's record.

    Raises:
        ValueError: the record is damaged, or of a later version.
    """
    return parse_content(_parse(record).get("prompt", ""))


def dump_terminal(terminal: Terminal) -> str:
    """Return the record of a terminal, without the id of its generation."""
    usage = None if terminal.usage is None else dump_usage(terminal.usage)
    record: dict[str, Any] = {"v": VERSION, "type": terminal.type, "usage": usage}
    keys = _DONE_KEYS if isinstance(terminal, Done) else _ERROR_KEYS
    record |= {key: getattr(terminal, key) for key in keys}
    return compact({key: value for key, value in record.items() if value is not None})


def parse_terminal(record: str, generation: str) -> Terminal:
    """Parse the record of a terminal. Version 1 had the same keys.

    Raises:
        ValueError: the record is damaged, or of a later version.
    """
    value = _parse(record)
    about: dict[str, Any] = {"id": generation, "usage": value.get("usage")}
    if value.get("type") == "done":
        return Done(**about, **{key: value[key] for key in _DONE_KEYS if key in value})
    if value.get("type") != "error":
        raise ValueError("a terminal has no known type")
    about |= {key: value[key] for key in _ERROR_KEYS if key in value}
    about["code"] = next((code for code in Code if code == value.get("code")), None)
    return Error(**about)


def _parse(record: str | bytes) -> dict[str, Any]:
    value = json.loads(record)
    if not isinstance(value, dict):
        raise ValueError("a record is not an object")  # noqa: TRY004 - it is about a saved value
    if value.get("v", 1) not in range(1, VERSION + 1):
        raise ValueError("a record of a later version")
    return value


def dump_batch(pieces: Pieces) -> str:
    """Return the record of consecutive pieces of a running generation."""
    return compact({"v": VERSION, "runs": list(pieces.runs())})


def parse_batch(record: str, pieces: Pieces, after: int) -> None:
    """Parse the record of a batch, and add its pieces to the earlier ones.

    Args:
        record: the record.
        pieces: the pieces of the earlier records.
        after: the number of pieces before the record.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        value, after = _BATCH.validate_json(record, strict=True), operator.index(after)
    except (TypeError, ValueError):
        raise ValueError("a batch of pieces is damaged") from None
    if isinstance(value, list):
        batch = _old_batch(value, pieces)
    else:
        batch = Pieces()
        for kind, block, data in value.runs:
            batch.extend(kind, block, data)
    pieces.replace(after, batch)


def _old_batch(value: list[str | tuple[str]], before: Pieces) -> Pieces:
    """Return the pieces of a record of version 1: a text is a string, thinking is in a list."""
    batch = Pieces()
    last, number = before.kind, before.block
    for item in value:
        kind: Kind = TEXT if isinstance(item, str) else "thinking"
        if kind != last and (len(before) or len(batch)):
            number += 1
        last = kind
        batch.extend(kind, number, [item] if isinstance(item, str) else list(item))
    return batch
