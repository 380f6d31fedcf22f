"""What a dialect is."""

from typing import Protocol

from wsserver.live import Generation
from wsserver.pieces import Run
from wsserver.protocol import Terminal


class Dialect(Protocol):
    """Encodes a generation as the messages of one protocol. It has no state of its own.

    A follower writes ``start`` once and first, then runs, then ``terminal`` once and last.
    """

    def start(
        self, generation: Generation, *, after: int, shown: bool, request: str | None
    ) -> bytes:
        """Encode the beginning.

        Args:
            generation: what the client follows from now on.
            after: the seq of the last piece that the client has.
            shown: the client does not know the prompt yet.
            request: the ``request`` of the frame that asked for it.
        """
        ...

    def run(self, generation: Generation, run: Run) -> bytes:
        """Encode consecutive pieces of one kind."""
        ...

    def terminal(self, terminal: Terminal) -> bytes:
        """Encode the end."""
        ...
