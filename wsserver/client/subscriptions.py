"""Open conversations: the server sends the running and later replies to all clients' prompts."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Self

from wsserver.client.connection import Connection
from wsserver.client.failures import ChatError, ConnectionFailed, ServerError
from wsserver.client.history import History, parse_nothing
from wsserver.client.link import Link
from wsserver.client.queries import Queries
from wsserver.client.replies import Replies
from wsserver.client.reply import Reply
from wsserver.errors import Code
from wsserver.protocol import CloseConversation


class Subscription:
    """An open conversation. Iterate over it to get the replies to prompts of other clients.

    ::

        subscription = await chat.open(conversation)
        async for reply in subscription:
            print(reply.prompt, (await reply.done()).text)

    The iteration begins with the running replies. It does not include replies to prompts of this
    chat. It ends when the subscription is closed or the conversation is deleted, and raises
    :class:`ConnectionFailed` when the chat is closed. After a lost connection the chat opens the
    conversation again; :attr:`history` then has the replies that ended in between.

    Attributes:
        conversation: the id of the conversation.
        history: the history, as of the last time that the conversation was opened.
        title: the current title.
        deleted: whether the conversation was deleted.
    """

    def __init__(
        self, history: History, close: Callable[["Subscription"], Awaitable[None]]
    ) -> None:
        self.conversation = history.conversation
        self.history = history
        self.title = history.title
        self.deleted = False
        self._close = close
        self._replies: asyncio.Queue[Reply | None] = asyncio.Queue()
        self._failure: ChatError | None = None
        self._ended = False

    def __aiter__(self) -> AsyncIterator[Reply]:
        return self

    async def __anext__(self) -> Reply:
        if not (self._ended and self._replies.empty()):
            reply = await self._replies.get()
            if reply is not None:
                return reply
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ConnectionFailed):
            await self.close()

    async def close(self) -> None:
        """Close the conversation. Its running replies continue. Idempotent.

        Raises:
            ServerError: the server cannot close it now.
            ConnectionFailed: there is no connection.
        """
        if not self._ended:
            self.finish()
            await self._close(self)

    # Called by the chat.

    def reopened(self, history: History) -> None:
        """Replace the history after a reconnect."""
        self.history = history
        self.title = history.title

    def add(self, reply: Reply) -> None:
        """Add a reply to the iteration."""
        self._replies.put_nowait(reply)

    def finish(self, failure: ChatError | None = None) -> None:
        """End the iteration."""
        if not self._ended:
            self._ended, self._failure = True, failure
            self._replies.put_nowait(None)


class Subscriptions:
    """The open conversations of a chat."""

    def __init__(self, connection: Connection, replies: Replies, queries: Queries) -> None:
        self._connection = connection
        self._replies = replies
        self._queries = queries
        self._open: dict[str, Subscription] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def open(self, conversation: str) -> Subscription:
        """Open a conversation, or return its subscription if it is open.

        Raises:
            ServerError: there is no such conversation, or the server cannot read it now.
            ConnectionFailed: there is no connection.
        """
        opened: list[Subscription] = []

        def on_open(newest: History) -> None:
            # The server sends running replies right after this answer.
            new = Subscription(newest, self._close)
            opened.append(self._open.setdefault(conversation, new))

        if (known := self._open.get(conversation)) is not None:
            return known
        history = await self._queries.history(conversation, on_open)
        opened[0].reopened(history)
        return opened[0]

    async def _close(self, subscription: Subscription) -> None:
        name = subscription.conversation
        if self._open.get(name) is not subscription:
            return
        del self._open[name]
        link = self._connection.link
        if link is None or link.limits is None:  # the next connection, or an older server
            return
        # After `close` the server sends only the replies that this connection asked for.
        self._replies.follow_again(name)
        await self._queries.ask(CloseConversation(conversation=name), parse_nothing)

    # The connection's `Requester`.

    def pending(self) -> bool:
        """Return whether a conversation is open, so that the client has to stay connected."""
        return bool(self._open)

    def send_all(self, _: Link) -> None:
        """Open all conversations again."""
        for conversation in self._open:
            if conversation not in self._tasks:
                task = asyncio.get_running_loop().create_task(self._open_again(conversation))
                self._tasks[conversation] = task
                task.add_done_callback(functools.partial(self._forget_task, conversation))

    def _forget_task(self, conversation: str, _: "asyncio.Task[None]") -> None:
        self._tasks.pop(conversation, None)

    async def _open_again(self, conversation: str) -> None:
        try:
            history = await self._queries.history(conversation, _ignore)
        except ConnectionFailed:
            return  # the next connection opens it again
        except ServerError as error:
            if (subscription := self._open.pop(conversation, None)) is not None:
                subscription.deleted = error.code == Code.NOT_FOUND
                subscription.finish(None if subscription.deleted else error)
            return
        if (subscription := self._open.get(conversation)) is not None:
            subscription.reopened(history)

    def receive(self, frame: Mapping[str, Any]) -> None:
        """Receive the start of another client's reply, a new title, or a deletion."""
        subscription = self._open.get(frame.get("conversation", ""))
        if subscription is None:
            return
        kind = frame.get("type")
        if kind == "renamed":
            subscription.title = frame["title"]
        elif kind == "deleted":
            del self._open[subscription.conversation]
            subscription.deleted = True
            subscription.finish()
        elif kind == "start" and "prompt" in frame and self._replies.get(frame["id"]) is None:
            subscription.add(self._replies.adopt(frame["id"], subscription.conversation))

    def fail_all(self, failure: ConnectionFailed) -> None:
        """End all subscriptions if the chat is closed for good."""
        if failure.final or self._connection.closing:
            for subscription in self._open.values():
                subscription.finish(failure)
            self._open.clear()
            for task in self._tasks.values():
                task.cancel()


def _ignore(_: History) -> None:
    """Ignore the newest page: the conversation already has a subscription."""
