"""A connection that lasts: one task dials, uses the link, and dials again.

It also says who the client is, and says so again before a token expires.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from wsserver.client.dial import FINAL, Pause, Socket, Timeouts, Unreached, reach, shown
from wsserver.client.failures import ConnectionFailed, ServerError, seconds_of
from wsserver.client.link import Ask, Limits, Link, is_refusal
from wsserver.protocol import Auth, Close

__all__ = ["Hooks", "Keeper", "State", "Token"]

Token = str | Callable[[], Awaitable[str]]
"""What says who the client is: a token, or what gives a fresh one each time that it is called."""

RENEW_AT = 0.8  # of the rest of a token's life
LEAST_RENEWAL = 1.0  # seconds between two renewals of a token


class State(StrEnum):
    """How a chat is connected."""

    CONNECTING = "connecting"
    OPEN = "open"
    LOST = "lost"  # and it is tried again
    IDLE = "idle"  # it is tried again when the chat is asked for something
    CLOSED = "closed"  # and it is not tried again


@dataclass(frozen=True, slots=True)
class Hooks:
    """What whoever needs the connection does with it. None of these may wait.

    Attributes:
        waiting: tells whether anything has been asked for that is not over.
        begin: asks on a new connection for all that is not over.
        hear: takes a frame that has an ``id``, or that nobody asked for.
        drop: has all fail that is not over.
    """

    waiting: Callable[[], bool]
    begin: Callable[[Link], None]
    hear: Callable[[Mapping[str, Any]], None]
    drop: Callable[[ConnectionFailed], None]


class Keeper:
    """Keeps a connection.

    Args:
        url: where to.
        token: who the client is, where the server asks.
        timeouts: how long what may take.
        hooks: of whoever needs the connection.
        on_state: called with each new state.

    Attributes:
        link: the connection; None while there is none.
        state: how it is connected.
        failure: why there is no connection, if there is none.
        principal: whom the server takes the client for; None if it has not told.
        limits: what the server accepts; None if it has not told.
    """

    def __init__(
        self,
        url: str,
        token: Token | None,
        timeouts: Timeouts,
        hooks: Hooks,
        on_state: Callable[[State], None] | None,
    ) -> None:
        self.link: Link | None = None
        self.state = State.CONNECTING
        self.failure: ConnectionFailed | None = None
        self.principal: str | None = None
        self.limits: Limits | None = None
        self._url = url
        self._token = token
        self._timeouts = timeouts
        self._hooks = hooks
        self._on_state = on_state
        self._pause = Pause()
        self._wanted = asyncio.Event()  # somebody asks for something
        self._opened: asyncio.Future[None]
        self._task: asyncio.Task[None] | None = None
        self._close_by: float | None = None
        self._complaint: ServerError | None = None  # the last error that was about no request
        self._renewal: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect for the first time.

        Raises:
            ConnectionFailed: there is no connection in time.
        """
        loop = asyncio.get_running_loop()
        self._opened = loop.create_future()
        self._task = loop.create_task(self._run())
        await asyncio.shield(self._opened)

    async def close(self, by: float) -> None:
        """Close the connection, and have what is not over fail.

        Args:
            by: when the connection is cut that the server does not close, by the event loop's
                clock.
        """
        assert self._task is not None
        self._close_by = by
        self._task.cancel()
        await asyncio.wait({self._task})
        self._opened.cancel()
        self._fail(ConnectionFailed("the chat was closed"))

    def want(self) -> None:
        """Connect again, if there was nothing to do so far."""
        self._wanted.set()

    # Dialling.

    async def _run(self) -> None:
        """Keep a connection, for as long as there is to be one."""
        loop = asyncio.get_running_loop()
        try:
            until = loop.time() + self._timeouts.opening
            first = True
            while True:
                socket = await self._connect(until)
                if socket is not None:
                    wanted = await self._use(socket)
                    # One that says nothing before it closes is as good as none.
                    if first or self._pause.is_shortest:
                        until = loop.time() + self._timeouts.patience
                    first = False
                    left = until - loop.time()
                    if wanted and left > 0:
                        self._set_state(State.LOST)
                        await asyncio.sleep(min(self._pause.next(), left))
                        continue
                    if wanted and self.failure is not None:
                        self._hooks.drop(self.failure)
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

    async def _connect(self, until: float) -> Socket | None:
        """Return a connection; None if it was given up for now, and what waited has failed.

        Raises:
            ConnectionFailed: there will be none.
        """
        try:
            return await reach(self._url, self._fresh_token, self._timeouts, self._pause, until)
        except Unreached as unreached:
            failure = ConnectionFailed(
                f"cannot connect to {shown(self._url)}: {unreached}",
                status=unreached.status,
                final=False,
            )
            if not self._opened.done():
                raise failure from unreached
            self.failure = failure
            self._hooks.drop(failure)
            return None

    async def _use(self, socket: Socket) -> bool:
        """Use a connection until it is lost; return whether to dial again at once.

        Raises:
            ConnectionFailed: not at all.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._complaint = None
        link = Link(socket, self._timeouts.ping, self._hooks.waiting, self._hear)
        header = socket.request and socket.request.headers.get("Authorization")
        if header:
            link.send(self._auth(header.removeprefix("Bearer ")))
        self._hooks.begin(link)
        self.link, self.failure = link, None
        self._set_state(State.OPEN)
        if not self._opened.done():
            self._opened.set_result(None)
        try:
            await link.run()
        finally:
            self.link = None
            if self._renewal is not None:
                self._renewal.cancel()
            closing = self._timeouts.closing
            await link.close(closing if self._close_by is None else self._close_by - loop.time())
        if link.spoke or loop.time() - began > self._timeouts.ping:
            self._pause.reset()
        return self._ended(link)

    def _ended(self, link: Link) -> bool:
        """Tell from the end of a connection whether there is to be another one at once.

        Raises:
            ConnectionFailed: there is to be none.
        """
        code, reason = link.socket.close_code, link.socket.close_reason
        if code == Close.MESSAGE_TOO_BIG:
            link.give_up_longest()
        if code == Close.NORMAL and not self._hooks.waiting():
            return False
        # The error before the close tells more, if it is about the same.
        if self._complaint is not None and self._complaint.code == reason:
            reason = self._complaint.message
        failure = ConnectionFailed(
            link.failure or f"the server closed the connection: {reason or code}",
            close_code=code,
            final=False,
        )
        # A token that has expired can be replaced, where one that was not good cannot.
        replaceable = callable(self._token) and self.principal is not None
        if code in FINAL and not (code == Close.POLICY_VIOLATION and replaceable):
            failure.final = True
            raise failure
        self.principal = None
        self.failure = failure
        return True

    def _hear(self, frame: Mapping[str, Any]) -> None:
        if frame.get("type") == "hello":
            assert self.link is not None
            self.limits = self.link.limits
            self.principal = frame.get("principal", self.principal)
        elif is_refusal(frame):
            self._complaint = ServerError.of(frame)
        else:
            self._hooks.hear(frame)

    # Who the client is.

    async def _fresh_token(self) -> str | None:
        if self._token is None or isinstance(self._token, str):
            return self._token
        try:
            return await self._token()
        except Exception as error:
            raise Unreached(f"no token: {str(error) or type(error).__name__}") from error

    def _auth(self, token: str) -> Ask:
        return Ask(lambda: Auth(token=token), self._authenticated)

    def _authenticated(self, answer: Mapping[str, Any]) -> None:
        """Take the answer to ``auth``. Where it is refused, the token before it still holds."""
        if is_refusal(answer):
            self._complaint = ServerError.of(answer)
            if self._complaint.retryable:
                self._renew_in(LEAST_RENEWAL)
            return
        self.principal = answer["principal"]
        if (life := _life(answer)) is not None:
            self._renew_in(life * RENEW_AT)

    def _renew_in(self, seconds: float) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
        if callable(self._token) and self.link is not None:
            renewal = self._renew(max(LEAST_RENEWAL, seconds), self.link)
            self._renewal = asyncio.get_running_loop().create_task(renewal)

    async def _renew(self, pause: float, link: Link) -> None:
        """Say again who the client is. If that fails, the server closes; then it is tried anew."""
        while True:
            await asyncio.sleep(pause)
            with contextlib.suppress(Unreached):
                token = await self._fresh_token()
                assert token is not None
                link.send(self._auth(token))
                return
            pause = LEAST_RENEWAL

    # Its end.

    def _set_state(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            if self._on_state is not None:
                self._on_state(state)

    def _fail(self, failure: ConnectionFailed) -> None:
        if self.state is State.CLOSED:
            return
        self._set_state(State.CLOSED)
        self.failure = failure
        self._hooks.drop(failure)
        if not self._opened.done():
            self._opened.set_exception(failure)
            self._opened.exception()  # whoever entered may have left meanwhile


def _life(answer: Mapping[str, Any]) -> float | None:
    """Return for how many seconds a token is good still; None if for ever, or nobody knows.

    An older server tells only a time, of which clocks may differ.
    """
    seconds, expires = answer.get("expires_in"), answer.get("expires")
    if seconds is None and expires is not None and (left := expires - time.time()) > 0:
        seconds = left
    return seconds_of(seconds)
