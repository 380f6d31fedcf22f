"""The screen of a dialogue: printed lines, below them a reply that grows, and the prompt.

What is printed is never drawn again. The lines of the growing reply and the prompt are redrawn in
place. The terminal's own scrollback has the whole dialogue.
"""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import in_terminal
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.posix_utils import PosixStdinReader
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from wsserver.client import Reply
from wsserver.terminal.rendering import MarkdownRenderer, Painter, PlainRenderer, Renderer
from wsserver.terminal.views import LiveView, View
from wsserver.terminal.wording import escape, quoted

QUEUED_SHOWN = 3  # prompts that wait
READ_SIZE, READS = 65536, 100  # bytes; reads between two updates of the screen
PROMPT = "> "
BEGIN_UPDATE, END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"  # other terminals ignore them


class Keys:
    """What the keys do. The dialogue sets it."""

    def __init__(self) -> None:
        self.on_text: Callable[[str], None] = lambda _: None
        self.on_interrupt: Callable[[], None] = lambda: None
        self.on_retry: Callable[[], None] = lambda: None
        self.on_edit: Callable[[str], None] = lambda _: None
        self.on_take_back: Callable[[], None] = lambda: None


class Screen:
    """A terminal with a prompt at its end.

    Args:
        plain: show Markdown as it is.
        commands: words that the Tab key completes.
        history: the file of earlier prompts; None if there is none.
    """

    def __init__(self, *, plain: bool, commands: Sequence[str], history: Path | None) -> None:
        self.keys = Keys()
        # Returns the lines of the growing reply for a width.
        self.live: Callable[[int], list[str]] | None = None
        self.queued: list[str] = []  # prompts that wait; drawn above the prompt
        self._plain = plain
        self._painter = Painter()
        self._held: list[str] = []  # lines printed while an editor has the terminal
        self._running = self._lent = self._updating = False
        past: History = InMemoryHistory() if history is None else _ForgivingHistory(history)
        # Without requests for the position of the cursor: lines that are printed before the answer
        # would make it wrong, and the prompt would scroll the screen.
        output = Vt100_Output.from_pty(
            sys.stdout,
            term=os.environ.get("TERM"),
            default_color_depth=ColorDepth.from_env(),
        )
        output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            self._above_prompt,
            input=_open_input(),
            output=output,
            history=past,
            key_bindings=self._bindings(),
            multiline=True,
            prompt_continuation="  ",
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            erase_when_done=True,
        )
        self._session.app.after_render += self._end_update

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return max(self._session.app.output.get_size().columns, 1)

    async def run(self) -> None:
        """Read what is typed, until the user leaves."""
        self._running = True
        try:
            with contextlib.suppress(EOFError):
                await self._session.prompt_async(handle_sigint=False)
        finally:
            self._running = False

    def leave(self) -> None:
        """Let :meth:`run` return."""
        if self._running:
            self._session.app.exit(exception=EOFError)

    def print(self, *lines: str) -> None:
        """Print lines above the prompt. Each may contain escape sequences for colours."""
        if self._lent:
            self._held += lines
            return
        text = "".join(line + "\r\n" for line in lines)
        output = self._session.app.output
        if self._running:
            # Otherwise the prompt flickers: terminals show all of an update at once.
            output.write_raw(BEGIN_UPDATE)
            self._updating = True
            self._session.app.renderer.erase()
        output.write_raw(text)
        output.flush()
        self.redraw()

    def _end_update(self, _: object) -> None:
        if self._updating:
            self._updating = False
            self._session.app.output.write_raw(END_UPDATE)
            self._session.app.output.flush()

    def note(self, line: str) -> None:
        """Print a line of the program."""
        self.print(*self._painter.paint_words(line, self.width, "dim"))

    def sent(self, prompt: str) -> None:
        """Print a prompt that is sent."""
        lines = quoted(prompt).split("\n")
        self.print(*(self._painter.paint_line(line, "bold") for line in lines))

    def show(self, markdown: str) -> None:
        """Print a message of the conversation."""
        renderer = self._renderer()
        renderer.feed(escape(markdown))
        self.print(*renderer.take(self.width, final=True))

    def view(self, reply: Reply) -> View:
        """Return what shows a reply."""
        return LiveView(self, self._painter, self._renderer(), reply)

    def _renderer(self) -> Renderer:
        return PlainRenderer() if self._plain else MarkdownRenderer(self._painter)

    def ready(self) -> None:
        """Do nothing: the prompt is always there."""

    def redraw(self) -> None:
        """Draw the growing reply and the prompt again."""
        if self._running:
            self._session.app.invalidate()

    def clear_input(self) -> bool:
        """Drop what was typed. Return whether there was something."""
        typed = bool(self._session.default_buffer.text)
        self._session.default_buffer.reset()
        return typed

    def fill_input(self, text: str) -> None:
        """Put a text where the user types."""
        self._session.default_buffer.text = text
        self._session.default_buffer.cursor_position = len(text)

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """Lend the terminal to another program."""
        async with in_terminal():
            self._lent = True
            try:
                yield
            finally:
                self._lent = False
        if self._held:
            lines, self._held = self._held, []
            self.print(*lines)

    def _above_prompt(self) -> ANSI:
        size = self._session.app.output.get_size()
        typed = self._session.default_buffer.document.line_count
        queued = self._queued_lines(size.columns)
        room = max(1, size.rows - len(queued) - min(typed, size.rows // 2) - 1)
        live = self.live(size.columns)[-room:] if self.live is not None else []
        return ANSI("".join(line + "\n" for line in live + queued) + PROMPT)

    def _queued_lines(self, width: int) -> list[str]:
        lines = [f"queued: {' '.join(text.split())}"[: width - 1] for text in self.queued]
        if len(lines) > QUEUED_SHOWN:
            lines[QUEUED_SHOWN - 1 :] = [f"queued: {len(lines) - QUEUED_SHOWN + 1} more"]
        return [self._painter.paint_line(line, "dim") for line in lines]

    def _can_take_back(self) -> bool:
        return bool(self.queued) and not self._session.default_buffer.text

    def _bindings(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus("DEFAULT_BUFFER")

        @keys.add("enter", filter=typing)
        @keys.add("c-j", filter=typing)
        def send(event: KeyPressEvent) -> None:
            text = event.current_buffer.text
            event.current_buffer.reset(append_to_history=True)
            self.keys.on_text(text)

        @keys.add("escape", "enter", filter=typing)
        def add_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("escape", "r", filter=typing)
        def retry(event: KeyPressEvent) -> None:
            if not event.current_buffer.text:  # keeps an unfinished prompt
                self.keys.on_retry()

        @keys.add("up", filter=typing & Condition(self._can_take_back))
        def take_back(_: KeyPressEvent) -> None:
            self.keys.on_take_back()

        @keys.add("c-x", "c-e", filter=typing)
        def edit(event: KeyPressEvent) -> None:
            self.keys.on_edit(event.current_buffer.text)

        @keys.add("c-c", filter=typing)
        def interrupt(_: KeyPressEvent) -> None:
            self.keys.on_interrupt()

        return keys


class _ForgivingHistory(FileHistory):
    """A history that ignores write errors of its file: the prompt is still sent."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


class _Reader(PosixStdinReader):
    """Reads at once all that was typed or pasted.

    After each read prompt_toolkit searches the paste for its end, from the beginning. With one
    read for each KiB, a paste of 20 MB took minutes.
    """

    def read(self, count: int = READ_SIZE) -> str:
        """Return the text; empty if there is none."""
        parts = [super().read(count)]
        while parts[-1] and len(parts) < READS:
            parts.append(super().read(count))
        return "".join(parts)


def _open_input() -> Vt100Input:
    opened = Vt100Input(sys.stdin)
    opened.stdin_reader = _Reader(opened.fileno(), encoding=opened.stdin.encoding)
    return opened
