"""The screen of a dialogue where the cursor cannot move: ``TERM=dumb``, or stdout is a pipe."""

import asyncio
import codecs
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator
from typing import TextIO

from wsserver.client import Reply
from wsserver.terminal.screen import PROMPT, Keys
from wsserver.terminal.views import PlainView, View
from wsserver.terminal.wording import escape, quoted

READ_SIZE = 65536  # bytes


class PlainScreen:
    """Prints lines in the order in which they come, and reads lines of stdin."""

    def __init__(self, out: TextIO) -> None:
        self.keys = Keys()
        self.queued: list[str] = []
        self._out = out
        self._asked = False  # whether the prompt is the last thing on the screen
        self._ended = asyncio.Event()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._typed = ""

    async def run(self) -> None:
        """Read lines, until the end of stdin or until :meth:`leave`."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            data = b"-"
            while data:
                # Not `sys.stdin`: Python could not end while a thread holds its lock.
                data = os.read(sys.stdin.fileno(), READ_SIZE)
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._receive, data)

        threading.Thread(target=read, daemon=True).start()
        await self._ended.wait()

    def leave(self) -> None:
        """Let :meth:`run` return."""
        self._ended.set()

    def view(self, _: Reply) -> View:
        """Return what shows a reply."""
        return PlainView(self._out)

    def ready(self) -> None:
        """Show the prompt."""
        self._out.write(PROMPT)
        self._out.flush()
        self._asked = True

    def sent(self, prompt: str) -> None:
        """Show a prompt that is sent, unless the terminal shows it as it was typed."""
        if self._asked:
            self._asked = False
        else:
            self.note(quoted(prompt))

    def note(self, line: str) -> None:
        """Print a line of the program."""
        self._asked = False
        print(escape(line), file=self._out, flush=True)

    def show(self, markdown: str) -> None:
        """Print a message of the conversation."""
        self.note(markdown)

    def redraw(self) -> None:
        """Do nothing: what is printed stays."""

    def clear_input(self) -> bool:
        """Return whether something was typed. The terminal has it, and clears it."""
        return False

    def fill_input(self, text: str) -> None:
        """Enter a text as if it were typed."""
        self.keys.on_text(text)

    @contextlib.asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        """Lend the terminal to another program."""
        yield

    def _receive(self, data: bytes) -> None:
        self._typed += self._decoder.decode(data, final=not data)
        *lines, self._typed = self._typed.split("\n")
        for line in lines:
            self.keys.on_text(line)
        if not data:
            if self._asked:
                self.note("")  # ends the line of the prompt
            self.leave()
