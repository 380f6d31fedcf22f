"""A connection to the server. One task opens it, and opens it again when it is lost."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from wsserver.client.credentials import Credentials, Token
from wsserver.client.dial import (
    FINAL_CLOSE_CODES,
    AttemptFailed,
    Backoff,
    Socket,
    Timeouts,
    dial,
    without_credentials,
)
from wsserver.client.failures import ConnectionFailed, ServerError
from wsserver.client.history import Limits
from wsserver.client.link import Link, is_refusal
from wsserver.protocol import Close


class State(StrEnum):
    """The state of a chat's connection."""

    CONNECTING = "connecting"
    OPEN = "open"
    LOST = "lost"  # the client is trying again
    IDLE = "idle"  # the client connects again at the next request
    CLOSED = "closed"  # for good


class Requester(Protocol):
    """Sends requests over the connection and receives frames. No method may block."""

    def pending(self) -> bool:
        """Return whether a request has not ended."""

    def send_all(self, link: Link) -> None:
        """Send all requests that have not ended, on a new connection."""

    def receive(self, frame: Mapping[str, Any]) -> None:
        """Receive a frame that has an ``id``, or that answers no request."""

    def fail_all(self, failure: ConnectionFailed) -> None:
        """Let all requests fail that have not ended."""


class Connection:
    """Connects, uses the :class:`Link`, and connects again."""

    def __init__(
        self,
        url: str,
        token: Token | None,
        timeouts: Timeouts,
        on_state: Callable[[State], None] | None,
    ) -> None:
        self.requesters: Sequence[Requester] = ()
        self.link: Link | None = None  # the current link; None while there is no connection
        self.state = State.CONNECTING
        self.closing = False  # whether the chat is about to close the connection
        # The reason why there is no connection; None while there is one.
        self.failure: ConnectionFailed | None = None
        self.limits: Limits | None = None  # the server's limits; None before its first `hello`
        self.models: tuple[str, ...] = ()  # the server's models; empty before its first `hello`
        self._url = url
        self._credentials = Credentials(token, self._note_error)
        self._timeouts = timeouts
        self._on_state = on_state
        self._backoff = Backoff()
        self._needed = asyncio.Event()  # a request was made
        self._opened: asyncio.Future[None]
        self._task: asyncio.Task[None] | None = None
        self._close_deadline: float | None = None
        self._last_error: ServerError | None = None  # the last error that refused no request

    @property
    def principal(self) -> str | None:
        """The principal of the client; None if the server has not sent it."""
        return self._credentials.principal

    async def open(self) -> None:
        """Connect for the first time.

        Raises:
            ConnectionFailed: there was no connection in time.
        """
        loop = asyncio.get_running_loop()
        self._opened = loop.create_future()
        self._task = loop.create_task(self._run())
        await asyncio.shield(self._opened)

    async def close(self, deadline: float) -> None:
        """Close the connection, and let all requests fail.

        Args:
            deadline: when to abort the connection if the server has not closed it, by the event
                loop's clock.
        """
        assert self._task is not None
        self._close_deadline = deadline
        self._task.cancel()
        await asyncio.wait({self._task})
        self._opened.cancel()
        self._fail(ConnectionFailed("the chat was closed"))

    def check(self) -> None:
        """Check that requests can be made.

        Raises:
            RuntimeError: the chat was not entered.
            ConnectionFailed: the chat is closed.
        """
        if self._task is None:
            raise RuntimeError("use the chat inside its `async with`")
        if self.state is State.CLOSED or self.closing:
            raise self.failure or ConnectionFailed("the chat was closed")

    def reopen(self) -> None:
        """Connect again if the state is idle."""
        self._needed.set()

    async def _run(self) -> None:
        """Connect and reconnect, until the chat is closed or a failure is final."""
        loop = asyncio.get_running_loop()
        try:
            deadline = loop.time() + self._timeouts.opening
            first = True
            while True:
                socket = await self._connect(deadline)
                if socket is not None:
                    again = await self._use(socket)
                    # A connection on which the server answered nothing does not count as success.
                    if first or not self._backoff.failed:
                        deadline = loop.time() + self._timeouts.patience
                    first = False
                    left = deadline - loop.time()
                    if again and left > 0:
                        self._set_state(State.LOST)
                        await asyncio.sleep(min(self._backoff.next(), left))
                        continue
                    if again and self.failure is not None:
                        self._fail_requests(self.failure)
                self._needed.clear()
                self._set_state(State.IDLE)
                await self._needed.wait()
                deadline = loop.time() + self._timeouts.patience
                self._set_state(State.CONNECTING)
        except ConnectionFailed as failure:
            self._fail(failure)
        except Exception as error:  # noqa: BLE001
            broken = ConnectionFailed(f"{type(error).__name__}: {error}")
            broken.__cause__ = error
            self._fail(broken)

    async def _connect(self, deadline: float) -> Socket | None:
        """Return a connection; None if there was none in time, and all requests have failed.

        Raises:
            ConnectionFailed: the failure is final, or there was no connection before.
        """
        fresh_token = self._credentials.fresh_token
        try:
            return await dial(self._url, fresh_token, self._timeouts, self._backoff, deadline)
        except AttemptFailed as attempt:
            failure = ConnectionFailed(
                f"cannot connect to {without_credentials(self._url)}: {attempt}",
                status=attempt.status,
                final=False,
            )
            if not self._opened.done():
                raise failure from attempt
            self.failure = failure
            self._fail_requests(failure)
            return None

    async def _use(self, socket: Socket) -> bool:
        """Use a connection until it is lost; return whether to connect again without a request.

        Raises:
            ConnectionFailed: the end of the connection is final.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._last_error = None
        link = Link(socket, self._timeouts.ping, self._pending, self._receive)
        header = socket.request and socket.request.headers.get("Authorization")
        if header:
            # The handshake authenticated the client. The `auth` frame asks when the token expires.
            self._credentials.send(header.removeprefix("Bearer "), link)
        for requester in self.requesters:
            requester.send_all(link)
        self.link, self.failure = link, None
        self._set_state(State.OPEN)
        if not self._opened.done():
            self._opened.set_result(None)
        try:
            await link.run()
        finally:
            self.link = None
            self._credentials.stop()
            deadline = self._close_deadline
            timeout = self._timeouts.closing if deadline is None else deadline - loop.time()
            await link.close(timeout)
        if link.answered or loop.time() - began > self._timeouts.ping:
            self._backoff.reset()
        return self._should_reconnect(link)

    def _should_reconnect(self, link: Link) -> bool:
        """Return whether to connect again without a request, after a connection has ended.

        Raises:
            ConnectionFailed: the close code is final.
        """
        code, reason = link.socket.close_code, link.socket.close_reason
        if code == Close.MESSAGE_TOO_BIG:
            link.refuse_longest()
        if code == Close.NORMAL and not self._pending():
            return False
        # The error frame before the close has the better message, if it has the same code.
        if self._last_error is not None and self._last_error.code == reason:
            reason = self._last_error.message
        failure = ConnectionFailed(
            link.failure or f"the server closed the connection: {reason or code}",
            close_code=code,
            final=False,
        )
        expired = code == Close.POLICY_VIOLATION and self._credentials.can_replace
        if code in FINAL_CLOSE_CODES and not expired:
            failure.final = True
            raise failure
        self._credentials.principal = None
        self.failure = failure
        return True

    def _receive(self, frame: Mapping[str, Any]) -> None:
        if frame.get("type") == "hello":
            assert self.link is not None
            self.limits, self.models = self.link.limits, self.link.models
            self._credentials.principal = frame.get("principal", self.principal)
        elif is_refusal(frame):
            self._note_error(ServerError.of(frame))
        else:
            for requester in self.requesters:
                requester.receive(frame)

    def _note_error(self, error: ServerError) -> None:
        self._last_error = error

    def _pending(self) -> bool:
        return any(requester.pending() for requester in self.requesters)

    def _fail_requests(self, failure: ConnectionFailed) -> None:
        for requester in self.requesters:
            requester.fail_all(failure)

    def _set_state(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            if self._on_state is not None:
                self._on_state(state)

    def _fail(self, failure: ConnectionFailed) -> None:
        """Close for good."""
        if self.state is State.CLOSED:
            return
        self._set_state(State.CLOSED)
        self.failure = failure
        self._fail_requests(failure)
        if not self._opened.done():
            self._opened.set_exception(failure)
            self._opened.exception()  # marks it as retrieved, since `open` may have been cancelled
