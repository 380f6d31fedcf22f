"""The log of a reply, and the states of a generation. Plain data: no I/O, no tasks, no clock.

A log is append-only. It has one writer and any number of followers: sockets, second tabs, the
store. Each follower has a cursor of its own and is woken when there is more to read. A follower
that is not ready does not read; later it reads everything after its cursor as few runs. So the
log gives back-pressure, merging, resume and several readers at once.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, Literal, Protocol, TypeVar

from wsserver.content import Usage
from wsserver.pieces import TEXT, Kind, Pieces

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class End:
    """The model's own end of a reply: the stop reason, and the usage if the model knows it."""

    reason: str = "end_turn"
    usage: Usage | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str) or not isinstance(  # type: ignore[redundant-expr]
            self.usage, Usage | None
        ):
            raise TypeError("an End has a text, and a Usage or None")


class State(Enum):
    """The state of a generation. A generation never returns to a state."""

    QUEUED = auto()  # another generation of the conversation has not ended
    RUNNING = auto()  # the model answers
    STOPPING = auto()  # the reply must end early; the request to the model is being closed
    SAVING = auto()  # the store saves the end of the reply
    ENDED = auto()  # the log has its terminal


Event = Literal["start", "stop", "save", "end", "restore"]
"""What changes the state of a generation. ``restore``: it was read from the store."""

# The one table of states: event -> states in which the event is legal -> the state after it.
TRANSITIONS: dict[Event, dict[State, State]] = {
    "start": {State.QUEUED: State.RUNNING},
    "stop": {State.QUEUED: State.STOPPING, State.RUNNING: State.STOPPING},
    "save": {State.RUNNING: State.SAVING, State.STOPPING: State.SAVING},
    "end": {State.SAVING: State.ENDED},
    "restore": {State.QUEUED: State.ENDED},
}


class IllegalTransition(RuntimeError):
    """The event is illegal in the state. Nothing has changed."""


def state_after(state: State, event: Event) -> State:
    """Return the state that an event leads to.

    Raises:
        IllegalTransition: the event is illegal in this state.
    """
    found = TRANSITIONS[event].get(state)
    if found is None:
        raise IllegalTransition(f"{event} while {state.name.lower()}")
    return found


class Follower(Protocol):
    """Reads a log through a cursor of its own."""

    def wake(self) -> None:
        """Read on: there is a new piece, or the terminal. Must neither raise nor wait."""
        ...


class Log(Generic[T]):
    """All pieces of a generation in order, then one terminal of type ``T``.

    ``seq`` is the number of a piece, from 1; a cursor is the seq of the last piece read, 0 at
    the start. Appending takes constant time, and reading time in proportion to what is read.
    """

    __slots__ = ("followers", "pieces", "terminal")

    def __init__(self, pieces: Pieces | None = None) -> None:
        self.pieces = Pieces() if pieces is None else pieces
        self.terminal: T | None = None
        self.followers: list[Follower] = []

    @property
    def seq(self) -> int:
        """The number of the last piece; 0 if there is none."""
        return len(self.pieces.data)

    @property
    def text(self) -> str:
        """All text so far, without the thinking."""
        return self.pieces.text

    def append(self, data: str, kind: Kind = TEXT, block: int = 0) -> None:
        """Add a piece and wake the followers. A piece without data adds nothing.

        Args:
            data: the text, or the data of another kind; see :data:`~wsserver.pieces.Kind`.
            kind: what the data is.
            block: the index of the piece's block.

        Raises:
            RuntimeError: the log has its terminal.
        """
        if self.terminal is not None:
            raise RuntimeError("append to a log that has its terminal")
        if data:
            pieces = self.pieces
            if kind != pieces.kind or block != pieces.block:
                pieces.begin(kind, block)
            pieces.data.append(data)
            for follower in tuple(self.followers):  # a copy: a woken follower may remove itself
                follower.wake()

    def extend(self, pieces: Pieces) -> None:
        """Add pieces that another log has, and wake the followers once.

        Raises:
            RuntimeError: the log has its terminal.
        """
        if self.terminal is not None:
            raise RuntimeError("extend a log that has its terminal")
        for kind, block, data in pieces.runs():
            self.pieces.extend(kind, block, data)
        for follower in tuple(self.followers):
            follower.wake()

    def end(self, terminal: T) -> None:
        """Add the terminal and wake each follower for the last time, even if another one fails.

        Raises:
            RuntimeError: the log has its terminal.
            Exception: the first failure of a follower, once all followers have been woken.
        """
        if self.terminal is not None:
            raise RuntimeError("a second terminal")
        self.terminal = terminal
        failures = []
        for follower in tuple(self.followers):
            try:
                follower.wake()
            except Exception as error:  # noqa: BLE001
                failures.append(error)
        if failures:
            raise failures[0]
