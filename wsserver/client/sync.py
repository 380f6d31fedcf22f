"""The client for programs without an event loop.

::

    with connect("ws://localhost:3001") as chat:
        for text in chat.prompt("Tell me a story"):
            print(text, end="")

The chat runs in its own thread. Ctrl-C leaves the ``for`` loop and then the ``with`` block, which
stops the running replies.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

from wsserver.client.chat import Chat
from wsserver.client.connection import State
from wsserver.client.credentials import Token
from wsserver.client.history import Conversation, History, Limits
from wsserver.client.reply import Done, Reply
from wsserver.client.subscriptions import Subscription
from wsserver.content import Block, Message, Role, Usage

T = TypeVar("T")

SETTLE_TIMEOUT = 5.0  # seconds for cancelled tasks to end


class _Loop:
    """An event loop in a thread, from :meth:`start` to :meth:`close`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread
        self._lock = threading.Lock()  # held while the loop starts, ends, or accepts a coroutine

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: the thread runs already.
        """
        if self._loop is not None:
            raise RuntimeError("a chat can be entered only once")
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, daemon=True)
        self._thread.start()
        self._loop = loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread and return its result. Ctrl-C cancels the coroutine.

        Without the thread, run a coroutine that does not have to wait.
        """
        with self._lock:
            if self._loop is None:
                return _without_waiting(coroutine)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Wait for the cancelled tasks, and end the thread."""
        with self._lock:
            loop, self._loop = self._loop, None
        assert loop is not None
        asyncio.run_coroutine_threadsafe(_settle(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()


class SyncReply:
    """A :class:`~wsserver.client.Reply` with blocking calls, readable after the ``with`` block."""

    def __init__(self, reply: Reply, loop: _Loop) -> None:
        self._reply = reply
        self._loop = loop

    @property
    def id(self) -> str:
        """The id of the reply."""
        return self._reply.id

    @property
    def conversation(self) -> str | None:
        """The id of the conversation; None for a prompt with ``messages``."""
        return self._reply.conversation

    @property
    def text(self) -> str:
        """The text so far."""
        return self._loop.run(_call(lambda: self._reply.text))

    @property
    def usage(self) -> Usage | None:
        """Tokens of the reply; None before the end."""
        return self._reply.usage

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The content blocks so far; see :attr:`wsserver.client.Reply.blocks`."""
        return self._loop.run(_call(lambda: self._reply.blocks))

    @property
    def thinking(self) -> Iterator[str]:
        """Iterate over the model's thinking."""
        return self._iterate(self._reply.thinking)

    def __iter__(self) -> Iterator[str]:
        return self._iterate(aiter(self._reply))

    def stop(self) -> None:
        """Stop the reply, without waiting for its end."""
        self._loop.run(self._reply.stop())

    def done(self) -> Done:
        """Wait for the end of the reply; see :meth:`wsserver.client.Reply.done`."""
        return self._loop.run(self._reply.done())

    def _iterate(self, pieces: AsyncIterator[str]) -> Iterator[str]:
        while (piece := self._loop.run(_next(pieces))) is not None:
            yield piece


class SyncSubscription:
    """A :class:`~wsserver.client.Subscription` with blocking calls."""

    def __init__(self, subscription: Subscription, loop: _Loop) -> None:
        self._subscription = subscription
        self._loop = loop

    @property
    def history(self) -> History:
        """The history, as of the last time that the conversation was opened."""
        return self._subscription.history

    @property
    def title(self) -> str:
        """The current title."""
        return self._subscription.title

    @property
    def deleted(self) -> bool:
        """Whether the conversation was deleted."""
        return self._subscription.deleted

    def __iter__(self) -> Iterator[SyncReply]:
        while (reply := self._loop.run(_next(self._subscription))) is not None:
            yield SyncReply(reply, self._loop)

    def close(self) -> None:
        """Close the conversation; see :meth:`wsserver.client.Subscription.close`."""
        self._loop.run(self._subscription.close())


