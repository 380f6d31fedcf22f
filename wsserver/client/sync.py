"""The same client for programs without an event loop.

::

    with connect("ws://localhost:3001") as chat:
        for text in chat.prompt("Tell me a story"):
            print(text, end="")

The chat runs in a thread of its own. Ctrl-C leaves the loop and then the ``with``, which stops
what still runs.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from wsserver.client.chat import connect as connect_async
from wsserver.client.history import Conversation, History
from wsserver.client.keeper import State
from wsserver.client.link import Limits
from wsserver.client.reply import Done, Reply, Usage

__all__ = ["SyncChat", "SyncReply", "connect"]

T = TypeVar("T")

LAST_MOMENT = 5.0  # seconds for what was interrupted


def connect(url: str, **settings: Any) -> "SyncChat":
    """Make a chat; it connects as its ``with`` is entered.

    Args:
        url: ``ws://`` or ``wss://``.
        settings: those of :func:`wsserver.client.connect`. What they call, a token's source and
            ``on_state``, is called in the chat's thread.
    """
    return SyncChat(url, settings)


class _Loop:
    """An event loop in a thread, from :meth:`start` to :meth:`close`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread
        self._starting = threading.Lock()  # or ending

    def start(self) -> None:
        """Begin the thread.

        Raises:
            RuntimeError: it runs already.
        """
        if self._loop is not None:
            raise RuntimeError("a chat runs once")
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, daemon=True)
        self._thread.start()
        self._loop = loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it there, and return what it does. What interrupts the wait cancels it.

        Before and after the thread nothing is under way, so that nothing need be waited for.
        """
        with self._starting:
            if self._loop is None:
                return _without_waiting(coroutine)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread, after what was interrupted in it has come to its end."""
        with self._starting:
            loop, self._loop = self._loop, None
        assert loop is not None
        asyncio.run_coroutine_threadsafe(_settle(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()


class SyncReply:
    """A :class:`~wsserver.client.Reply` whose calls wait. It can be read after the ``with`` too."""

    def __init__(self, reply: Reply, loop: _Loop) -> None:
        self._reply = reply
        self._loop = loop

    @property
    def id(self) -> str:
        """Names it."""
        return self._reply.id

    @property
    def conversation(self) -> str | None:
        """Which it belongs to."""
        return self._reply.conversation

    @property
    def text(self) -> str:
        """All text so far."""
        return self._loop.run(_call(lambda: self._reply.text))

    @property
    def usage(self) -> Usage | None:
        """Tokens spent; None before its end."""
        return self._reply.usage

    @property
    def thinking(self) -> Iterator[str]:
        """Iterate over the model's thinking."""
        return self._iterate(self._reply.thinking)

    def __iter__(self) -> Iterator[str]:
        return self._iterate(aiter(self._reply))

    def stop(self) -> None:
        """Stop it; its terminal follows."""
        self._loop.run(self._reply.stop())

    def done(self) -> Done:
        """Wait for its end; raises what :meth:`wsserver.client.Reply.done` does."""
        return self._loop.run(self._reply.done())

    def _iterate(self, pieces: AsyncIterator[str]) -> Iterator[str]:
        while (piece := self._loop.run(_next(pieces))) is not None:
            yield piece


class SyncChat:
    """A :class:`~wsserver.client.Chat` whose calls wait."""

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        self._loop = _Loop()
        self._chat = connect_async(url, **settings)

    def __enter__(self) -> Self:
        self._loop.start()
        try:
            self._loop.run(self._chat.__aenter__())
        except BaseException:
            self._loop.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._loop.run(self._chat.close())
        finally:
            self._loop.close()

    @property
    def state(self) -> State:
        """How it is connected."""
        return self._chat.state

    @property
    def conversation(self) -> str:
        """Which goes on where a prompt names none."""
        return self._chat.conversation

    @property
    def principal(self) -> str | None:
        """Whom the server takes the client for; None if it has not told."""
        return self._chat.principal

    @property
    def limits(self) -> Limits | None:
        """What the server accepts; None if it has not told."""
        return self._chat.limits

    def prompt(self, text: str | None = None, **keys: Any) -> SyncReply:
        """Ask for a reply; see :meth:`wsserver.client.Chat.prompt`."""
        return self._reply(lambda: self._chat.prompt(text, **keys))

    def resume(self, reply_id: str, after: int = 0) -> SyncReply:
        """Follow a reply again; see :meth:`wsserver.client.Chat.resume`."""
        return self._reply(lambda: self._chat.resume(reply_id, after))

    def history(self, conversation: str | None = None) -> History:
        """Return all of a conversation; see :meth:`wsserver.client.Chat.history`."""
        return self._loop.run(self._chat.history(conversation))

    def conversations(self, limit: int = 20) -> list[Conversation]:
        """Return the client's conversations; see :meth:`wsserver.client.Chat.conversations`."""
        return self._loop.run(self._chat.conversations(limit))

    def rename(self, conversation: str, title: str) -> None:
        """Give a conversation another title; see :meth:`wsserver.client.Chat.rename`."""
        self._loop.run(self._chat.rename(conversation, title))

    def delete(self, conversation: str) -> None:
        """Delete a conversation; see :meth:`wsserver.client.Chat.delete`."""
        self._loop.run(self._chat.delete(conversation))

    def _reply(self, ask: Callable[[], Reply]) -> SyncReply:
        return SyncReply(self._loop.run(_call(ask)), self._loop)


def _without_waiting(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that has nothing to wait for.

    Raises:
        RuntimeError: the coroutine waits.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    coroutine.close()
    raise RuntimeError("a chat is used inside its `with`")


async def _settle() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=LAST_MOMENT)


async def _call(function: Callable[[], T]) -> T:
    return function()


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)
