"""The log: one line per event. No logged value can break a line or look like another line.

The import configures nothing: in a program that embeds the server, an event is a record of the
logger ``wsserver``. Its message is a whole line (``generation id=… reason=end_turn seconds=1.2``),
and its attribute ``event`` is the same as a dict. ``wsserver serve`` owns its process and calls
:func:`set_up`.

The text of an exception may contain a key, a prompt or the answer of an API. So an event shows the
types of the exceptions and the code lines they passed. Only level ``debug`` shows their text.

No client can fill the disk: in each :data:`WINDOW` the log writes at most :data:`MAX_LINES` lines
of an event for each principal, and as many for all anonymous clients together. The event
``lines left out`` counts the others.
"""

import asyncio
import contextlib
import json
import logging
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

MAX_PLACES = 20  # innermost frames of a traceback; a recursion has a thousand
CALLER = 3  # the caller of `log.info`, counted from the call of the standard library
WINDOW = 10.0  # seconds
MAX_LINES = 100  # more than a person reads; at most 220 MB a day for each event
# Warnings of asyncio about a client that has gone, without and with TLS.
_GONE = ("socket.send() raised exception.", "SSL connection is closed")
_QUOTE = re.compile(r'(\\*)("|\Z)')  # a quote or the end, and the backslashes before it
NAMES = 1000  # counts in a window; later principals share the count of anonymous clients

logger = logging.getLogger("wsserver")
_node: ContextVar[Callable[[], str] | None] = ContextVar("node", default=None)


class _Event(dict[str, Any]):
    """The ``event`` of one line and further keys. All values are escaped."""


def printable(text: str) -> str:
    """Escape all characters that are neither visible nor a space.

    These are line ends of any kind, control characters of terminals, characters without a width,
    and characters that change the direction of text.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def set_up(
    level: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> None:
    """Write all records of this process to a stream: text on a terminal, else JSON objects.

    Args:
        level: least severe level of this package's events: debug, info, warning or error. Records
            of other libraries are written from level warning on, whatever level the library sets:
            at lower levels the Anthropic SDK logs prompts.
        stream: destination; the default is stderr.
        clock: monotonic clock for the :data:`WINDOW`, in seconds.
    """
    _limit.begin(clock)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(as_json=not handler.stream.isatty(), full=level == "debug"))
    handler.addFilter(_from_libraries)
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, _Formatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())


def name_node(node: Callable[[], str]) -> None:
    """Add the id of a node of a cluster to each event of this context, and of its tasks."""
    _node.set(node)


class _Formatter(logging.Formatter):
    """Formats any record as one line.

    Args:
        as_json: format a JSON object instead of text.
        full: include the text of exceptions.
    """

    def __init__(self, *, as_json: bool, full: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._full = full

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without its line end."""
        event = getattr(record, "event", None)
        if not isinstance(event, _Event):
            event = _library_event(record, full=self._full)
        if self._full and record.exc_info and record.exc_info[0]:
            text = "".join(traceback.format_exception(*record.exc_info))
            event = _Event(event, traceback=printable(text))
        level = record.levelname.lower()
        when = datetime.fromtimestamp(record.created, UTC)
        if self._as_json:
            stamp = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            head = {"timestamp": stamp, "level": level, "event": event["event"]}
            return json.dumps({**head, **event})
        return f"{when.astimezone():%H:%M:%S} {level:7} {_line(event)}"


