"""``wsserver chat``: a chat in a terminal, or one prompt for a script.

A model's text may contain control characters that a terminal would execute. The terminal gets them
escaped. A program that reads from a pipe gets the text unchanged, and the end of its last line.
"""

from wsserver.terminal.options import Options
from wsserver.terminal.program import Terminal, run

__all__ = ["Options", "Terminal", "run"]
