"""Conversations as the client shows them, read from the server's answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Conversation",
    "History",
    "Message",
    "read_conversations",
    "read_history",
    "read_nothing",
]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation. ``partial``: why a reply is not whole, where it is not."""

    role: str
    content: str
    id: str
    partial: str | None = None


@dataclass(frozen=True, slots=True)
class History:
    """A conversation: its messages, oldest first, and the ids of replies that still run."""

    conversation: str
    title: str
    messages: tuple[Message, ...]
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation in a list. Times are in seconds since 1970."""

    id: str
    title: str
    created: float
    updated: float


def read_history(
    conversation: str, asked: int, frame: Mapping[str, Any]
) -> tuple[History, int | None]:
    """Return a part of a history, and where the part before it ends; None if it is the first.

    Args:
        conversation: which.
        asked: the ``before`` of the request. That of the answer has to be less.
        frame: the answer.
    """
    messages = tuple(
        Message(
            _text(m["role"]),
            _text(m["content"]),
            _text(m["id"]),
            None if m.get("partial") is None else _text(m["partial"]),
        )
        for m in frame["messages"]
    )
    running = tuple(_text(reply) for reply in frame["running"])
    before = frame.get("before")
    if before is not None and not 0 <= before < asked:
        raise ValueError("a history has a beginning")
    return History(conversation, _text(frame["title"]), messages, running), before


def read_conversations(frame: Mapping[str, Any]) -> tuple[list[Conversation], str | None]:
    """Return a page of a list, and what gets the next page; None if it is the last."""
    items = [
        Conversation(_text(i["id"]), _text(i["title"]), float(i["created"]), float(i["updated"]))
        for i in frame["items"]
    ]
    following = frame.get("next")
    return items, None if following is None else _text(following)


def read_nothing(_: Mapping[str, Any]) -> None:
    """Take an answer that says only that the request is done."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is expected")
    return value
