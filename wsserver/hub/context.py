"""Selects the turns of a conversation that the model gets.

Anthropic's prompt cache matches the longest common beginning of two requests
(https://platform.claude.com/docs/en/build-with-claude/prompt-caching). If each prompt of a long
conversation dropped the oldest turn, no two requests would begin with the same turn. So the first
turn changes rarely, and then by many turns. It depends only on the numbers and sizes of the turns,
and is the same after a restart.
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
from wsserver.models.base import Request
from wsserver.stores.base import Turn
from wsserver.text import tokens_in

IMAGE = 1600  # most tokens of an image; the API scales larger ones down
DOCUMENT = 32  # characters of a PDF's base64 data per token, about

_WHOLE_OR_STOPPED = frozenset({None, "client", "replaced"})


def messages_of(turns: Sequence[Turn], prompt: Message, *, count: int, size: int) -> list[Message]:
    """Make the messages of a request to the model.

    Args:
        turns: the newest turns of the conversation, oldest first.
        prompt: the new message of the user. It is never dropped.
        count: messages at most.
        size: characters at most, without thinking. If not all turns fit, the messages have at
            least a third of it.
    """
    shown = [turn for turn in turns if _shown(turn)]
    # If a retry replaced the first turn, the conversation begins with a later number.
    complete = not turns or turns[0].number <= 1 or _size(turns) <= size * 2 // 3
    messages: list[Message] = []

    def ask(message: Message) -> None:
        # A prompt that was stopped before the first text and sent again is shown once.
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
    """Return the newest turns that fit into a request. The store has the others."""
    kept = list(turns[-count:])
    total = _size(kept)
    while len(kept) > 1 and total > size:
        total -= kept.pop(0).size
    return kept


def less_than(size: int) -> int:
    """Return the characters of the next request, after the model refused ``size``."""
    return size * 3 // 4


def tokens_of(request: Request) -> int:
    """Return an estimate of the tokens of a request, without the thinking in its messages."""
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
    """Return an estimate of the tokens of a block with base64 data."""
    if isinstance(block, Image):
        return IMAGE
    return len(str(block.source.get("data"))) // DOCUMENT


def _first(turns: Sequence[Turn], prompt: int, count: int, size: int, *, complete: bool) -> int:
    """Return the index of the first turn to show; the length if none fits.

    If not all turns fit, the shown turns use between a third of the limits and all of them. Among
    the turns that can then be the first, the one whose number has the most factors of two is
    chosen. It stays the same while many turns are added, and the next choice is many turns later.
    """
    most = _fitting(turns, count - 1, size - prompt)
    if most == 0 and complete:
        return 0
    least = _fitting(turns, (count - 1) // 3, size // 3)
    places = range(most, min(max(most, least) + 1, len(turns)))
    begins = [place for place in places if not _has_results(turns[place].prompt)]
    return max(begins, key=lambda place: _factors(turns[place].number), default=len(turns))


def _has_results(prompt: Message) -> bool:
    """Whether a prompt has tool results. Models accept these only after the tool calls."""
    return any(isinstance(block, ToolResult) for block in prompt.blocks)


def _fitting(turns: Sequence[Turn], count: int, size: int) -> int:
    """Return the index of the first turn of the newest that fit into the limits."""
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
    """Return whether later requests contain the turn.

    A turn that the model refused would make it refuse the next prompts too. A prompt that failed
    before the first text was not answered. A prompt that the user stopped is kept.
    """
    if turn.partial == Code.REFUSAL:
        return False
    return turn.partial in _WHOLE_OR_STOPPED or turn.answered
