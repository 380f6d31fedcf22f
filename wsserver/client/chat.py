"""A chat with a server: any number of replies at once, over one connection that mends itself.

One task owns the connection: it dials, reads, and dials again. What has to be sent again on a new
connection follows from what each reply has so far, so nothing else need be remembered. A second
task writes, in this order: stops; prompts and resumes, as many unanswered at once as the server
takes; then one request at a time, since the answers to those carry no id.
"""

import asyncio
import contextlib
import functools
import json
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from wsserver.client.dial import FINAL, Pause, Timeouts, Unreached, dial, shown
from wsserver.client.failures import (
    ChatError,
    ConnectionFailed,
    ReplyError,
    ServerError,
    seconds_of,
)
from wsserver.client.reply import Reply, Usage
from wsserver.errors import Code
from wsserver.protocol import Auth, Close, Delete, List, Open, Prompt, Rename, Resume, Turn

__all__ = [
    "Chat",
    "Conversation",
    "History",
    "Message",
    "State",
    "Token",
    "connect",
    "new_id",
]

T = TypeVar("T")

Token = str | Callable[[], Awaitable[str]]
"""What says who the client is: a token, or what gives a fresh one each time that it is called."""

MOST_UNANSWERED = 8  # prompts and resumes; well below the unusable frames in a row that close it
LEAST_WAIT = 0.05  # seconds, however soon the server would have it
SOON = 1.0  # seconds until what was refused is sent again, where the server does not say
MARGIN = 1.05  # of a time that the server asks to wait, as clocks and timers differ
RENEW_AT = 0.8  # of the time for which a token is good
MESSAGES_PER_TURN = 16  # taken before whoever reads the replies gets a turn
PAGE = 100  # conversations in one answer
NEWEST = 2**53 - 1  # a `before` that is after every message: the history, and nothing to follow


class State(StrEnum):
    """How a chat is connected."""

    CONNECTING = "connecting"
    OPEN = "open"
    LOST = "lost"  # and it is tried again
    IDLE = "idle"  # it is tried again when the chat is asked for something
    CLOSED = "closed"  # and it is not tried again


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation. ``partial``: why a reply is not whole, where it is not."""

    role: str
    content: str
    id: str
    partial: str | None = None


@dataclass(frozen=True, slots=True)
class History:
    """A conversation: its messages, oldest first, and the ids of replies that still run."""

    conversation: str
    title: str
    messages: tuple[Message, ...]
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation in a list. Times are in seconds since 1970."""

    id: str
    title: str
    created: float
    updated: float


def new_id() -> str:
    """Return an id for a conversation or a reply: 128 random bits."""
    return secrets.token_urlsafe(16)


