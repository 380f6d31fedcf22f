"""Builds frames with histories and lists: the items that fit, and the start of the next page."""

from collections.abc import Sequence
from dataclasses import replace
from json.encoder import encode_basestring

from pydantic import TypeAdapter

from wsserver.content import Message, parse_content
from wsserver.protocol import ConversationItem, Conversations, History
from wsserver.settings import ANSWER_ROOM, ESCAPED, Settings
from wsserver.stores.base import StoredConversation, Summary, Turn
from wsserver.wire import HistoryMessage

_JSON = TypeAdapter(list[HistoryMessage])

FRAME_ROOM = ANSWER_ROOM // 2  # bytes of a frame besides its items
ITEM_ROOM = 512  # bytes of a conversation besides its title


def room_of(settings: Settings) -> int:
    """Return the bytes for items in one answer."""
    return settings.answer_size - FRAME_ROOM


def history(stored: StoredConversation, live: list[str], room: int, request: str | None) -> History:
    """Make a ``history`` frame with the newest turns that fit.

    Args:
        stored: the conversation, with at least as many turns as fit.
        live: the ids of the running and waiting generations.
        room: bytes for the messages. If a single turn is longer, it is cut.
        request: the ``request`` of the client's frame.
    """
    turns: list[Turn] = []
    messages: list[Message] = []
    for turn in reversed(stored.turns):
        shown = _messages(turn)
        if (size := _size(shown)) > room:
            if turns:
                break
            shown = _cut(shown, room)
        turns.insert(0, turn)
        messages = shown + messages
        room -= size
    older = stored.older or len(turns) < len(stored.turns)
    return History(
        conversation=stored.id,
        title=stored.title,
        messages=messages,
        running=live,
        before=turns[0].number if turns and older else None,
        request=request,
    )


def conversations(
    found: Sequence[Summary], limit: int, room: int, request: str | None
) -> Conversations:
    """Make a page of the list of conversations.

    Args:
        found: the conversations; one more than the limit if there are more.
        limit: conversations at most.
        room: bytes for the items. The first item is included even if it is longer.
        request: the ``request`` of the client's frame.
    """
    items: list[ConversationItem] = []
    for summary in found[:limit]:
        room -= ITEM_ROOM + len(encode_basestring(summary.title).encode())
        if room < 0 and items:
            break
        items.append(
            ConversationItem(
                id=summary.id,
                title=summary.title,
                created=summary.created,
                updated=summary.updated,
            )
        )
    more = len(found) > len(items)
    following = str(found[len(items) - 1].place) if more else None
    return Conversations(items=items, next=following, request=request)


def _messages(turn: Turn) -> list[Message]:
    """Return the messages of a turn; without the reply if it is empty and has no ``partial``."""
    return [turn.prompt, turn.reply] if turn.reply.blocks or turn.partial else [turn.prompt]


def _cut(messages: list[Message], room: int) -> list[Message]:
    """Cut a turn. A message over half of ``room`` bytes keeps only a part of its text."""
    found = []
    for message in messages:
        if message.role == "user" and _size([message]) <= room // 2:
            found.append(message)
            continue
        text = message.text
        left = room // 2 - _size([replace(message, blocks=(), partial="cut")])
        if len(encode_basestring(text).encode()) > left:
            text = text[: max(0, left) // ESCAPED]
        cut = message.role == "assistant" and message.partial is None
        partial = "cut" if cut else message.partial
        found.append(replace(message, blocks=parse_content(text), partial=partial))
    return found


def _size(messages: list[Message]) -> int:
    """Return the size of messages in a frame, in bytes."""
    return len(_JSON.dump_json(messages))
