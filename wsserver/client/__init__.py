"""The client. It sends prompts and receives replies, and reconnects when the connection is lost.

::

    async with connect("ws://localhost:3001") as chat:
        async for text in chat.prompt("Tell me a story"):
            print(text, end="")

:func:`connect_sync` is the blocking variant for programs without an event loop.
"""

from wsserver.client.chat import Chat, connect, new_id
from wsserver.client.connection import State
from wsserver.client.credentials import Token
from wsserver.client.failures import ChatError, ConnectionFailed, ReplyError, ServerError
from wsserver.client.history import Conversation, History, Limits
from wsserver.client.reply import Done, Reply
from wsserver.client.subscriptions import Subscription
from wsserver.client.sync import connect as connect_sync
from wsserver.content import Message, Usage

__all__ = [
    "Chat",
    "ChatError",
    "ConnectionFailed",
    "Conversation",
    "Done",
    "History",
    "Limits",
    "Message",
    "Reply",
    "ReplyError",
    "ServerError",
    "State",
    "Subscription",
    "Token",
    "Usage",
    "connect",
    "connect_sync",
    "new_id",
]
