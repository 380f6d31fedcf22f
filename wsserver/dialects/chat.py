"""What protocols have in common whose clients send all messages of a chat with each prompt."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from wsserver.errors import Code, Refused
from wsserver.wire import ID_PATTERN


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of a chat, the newest last."""

    conversation: str  # the id of the conversation that the chat is
    messages: list[dict[str, Any]]  # as the protocol has them
    keys: dict[str, Any]  # further keys of the prompt
    replaces: bool = False  # the newest message replaces one that was sent before
    # The id of the reply before the newest message. None if there is none, or no id of ours.
    previous: str | None = None
    whole: bool = True  # the messages begin with the first one


def separate_system(
    messages: Iterable[tuple[object, list[dict[str, Any]]]],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Separate the messages of a chat from its system prompt.

    Args:
        messages: the role and the content blocks of each message. Empty messages are left out.

    Returns:
        The messages of the user and of the assistant, and the key ``system`` of the prompt.

    Raises:
        Refused: the last message is not the user's.
    """
    found: list[dict[str, Any]] = []
    system: list[str] = []
    for role, blocks in messages:
        if role == "system":
            system += [block["text"] for block in blocks if block["type"] == "text"]
        elif blocks:
            found.append({"role": role, "content": blocks})
    if not found or found[-1]["role"] != "user":
        raise Refused(Code.INVALID_FRAME, "messages: the last one must be the user's.")
    return found, {"system": "\n\n".join(system)} if system else {}


def prompt_keys(chat: Chat, turns: Sequence[str]) -> dict[str, Any]:
    """Return the keys of the prompt for the newest message of a chat.

    The server has the history of a chat and needs only the newest message. It needs all messages
    of a chat that it does not know, and of one whose older messages were changed by the client.

    Args:
        chat: the chat.
        turns: the ids of the newest turns of its conversation, oldest first.

    Returns:
        The keys of the prompt that have the messages.
    """
    all_messages = {"messages": chat.messages}
    newest = {
        "prompt": chat.messages[-1]["content"],
        "conversation": chat.conversation,
        "on_busy": "interrupt",
    }
    if not turns:
        return newest if len(chat.messages) == 1 else all_messages
    if chat.previous is not None and chat.previous not in turns:
        return all_messages
    if not chat.replaces:
        return newest
    before = turns.index(chat.previous) + 1 if chat.previous is not None else 0
    if before == len(turns) - 1 or not chat.whole:
        return {**newest, "retry_of": turns[-1]}
    return newest if before == len(turns) else all_messages


def conversation_of(chat: str) -> str:
    """Return the id of the conversation that a chat is: its own id, or one made of it."""
    if re.fullmatch(ID_PATTERN, chat):
        return chat
    digest = hashlib.sha256(chat.encode(errors="surrogatepass")).digest()
    return "chat-" + base64.urlsafe_b64encode(digest).decode().rstrip("=")
