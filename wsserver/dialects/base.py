"""The interface of a dialect."""

from collections.abc import Mapping
from typing import Protocol

from wsserver.hub.live import Generation
from wsserver.pieces import Run
from wsserver.protocol import Error, Terminal


class Dialect(Protocol):
    """Encodes a generation as the messages of one protocol.

    A dialect that remembers something, such as which part is open, serves one client.
    A follower writes ``start`` once and first, then runs, then ``terminal`` once and last.
    """

    def start(
        self, generation: Generation, *, after: int, shown: bool, request: str | None
    ) -> bytes:
        """Encode the beginning.

        Args:
            generation: the generation that the client follows from now on.
            after: the seq of the last piece that the client has.
            shown: whether to include the prompt, because another client sent it.
            request: the ``request`` of the frame that this answers.
        """
        ...

    def run(self, generation: Generation, run: Run) -> bytes:
        """Encode consecutive pieces of one kind."""
        ...

    def terminal(self, terminal: Terminal) -> bytes:
        """Encode the end."""
        ...


class StreamDialect(Dialect, Protocol):
    """Encodes a generation as the body of one HTTP response.

    Attributes:
        comment: keeps the connection alive, and means nothing.
        headers: further headers of the response.
    """

    comment: bytes
    headers: Mapping[str, str]

    def error(self, error: Error) -> bytes:
        """Encode an error that is not the end of the generation."""
        ...