class _Limit:
    """Decides which lines are written, and counts the lines that are not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # libraries log from threads of their own
        self.begin(time.monotonic)

    def begin(self, clock: Callable[[], float]) -> None:
        """Begin a window by a monotonic clock, in seconds."""
        self._clock = clock
        self._began = self._clock()
        self._written: Counter[Hashable] = Counter()
        self._left_out: Counter[str] = Counter()
        self._level = logging.NOTSET  # most severe level of the lines left out

    def allows(self, event: str, level: int, name: object = None) -> bool:
        """Count a line; return whether to write it.

        Args:
            event: name of the event, from a bounded set.
            level: severity of the line.
            name: principal with a count of its own; None for anonymous clients.
        """
        key: Hashable = event, level, name
        self._write_if_over()
        with self._lock:
            if key not in self._written and len(self._written) >= NAMES:
                key = event, level, None
            self._written[key] += 1
            if self._written[key] <= MAX_LINES:
                return True
            first = not self._left_out
            self._left_out[event] += 1
            self._level = max(self._level, level)
        if first:
            with contextlib.suppress(
                RuntimeError
            ):  # no event loop: the next line writes the counts
                asyncio.get_running_loop().call_later(WINDOW, self._write_if_over)
        return False

    def _write_if_over(self) -> None:
        if self._clock() - self._began >= WINDOW:
            self.write_left_out()

    def write_left_out(self) -> None:
        """Write the counts of lines that were left out, if any, and begin a new window."""
        with self._lock:
            left_out, level = self._left_out, self._level
            self.begin(self._clock)
        if left_out:
            counts = {event.replace(" ", "_"): count for event, count in left_out.items()}
            log.log(level, "lines left out", **counts)


_limit = _Limit()


def write_left_out() -> None:
    """Write how many lines were left out, before the program ends."""
    _limit.write_left_out()


def _from_libraries(record: logging.LogRecord) -> bool:
    """Drop records of libraries about prompts and about each client that disconnected."""
    if isinstance(getattr(record, "event", None), _Event):
        return True
    if record.name == "asyncio" and record.msg in _GONE:
        return False
    least = logging.ERROR if record.name.startswith("websockets") else logging.WARNING
    return record.levelno >= least and _limit.allows(record.name, record.levelno)


def _library_event(record: logging.LogRecord, *, full: bool) -> _Event:
    """Return the record of another library as an event, without the text of an exception."""
    failure = record.exc_info[1] if record.exc_info else None
    if full or failure is None:
        message = record.getMessage()
    else:
        # The message may contain the text of the exception. In a message of asyncio that text is
        # after the first line, or after the first bracket.
        first, *_ = str(record.msg).split("\n")
        message = first.partition("(")[0].partition("<")[0].rstrip()
    event = _Event(event=printable(message), logger=printable(record.name))
    if failure is not None:
        event.update(_describe(failure))
    _add_node(event)
    return event


def _add_node(event: _Event) -> None:
    node = _node.get()
    if node is not None:
        event["node"] = node()


def _describe(failure: BaseException) -> dict[str, str]:
    """Return the types and places of a failure, without its text."""
    chain = list(_chain(failure))
    types = " from ".join(type(link).__name__ for link in chain)
    places = " from ".join(", ".join(_places(link)) or "nowhere" for link in chain)
    return {"failure": printable(types), "where": printable(places)}


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """Yield a failure, its cause, the cause of its cause, and so on."""
    seen: set[int] = set()
    link: BaseException | None = failure
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        if isinstance(link, BaseExceptionGroup):
            link = link.exceptions[0]
        else:
            link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _places(failure: BaseException) -> list[str]:
    walked = list(traceback.walk_tb(failure.__traceback__))
    return [
        f"{Path(frame.f_code.co_filename).name}:{line} in {frame.f_code.co_name}"
        for frame, line in walked[-MAX_PLACES:]
    ]


def _line(event: Mapping[str, object]) -> str:
    keys = (f"{key}={_quoted(value)}" for key, value in event.items() if key != "event")
    return " ".join([str(event["event"]), *keys])


def _quoted(value: object) -> str:
    text = str(value)
    if text and not any(c in ' "=' for c in text):
        return text
    # Without twice as many, a backslash before a quote would take the quote's escape for itself.
    return '"{}"'.format(_QUOTE.sub(lambda m: m[1] * 2 + (m[2] and '\\"'), text))


class _Log:
    """Writes events: ``log.info("event", key=value)``.

    A None value is left out. ``failure`` is an exception. The field ``principal`` has a limit of
    lines of its own.
    """

    def debug(self, event: str, **values: object) -> None:
        _write(logging.DEBUG, event, values)

    def info(self, event: str, **values: object) -> None:
        _write(logging.INFO, event, values)

    def warning(self, event: str, **values: object) -> None:
        _write(logging.WARNING, event, values)

    def error(self, event: str, **values: object) -> None:
        _write(logging.ERROR, event, values)

    def log(self, level: int, event: str, **values: object) -> None:
        _write(level, event, values)


log = _Log()


def _write(level: int, event: str, values: dict[str, object]) -> None:
    if not (logger.isEnabledFor(level) and _limit.allows(event, level, values.get("principal"))):
        return
    failure = values.pop("failure", None)
    if isinstance(failure, BaseException):
        values |= _describe(failure)
    else:
        failure = None
    safe = _Event(event=printable(event))
    for key, value in values.items():
        if value is not None:
            safe[key] = value if isinstance(value, int | float) else printable(str(value))
    _add_node(safe)
    # A formatter shows the text of the exception only if it gets `exc_info`.
    shown = failure if logger.isEnabledFor(logging.DEBUG) else None
    logger.log(level, _line(safe), extra={"event": safe}, exc_info=shown, stacklevel=CALLER)
