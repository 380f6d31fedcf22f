"""The content of a reply, assembled from its frames.

The text is stored once, and each reader has a position in it. A slow reader gets larger pieces and
costs no memory. Beside the text there is a short list of where each content block begins.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wsserver.content import Block, Text, Thinking, parse_block
from wsserver.wire import text_of


class GrowingText:
    """A text that grows at its end. ``size`` is its length in characters."""

    __slots__ = ("_buffer", "size")

    def __init__(self) -> None:
        self._buffer = io.StringIO(newline="")  # keeps line ends as they are
        self.size = 0

    def append(self, text: str) -> None:
        """Add text at the end."""
        self._buffer.seek(self.size)
        self._buffer.write(text)
        self.size += len(text)

    def read(self, start: int, end: int | None = None) -> str:
        """Return the text from one position to another."""
        self._buffer.seek(start)
        return self._buffer.read(-1 if end is None else end - start)


@dataclass(eq=False, slots=True)
class _Run:
    """Consecutive frames of one type and block: where their text begins, and their other data."""

    type: str
    block: int
    start: int
    data: list[Any] = field(default_factory=list)


class ReplyContent:
    """The content so far."""

    def __init__(self) -> None:
        self.text = GrowingText()  # the text of all text blocks
        self.thinking = GrowingText()  # the text of all thinking blocks
        self._runs: list[_Run] = []

    def receive(self, frame: Mapping[str, Any]) -> None:
        """Append a ``token``, ``thinking`` or ``block`` frame.

        Raises:
            KeyError, TypeError: the frame breaks the protocol.
        """
        kind, block = frame["type"], frame.get("block", 0)
        run = self._runs[-1] if self._runs else None
        if run is None or run.block != block or run.type != kind:
            run = self._begin_run(kind, block)
        if kind == "block":
            run.data.append(text_of(frame["partial_json"]))
        elif kind == "token":
            self.text.append(frame["text"])
            if "citation" in frame:
                run.data.append(frame["citation"])
        else:
            self.thinking.append(frame["text"])
            if "signature" in frame:
                run.data.append(text_of(frame["signature"]))

    def _begin_run(self, kind: str, block: int) -> _Run:
        if type(block) is not int:
            raise TypeError("a `block` is not a number")
        run = _Run(kind, block, 0 if kind == "block" else self._text_of(kind).size)
        self._runs.append(run)
        return run

    def blocks(self) -> tuple[Block, ...]:
        """Return the content blocks, in the order of their numbers, without unfinished ones."""
        ends: dict[str, int | None] = {}  # by type: where the text of the next run begins
        runs: dict[int, list[tuple[_Run, int | None]]] = {}
        for run in reversed(self._runs):
            runs.setdefault(run.block, []).append((run, ends.get(run.type)))
            ends[run.type] = run.start
        blocks = (self._build(runs[number][::-1]) for number in sorted(runs))
        return tuple(block for block in blocks if block is not None)

    def _build(self, runs: list[tuple[_Run, int | None]]) -> Block | None:
        kind, data = runs[0][0].type, [item for run, _ in runs for item in run.data]
        if kind == "block":
            try:
                return parse_block(json.loads("".join(data)))
            except ValueError:  # the rest of its JSON is to come
                return None
        text = "".join(self._text_of(kind).read(run.start, end) for run, end in runs)
        if kind == "thinking":
            return Thinking(text, "".join(data))
        return Text(text, {"citations": data} if data else {})

    def _text_of(self, kind: str) -> GrowingText:
        return self.text if kind == "token" else self.thinking
