"""Renders a reply for a terminal: Markdown with ``rich``, or the text as it is."""

from collections.abc import Iterable
from typing import ClassVar, Protocol

from markdown_it.token import Token
from rich.cells import cell_len, chop_cells
from rich.console import COLOR_SYSTEMS, Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement, TableElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from wsserver.terminal.blocks import PARSER, Blocks, Part
from wsserver.terminal.wording import escape

LONGEST_DRAWN = 3000  # characters of Markdown that are rendered again and again
LINES_DRAWN = 12  # of longer Markdown, whose source is shown
NARROWEST_COLUMN = 4  # columns of the terminal for one of a table, with the space around it
CONTEXT = 50  # lines of code before a line that decide its colours
CODE_THEME = "ansi_dark"  # the colours of the terminal, on any background
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "none",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.h4": "bold italic",
        "markdown.hr": "dim",
        "markdown.link": "none",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)


class Painter:
    """Turns renderables into lines with escape sequences for colours, and no other ones."""

    def __init__(self) -> None:
        self._console = Console(force_terminal=True, theme=THEME, legacy_windows=False)
        self._colors = COLOR_SYSTEMS.get(self._console.color_system or "")

    def paint(self, renderable: RenderableType, width: int) -> list[str]:
        """Return the lines of a renderable."""
        options = self._console.options.update(width=max(width, 1), height=None)
        lines = self._console.render_lines(renderable, options, pad=False)
        return ["".join(map(self._paint_segment, self._cleaned(line))) for line in lines]

    def paint_words(self, text: str, width: int, style: str) -> list[str]:
        """Return lines of text in one style, broken between words."""
        return self.paint(Text(escape(text), style, overflow="fold"), width)

    def paint_line(self, line: str, style: str) -> str:
        """Return a line in one style. The terminal breaks it where it is too long."""
        text = escape(line)
        return self._console.get_style(style).render(text, color_system=self._colors)

    def _cleaned(self, line: list[Segment]) -> Iterable[Segment]:
        """Return a line without spaces at its end, and without colours if nobody wants them."""
        line = [segment for segment in line if not segment.control]
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        return Segment.remove_color(line) if self._console.no_color else line

    def _paint_segment(self, segment: Segment) -> str:
        text = escape(segment.text)  # an entity of Markdown may stand for a control character
        if segment.style is None:
            return text
        return segment.style.render(text, color_system=self._colors)


class Renderer(Protocol):
    """Renders the text of one reply as it arrives. The text has no control characters."""

    def feed(self, text: str) -> None:
        """Add text."""

    def take(self, width: int, *, final: bool = False) -> list[str]:
        """Return the lines that are complete, each once. ``final``: the text has ended."""

    def live(self, width: int) -> list[str]:
        """Return the lines that are not complete."""