def connect(
    url: str,
    *,
    token: Token | None = None,
    conversation: str | None = None,
    patience: float = 120.0,
    open_timeout: float = 10.0,
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
        patience: seconds for which a lost connection is tried again, and for which a prompt is sent
            again that the server has no room for now but tells when. Then what waits fails; the
            next prompt tries anew.
        open_timeout: seconds for the first connection, all attempts together, and for each later
            attempt.
        ping_timeout: seconds between pings, and for the answer to one; the connection is then
            taken for lost.
        close_timeout: seconds to have replies stopped and the connection closed in the end.
        on_state: called with each new state. Must neither raise nor wait.
    """
    timeouts = Timeouts(open_timeout, ping_timeout, close_timeout, patience)
    return Chat(url, token or None, conversation or new_id(), timeouts, on_state)


@dataclass(eq=False, slots=True)
class _Asked:
    """A reply that is not over, and how to ask for it.

    ``sent``: the server may have the prompt. ``until``: when what it refuses has to succeed.
    """

    reply: Reply
    prompt: bytes | None  # None for what somebody else has asked
    until: float
    sent: bool = False

    def frame(self) -> bytes:
        # What was stopped before its start is asked for, lest it begin for nothing.
        reply = self.reply
        if self.prompt is None or reply.started or (reply.stopping and self.sent):
            return _dump(Resume(id=reply.id, after=reply.seq))
        return self.prompt


@dataclass(eq=False, slots=True)
class _Request:
    """A request that is no prompt, and its answer to come. ``again``: it was sent before.

    ``read`` is given the answer as it comes: what it cannot read is not of the protocol.
    """

    frame: bytes
    kind: str
    read: Callable[[Mapping[str, Any]], Any]
    answer: asyncio.Future[Any]
    conversation: str | None
    sent: bool = False
    again: bool = False

    def fits(self, frame: Mapping[str, Any]) -> bool:
        """Whether a frame is the answer, and not news of what others did."""
        news = frame.get("conversation") not in {None, self.conversation}
        return frame.get("type") == self.kind and not (news and self.conversation is not None)


class Chat:
    """A chat with a server; see :func:`connect`.

    Entering it raises :class:`ConnectionFailed` when there is no connection in time. Leaving it
    stops what it has asked and what still runs; where there is no connection just then, the server
    stops that by itself after its grace time. What is only followed, by :meth:`resume`, runs on.

    Attributes:
        conversation: which goes on where a prompt names none.
        principal: whom the server takes the client for; None if it has not been asked.
        failure: why there is no connection, if there is none.
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
        self.principal: str | None = None
        self.failure: ConnectionFailed | None = None
        self._url = url
        self._token = token
        self._timeouts = timeouts
        self._on_state = on_state
        self._state = State.CONNECTING
        self._asked: dict[str, _Asked] = {}  # all that is not over, in the order of asking
        self._request: _Request | None = None
        self._requests = asyncio.Lock()
        self._owner: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None]
        self._wanted = asyncio.Event()  # somebody asks for something
        self._pause = Pause()
        self._closing = False
        # Of this connection.
        self._wake = asyncio.Event()  # there is something to write
        self._urgent: deque[bytes] = deque()
        self._outbox: deque[_Asked] = deque()
        self._unanswered: set[str] = set()
        self._window = MOST_UNANSWERED
        self._held_until = 0.0
        self._stopped: set[str] = set()
        self._authenticated = asyncio.Event()  # no `auth` waits for its answer
        self._complaint = ""  # the last error that was about nothing else than the connection
        self._renewal: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """How it is connected."""
        return self._state

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        if self._owner is not None:
            raise RuntimeError("a chat runs once")
        self._opened = loop.create_future()
        self._owner = loop.create_task(self._run())
        try:
            await asyncio.shield(self._opened)
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
        if self._owner is None or self._closing:
            return
        self._closing = True
        try:
            own = [asked.reply for asked in self._asked.values() if asked.prompt is not None]
            for reply in own:
                self._stop(reply)
            if own and self._state is State.OPEN:
                ends = [asyncio.ensure_future(_ended(reply)) for reply in own]
                await asyncio.wait(ends, timeout=self._timeouts.closing)
                for end in ends:
                    end.cancel()
        finally:
            self._owner.cancel()
            await asyncio.wait({self._owner})
            self._opened.cancel()
            self._fail(ConnectionFailed("the chat was closed"))

    # What it is asked for.

    def prompt(
        self,
        text: str | None = None,
        *,
        messages: Sequence[tuple[Literal["user", "assistant"], str]] | None = None,
        conversation: str | None = None,
        on_busy: Literal["reject", "queue", "interrupt"] = "reject",
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
            model=model,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        )
        assert frame.id is not None
        reply = Reply(frame.id, conversation, 0, self._stop)
        return self._ask(reply, _dump(frame))

    def resume(self, reply_id: str, after: int = 0) -> Reply:
        """Follow a reply again, from this or another program, while the server still knows it.

        Args:
            reply_id: the :attr:`Reply.id`.
            after: the :attr:`Reply.seq` of the last piece that is known; the text begins after it.

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
            read = functools.partial(_read_history, name, before)
            pages.append(
                await self._ask_for(Open(conversation=name, before=before), "history", read)
            )
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
            items, before = await self._ask_for(frame, "conversations", _read_conversations)
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
        await self._ask_for(Rename(conversation=conversation, title=title), "renamed", _done)

    async def delete(self, conversation: str) -> None:
        """Stop what runs in a conversation, and delete it.

        Raises:
            ServerError: there is none, or it cannot be deleted now.
            ConnectionFailed: there is no connection.
        """
        await self._ask_for(Delete(conversation=conversation), "deleted", _done)

    def _check(self) -> None:
        if self._owner is None:
            raise RuntimeError("a chat is used inside its `async with`")
        if self._state is State.CLOSED or self._closing:
            raise self.failure or ConnectionFailed("the chat was closed")

    def _ask(self, reply: Reply, prompt: bytes | None) -> Reply:
        asked = _Asked(reply, prompt, asyncio.get_running_loop().time() + self._timeouts.patience)
        self._asked[reply.id] = asked
        self._outbox.append(asked)
        self._want()
        return reply

    def _stop(self, reply: Reply) -> None:
        asked = self._asked.get(reply.id)
        if asked is None:
            return
        reply.stopping = True
        if asked.prompt is not None and not asked.sent:
            del self._asked[reply.id]
            with contextlib.suppress(ValueError):
                self._outbox.remove(asked)
            reply.end("stopped", "client", Usage())
        elif self._state is State.OPEN and asked not in self._outbox:
            self._send_stop(reply)
        # Else it is sent once the server has told on this connection that it has it.

    def _send_stop(self, reply: Reply) -> None:
        if reply.id not in self._stopped:
            self._stopped.add(reply.id)
            self._urgent.append(json.dumps({"type": "stop", "id": reply.id}).encode())
            self._wake.set()

    async def _ask_for(
        self,
        frame: Open | List | Rename | Delete,
        kind: str,
        read: Callable[[Mapping[str, Any]], T],
    ) -> T:
        """Send a request and return its answer, however often the connection is lost meanwhile."""
        self._check()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeouts.patience
        async with self._requests:
            while True:
                self._check()
                answer: asyncio.Future[T] = loop.create_future()
                request = self._request = _Request(
                    _dump(frame), kind, read, answer, getattr(frame, "conversation", None)
                )
                self._want()
                try:
                    return await answer
                except ServerError as error:
                    # Of a request that was lost nobody knows whether it has been done.
                    if isinstance(frame, Delete) and request.again and error.code == Code.NOT_FOUND:
                        return read({})
                    wait = error.retry_after
                    if not error.retryable or wait is None or loop.time() + wait > until:
                        raise
                    await asyncio.sleep(max(LEAST_WAIT, wait * MARGIN))
                finally:
                    self._request = None

    def _want(self) -> None:
        self._wanted.set()
        self._wake.set()

    # The connection.

    async def _run(self) -> None:
        """Own the connection, for as long as there is to be one."""
        loop = asyncio.get_running_loop()
        try:
            until = loop.time() + self._timeouts.opening
            first = True
            while True:
                socket = await self._connect(until)
                if socket is not None:
                    began = loop.time()
                    wanted = await self._talk(socket)
                    if loop.time() - began > self._timeouts.ping:
                        self._pause.reset()
                    # One that says nothing before it closes is as good as none.
                    if first or self._pause.is_shortest:
                        until = loop.time() + self._timeouts.patience
                    first = False
                    if wanted and loop.time() < until:
                        self._set_state(State.LOST)
                        await asyncio.sleep(self._pause.next())
                        continue
                    if wanted and self.failure is not None:
                        self._drop(self.failure)
                self._wanted.clear()
                self._set_state(State.IDLE)
                await self._wanted.wait()
                until = loop.time() + self._timeouts.patience
                self._set_state(State.CONNECTING)
        except ConnectionFailed as failure:
            self._fail(failure)
        except Exception as error:  # noqa: BLE001
            broken = ConnectionFailed(f"{type(error).__name__}: {error}")
            broken.__cause__ = error
            self._fail(broken)

    async def _connect(self, until: float) -> ClientConnection | None:
        """Return a connection; None if it was given up for now, and what waited has failed.

        Raises:
            ConnectionFailed: there will be none.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(self._timeouts.opening):
                    token = await self._fresh_token()
                    return await dial(self._url, token, self._timeouts)
            except Unreached as error:
                unreached = error
            except TimeoutError:
                unreached = Unreached("no answer in time")
            wait = self._pause.next() + unreached.after
            left = until - loop.time()
            if wait < left:
                await asyncio.sleep(wait)
                continue
            failure = ConnectionFailed(
                f"cannot connect to {shown(self._url)}: {unreached}",
                status=unreached.status,
                final=False,
            )
            if not self._opened.done():
                raise failure
            self._drop(failure)
            return None

    async def _fresh_token(self) -> str | None:
        if self._token is None or isinstance(self._token, str):
            return self._token
        try:
            return await self._token()
        except Exception as error:
            raise Unreached(f"no token: {str(error) or type(error).__name__}") from error

    async def _talk(self, socket: ClientConnection) -> bool:
        """Use a connection until it is lost; return whether to dial again at once.

        Raises:
            ConnectionFailed: not at all.
        """
        loop = asyncio.get_running_loop()
        self._urgent.clear()
        self._stopped.clear()
        self._unanswered.clear()
        self._window, self._held_until, self._complaint = MOST_UNANSWERED, 0.0, ""
        self._outbox = deque(self._asked.values())
        if self._request is not None:
            self._request.again = self._request.sent
            self._request.sent = False
        self._authenticated.set()
        header = socket.request and socket.request.headers.get("Authorization")
        if header:
            self._send_auth(header.removeprefix("Bearer "))
        self.failure = None
        self._set_state(State.OPEN)
        if not self._opened.done():
            self._opened.set_result(None)
        writer = loop.create_task(self._write(socket))
        try:
            await self._read(socket)
        except ConnectionClosed:
            pass
        finally:
            if self._renewal is not None:
                self._renewal.cancel()
            writer.cancel()
            await asyncio.wait({writer})
            await socket.close()
        return self._ended(socket)

    def _ended(self, socket: ClientConnection) -> bool:
        code, reason = socket.close_code, self._complaint or socket.close_reason
        busy = bool(self._asked) or self._request is not None
        if code == Close.NORMAL and not busy:
            return False
        failure = ConnectionFailed(
            f"the server closed the connection: {reason or code}", close_code=code, final=False
        )
        # A token that has expired can be replaced, where one that was not good cannot.
        replaceable = callable(self._token) and self.principal is not None
        if code in FINAL and not (code == Close.POLICY_VIOLATION and replaceable):
            failure.final = True
            raise failure
        self.principal = None
        self.failure = failure
        return True

    async def _read(self, socket: ClientConnection) -> None:
        turn = 0
        async for message in socket:
            try:
                frame = json.loads(message)
                if not isinstance(frame, dict):
                    raise TypeError("a frame is an object")
                self._take(frame)
            except (ValueError, KeyError, TypeError) as error:
                reason = f"this is no server of this protocol: {error!r}"
                raise ConnectionFailed(reason) from error
            turn = (turn + 1) % MESSAGES_PER_TURN
            if not turn:
                await asyncio.sleep(0)

    async def _write(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._wake.clear()
                frame = self._next_frame()
                if frame is None:
                    await self._wake.wait()
                else:
                    await socket.send(frame, text=True)

    def _next_frame(self) -> bytes | None:
        """Take the next frame to be sent, if there is one that may be sent now."""
        loop = asyncio.get_running_loop()
        if self._urgent:
            return self._urgent.popleft()
        if self._held_until > loop.time():
            loop.call_at(self._held_until, self._wake.set)
            return None
        if self._outbox and len(self._unanswered) < self._window:
            asked = self._outbox.popleft()
            frame = asked.frame()
            asked.sent = True
            self._unanswered.add(asked.reply.id)
            return frame
        request = self._request
        if request is not None and not request.sent and self._authenticated.is_set():
            request.sent = True
            return request.frame
        return None

    # What the server says.

    def _take(self, frame: dict[str, Any]) -> None:
        kind = frame.get("type")
        name = frame.get("id")
        if kind == "error" and name is None:
            self._refused(frame)
        elif name is not None:
            self._pause.reset()
            self._follow(name, frame)
        elif kind == "authenticated":
            self._pause.reset()
            self._authenticated.set()
            self.principal = frame["principal"]
            self._renew_before(frame.get("expires"))
            self._wake.set()
        elif kind in {"history", "conversations", "renamed", "deleted"}:
            self._pause.reset()
            request = self._request
            if request is not None and request.fits(frame) and not request.answer.done():
                request.answer.set_result(request.read(frame))
        # Anything else is of a later version.

    def _follow(self, name: str, frame: Mapping[str, Any]) -> None:
        asked = self._asked.get(name)
        if asked is None:
            return
        reply = asked.reply
        reply.take(frame)
        if frame["type"] == "start":
            self._answered(name)
            self._window = min(MOST_UNANSWERED, self._window + 1)
            if reply.stopping:
                self._send_stop(reply)
        if reply.over:
            self._answered(name)
            del self._asked[name]

    def _answered(self, name: str) -> None:
        self._unanswered.discard(name)
        self._wake.set()

    def _refused(self, frame: Mapping[str, Any]) -> None:
        """Take an error that is about a frame of the client's."""
        asked = self._asked.get(frame.get("about", ""))
        if frame["code"] == Code.NOT_RUNNING:
            return
        wait = seconds_of(frame.get("retry_after"))
        if frame["code"] == Code.LIMIT and wait is not None:
            self._hold(wait)
        if asked is not None:
            self._answered(asked.reply.id)
            self._refused_reply(asked, ReplyError.of(frame))
            return
        self._complaint = str(frame.get("message", ""))
        if not self._authenticated.is_set():
            self._authenticated.set()
            self._wake.set()
        elif self._request is not None and not self._request.answer.done():
            self._request.answer.set_exception(ServerError.of(frame))

    def _hold(self, seconds: float) -> None:
        """Send nothing but stops for a time, and then less at once."""
        until = asyncio.get_running_loop().time() + seconds * MARGIN
        self._held_until = max(self._held_until, until)
        self._window = max(1, len(self._unanswered) // 2)

    def _refused_reply(self, asked: _Asked, error: ReplyError) -> None:
        """Try again, if that is known to help; else the reply has failed."""
        loop = asyncio.get_running_loop()
        reply = asked.reply
        resumed = reply.started or asked.prompt is None
        if error.code == Code.SHUTTING_DOWN:
            return  # another server will be asked, as soon as this one has closed
        if error.code == Code.NOT_FOUND and reply.stopping and not resumed:
            del self._asked[reply.id]
            reply.end("stopped", "client", Usage())
            return
        wait = error.retry_after
        if wait is None and error.retryable and resumed:
            wait = SOON  # it runs; it is only this connection that may not follow it now
        if error.retryable and wait is not None and loop.time() + wait < asked.until:
            loop.call_later(max(LEAST_WAIT, wait * MARGIN), self._again, asked, self._outbox)
            return
        del self._asked[reply.id]
        reply.fail(error)

    def _again(self, asked: _Asked, outbox: deque[_Asked]) -> None:
        # On another connection all is asked anew anyway.
        if outbox is self._outbox and not asked.reply.over:
            outbox.append(asked)
            self._wake.set()

    # Who the client is.

    def _send_auth(self, token: str) -> None:
        self._authenticated.clear()
        self._urgent.append(_dump(Auth(token=token)))
        self._wake.set()

    def _renew_before(self, expires: float | None) -> None:
        if expires is None or not callable(self._token):
            return
        delay = max(0.0, (expires - time.time()) * RENEW_AT)
        if self._renewal is not None:
            self._renewal.cancel()
        self._renewal = asyncio.get_running_loop().create_task(self._renew(delay))

    async def _renew(self, delay: float) -> None:
        """Say again who the client is. If that fails, the server closes; then it is tried anew."""
        await asyncio.sleep(delay)
        with contextlib.suppress(Unreached):
            token = await self._fresh_token()
            async with self._requests:  # so that errors without an id are about one thing only
                assert token is not None
                self._send_auth(token)
                await self._authenticated.wait()

    # Its end.

    def _set_state(self, state: State) -> None:
        if state is not self._state:
            self._state = state
            if self._on_state is not None:
                self._on_state(state)

    def _drop(self, failure: ChatError) -> None:
        """Have all that waits fail."""
        asked, self._asked = self._asked, {}
        self._outbox.clear()
        for one in asked.values():
            one.reply.fail(failure)
        if self._request is not None and not self._request.answer.done():
            self._request.answer.set_exception(failure)
        if isinstance(failure, ConnectionFailed):
            self.failure = failure

    def _fail(self, failure: ConnectionFailed) -> None:
        if self._state is State.CLOSED:
            return
        self._set_state(State.CLOSED)
        self._drop(failure)
        if not self._opened.done():
            self._opened.set_exception(failure)
            self._opened.exception()  # whoever entered may have left meanwhile


def _dump(frame: Prompt | Resume | Open | List | Rename | Delete | Auth) -> bytes:
    return frame.model_dump_json(exclude_none=True).encode()


async def _ended(reply: Reply) -> None:
    with contextlib.suppress(ChatError):
        await reply.done()


def _read_history(name: str, asked: int, frame: Mapping[str, Any]) -> tuple[History, int | None]:
    """Return a part of a history, and where the one before it ends."""
    messages = tuple(
        Message(
            _text(m["role"]),
            _text(m["content"]),
            _text(m["id"]),
            None if m.get("partial") is None else _text(m["partial"]),
        )
        for m in frame["messages"]
    )
    running = tuple(_text(reply) for reply in frame["running"])
    before = frame.get("before")
    if before is not None and not 0 <= before < asked:
        raise ValueError("a history has a beginning")
    return History(name, _text(frame["title"]), messages, running), before


def _read_conversations(frame: Mapping[str, Any]) -> tuple[list[Conversation], str | None]:
    """Return a part of a list, and where the next one begins."""
    items = [
        Conversation(_text(i["id"]), _text(i["title"]), float(i["created"]), float(i["updated"]))
        for i in frame["items"]
    ]
    following = frame.get("next")
    return items, None if following is None else _text(following)


def _done(_: Mapping[str, Any]) -> None:
    """Take an answer that says no more than that it is done."""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is expected")
    return value
