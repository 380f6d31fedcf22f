"""Histories and lists of conversations, parsed from the server's answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from wsserver.content import Message
from wsserver.wire import parse_message

T = TypeVar("T")


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
        KeyError, TypeError, ValueError: the frame breaks the protocol.
    """
    messages = tuple(map(parse_message, frame["messages"]))
    running = tuple(_text(reply) for reply in frame["running"])
    before = frame.get("before")
    if before is not None and not 0 <= before < asked:
        raise ValueError("the pages of a history do not end")
    return History(conversation, _text(frame["title"]), messages, running), before


def parse_conversations(frame: Mapping[str, Any]) -> tuple[list[Conversation], str | None]:
    """Return a page of the list, and the ``before`` of the next page; None after the last.

    Raises:
        KeyError, TypeError, ValueError: the frame breaks the protocol.
    """
    items = [
        Conversation(_text(i["id"]), _text(i["title"]), float(i["created"]), float(i["updated"]))
        for i in frame["items"]
    ]
    return items, _optional(_text, frame.get("next"))


def parse_nothing(_: Mapping[str, Any]) -> None:
    """Return None for an answer that only confirms the request."""


def _optional(parse: Callable[[Any], T], value: object) -> T | None:
    return None if value is None else parse(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a value is not a string")
    return value