class _Settings(TypedDict, total=False):
    """The keywords of ``Chat``."""

    token: Token | None
    conversation: str | None
    patience: float
    open_timeout: float
    ping_timeout: float
    close_timeout: float
    on_state: Callable[[State], None] | None


class _Keys(TypedDict, total=False):
    """The keywords of ``Chat.prompt``."""

    messages: Sequence[Message | tuple[Role, str]] | None
    conversation: str | None
    on_busy: Literal["reject", "queue", "interrupt"]
    retry_of: str | None
    model: str | None
    system: str | None
    max_tokens: int | None
    temperature: float | None


class SyncChat:
    """A :class:`~wsserver.client.Chat` with blocking calls.

    It connects when its ``with`` block is entered.

    Args:
        url: the server's address, ``ws://`` or ``wss://``.
        settings: the arguments of :class:`wsserver.client.Chat`. The functions among them
            (``token``, ``on_state``) are called in the chat's thread.
    """

    def __init__(self, url: str, **settings: Unpack[_Settings]) -> None:
        self._loop = _Loop()
        self._chat = Chat(url, **settings)

    def __enter__(self) -> Self:
        self._loop.start()
        try:
            self._loop.run(self._chat.__aenter__())
        except BaseException:
            self._loop.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._loop.run(self._chat.close())
        finally:
            self._loop.close()

    @property
    def state(self) -> State:
        """The state of the connection."""
        return self._chat.state

    @property
    def conversation(self) -> str:
        """The id of the conversation for prompts that name none."""
        return self._chat.conversation

    @property
    def principal(self) -> str | None:
        """The principal of the client; None if the server has not sent it."""
        return self._chat.principal

    @property
    def limits(self) -> Limits | None:
        """The server's limits; None if the server has not sent them."""
        return self._chat.limits

    @property
    def models(self) -> tuple[str, ...]:
        """The models that a prompt can choose, the default first; empty if not yet known."""
        return self._chat.models

    def prompt(self, text: str | Sequence[Block] | None = None, **keys: Unpack[_Keys]) -> SyncReply:
        """Send a prompt; see :meth:`wsserver.client.Chat.prompt`."""
        return self._reply(lambda: self._chat.prompt(text, **keys))

    def resume(self, reply_id: str, after: int = 0) -> SyncReply:
        """Follow a reply; see :meth:`wsserver.client.Chat.resume`."""
        return self._reply(lambda: self._chat.resume(reply_id, after))

    def open(self, conversation: str | None = None) -> SyncSubscription:
        """Open a conversation; see :meth:`wsserver.client.Chat.open`."""
        return SyncSubscription(self._loop.run(self._chat.open(conversation)), self._loop)

    def history(self, conversation: str | None = None) -> History:
        """Return the history of a conversation; see :meth:`wsserver.client.Chat.history`."""
        return self._loop.run(self._chat.history(conversation))

    def conversations(self, limit: int = 20) -> list[Conversation]:
        """Return the client's conversations; see :meth:`wsserver.client.Chat.conversations`."""
        return self._loop.run(self._chat.conversations(limit))

    def rename(self, conversation: str, title: str) -> None:
        """Change the title of a conversation; see :meth:`wsserver.client.Chat.rename`."""
        self._loop.run(self._chat.rename(conversation, title))

    def delete(self, conversation: str) -> None:
        """Delete a conversation; see :meth:`wsserver.client.Chat.delete`."""
        self._loop.run(self._chat.delete(conversation))

    def _reply(self, ask: Callable[[], Reply]) -> SyncReply:
        return SyncReply(self._loop.run(_call(ask)), self._loop)


connect = SyncChat


def _without_waiting(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that does not have to wait.

    Raises:
        RuntimeError: the coroutine has to wait.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    coroutine.close()
    raise RuntimeError("use the chat inside its `with`")


async def _settle() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=SETTLE_TIMEOUT)


async def _call(function: Callable[[], T]) -> T:
    return function()


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)
