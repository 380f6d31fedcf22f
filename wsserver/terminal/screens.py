"""Chooses the screen that fits the terminal."""

import os
import sys
from collections.abc import Callable

from wsserver.terminal.commands import COMMANDS
from wsserver.terminal.files import open_history
from wsserver.terminal.plain_screen import PlainScreen
from wsserver.terminal.screen import Screen


def make_screen(*, plain: bool, warn: Callable[[str], None]) -> Screen | PlainScreen:
    """Return a screen for stdin and stdout.

    Args:
        plain: show Markdown as it is.
        warn: called with a message if earlier prompts cannot be saved.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in {"dumb", "unknown", ""}:
        return PlainScreen(sys.stdout)
    history = None
    try:
        history = open_history()
    except OSError as error:
        warn(f"cannot save the history of your prompts: {error.strerror}")
    return Screen(plain=plain, commands=[f"/{name}" for name in COMMANDS], history=history)
