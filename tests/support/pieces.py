"""The output of a model, as texts that a test can compare, and as pieces of a reply."""

from collections.abc import Iterable
from itertools import groupby

import wsserver
from wsserver.pieces import Kind, Pieces

__all__ = ["Thinking", "heard", "said", "yielded"]


class Thinking(str):
    """A piece of thinking. A plain ``str`` is a piece of text."""

    __slots__ = ()


def said(*texts: str, block: int = 0) -> Pieces:
    """Make pieces of texts. Each change of kind begins a block."""
    pieces = Pieces()
    for number, (kind, run) in enumerate(groupby(texts, type), block):
        pieces.extend("thinking" if kind is Thinking else "text", number, list(map(str, run)))
    return pieces


def heard(pieces: Iterable[tuple[Kind, int, str]]) -> list[str]:
    """Return the texts of pieces."""
    return [Thinking(data) if kind == "thinking" else data for kind, _, data in pieces]


def yielded(text: str) -> str | wsserver.Thinking:
    """Return the output of a model for a text."""
    return wsserver.Thinking(str(text)) if isinstance(text, Thinking) else text
