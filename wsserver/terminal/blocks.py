"""Splits Markdown that streams into parts that can be printed once and for all. No I/O.

Each part is a top-level block, items of a top-level list, a line of a top-level code fence, or the
first lines of a long paragraph. A part is complete when more text cannot change its look.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

LONGEST_BLOCK = 65536  # characters of a block that are kept back; a longer block is cut
LONGEST_TEXT = 8192  # the same for a paragraph, which takes longer to parse
LONGEST_PARAGRAPH = 12  # lines of a paragraph that are kept back
GROWTH = 200  # characters between two attempts to cut a paragraph

# HTML and link definitions are text here. Otherwise `<String>` of `Vec<String>` would not be shown.
PARSER = MarkdownIt("commonmark", {"html": False})
PARSER.enable(["strikethrough", "table"]).disable("reference")


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is complete.

    Attributes:
        kind: ``fence`` is the first or the last line of a code fence, ``code`` a line inside.
        text: its source.
        spaced: whether an empty line comes before it.
        language: of a line of code.
    """

    kind: Literal["markdown", "fence", "code"]
    text: str
    spaced: bool = False
    language: str = ""


@dataclass(frozen=True, slots=True)
class _Fence:
    mark: str
    language: str

    def closed_by(self, line: str) -> bool:
        mark = re.escape(self.mark[0])
        return re.fullmatch(rf" {{0,3}}{mark}{{{len(self.mark)},}}\s*", line) is not None


class Blocks:
    """Takes text, and returns the parts that are complete.

    Args:
        render: returns the lines of a Markdown source on the screen.
    """

    def __init__(self, render: Callable[[str], list[str]]) -> None:
        self._render = render
        self._rest = ""
        self._fence: _Fence | None = None
        self._spaced = False  # whether an empty line comes before the next part
        self._next_cut = 0  # characters of the rest before the next attempt to cut it

    def feed(self, text: str) -> None:
        """Add text."""
        self._rest += text

    @property
    def rest(self) -> Part:
        """The text that is not complete."""
        if self._fence is not None:
            return Part("code", self._rest, language=self._fence.language)
        return Part("markdown", self._rest, self._spaced)

    def take(self, *, final: bool = False) -> list[Part]:
        """Return the parts that are complete. ``final``: the text has ended, so return all."""
        parts: list[Part] = []
        while (part := self._take_one(final=final)) is not None:
            parts.append(part)
        return parts

    def _take_one(self, *, final: bool) -> Part | None:
        if self._fence is not None:
            return self._take_code(self._fence, final=final)
        # The rest of an incomplete line may change the kind of the line.
        source = self._rest if final else self._rest[: self._rest.rfind("\n") + 1]
        tokens = PARSER.parse(source)
        starts = [(token, token.map[0]) for token in tokens if _is_block(token) and token.map]
        if starts and starts[0][0].type == "fence":
            return self._open_fence(source, *starts[0])
        if len(starts) > 1:
            return self._take_lines(source, starts[1][1])
        if starts and (line := _last_item(tokens)):
            spaced = not source.split("\n")[line - 1].strip()
            return self._take_lines(source, line, spaced=spaced)
        if final and self._rest.strip():
            return self._take_until(len(self._rest))
        return self._cut()

    def _take_lines(self, source: str, count: int, *, spaced: bool = True) -> Part:
        return self._take_until(len(_first_lines(source, count)), spaced=spaced)

    def _take_until(self, end: int, *, spaced: bool = True) -> Part:
        """Take the beginning of the rest. ``spaced``: an empty line follows it."""
        part = Part("markdown", self._rest[:end], self._spaced)
        self._rest, self._spaced, self._next_cut = self._rest[end:], spaced, 0
        return part

    # Code fences, line by line.

    def _open_fence(self, source: str, token: Token, line: int) -> Part:
        self._fence = _Fence(token.markup, (token.info.split() or [""])[0])
        spaced = self._spaced
        self._take_lines(source, line + 1)
        return Part("fence", source.split("\n")[line].strip(), spaced)

    def _take_code(self, fence: _Fence, *, final: bool) -> Part | None:
        line, end, after = self._rest.partition("\n")
        if not end and not (final and line):
            return None
        self._rest = after
        if fence.closed_by(line):
            self._fence = None
            return Part("fence", line.strip())
        return Part("code", line, language=fence.language)

    # Long blocks.

    def _cut(self) -> Part | None:
        """Take a part of a block that is too long to be kept back."""
        blocks = [token for token in PARSER.parse(self._rest) if _is_block(token)]
        kinds = [token.type for token in blocks]
        text = kinds == ["paragraph_open"]
        if text and (part := self._cut_paragraph()) is not None:
            return part
        if len(self._rest) <= (LONGEST_TEXT if text else LONGEST_BLOCK):
            return None
        if kinds == ["table_open"] and blocks[0].map is not None:
            return self._cut_table(blocks[0].map[0])
        end = self._rest.rfind("\n") + 1 or self._rest.rfind(" ") + 1 or len(self._rest)
        return self._take_until(end, spaced=False)

    def _cut_table(self, line: int) -> Part | None:
        """Take all rows of a table but the last. The next part begins with the header again."""
        lines = self._rest.split("\n")
        header = "".join(text + "\n" for text in lines[line : line + 2])
        end = self._rest.rfind("\n", 0, -1) + 1
        if len(lines) < line + 4:  # the header, a row, and what follows it
            return self._take_until(len(self._rest), spaced=False)
        part = self._take_until(end, spaced=False)
        self._rest = header + self._rest
        return part

    def _cut_paragraph(self) -> Part | None:
        """Take all lines but the last two, if both parts then look as before."""
        whole = self._rest
        if len(whole) < max(self._next_cut, LONGEST_PARAGRAPH):
            return None
        lines = self._render(whole)
        if len(lines) <= LONGEST_PARAGRAPH:
            return None
        low, high = 0, len(whole)
        while high - low > 1:  # the longest beginning that has the wanted lines
            middle = (low + high) // 2
            fits = len(self._render(whole[:middle])) <= len(lines) - 2
            low, high = (middle, high) if fits else (low, middle)
        space = 1 + max(whole.rfind(" ", 0, low + 1), whole.rfind("\n", 0, low + 1))
        for cut in (space, low):
            if cut and self._render(whole[:cut]) + self._render(whole[cut:]) == lines:
                return self._take_until(cut, spaced=False)
        self._next_cut = len(whole) + GROWTH
        return None


def _is_block(token: Token) -> bool:
    return token.level == 0 and token.nesting >= 0


def _first_lines(source: str, count: int) -> str:
    # Not `splitlines`: Markdown ends a line at "\n" only.
    return "".join(line + "\n" for line in source.split("\n")[:count])[: len(source)]


def _last_item(tokens: list[Token]) -> int:
    """Return the line where the last item of a list begins; 0 if the list has one item."""
    return max(
        (t.map[0] for t in tokens if t.type == "list_item_open" and t.level == 1 and t.map),
        default=0,
    )
