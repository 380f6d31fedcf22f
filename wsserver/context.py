"""What a model gets of a conversation: which turns, beginning where.

Anthropic's prompt cache serves the beginning that a request has in common with an earlier request
(https://platform.claude.com/docs/en/build-with-claude/prompt-caching). If each prompt of a long
conversation dropped the oldest turn, no two requests would begin alike. So the beginning moves
rarely and far. It depends on the numbers and sizes of the turns alone: after a restart it is the
same.
"""

from collections.abc import Sequence

from wsserver.content import (
    Document,
    Image,
    Message,
    RedactedThinking,
    Thinking,
    ToolResult,
    text_of_block,
)
from wsserver.errors import Code
from wsserver.generation import tokens_in
from wsserver.models.base import Request
from wsserver.stores.base import Turn

IMAGE = 1600  # tokens of an image at most, as the API scales larger ones down
DOCUMENT = 32  # characters of a PDF's base64 data for each token, about

_WHOLE_OR_STOPPED = frozenset({None, "client", "replaced"})


def messages_of(turns: Sequence[Turn], prompt: Message, *, count: int, size: int) -> list[Message]:
    """Make the messages of a request to the model.

    Args:
        turns: the newest turns of the conversation, oldest first, numbered from 1 in it.
        prompt: the new message of the user. It is never dropped.
        count: messages at most.
        size: characters at most, without thinking. Where not all turns fit, a third of it is used,
            or more.
    """
    shown = [turn for turn in turns if _shown(turn)]
    # The first turn may have been replaced, so that the second is the first of all.
    complete = not turns or turns[0].number <= 1 or _size(turns) <= size * 2 // 3
    messages: list[Message] = []

    def ask(message: Message) -> None:
        # A prompt that was stopped before the first word and is sent again is shown once.
        last = messages[-1] if messages else None
        if last is None or (last.role, last.blocks) != ("user", message.blocks):
            messages.append(message)

    for turn in shown[_first(shown, prompt.size, count, size, complete=complete) :]:
        ask(turn.prompt)
        if turn.answered:  # models refuse an empty message
            messages.append(turn.reply)
    ask(prompt)
    return messages


def newest(turns: Sequence[Turn], count: int, size: int) -> list[Turn]:
    """Return the newest turns that a request may have. The store has the others."""
    kept = list(turns[-count:])
    total = _size(kept)
    while len(kept) > 1 and total > size:
        total -= kept.pop(0).size
    return kept


def less_than(size: int) -> int:
    """Return how many characters to send after the model refused so many."""
    return size * 3 // 4


def tokens_of(request: Request) -> int:
    """Return about how many tokens a request has, without the thinking of its messages."""
    texts = [request.system or ""]
    data = 0
    for message in request.messages:
        for block in message.blocks:
            if isinstance(block, Image | Document) and block.source.get("type") == "base64":
                data += _tokens_of_data(block)
            elif not isinstance(block, Thinking | RedactedThinking):
                texts.append(text_of_block(block))
    return data + tokens_in("".join(texts))


def _tokens_of_data(block: Image | Document) -> int:
    """Return about how many tokens the base64 data of a block is for the model."""
    if isinstance(block, Image):
        return IMAGE
    return len(str(block.source.get("data"))) // DOCUMENT


def _first(turns: Sequence[Turn], prompt: int, count: int, size: int, *, complete: bool) -> int:
    """Return the place of the first turn to show; the end where none fits.

    Where not all turns fit, those shown take between a third of the room and all of it. Of the
    turns that can then be the first, it is the one whose number has the most factors of two. That
    one stays the same while many turns are added, and the next one is far from it.
    """
    most = _fitting(turns, count - 1, size - prompt)
    if most == 0 and complete:
        return 0
    least = _fitting(turns, (count - 1) // 3, size // 3)
    places = range(most, min(max(most, least) + 1, len(turns)))
    begins = [place for place in places if not _has_results(turns[place].prompt)]
    return max(begins, key=lambda place: _factors(turns[place].number), default=len(turns))


def _has_results(prompt: Message) -> bool:
    """Whether a prompt has results of tools, which models take only after the tools' calls."""
    return any(isinstance(block, ToolResult) for block in prompt.blocks)


def _fitting(turns: Sequence[Turn], count: int, size: int) -> int:
    """Return the place from which on the turns fit a number of messages and characters."""
    place = len(turns)
    while place:
        turn = turns[place - 1]
        count -= 2 if turn.answered else 1
        size -= turn.size
        if count < 0 or size < 0:
            break
        place -= 1
    return place


def _size(turns: Sequence[Turn]) -> int:
    """Return the characters of turns."""
    return sum(turn.size for turn in turns)


def _factors(number: int) -> int:
    """Return the largest power of two that divides a number of a turn."""
    return number & -number


def _shown(turn: Turn) -> bool:
    """Return whether later requests have the turn.

    After a refused turn the model would refuse the next turns too. A prompt that failed before the
    first word did not reach the model; a prompt that the user stopped belongs to the conversation.
    """
    if turn.partial == Code.REFUSAL:
        return False
    return turn.partial in _WHOLE_OR_STOPPED or turn.answered
