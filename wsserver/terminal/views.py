"""Shows one reply while it streams."""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Protocol, TextIO

from wsserver.client import Reply
from wsserver.terminal.rendering import Painter, Renderer
from wsserver.terminal.wording import describe_thought, escape

FRAME = 0.04  # seconds between two updates of the screen
LOAD = 4  # a pause before an update is at least this many times its length
TICK = 1.0  # seconds between two updates of a counter


class View(Protocol):
    """Gets a reply piece by piece."""

    def think(self, thinking: str) -> None:
        """Show a part of the thinking."""

    def say(self, text: str) -> None:
        """Show a part of the text."""

    def close(self) -> None:
        """Print what is left."""


class Display(Protocol):
    """Prints lines above a region that is drawn again and again."""

    live: Callable[[int], list[str]] | None

    @property
    def width(self) -> int:
        """Columns of the terminal."""

    def print(self, *lines: str) -> None:
        """Print lines for good."""

    def note(self, line: str) -> None:
        """Print a line of the program."""

    def redraw(self) -> None:
        """Draw the region again."""


class PlainView:
    """Writes the text as it arrives."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._thoughts = ""
        self._at_start = True  # of a line

    def think(self, thinking: str) -> None:
        """Keep the thinking until the text begins."""
        self._thoughts += thinking

    def say(self, text: str) -> None:
        """Write a part of the text."""
        self._write_thoughts()
        self._write(escape(text))

    def close(self) -> None:
        """End the last line."""
        self._write_thoughts()
        self._end_line()

    def _write_thoughts(self) -> None:
        if self._thoughts:
            self._end_line()
            self._write(describe_thought(self._thoughts) + "\n")
            self._thoughts = ""

    def _end_line(self) -> None:
        if not self._at_start:
            self._write("\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._at_start = text.endswith("\n")


class LiveView:
    """Prints the parts of a reply that are complete, and draws the rest above the prompt."""

    def __init__(self, screen: Display, painter: Painter, renderer: Renderer, reply: Reply) -> None:
        self._screen = screen
        self._painter = painter
        self._renderer = renderer
        self._reply = reply
        self._loop = asyncio.get_running_loop()
        self._began = self._thinking_began = self._loop.time()
        self._thoughts = ""
        self._spoke = False  # whether text has arrived
        self._spent = 0.0  # seconds of rendering since the last update
        self._drawn: tuple[int, list[str]] | None = None  # the last lines, for their width
        self._timer: asyncio.TimerHandle | None = None
        screen.live = self._live
        self._update()

    def think(self, thinking: str) -> None:
        """Count the thinking."""
        if not self._thoughts:
            self._thinking_began = self._loop.time()
        self._thoughts += thinking
        self._schedule()

    def say(self, text: str) -> None:
        """Render a part of the text soon."""
        self._print_thoughts()
        self._spoke = True
        self._renderer.feed(escape(text))
        self._schedule()

    def close(self) -> None:
        """Print what is left."""
        if self._timer is not None:
            self._timer.cancel()
        self._screen.live = None
        self._print_thoughts()
        self._screen.print(*self._renderer.take(self._screen.width, final=True))

    def _print_thoughts(self) -> None:
        if self._thoughts:
            seconds = self._loop.time() - self._thinking_began
            thoughts, self._thoughts = self._thoughts, ""
            # Text before the thoughts ends here, so that it is not printed after them.
            self._screen.print(*self._renderer.take(self._screen.width, final=True))
            self._screen.note(describe_thought(thoughts, seconds))

    def _schedule(self) -> None:
        """Update soon; later if the last updates were slow."""
        due = self._loop.time() + max(FRAME, LOAD * self._spent)
        if self._timer is None or self._timer.when() > due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._update)

    def _update(self) -> None:
        began = perf_counter()
        self._drawn = None
        lines = self._renderer.take(self._screen.width)
        self._spent = perf_counter() - began
        if lines:
            self._screen.print(*lines)
        else:
            self._screen.redraw()
        self._timer = self._loop.call_later(TICK, self._update)

    def _live(self, width: int) -> list[str]:
        if self._drawn is None or self._drawn[0] != width:
            began = perf_counter()
            self._drawn = width, self._renderer.live(width)
            self._spent += perf_counter() - began
        status = self._status()
        if not status:
            return self._drawn[1]
        return [*self._drawn[1], self._painter.paint_line(status[: width - 1], "dim")]

    def _status(self) -> str:
        if self._reply.stopping:
            return "[stopping…]"
        if self._thoughts:
            seconds = self._loop.time() - self._thinking_began
            return f"[thinking… {len(self._thoughts):,} characters, {seconds:.0f} s]"
        if self._spoke:
            return ""
        if self._reply.queued:
            return f"[waiting, place {self._reply.queued} in the queue…]"
        return f"[waiting… {self._loop.time() - self._began:.0f} s]"
