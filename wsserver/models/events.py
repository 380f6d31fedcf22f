"""Server-sent events of a model's API: from bytes to the JSON of an event.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

import json
import re
from typing import Any

from pydantic_core import from_json

from wsserver.errors import Code, ModelError

MAX_EVENT = 1_048_576  # bytes; events of APIs are much shorter

_FIELDS = (b"event", b"data", b"id", b"retry", b"")  # b"" begins a comment
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Events:
    """Splits a stream of bytes into events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return each event that the chunk completes, with LF between its lines.

        Raises:
            ModelError: an event is too long.
        """
        buffer = self._rest + chunk
        held = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # perhaps half of a line end
                buffer, held = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, rest = buffer.split(b"\n\n")
        self._rest = rest + held
        if len(self._rest) > MAX_EVENT:
            raise ModelError(Code.MALFORMED)
        return events

    @staticmethod
    def data(event: bytes) -> bytes:
        """Return the data of an event; empty if it has none.

        The standard ignores unknown fields. Here they are an error: APIs send none, so a line with
        an unknown field is damaged, and its text would be lost without notice. Older versions of
        llama.cpp send an error in a field ``error``; it is returned as newer versions send it.

        Raises:
            ModelError: a line has an unknown field.
        """
        data = []
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif field == b"error":
                return b'{"error":' + value + b"}"
            elif field not in _FIELDS:
                raise ModelError(Code.MALFORMED)
        return b"\n".join(data)


def parse(data: bytes) -> Any:
    r"""Parse JSON, even if an escape such as ``\ud83d`` is half of a surrogate pair.

    Raises:
        ValueError: the data is not JSON.
    """
    try:
        return from_json(data)
    except ValueError:
        if not _SURROGATE.search(data):
            raise
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
