"""Reads prompts from a terminal, with editing keys and a history. Needs prompt_toolkit."""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout


class RetryRequested(Exception):
    """The user pressed Alt-R to repeat the last prompt."""


class LineEditor:
    """Reads one prompt at a time.

    Args:
        warn: called with a message if the history of prompts cannot be saved.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        history: History
        try:
            history = _ForgivingHistory(open_history())
        except OSError as error:
            warn(f"cannot save the history of your prompts: {error.strerror}")
            history = InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=history, key_bindings=_key_bindings(), multiline=True
        )

    async def read(self) -> str:
        """Wait for a prompt and return it.

        Raises:
            EOFError: the user pressed Ctrl-D.
            RetryRequested: the user pressed Alt-R.
        """
        with patch_stdout():
            return await self._session.prompt_async("> ", handle_sigint=False)


class _ForgivingHistory(FileHistory):
    """A history that ignores write errors of its file: the prompt is still sent."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def add_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("escape", "r")
    def retry(event: KeyPressEvent) -> None:
        if not event.current_buffer.text:  # keeps an unfinished prompt
            event.app.exit(exception=RetryRequested)

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            run_in_terminal(lambda: print("[Ctrl-D leaves]", flush=True))

    return keys


def open_history() -> Path:
    """Create the file of the history if needed, readable for its user only; return its path.

    The place follows the XDG Base Directory Specification (``XDG_STATE_HOME``).
    """
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(home) / "wsserver" / "history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.closing(os.fdopen(descriptor)):
        # To disable the history, a user may link the path to /dev/null, which others use too.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
    return path
