"""A chat with a server: any number of replies at once, over one connection that mends itself.

What is sent again on a new connection follows from what each reply has so far, so that nothing else
has to be remembered.
"""

import asyncio
import contextlib
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from wsserver.client.dial import Timeouts
from wsserver.client.failures import ChatError, ConnectionFailed, ReplyError, ServerError
from wsserver.client.history import (
    Conversation,
    History,
    read_conversations,
    read_history,
    read_nothing,
)
from wsserver.client.keeper import Hooks, Keeper, State, Token
from wsserver.client.link import MARGIN, Ask, Limits, Link, is_refusal
from wsserver.client.reply import Reply, Usage
from wsserver.errors import Code
from wsserver.protocol import Delete, List, Open, Prompt, Rename, Resume, Stop, Turn

__all__ = ["Chat", "connect", "new_id"]

T = TypeVar("T")

LEAST_WAIT = 0.05  # seconds, however soon the server would have it
SOON = 1.0  # seconds until what was refused is sent again, where the server does not say
PAGE = 100  # conversations in one answer
NEWEST = 2**53 - 1  # a `before` that is after every message: the history, and nothing to follow


def new_id() -> str:
    """Return an id for a conversation or a reply: 128 random bits."""
    return secrets.token_urlsafe(16)


def connect(
    url: str,
    *,
    token: Token | None = None,
    conversation: str | None = None,
    patience: float = 120.0,
    open_timeout: float = 30.0,
    ping_timeout: float = 20.0,
    close_timeout: float = 5.0,
    on_state: Callable[[State], None] | None = None,
) -> "Chat":
    """Make a chat; it connects as its ``async with`` is entered.

    Args:
        url: ``ws://`` or ``wss://``.
        token: who the client is, where the server asks. What gives fresh tokens is called for each
            connection, and before a token expires.
        conversation: which goes on where a prompt names none. Default: a new one.
        patience: seconds for which a lost connection is tried again, for which a prompt is sent
            again that the server has no room for now but tells when, and for which an answer is
            waited for. Then what waits fails; the next prompt tries anew.
        open_timeout: seconds for the first connection, all attempts together. The default is more
            than a server takes to shut down and to start again.
        ping_timeout: seconds in which nothing comes before a ping, and for the answer to it; the
            connection is then taken for lost. At most 4 while a reply or an answer is expected.
        close_timeout: seconds to have replies stopped and the connection closed in the end.
        on_state: called with each new state. Must neither raise nor wait.
    """
    timeouts = Timeouts(open_timeout, ping_timeout, close_timeout, patience)
    return Chat(url, token or None, conversation or new_id(), timeouts, on_state)


@dataclass(eq=False, slots=True)
class _Asked:
    """A reply that is not over, and how to ask for it.

    Attributes:
        reply: which.
        prompt: None for a reply to the prompt of somebody else.
        until: when what the server refuses has to succeed, by the event loop's clock.
        ask: what asks for it.
        timer: ends the wait for an answer.
        refused: the last error that was about the prompt or a resume.
        gap: the error of a server that had less of the reply than is here.
    """

    reply: Reply
    prompt: Prompt | None
    until: float
    ask: Ask = field(init=False)
    timer: asyncio.TimerHandle = field(init=False)
    refused: ReplyError | None = None
    gap: ReplyError | None = None

    @property
    def resumes(self) -> bool:
        """Whether the server has accepted the prompt, as far as is known."""
        return self.prompt is None or self.reply.started

    def frame(self) -> Prompt | Resume:
        # What was stopped before its start is asked for, lest it begin for nothing.
        reply = self.reply
        if self.prompt is None or reply.started or (reply.stopping and self.ask.sent):
            return Resume(id=reply.id, after=reply.seq if self.gap is None else 0)
        return self.prompt


