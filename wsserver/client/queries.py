"""Requests that have one answer each: a history, a list, a rename, a delete."""

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from wsserver.client.connection import Connection
from wsserver.client.failures import ConnectionFailed, ServerError
from wsserver.client.history import History, parse_history
from wsserver.client.link import CLOCK_MARGIN, Link, Request, is_refusal
from wsserver.errors import Code
from wsserver.protocol import CloseConversation, Delete, List, Open, Rename

T = TypeVar("T")

AFTER_ALL = 2**53 - 1  # a `before` above all messages: `open` then follows nothing
LARGEST_PAGE, SMALLEST_PAGE = 65536, 1024  # bytes of messages, after lost connections
SHORTEST_WAIT = 0.05  # seconds before a refused request is sent again


class Queries:
    """Sends queries, and sends them again on a new connection while they have no answer."""

    def __init__(self, connection: Connection, patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._page_size: int | None = None  # bytes; None for the server's limit
        self._accepts_size = True
        self._open: dict[asyncio.Future[Any], Request] = {}  # oldest first

    async def ask(
        self,
        frame: Open | CloseConversation | List | Rename | Delete,
        parse: Callable[[Mapping[str, Any]], T],
    ) -> T:
        """Send a query and return its parsed answer.

        Raises:
            ServerError: the server refused the query.
            ConnectionFailed: there was no answer in time, or the chat was closed.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while True:
            answer: asyncio.Future[T] = loop.create_future()
            request = Request(lambda: frame, functools.partial(_settle, answer, parse))
            if isinstance(frame, Open):
                request.make_frame = functools.partial(self._sized, frame, request)
            self._open[answer] = request
            if self._connection.link is not None:
                self._connection.link.send_query(request)
            self._connection.reopen()
            try:
                async with asyncio.timeout_at(deadline):
                    return await answer
            except TimeoutError:
                raise ConnectionFailed("the server did not answer in time", final=False) from None
            except ServerError as error:
                # A delete that was sent on a lost connection may have succeeded.
                sent_before = request.times_sent > 1
                if isinstance(frame, Delete) and sent_before and error.code == Code.NOT_FOUND:
                    return parse({})
                if error.code == Code.INVALID_FRAME and self._page_size is not None:
                    self._page_size, self._accepts_size = None, False  # an older server
                    continue
                wait = error.retry_after
                if not error.retryable or wait is None or loop.time() + wait > deadline:
                    raise
            finally:
                del self._open[answer]
                if self._connection.link is not None:
                    self._connection.link.remove(request)
            await asyncio.sleep(max(SHORTEST_WAIT, wait * CLOCK_MARGIN))
            self._connection.check()

    def _sized(self, frame: Open, request: Request) -> Open:
        """Return a frame that asks for less after two connections broke before the answer.

        A connection that breaks after a number of bytes never carries a larger page.
        """
        if request.times_sent > 1 and self._accepts_size:
            self._page_size = max(SMALLEST_PAGE, (self._page_size or LARGEST_PAGE) // 2)
        return frame.model_copy(update={"size": self._page_size})

    async def history(
        self, conversation: str, on_open: Callable[[History], None] | None = None
    ) -> History:
        """Return all pages of a history.

        Args:
            conversation: the id.
            on_open: called with the newest page at once. If given, the conversation is opened.

        Raises:
            ServerError: there is no such conversation, or the server cannot read it now.
            ConnectionFailed: there is no connection.
        """

        def parse(page: Mapping[str, Any]) -> tuple[History, int | None]:
            found, before = parse_history(conversation, asked, page)
            if on_open is not None and not pages:
                on_open(found)
            return found, before

        pages: list[History] = []
        asked = AFTER_ALL
        frame = Open(conversation=conversation, before=None if on_open else asked)
        while True:
            page, before = await self.ask(frame, parse)
            pages.append(page)
            if before is None:
                break
            asked = before
            frame = Open(conversation=conversation, before=before)
        messages = tuple(message for page in reversed(pages) for message in page.messages)
        return replace(pages[0], messages=messages)

    # The connection's `Requester`.

    def pending(self) -> bool:
        """Return whether a query has no answer."""
        return bool(self._open)

    def send_all(self, link: Link) -> None:
        """Send all queries without an answer."""
        for request in self._open.values():
            link.send_query(request)

    def receive(self, frame: Mapping[str, Any]) -> None:
        """Ignore a frame that answers no query."""

    def fail_all(self, failure: ConnectionFailed) -> None:
        """Let all queries fail."""
        for answer in self._open:
            if not answer.done():
                answer.set_exception(failure)


def _settle(
    answer: asyncio.Future[T], parse: Callable[[Mapping[str, Any]], T], frame: Mapping[str, Any]
) -> None:
    """Set the result of a query. An answer that violates the protocol raises and sets nothing."""
    if answer.done():
        return
    if is_refusal(frame):
        answer.set_exception(ServerError.of(frame))
    else:
        answer.set_result(parse(frame))