class PlainRenderer:
    """Shows the text as it is. The terminal breaks long lines."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> None:
        """Add text."""
        self._rest += text

    def take(self, width: int, *, final: bool = False) -> list[str]:  # noqa: ARG002
        """Return the lines that have ended."""
        *lines, self._rest = self._rest.split("\n")
        if final and self._rest:
            lines.append(self._rest)
            self._rest = ""
        return lines

    def live(self, width: int) -> list[str]:
        """Return the end of the line that has not ended."""
        return _end_of_line(self._rest, width) if self._rest else []


class MarkdownRenderer:
    """Renders Markdown. Each part is rendered for good when it is complete."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter
        self._width = 80
        self._blocks = Blocks(self._markdown)
        self._code: list[str] = []  # the last lines of the code fence

    def feed(self, text: str) -> None:
        """Add text."""
        self._blocks.feed(text)

    def take(self, width: int, *, final: bool = False) -> list[str]:
        """Return the lines of the parts that are complete."""
        self._width = width
        lines: list[str] = []
        code: list[str] = []
        language = ""
        for part in self._blocks.take(final=final):
            if part.kind == "code":
                code.append(part.text)
                language = part.language
                continue
            lines += self._take_code(code, language)
            code = []
            lines += self._render(part)
            if part.kind == "fence":
                self._code.clear()
        return lines + self._take_code(code, language)

    def live(self, width: int) -> list[str]:
        """Return the lines of the part that is not complete."""
        self._width = width
        rest = self._blocks.rest
        if not rest.text.strip("\n"):
            return []
        if rest.kind == "code":
            return _end_of_line(rest.text, width)
        if len(rest.text) > LONGEST_DRAWN:
            return [escape(line)[:width] for line in rest.text.split("\n")[-LINES_DRAWN:]]
        return self._render(rest)

    def _take_code(self, code: list[str], language: str) -> list[str]:
        lines = self._paint_code(code, language)
        self._code = [*self._code, *code][-CONTEXT:]
        return lines

    def _render(self, part: Part) -> list[str]:
        if part.kind == "fence":
            lines = [self._painter.paint_line(part.text, "dim")]
        else:
            lines = self._markdown(part.text)
        return ["", *lines] if part.spaced and lines else lines

    def _markdown(self, source: str) -> list[str]:
        markdown = _Markdown(source)
        cut = _is_too_deep(markdown.parsed)
        lines = self._painter.paint(Text(source, overflow="fold") if cut else markdown, self._width)
        first = next((n for n, line in enumerate(lines) if line), len(lines))
        while lines and not lines[-1]:
            lines.pop()
        return lines[first:]

    def _paint_code(self, code: list[str], language: str) -> list[str]:
        """Return lines of code in colours. They are as long as in the source, to be copied."""
        if not code:
            return []
        source = "\n".join([*self._code, *code])
        text = _syntax(source, language or "text").highlight(source)
        text.expand_tabs(4)
        lines = text.split("\n", allow_blank=True)[: len(self._code) + len(code)]
        lines = lines[len(self._code) :]
        width = 1 + max(cell_len(line.plain) for line in lines)
        return [painted for line in lines for painted in self._painter.paint(line, width)]


def _end_of_line(line: str, width: int) -> list[str]:
    """Return the end of a line, broken at the width."""
    return chop_cells(line[-LINES_DRAWN * width :].expandtabs(4), width)


def _syntax(source: str, language: str) -> Syntax:
    return Syntax(source, language, theme=CODE_THEME, background_color="default", word_wrap=True)


class _CodeBlock(CodeBlock):
    """A code block inside a list or a quote, below its language, without a background."""

    def __init__(self, info: str) -> None:
        super().__init__(info.partition(" ")[0] or "text", CODE_THEME)
        self._info = info

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> "_CodeBlock":  # noqa: ARG003
        return cls(token.info.strip())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._info:
            yield Text(self._info, "dim", overflow="fold")
        if code := str(self.text).rstrip():
            yield _syntax(code, self.lexer_name)


class _Heading(Heading):
    """A heading at the left, as all text."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Table(TableElement):
    """A table that loses no text: it breaks long words, and is no grid if it has many columns."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [*([self.header.row] if self.header else []), *(self.body.rows if self.body else [])]
        cells = [[cell.content for cell in row.cells] for row in rows if row is not None]
        if any(len(row) * NARROWEST_COLUMN > options.max_width for row in cells):
            for row in cells:
                yield Text(" | ", overflow="fold").join(row)
            return
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "heading_open": _Heading,
        "table_open": _Table,
    }

    def __init__(self, source: str) -> None:
        # Links show their address, as text: a link of the terminal would hide it.
        super().__init__("", hyperlinks=False)
        self.markup = source
        self.parsed = [_without_images(token) for token in PARSER.parse(source)]


def _is_too_deep(tokens: list[Token]) -> bool:
    """Return whether the parser has left out text, because its blocks are nested too deeply."""
    return max((token.level for token in tokens), default=0) >= PARSER.options.maxNesting - 1


def _without_images(token: Token) -> Token:
    """Replace the images of a line by their text and address."""
    for child in token.children or ():
        if child.type == "image":
            child.type, child.tag, child.children = "text", "", None
            child.content = f"🖼 {child.content} ({child.attrGet('src')})"
    return token
