"""Answers made of what the store has: as much as one frame can hold, and where to go on."""

from collections.abc import Sequence
from dataclasses import replace
from json.encoder import encode_basestring

from wsserver.protocol import ConversationItem, Conversations, History, HistoryMessage
from wsserver.settings import ANSWER_ROOM, ESCAPED, Settings
from wsserver.stores.base import StoredConversation, Summary, Turn

__all__ = ["conversations", "history", "room_of"]

FRAME_ROOM = ANSWER_ROOM // 2  # bytes of a frame besides its items
ITEM_ROOM = 512  # bytes of a turn or a conversation besides its text


def room_of(settings: Settings) -> int:
    """Return how many bytes of items an answer can hold."""
    return settings.answer_size - FRAME_ROOM


def history(stored: StoredConversation, live: list[str], room: int, request: str | None) -> History:
    """Make a ``history`` of the newest turns that there is room for.

    Args:
        stored: the conversation, with at least as many turns as there is room for.
        live: the ids of the generations that run or wait.
        room: bytes. A turn that is too long alone is cut.
        request: the ``request`` of the frame that is answered.
    """
    turns: list[Turn] = []
    for turn in reversed(stored.turns):
        size = ITEM_ROOM + _size(turn.prompt) + _size(turn.text)
        if size > room and turns:
            break
        turns.insert(0, turn if size <= room else _beginning(turn, room - ITEM_ROOM))
        room -= size
    older = stored.older or len(turns) < len(stored.turns)
    return History(
        conversation=stored.id,
        title=stored.title,
        messages=[message for turn in turns for message in _messages(turn)],
        running=live,
        before=turns[0].number if turns and older else None,
        request=request,
    )


def conversations(
    found: Sequence[Summary], limit: int, room: int, request: str | None
) -> Conversations:
    """Make a page of a list of conversations, as long as there is room.

    Args:
        found: the conversations, one more than the limit if there are more.
        limit: how many at most.
        room: bytes. The first one is there in any case.
        request: the ``request`` of the frame that is answered.
    """
    items: list[ConversationItem] = []
    for summary in found[:limit]:
        room -= ITEM_ROOM + _size(summary.title)
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


def _beginning(turn: Turn, room: int) -> Turn:
    """Cut a turn to what fits into so many bytes of JSON, its prompt to half of that at most."""
    prompt = turn.prompt
    if _size(prompt) > room // 2:
        prompt = prompt[: room // 2 // ESCAPED]
    text = turn.text[: max(0, room - _size(prompt)) // ESCAPED]
    return replace(turn, prompt=prompt, text=text, partial=turn.partial or "cut")


def _messages(turn: Turn) -> list[HistoryMessage]:
    messages = [HistoryMessage(role="user", content=turn.prompt, id=turn.id)]
    if turn.text or turn.partial:
        reply = HistoryMessage(
            role="assistant", content=turn.text, id=turn.id, partial=turn.partial
        )
        messages.append(reply)
    return messages


def _size(text: str) -> int:
    return len(encode_basestring(text).encode())
