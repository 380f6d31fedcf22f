"""A chat with a server: any number of replies at once, over one connection."""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Literal, Self

from wsserver.client.connection import Connection, State
from wsserver.client.credentials import Token
from wsserver.client.dial import Timeouts
from wsserver.client.failures import ChatError, ConnectionFailed
from wsserver.client.history import (
    Conversation,
    History,
    Limits,
    parse_conversations,
    parse_nothing,
)
from wsserver.client.queries import Queries
from wsserver.client.replies import Replies
from wsserver.client.reply import Reply
from wsserver.client.subscriptions import Subscription, Subscriptions
from wsserver.content import Block, Message, Role
from wsserver.protocol import Delete, List, Prompt, Rename, Resume

PAGE_SIZE = 100  # conversations per request


def new_id() -> str:
    """Return a random id for a conversation or a reply: 128 bits."""
    return secrets.token_urlsafe(16)


class Chat:
    """A chat with a server. It connects when its ``async with`` block is entered.

    Entering the block raises :class:`ConnectionFailed` if there is no connection in time. Leaving
    the block stops the replies to prompts of this chat. Without a connection at that moment, the
    server stops them after its grace time. Replies that the chat only follows, by :meth:`resume`,
    run on.

    Args:
        url: the server's address, ``ws://`` or ``wss://``.
        token: bearer token, or an async function that returns a fresh one. The function is called
            for each connection, and before a token expires.
        conversation: id of the conversation for prompts that name none. Default: a new one.
        patience: seconds to reconnect after a lost connection, to repeat a prompt that the server
            refuses for now, and to wait for an answer. After that time the pending requests fail,
            and the next request connects again.
        open_timeout: seconds for the first connection, all attempts together. The default is longer
            than a restart of the server.
        ping_timeout: seconds without data before the client sends a ping, and seconds to wait for
            the answer. While a reply or an answer is pending, at most 4.
        close_timeout: seconds to stop replies and to close the connection at the end.
        on_state: called with each new state. It must neither raise nor block.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token | None = None,
        conversation: str | None = None,
        patience: float = 120.0,
        open_timeout: float = 30.0,
        ping_timeout: float = 20.0,
        close_timeout: float = 5.0,
        on_state: Callable[[State], None] | None = None,
    ) -> None:
        self.conversation = conversation or new_id()
        self._timeouts = Timeouts(open_timeout, ping_timeout, close_timeout, patience)
        self._entered = False
        self._connection = Connection(url, token or None, self._timeouts, on_state)
        self._replies = Replies(self._connection, patience)
        self._queries = Queries(self._connection, patience)
        self._subscriptions = Subscriptions(self._connection, self._replies, self._queries)
        # Subscriptions come first: they create the reply that the other requesters then know.
        self._connection.requesters = (self._subscriptions, self._replies, self._queries)

    @property
    def state(self) -> State:
        """The state of the connection."""
        return self._connection.state

    @property
    def principal(self) -> str | None:
        """The principal of the client; None if the server has not sent it."""
        return self._connection.principal

    @property
    def limits(self) -> Limits | None:
        """The server's limits; None if the server has not sent them."""
        return self._connection.limits

    @property
    def models(self) -> tuple[str, ...]:
        """The models that a prompt can choose, the default first; empty if not yet known."""
        return self._connection.models

    @property
    def failure(self) -> ConnectionFailed | None:
        """The reason why there is no connection; None while there is one."""
        return self._connection.failure

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a chat can be entered only once")
        self._entered = True
        try:
            await self._connection.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the replies to this chat's prompts, and close the connection. Idempotent."""
        if not self._entered or self._connection.closing:
            return
        self._connection.closing = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeouts.closing
        try:
            own = self._replies.own
            for reply in own:
                self._replies.stop(reply)
            if own and self._connection.link is not None:
                ends = [asyncio.ensure_future(_wait_for_end(reply)) for reply in own]
                await asyncio.wait(ends, timeout=deadline - loop.time())
                for end in ends:
                    end.cancel()
        finally:
            await self._connection.close(deadline)

    def prompt(
        self,
        text: str | Sequence[Block] | None = None,
        *,
        messages: Sequence[Message | tuple[Role, str]] | None = None,
        conversation: str | None = None,
        on_busy: Literal["reject", "queue", "interrupt"] = "reject",
        retry_of: str | None = None,
        model: str | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Reply:
        """Send a prompt, now or as soon as there is a connection.

        If the connection is lost before the server has accepted the prompt, the client sends the
        prompt again under the same id. The server runs a prompt of one id once.

        Args:
            text: the next user message of a conversation: text, or content blocks such as
                ``wsserver.content.Image``.
            messages: a history that the program keeps itself, instead of ``text``. A tuple of role
                and text stands for a message.
            conversation: id of the conversation. An unknown one is created. Default: the chat's.
            on_busy: what the server does if the conversation is generating: refuse the prompt with
                ``busy``, let it wait, or stop the running reply.
            retry_of: id of the conversation's last reply. The new turn replaces the old one, which
                the model no longer gets. ``text`` may differ. A server without support for
                ``retry_of`` keeps both turns.
            model: a model that the server allows.
            system: the system prompt.
            max_tokens: maximum length of the reply, in tokens.
            temperature: from 0 to 2.

        Raises:
            ValueError: an argument is not valid in the protocol.
            ConnectionFailed: the chat is closed.
        """
        self._connection.check()
        turns = None
        if messages is None:
            conversation = conversation or self.conversation
        else:
            turns = [m if isinstance(m, Message) else Message(*m) for m in messages]
        reply_id = new_id()
        frame = Prompt(
            prompt=text if text is None or isinstance(text, str) else tuple(text),
            messages=turns,
            id=reply_id,
            conversation=conversation,
            on_busy=on_busy,
            retry_of=retry_of,
            model=model,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        return self._replies.start(Reply(reply_id, conversation, 0, self._replies.stop), frame)

    def resume(self, reply_id: str, after: int = 0) -> Reply:
        """Follow a reply that this or another program started, while the server still has it.

        Args:
            reply_id: the :attr:`Reply.id`.
            after: the :attr:`Reply.seq` of the last known piece. The text begins after that piece.
                If the server died and has fewer pieces, the reply ends as ``interrupted``.

        Raises:
            ValueError: the id is not valid in the protocol.
            ConnectionFailed: the chat is closed.
        """
        self._connection.check()
        if (known := self._replies.get(reply_id)) is not None:
            return known
        Resume(id=reply_id, after=after)  # validates both
        return self._replies.start(Reply(reply_id, None, after, self._replies.stop), None)

    async def history(self, conversation: str | None = None) -> History:
        """Return the whole history of a conversation. Default: the chat's own.

        Raises:
            ServerError: there is no such conversation, or the server cannot read it now.
            ConnectionFailed: there is no connection.
        """
        self._connection.check()
        return await self._queries.history(conversation or self.conversation)

    async def open(self, conversation: str | None = None) -> Subscription:
        """Open a conversation, to follow the replies to prompts of other clients.

        Args:
            conversation: the id. Default: the chat's own.

        Raises:
            ServerError: there is no such conversation, or the server cannot read it now.
            ConnectionFailed: there is no connection.
        """
        self._connection.check()
        return await self._subscriptions.open(conversation or self.conversation)

    async def conversations(self, limit: int = 20) -> list[Conversation]:
        """Return at most ``limit`` conversations of the client, the one used last first.

        Raises:
            ServerError: the server cannot read them now.
            ConnectionFailed: there is no connection.
        """
        self._connection.check()
        conversations: list[Conversation] = []
        before: str | None = None
        while len(conversations) < limit:
            frame = List(limit=min(PAGE_SIZE, limit - len(conversations)), before=before)
            page, before = await self._queries.ask(frame, parse_conversations)
            conversations += page
            if before is None or not page:
                break
        return conversations

    async def rename(self, conversation: str, title: str) -> None:
        """Change the title of a conversation.

        Raises:
            ServerError: there is no such conversation, or the server cannot save it now.
            ConnectionFailed: there is no connection.
        """
        self._connection.check()
        await self._queries.ask(Rename(conversation=conversation, title=title), parse_nothing)

    async def delete(self, conversation: str) -> None:
        """Stop the replies that run in a conversation, and delete it.

        Raises:
            ServerError: there is no such conversation, or the server cannot delete it now.
            ConnectionFailed: there is no connection.
        """
        self._connection.check()
        await self._queries.ask(Delete(conversation=conversation), parse_nothing)


connect = Chat


async def _wait_for_end(reply: Reply) -> None:
    with contextlib.suppress(ChatError):
        await reply.done()
