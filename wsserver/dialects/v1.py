"""The frames of ``wsserver.v1``; see ``PROTOCOL.md``."""

from wsserver.content import Message
from wsserver.encoding import encode, encode_run
from wsserver.hub.live import Generation
from wsserver.pieces import Run
from wsserver.protocol import Start, Terminal


class V1:
    """The dialect of :mod:`wsserver.protocol`: one frame each."""

    @staticmethod
    def start(generation: Generation, *, after: int, shown: bool, request: str | None) -> bytes:
        """Encode a ``start`` frame."""
        # An interrupting prompt waits only until a request is closed, and has no `queued`.
        queued = generation.queued if generation.prompt.on_busy == "queue" else None
        message = generation.prompt.new_messages[-1] if shown else None
        return encode(
            Start(
                id=generation.id,
                conversation=generation.conversation_id,
                model=generation.model,
                queued=queued,
                after=after or None,
                prompt=message.text if message else None,
                blocks=_types(message) if message else None,
                retry_of=generation.prompt.retry_of if shown else None,
                request=request,
            )
        )

    @staticmethod
    def run(generation: Generation, run: Run) -> bytes:
        """Encode a ``token`` or ``thinking`` frame."""
        return encode_run(generation.id, run)

    @staticmethod
    def terminal(terminal: Terminal) -> bytes:
        """Encode a ``done`` or ``error`` frame."""
        return encode(terminal)


def _types(message: Message) -> list[str] | None:
    """Return the types of the blocks of a message; None for a single text block."""
    types = [block.type for block in message.blocks]
    return None if types == ["text"] else types
