"""Exit codes of ``wsserver chat``, as shells use them."""

from signal import SIGINT

DONE, FAILED = 0, 1
SIGNAL_BASE = 128  # the code after a signal: this and the signal's number
INTERRUPTED = SIGNAL_BASE + SIGINT
