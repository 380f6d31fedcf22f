"""The log: one event a line, which whatever it tells of cannot break or disguise.

The one module that knows structlog. Importing it configures nothing: in a program that embeds the
server, events are records of the logger ``wsserver`` whose message is a line by itself
(``generation id=… reason=end_turn seconds=1.2``) and whose attribute ``event`` has the same as a
dict. :func:`set_up` is for ``wsserver serve``, which owns its process.

Nobody can say what an exception's text holds: a key, a prompt, what an API answered. So an event
has the types of the exceptions and the places they came through, and their text at level ``debug``
only.

No client can fill a disk: in each :data:`WINDOW` an event gets :data:`MOST` lines for each
principal, and as many for all strangers together. The event ``lines left out`` counts the rest.
"""

import asyncio
import contextlib
import json
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import structlog

__all__ = ["log", "printable", "set_up", "tell_left_out"]

MOST_PLACES = 20  # of one traceback, the innermost; a recursion has a thousand
CALLER = 4  # frames of structlog's between whoever logs and the standard library
WINDOW = 10.0  # seconds
MOST = 100  # lines: more than anybody reads, and 220 MB a day at most for each event
LEVELS = logging.getLevelNamesMapping()
NAMES = 1000  # counts kept in a window; who comes later shares the strangers' count

logger = logging.getLogger("wsserver")


class _Event(dict[str, Any]):
    """What one line says, under ``event`` and further keys, safe to show as it is."""


def printable(text: str) -> str:
    """Return text with all escaped that is neither to be seen nor a space.

    That is line ends of any kind, what terminals obey, and characters without a width or that
    change the direction of others.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def set_up(level: str, stream: TextIO | None = None) -> None:
    """Send all records of this process to a stream: lines on a terminal, else JSON objects.

    Args:
        level: the least severe one of our own: debug, info, warning or error. Other libraries'
            records are shown from warnings on, whatever level those libraries set for themselves:
            below, the Anthropic SDK logs prompts.
        stream: where to; the default is stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(as_json=not handler.stream.isatty(), full=level == "debug"))
    handler.addFilter(_from_libraries)
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old.formatter, _Formatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())


class _Formatter(logging.Formatter):
    """Makes a line of any record.

    Args:
        as_json: as a JSON object and not as text.
        full: with the text of exceptions.
    """

    def __init__(self, *, as_json: bool, full: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._full = full

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        event = getattr(record, "event", None)
        if not isinstance(event, _Event):
            event = _foreign(record, full=self._full)
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
    """Decides which lines are written, and counts the lines that are not.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # libraries log from their threads
        self.clear()

    def clear(self) -> None:
        """Begin a window."""
        self._began = self._clock()
        self._written: Counter[Hashable] = Counter()
        self._left_out: Counter[str] = Counter()
        self._level = logging.NOTSET  # the most severe one of the lines that were left out

    def allows(self, event: str, level: int, name: object = None) -> bool:
        """Count a line; return whether it is to be written.

        Args:
            event: what it tells of; a bounded set of texts.
            level: its severity.
            name: who is counted apart from others.
        """
        key: Hashable = event, level, name
        self._tell_if_over()
        with self._lock:
            if key not in self._written and len(self._written) >= NAMES:
                key = event, level, None
            self._written[key] += 1
            if self._written[key] <= MOST:
                return True
            first = not self._left_out
            self._left_out[event] += 1
            self._level = max(self._level, level)
        if first:
            with contextlib.suppress(RuntimeError):  # no event loop: the next line tells
                asyncio.get_running_loop().call_later(WINDOW, self._tell_if_over)
        return False

    def _tell_if_over(self) -> None:
        if self._clock() - self._began >= WINDOW:
            self.tell()

    def tell(self) -> None:
        """Write how many lines were left out, if any, and begin a new window."""
        with self._lock:
            left_out, level = self._left_out, self._level
            self.clear()
        if left_out:
            counts = {event.replace(" ", "_"): count for event, count in left_out.items()}
            log.log(level, "lines left out", **counts)


_limit = _Limit()


def tell_left_out() -> None:
    """Write now how many lines were left out: for a program that is about to end."""
    _limit.tell()


def _from_libraries(record: logging.LogRecord) -> bool:
    """Keep out what libraries log of prompts, and of each client that went away."""
    if isinstance(getattr(record, "event", None), _Event):
        return True
    if record.name == "asyncio" and record.msg == "socket.send() raised exception.":
        return False
    least = logging.ERROR if record.name.startswith("websockets") else logging.WARNING
    return record.levelno >= least and _limit.allows(record.name, record.levelno)


def _foreign(record: logging.LogRecord, *, full: bool) -> _Event:
    """Return what another library says; of an exception, only where it happened."""
    failure = record.exc_info[1] if record.exc_info else None
    if full or failure is None:
        message = record.getMessage()
    else:
        # What it puts into its message may well be that exception. asyncio's has been put
        # together already: from the second line on, or where it shows an object.
        first, *_ = str(record.msg).split("\n")
        message = first.partition("(")[0].partition("<")[0].rstrip()
    event = _Event(event=printable(message), logger=printable(record.name))
    if failure is not None:
        event.update(_told(failure))
    return event


def _told(failure: BaseException) -> dict[str, str]:
    """Say what is known of a failure, without what it says itself."""
    chain = list(_chain(failure))
    types = " from ".join(type(link).__name__ for link in chain)
    places = " from ".join(", ".join(_places(link)) or "nowhere" for link in chain)
    return {"failure": printable(types), "where": printable(places)}


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """Yield a failure, its cause, that one's cause, and so on."""
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
        for frame, line in walked[-MOST_PLACES:]
    ]


def _line(event: Mapping[str, object]) -> str:
    keys = (f"{key}={_shown(value)}" for key, value in event.items() if key != "event")
    return " ".join([str(event["event"]), *keys])


def _shown(value: object) -> str:
    text = str(value)
    if text and not any(c in ' "=' for c in text):
        return text
    return '"{}"'.format(text.replace('"', '\\"'))


def _limited(_: object, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if not _limit.allows(event["event"], LEVELS[level.upper()], event.get("principal")):
        raise structlog.DropEvent
    return event


def _as_record(
    _: object, __: str, event: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    """Return the arguments for the standard library's logger."""
    failure = event.pop("failure", None)
    if isinstance(failure, BaseException):
        event.update(_told(failure))
    safe = _Event(
        (key, value if isinstance(value, int | float) else printable(str(value)))
        for key, value in event.items()
        if value is not None
    )
    return (_line(safe),), {
        "extra": {"event": safe},
        # With it whoever formats the record shows the text too.
        "exc_info": failure if logger.isEnabledFor(logging.DEBUG) else None,
        "stacklevel": CALLER,
    }


log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    logger,
    processors=[structlog.stdlib.filter_by_level, _limited, _as_record],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
    cache_logger_on_first_use=True,
)
"""``log.info("event", key=value)``. What is None is left out; ``failure`` is an exception."""
