"""What protocols have in common whose clients send all messages of a chat with each prompt."""

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from wsserver.wire import ID_PATTERN


@dataclass(frozen=True, slots=True)
class Chat:
    """All messages of a chat, the newest last."""

    conversation: str  # the id of the conversation that the chat is
    messages: list[dict[str, Any]]  # as the protocol has them
    keys: dict[str, Any]  # further keys of the prompt
    regenerate: bool = False  # make the last reply again


def conversation_of(chat: str) -> str:
    """Return the id of the conversation that a chat is: its own id, or one made of it."""
    if re.fullmatch(ID_PATTERN, chat):
        return chat
    digest = hashlib.sha256(chat.encode(errors="surrogatepass")).digest()
    return "chat-" + base64.urlsafe_b64encode(digest).decode().rstrip("=")
