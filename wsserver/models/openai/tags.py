"""The thinking that a server leaves in the text, between ``<think>`` and ``</think>``.

LM Studio does so by default; vLLM and llama.cpp do so without a parser for the model's reasoning.
"""

from wsserver.content import Thinking

_OPEN, _CLOSE = "<think>", "</think>"
_SPACE = 100  # characters before the first tag


class Tags:
    """Separates the thinking at the beginning of a reply from its text. No I/O.

    Later tags stay in the text: there the model may write about tags.

    Attributes:
        over: whether all further text is text.
    """

    def __init__(self) -> None:
        self.over = False
        self._held = ""  # perhaps the beginning of a tag
        self._tag: str | None = _OPEN  # the next tag
        self._thought = False  # whether there was thinking

    def feed(self, text: str) -> list[Thinking | str]:
        """Return the thinking and the text that are certain to be no part of a tag."""
        self._held += text
        if self._tag == _OPEN:
            begin = self._held.lstrip()
            if len(self._held) - len(begin) >= _SPACE:
                return self.flush()
            if not begin.startswith(_OPEN):
                return [] if _OPEN.startswith(begin) else self.flush()
            self._held, self._tag = begin.removeprefix(_OPEN), _CLOSE
        found: list[Thinking | str] = []
        if self._tag == _CLOSE:
            if not self._thought:
                self._held = self._held.lstrip()
            thought, close, rest = self._held.partition(_CLOSE)
            if close:
                self._tag = None
            else:
                cut = len(thought) - _overlap(thought)
                thought, rest = thought[:cut], thought[cut:]
            self._held = rest
            if thought:
                self._thought = True
                found.append(Thinking(thought))
        if self._tag is None:
            self._held = self._held.lstrip()
            if self._held:
                found += self.flush()
        return found

    def flush(self) -> list[Thinking | str]:
        """Return what is left, and end the thinking."""
        self.over = True
        held, self._held = self._held, ""
        if not held:
            return []
        return [Thinking(held) if self._tag == _CLOSE else held]


def _overlap(text: str) -> int:
    """Return the length of the longest end of a text that is a beginning of the closing tag."""
    return next((n for n in range(len(_CLOSE) - 1, 0, -1) if text.endswith(_CLOSE[:n])), 0)
