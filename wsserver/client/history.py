"""The server's limits, histories and lists of conversations, parsed from its frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from wsserver.content import Message
from wsserver.wire import optional, parse_message, text_of


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts on one connection. A limit that the server does not tell is None.

    Attributes:
        message_size: bytes of a frame of the client.
        prompt_size: bytes of a prompt and its system prompt, as UTF-8.
        answer_size: bytes of the largest frame of the server.
        frame_rate: frames per second in the long run.
        frame_burst: frames at once.
        bad_frames: unusable frames in a row before the server closes the connection.
        requests: frames that may wait for an answer.
        generations_per_socket: replies that may run or wait.
        queue_size: prompts that may wait in a conversation.
    """

    message_size: int | None = None
    prompt_size: int | None = None
    answer_size: int | None = None
    frame_rate: float | None = None
    frame_burst: int | None = None
    bad_frames: int | None = None
    requests: int | None = None
    generations_per_socket: int | None = None
    queue_size: int | None = None

    @classmethod
    def of(cls, limits: Mapping[str, Any]) -> Self:
        """Convert the ``limits`` of a ``hello``. Unknown limits are ignored.

        Raises:
            TypeError: a limit is not a number.
        """
        known = {key: limits[key] for key in cls.__slots__ if key in limits}
        if not all(isinstance(value, int | float) for value in known.values()):
            raise TypeError("a limit is not a number")
        return cls(**known)


@dataclass(frozen=True, slots=True)
class History:
    """A conversation: its messages, oldest first, and the ids of replies that run or wait."""

    conversation: str
    title: str
    messages: tuple[Message, ...]
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """An entry of the list of conversations. Times are in seconds since 1970."""

    id: str
    title: str
    created: float
    updated: float


def parse_history(
    conversation: str, asked: int, frame: Mapping[str, Any]
) -> tuple[History, int | None]:
    """Return a page of a history, and the ``before`` of the page before it; None at the beginning.

    Args:
        conversation: id of the conversation.
        asked: the ``before`` of the request. That of the answer has to be smaller.
        frame: the ``history`` frame.

    Raises:
        KeyError, TypeError, ValueError: the frame violates the protocol.
    """
    messages = tuple(map(parse_message, frame["messages"]))
    running = tuple(text_of(reply) for reply in frame["running"])
    before = frame.get("before")
    if before is not None and not 0 <= before < asked:
        raise ValueError("the pages of a history do not end")
    return History(conversation, text_of(frame["title"]), messages, running), before


def parse_conversations(frame: Mapping[str, Any]) -> tuple[list[Conversation], str | None]:
    """Return a page of the list, and the ``before`` of the next page; None after the last.

    Raises:
        KeyError, TypeError, ValueError: the frame violates the protocol.
    """
    items = [
        Conversation(
            text_of(i["id"]), text_of(i["title"]), float(i["created"]), float(i["updated"])
        )
        for i in frame["items"]
    ]
    return items, optional(text_of, frame.get("next"))


def parse_nothing(_: Mapping[str, Any]) -> None:
    """Return None for an answer that only confirms the request."""
