"""Actions of clients in many tests: prompt, resume, and open conversations."""

from typing import Any

from tests.support.client import Client
from tests.support.puppet import Puppet

__all__ = ["ID", "ONE", "OTHER", "TWO", "exchange", "opened", "resume", "turns"]

ID, OTHER = "chosen-by-the-client", "another-of-the-client"
ONE, TWO = "conversation-one", "conversation-two"


async def exchange(chat: Client, puppet: Puppet, prompt: str, answer: str, **keys: Any) -> str:
    """Prompt, have the model answer, and return the id."""
    number = len(puppet.replies)
    start = await chat.prompt(prompt, **keys)
    assert start["type"] == "start", start
    (await puppet.reply(number)).say(answer).end()
    await chat.text(start["id"])
    return str(start["id"])


async def resume(chat: Client, after: int = 0, id_: str = ID) -> dict[str, Any]:
    """Resume, and return the answer."""
    await chat.send({"type": "resume", "id": id_, "after": after})
    return await chat.next("start", "error")


async def opened(chat: Client, conversation: str = ONE, **keys: Any) -> dict[str, Any]:
    """Open a conversation, and return the answer."""
    await chat.send({"type": "open", "conversation": conversation, **keys})
    return await chat.next("history", "error")


async def turns(chat: Client, conversation: str = ONE) -> list[tuple[str, str, str | None]]:
    """Return role, text and ``partial`` of the messages of a conversation."""
    await chat.send({"type": "open", "conversation": conversation, "before": 2**53 - 1})
    history = await chat.next("history")
    return [(m["role"], m["content"], m.get("partial")) for m in history["messages"]]
