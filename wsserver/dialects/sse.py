"""Frames as server-sent events (WHATWG HTML, section "Server-sent events").

Each event is one frame of ``wsserver.v1``. Its ``id`` is ``GENERATION.SEQ``, so that a client can
go on after it; that of the terminal is ``GENERATION.end``.
"""

from collections.abc import Mapping
from types import MappingProxyType

from wsserver.dialects.v1 import V1
from wsserver.encoding import encode
from wsserver.hub.live import Generation
from wsserver.pieces import Run
from wsserver.protocol import Error, Terminal

RETRY = b"retry: 1000\n"  # milliseconds until an EventSource connects again


class SSE:
    """The dialect of :mod:`wsserver.protocol` over a response of type ``text/event-stream``."""

    comment = b":\n\n"
    headers: Mapping[str, str] = MappingProxyType({})

    @staticmethod
    def start(generation: Generation, *, after: int, shown: bool, request: str | None) -> bytes:
        """Encode a ``start`` event."""
        frame = V1.start(generation, after=after, shown=shown, request=request)
        return RETRY + _event(generation.id, b"%d" % after, frame)

    @staticmethod
    def run(generation: Generation, run: Run) -> bytes:
        """Encode a ``token``, ``thinking`` or ``block`` event."""
        return _event(generation.id, b"%d" % run.seq, V1.run(generation, run))

    @staticmethod
    def terminal(terminal: Terminal) -> bytes:
        """Encode a ``done`` or ``error`` event."""
        assert terminal.id is not None
        return _event(terminal.id, b"end", V1.terminal(terminal))

    @staticmethod
    def error(error: Error) -> bytes:
        """Encode an ``error`` event without an id."""
        return b"data: %b\n\n" % encode(error)


def _event(generation: str, place: bytes, frame: bytes) -> bytes:
    return b"id: %b.%b\ndata: %b\n\n" % (generation.encode(), place, frame)