class Chat:
    """A chat with a server; see :func:`connect`.

    Entering it raises :class:`ConnectionFailed` when there is no connection in time. Leaving it
    stops what it has asked and what still runs; where there is no connection just then, the server
    stops that by itself after its grace time. What is only followed, by :meth:`resume`, runs on.

    Attributes:
        conversation: which goes on where a prompt names none.
    """

    def __init__(
        self,
        url: str,
        token: Token | None,
        conversation: str,
        timeouts: Timeouts,
        on_state: Callable[[State], None] | None,
    ) -> None:
        self.conversation = conversation
        self._timeouts = timeouts
        self._asked: dict[str, _Asked] = {}  # all that is not over, in the order of asking
        self._requests: dict[asyncio.Future[Any], Ask] = {}  # in the order of asking
        self._stopped: set[str] = set()  # replies, on this connection
        self._entered = self._closing = False
        hooks = Hooks(self._waiting, self._begin, self._hear, self._drop)
        self._keeper = Keeper(url, token, timeouts, hooks, on_state)

    @property
    def state(self) -> State:
        """How it is connected."""
        return self._keeper.state

    @property
    def principal(self) -> str | None:
        """Whom the server takes the client for; None if it has not told."""
        return self._keeper.principal

    @property
    def limits(self) -> Limits | None:
        """What the server accepts; None if it has not told."""
        return self._keeper.limits

    @property
    def failure(self) -> ConnectionFailed | None:
        """Why there is no connection, if there is none."""
        return self._keeper.failure

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("a chat runs once")
        self._entered = True
        try:
            await self._keeper.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop what was asked and still runs, and close the connection. Idempotent."""
        if not self._entered or self._closing:
            return
        self._closing = True
        loop = asyncio.get_running_loop()
        by = loop.time() + self._timeouts.closing
        try:
            own = [asked.reply for asked in self._asked.values() if asked.prompt is not None]
            for reply in own:
                self._stop(reply)
            if own and self._keeper.link is not None:
                ends = [asyncio.ensure_future(_ended(reply)) for reply in own]
                await asyncio.wait(ends, timeout=by - loop.time())
                for end in ends:
                    end.cancel()
        finally:
            await self._keeper.close(by)

    # What it is asked for.

    def prompt(
        self,
        text: str | None = None,
        *,
        messages: Sequence[tuple[Literal["user", "assistant"], str]] | None = None,
        conversation: str | None = None,
        on_busy: Literal["reject", "queue", "interrupt"] = "reject",
        retry_of: str | None = None,
        model: str | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Reply:
        """Ask for a reply. It is sent at once, or as soon as there is a connection.

        It is sent once: where a connection is lost before the server has accepted it, it is sent
        again under the same id, by which the server knows it.

        Args:
            text: the next message of a conversation.
            messages: role and content of each, instead of ``text``: a history that is kept here.
            conversation: which goes on; one that is not known begins. Default: the chat's own.
            on_busy: what to do while it is generating: fail with ``busy``, wait, or stop that.
            retry_of: the id of the conversation's last reply. The new turn takes the place of that
                turn, which the model is not shown again; ``text`` may differ. A server that does
                not know retries keeps both turns.
            model: one that the server allows.
            system: the system prompt.
            max_tokens: the most that the reply may have.
            temperature: from 0 to 2.

        Raises:
            ValueError: it is no prompt of the protocol's.
            ConnectionFailed: the chat is closed.
        """
        self._check()
        turns = None
        if messages is None:
            conversation = conversation or self.conversation
        else:
            turns = [Turn(role=role, content=said) for role, said in messages]
        frame = Prompt(
            prompt=text,
            messages=turns,
            id=new_id(),
            conversation=conversation,
            on_busy=on_busy,
            retry_of=retry_of,
            model=model,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        assert frame.id is not None
        reply = Reply(frame.id, conversation, 0, self._stop)
        return self._ask(reply, frame)

    def resume(self, reply_id: str, after: int = 0) -> Reply:
        """Follow a reply again, from this or another program, while the server still knows it.

        Args:
            reply_id: the :attr:`Reply.id`.
            after: the :attr:`Reply.seq` of the last piece that is known; the text begins after it.
                Where the server died and has less, the reply ends as ``interrupted``.

        Raises:
            ValueError: it is no id of the protocol's.
            ConnectionFailed: the chat is closed.
        """
        self._check()
        if reply_id in self._asked:
            return self._asked[reply_id].reply
        Resume(id=reply_id, after=after)
        return self._ask(Reply(reply_id, None, after, self._stop), None)

    async def history(self, conversation: str | None = None) -> History:
        """Return all of a conversation, by default the chat's own.

        Raises:
            ServerError: there is none, or it cannot be read now.
            ConnectionFailed: there is no connection.
        """
        name = conversation or self.conversation
        pages: list[tuple[History, int | None]] = []
        before: int | None = NEWEST
        while before is not None:
            read = functools.partial(read_history, name, before)
            pages.append(await self._ask_for(Open(conversation=name, before=before), read))
            before = pages[-1][1]
        messages = tuple(message for page, _ in reversed(pages) for message in page.messages)
        return replace(pages[0][0], messages=messages)

    async def conversations(self, limit: int = 20) -> list[Conversation]:
        """Return the client's conversations, the one used last first; at most ``limit``.

        Raises:
            ServerError: they cannot be read now.
            ConnectionFailed: there is no connection.
        """
        found: list[Conversation] = []
        before: str | None = None
        while len(found) < limit:
            frame = List(limit=min(PAGE, limit - len(found)), before=before)
            items, before = await self._ask_for(frame, read_conversations)
            found += items
            if before is None or not items:
                break
        return found

    async def rename(self, conversation: str, title: str) -> None:
        """Give a conversation another title.

        Raises:
            ServerError: there is none, or it cannot be saved now.
            ConnectionFailed: there is no connection.
        """
        await self._ask_for(Rename(conversation=conversation, title=title), read_nothing)

    async def delete(self, conversation: str) -> None:
        """Stop what runs in a conversation, and delete it.

        Raises:
            ServerError: there is none, or it cannot be deleted now.
            ConnectionFailed: there is no connection.
        """
        await self._ask_for(Delete(conversation=conversation), read_nothing)

    def _check(self) -> None:
        if not self._entered:
            raise RuntimeError("a chat is used inside its `async with`")
        if self.state is State.CLOSED or self._closing:
            raise self.failure or ConnectionFailed("the chat was closed")

    def _ask(self, reply: Reply, prompt: Prompt | None) -> Reply:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeouts.patience
        asked = self._asked[reply.id] = _Asked(reply, prompt, until)
        asked.ask = Ask(asked.frame, functools.partial(self._answered, asked))
        asked.timer = loop.call_at(until, self._give_up, asked)
        if self._keeper.link is not None:
            self._keeper.link.prompt(asked.ask)
        self._keeper.want()
        return reply

    def _give_up(self, asked: _Asked) -> None:
        """Have a reply fail that the server has neither accepted nor refused in time."""
        if asked.reply.started:
            return
        if self._keeper.link is None:  # the time for a new connection is counted elsewhere
            loop, patience = asyncio.get_running_loop(), self._timeouts.patience
            asked.timer = loop.call_later(patience, self._give_up, asked)
            return
        if asked.ask.sent:
            self._send_stop(asked.reply)  # nobody waits for it any more
        silence = ConnectionFailed("the server did not answer in time", final=False)
        self._forget(asked)
        asked.reply.fail(asked.refused or silence)

    def _forget(self, asked: _Asked) -> None:
        """Ask for a reply no more: it is over, or is about to be."""
        del self._asked[asked.reply.id]
        asked.timer.cancel()
        if self._keeper.link is not None:
            self._keeper.link.withdraw(asked.ask)

    def _stop(self, reply: Reply) -> None:
        asked, link = self._asked.get(reply.id), self._keeper.link
        if asked is None:
            return
        reply.stopping = True
        if asked.prompt is not None and not asked.ask.sent:
            self._forget(asked)
            reply.end("stopped", "client", Usage())
        elif link is not None and not link.waits(asked.ask):
            self._send_stop(reply)
        # Else it is sent once the server has told on this connection that it has it.

    def _send_stop(self, reply: Reply) -> None:
        if self._keeper.link is not None and reply.id not in self._stopped:
            self._stopped.add(reply.id)
            self._keeper.link.send(Ask(lambda: Stop(id=reply.id), lambda _: None))

    async def _ask_for(
        self, frame: Open | List | Rename | Delete, read: Callable[[Mapping[str, Any]], T]
    ) -> T:
        """Send a request and return its answer, however often the connection is lost meanwhile."""
        self._check()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeouts.patience
        while True:
            answer: asyncio.Future[T] = loop.create_future()
            ask = Ask(lambda: frame, functools.partial(_settle, answer, read))
            self._requests[answer] = ask
            if self._keeper.link is not None:
                self._keeper.link.request(ask)
            self._keeper.want()
            try:
                async with asyncio.timeout_at(until):
                    return await answer
            except TimeoutError:
                raise ConnectionFailed("the server did not answer in time", final=False) from None
            except ServerError as error:
                # Of a request that was lost nobody knows whether it has been done.
                again = ask.sent > 1
                if isinstance(frame, Delete) and again and error.code == Code.NOT_FOUND:
                    return read({})
                wait = error.retry_after
                if not error.retryable or wait is None or loop.time() + wait > until:
                    raise
            finally:
                del self._requests[answer]
                if self._keeper.link is not None:
                    self._keeper.link.withdraw(ask)
            await asyncio.sleep(max(LEAST_WAIT, wait * MARGIN))
            self._check()

    # What the keeper of the connection does with it.

    def _waiting(self) -> bool:
        """Whether anything has been asked for that is not over."""
        return bool(self._asked or self._requests)

    def _begin(self, link: Link) -> None:
        """Ask on a new connection for all that is not over."""
        self._stopped.clear()
        for asked in self._asked.values():
            asked.gap = None  # another server may have all of it
            link.prompt(asked.ask)
        for ask in self._requests.values():
            link.request(ask)

    def _drop(self, failure: ConnectionFailed) -> None:
        """Have all fail that is not over."""
        for asked in tuple(self._asked.values()):
            self._forget(asked)
            asked.reply.fail(failure)
        for answer in self._requests:
            if not answer.done():
                answer.set_exception(failure)

    def _hear(self, frame: Mapping[str, Any]) -> None:
        """Take a frame of a reply. Any other is news of what others did, or of a later version."""
        asked = self._asked.get(frame.get("id", ""))
        if asked is None:
            return
        reply = asked.reply
        if asked.gap is not None and _goes_on(frame, reply.seq):
            self._forget(asked)
            reply.fail(asked.gap)
            return
        reply.take(frame)
        if frame["type"] == "start" and reply.stopping:
            self._send_stop(reply)
        if reply.over:
            self._forget(asked)

    def _answered(self, asked: _Asked, answer: Mapping[str, Any]) -> None:
        """Take the answer to a prompt or a resume. A refusal is tried again, if that may help."""
        reply = asked.reply
        if not is_refusal(answer) or self._asked.get(reply.id) is not asked:
            return
        loop, link = asyncio.get_running_loop(), self._keeper.link
        error = asked.refused = ReplyError.of(answer)
        if error.code == Code.SHUTTING_DOWN:
            return  # another server will be asked, as soon as this one has closed
        if error.code == Code.NOT_FOUND and reply.stopping and not asked.resumes:
            self._forget(asked)
            reply.end("stopped", "client", Usage())
            return
        if error.code == Code.NOT_FOUND and reply.started:  # the server died before it saved any
            self._forget(asked)
            reply.fail(ReplyError(Code.INTERRUPTED, "The server lost the reply.", retryable=True))
            return
        if error.code == Code.GAP and asked.gap is None and link is not None:
            asked.gap = error  # the server died; how the reply ended is still to be told
            link.prompt(asked.ask)
            return
        wait = error.retry_after
        if wait is None and error.retryable and asked.resumes:
            wait = SOON  # it runs; it is only this connection that may not follow it now
        if error.retryable and wait is not None and loop.time() + wait < asked.until:
            loop.call_later(max(LEAST_WAIT, wait * MARGIN), self._again, asked, link)
            return
        self._forget(asked)
        reply.fail(error)

    def _again(self, asked: _Asked, link: Link | None) -> None:
        # On another connection all is asked anew anyway.
        if link is not None and link is self._keeper.link and not asked.reply.over:
            link.prompt(asked.ask)


async def _ended(reply: Reply) -> None:
    with contextlib.suppress(ChatError):
        await reply.done()


def _settle(
    answer: asyncio.Future[T], read: Callable[[Mapping[str, Any]], T], frame: Mapping[str, Any]
) -> None:
    """Give an answer to whoever waits for it. An answer that cannot be read is not answered."""
    if answer.done():
        return
    if is_refusal(frame):
        answer.set_exception(ServerError.of(frame))
    else:
        answer.set_result(read(frame))


def _goes_on(frame: Mapping[str, Any], seq: int) -> bool:
    """Whether a server that had less of a reply than is here goes on with it, or says it is whole.

    Then the text that comes does not follow on what is here.
    """
    kind = frame["type"]
    if kind == "done":
        return bool(frame["seq"] < seq)
    return kind in {"token", "thinking"} and frame["seq"] > seq
