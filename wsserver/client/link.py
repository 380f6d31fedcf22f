"""One connection to a server: frames out, each with a name, and answers in.

A server that says ``hello`` repeats the name of a frame, its ``request``, in the answer. An older
server knows no names: its answer is for the oldest frame that fits.
"""

import asyncio
import contextlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from websockets.exceptions import ConnectionClosed

from wsserver.client.dial import FINAL, Socket
from wsserver.client.failures import ConnectionFailed, seconds_of
from wsserver.errors import Code
from wsserver.protocol import (
    Auth,
    ClientFrame,
    Close,
    Delete,
    List,
    Open,
    Prompt,
    Rename,
    Resume,
    Stop,
)

__all__ = ["Ask", "Limits", "Link", "is_refusal"]

MOST_UNANSWERED = 8  # prompts, resumes and requests; well below the bad frames that close a socket
MARGIN = 1.05  # of a time that the server asks to wait, as clocks and timers differ
EXPECTING = 4.0  # seconds of silence, while something is expected, before a ping and after it
SLOWEST = 16384  # bytes a second that a link takes; a large frame may silence it for longer
MESSAGES_PER_TURN = 16  # taken before whoever reads the replies gets a turn

_ANSWERS: dict[str, type[ClientFrame]] = {
    "authenticated": Auth,
    "conversations": List,
    "deleted": Delete,
    "history": Open,
    "renamed": Rename,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts on one connection; None where it does not tell.

    Attributes:
        message_size: bytes of a frame.
        prompt_size: bytes of a prompt and its system prompt, as UTF-8.
        answer_size: bytes of the largest frame that the server sends.
        frame_rate: frames a second in the long run.
        frame_burst: frames at once.
        bad_frames: unusable frames in a row, after which the server closes.
        requests: frames that may wait for an answer.
        generations_per_socket: replies that may run or wait.
        queue_size: prompts that may wait in a conversation.
    """

    message_size: int | None = None
    prompt_size: int | None = None
    answer_size: int | None = None
    frame_rate: float | None = None
    frame_burst: int | None = None
    bad_frames: int | None = None
    requests: int | None = None
    generations_per_socket: int | None = None
    queue_size: int | None = None

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """Make them of a ``hello``, without the limits that are not known here."""
        known = {key: told[key] for key in cls.__slots__ if key in told}
        if not all(isinstance(value, int | float) for value in known.values()):
            raise TypeError("a limit is a number")
        return cls(**known)


@dataclass(eq=False, slots=True)
class Ask:
    """Something that the server has to answer, over however many connections.

    Attributes:
        make: makes the frame, in the moment in which it is sent.
        settle: takes the answer, or the ``error`` that refuses the frame.
        sent: how often a frame was sent.
    """

    make: Callable[[], ClientFrame]
    settle: Callable[[Mapping[str, Any]], None]
    sent: int = 0


@dataclass(eq=False, slots=True)
class _Sent:
    """A frame that is not answered yet, and its size in bytes."""

    ask: Ask
    frame: ClientFrame
    size: int


class Link:
    """Uses one connection until it is lost.

    Args:
        socket: the connection.
        silence: seconds in which nothing comes before a ping, and after it; less is enough while
            something is expected.
        expecting: whether a reply is expected.
        hear: called with ``hello``, with frames that have an ``id``, and with frames that nobody
            asked for.

    Attributes:
        limits: of the server, if it has told.
        spoke: whether the server has said anything besides ``hello`` and refusals.
        failure: why the connection ended, where the server did not close it.
    """

    def __init__(
        self,
        socket: Socket,
        silence: float,
        expecting: Callable[[], bool],
        hear: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.socket = socket
        self.limits: Limits | None = None
        self.spoke = False
        self.failure = ""
        self._silence = silence
        self._expecting = expecting
        self._hear = hear
        self._named = False  # the server answers by name
        self._greeted = asyncio.Event()
        self._wake = asyncio.Event()  # there is something to write
        self._stirred = asyncio.Event()  # there is something to expect
        self._urgent: deque[Ask] = deque()
        self._prompts: deque[Ask] = deque()
        self._requests: deque[Ask] = deque()
        self._sent: dict[str, _Sent] = {}
        self._names = map(str, itertools.count(1))
        self._window = MOST_UNANSWERED
        self._held_until = 0.0
        self._broken: BaseException | None = None

    # What is sent: stops and `auth`; prompts and resumes; requests.

    def send(self, ask: Ask) -> None:
        """Send before all that waits."""
        self._put(ask, self._urgent)

    def prompt(self, ask: Ask) -> None:
        """Send when its turn comes, as many unanswered at once as the server takes."""
        self._put(ask, self._prompts)

    def request(self, ask: Ask) -> None:
        """Send when no prompt waits; to a server that knows no names, one at a time."""
        self._put(ask, self._requests)

    def waits(self, ask: Ask) -> bool:
        """Whether a prompt has not been sent yet on this connection."""
        return ask in self._prompts

    def withdraw(self, ask: Ask) -> None:
        """Send it no more."""
        for queue in (self._prompts, self._requests):
            with contextlib.suppress(ValueError):
                queue.remove(ask)

    def _put(self, ask: Ask, queue: deque[Ask]) -> None:
        queue.append(ask)
        self._wake.set()
        self._stirred.set()

    # Its life.

    async def run(self) -> None:
        """Use the connection until it is lost.

        Raises:
            ConnectionFailed: this is no server of the protocol.
        """
        loop = asyncio.get_running_loop()
        helpers = [loop.create_task(self._write()), loop.create_task(self._watch())]
        for helper in helpers:
            helper.add_done_callback(self._check)
        try:
            await self._read()
        except ConnectionClosed as closed:
            ours = closed.sent if not closed.rcvd_then_sent else None
            if ours is not None and ours.code in FINAL | {Close.MESSAGE_TOO_BIG}:
                reason = f"this is no server of this protocol: {ours.reason or ours.code}"
                raise ConnectionFailed(reason) from closed
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.wait(helpers)
        if self._broken is not None:
            raise self._broken

    async def close(self, within: float) -> None:
        """Close the connection, and cut it if the server does not answer in time."""
        closing = asyncio.ensure_future(self.socket.close())
        await asyncio.wait({closing}, timeout=within)
        self.socket.transport.abort()
        await closing

    def _check(self, helper: "asyncio.Task[None]") -> None:
        if not helper.cancelled() and (error := helper.exception()) is not None:
            self._broken = error
            self.socket.transport.abort()

    def give_up_longest(self) -> bool:
        """Refuse the longest frame that has no answer, as the server found one too long.

        Returns:
            whether there was any.
        """
        if not self._sent:
            return False
        name = max(self._sent, key=lambda name: self._sent[name].size)
        self._sent.pop(name).ask.settle(_too_long("The server takes no frame that long."))
        return True

    # Writing.

    async def _write(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            # A server says `hello` before it answers a ping, or not at all.
            pong = asyncio.ensure_future(await self.socket.ping())
            pong.add_done_callback(lambda _: self._greeted.set())
            await self._greeted.wait()
            while True:
                self._wake.clear()
                data = self._next()
                if data is None:
                    await self._wake.wait()
                else:
                    await self.socket.send(data, text=True)

    def _next(self) -> bytes | None:
        """Take the next frame to be sent, if there is one that may be sent now."""
        while (ask := self._take_ask()) is not None:
            if (data := self._encode(ask)) is not None:
                return data
        return None

    def _take_ask(self) -> Ask | None:
        loop = asyncio.get_running_loop()
        if self._urgent:
            return self._urgent.popleft()
        if self._held_until > loop.time():
            loop.call_at(self._held_until, self._wake.set)
            return None
        asked = [sent.frame for sent in self._sent.values() if not isinstance(sent.frame, Stop)]
        if len(asked) >= self._window:
            return None
        if self._prompts:
            return self._prompts.popleft()
        # Without names, an error could be about any of several requests.
        one_by_one = not self._named and any(not isinstance(f, Prompt | Resume) for f in asked)
        return self._requests.popleft() if self._requests and not one_by_one else None

    def _encode(self, ask: Ask) -> bytes | None:
        """Return a frame as bytes; None if the server would find it too long."""
        frame, name, limits = ask.make(), next(self._names), self.limits or Limits()
        if self._named:
            frame = frame.model_copy(update={"request": name})
        elif isinstance(frame, Prompt):  # an older server knows no `retry_of`
            frame = frame.model_copy(update={"retry_of": None})
        data = frame.model_dump_json(exclude_none=True).encode()
        sizes = [("frame", len(data), limits.message_size)]
        if isinstance(frame, Prompt):
            sizes.insert(0, ("prompt", frame.size, limits.prompt_size))
        for what, size, most in sizes:
            if most is not None and size > most:
                ask.settle(_too_long(f"The {what} has {size:,} bytes; {most:,} are allowed."))
                return None
        ask.sent += 1
        if self._named or not isinstance(frame, Stop):  # an older server does not answer a `stop`
            self._sent[name] = _Sent(ask, frame, len(data))
        return data

    # Reading.

    async def _read(self) -> None:
        turn = 0
        async for message in self.socket:
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

    def _take(self, frame: dict[str, Any]) -> None:
        kind, refusal = frame.get("type"), is_refusal(frame)
        if kind == "hello":
            self.limits = Limits.of(frame.get("limits", {}))
            self._named = True
            self._greeted.set()
        elif not refusal:
            self.spoke = True
        sent = self._sent.pop(self._answered(frame) or "", None)
        if refusal and frame["code"] == Code.LIMIT:
            self._hold(seconds_of(frame.get("retry_after")))
        elif kind == "start":
            self._window = min(self._most, self._window + 1)
        if sent is not None:
            sent.ask.settle(frame)
            self._wake.set()
        if sent is None or frame.get("id") is not None:
            self._hear(frame)

    def _answered(self, frame: Mapping[str, Any]) -> str | None:
        """Return the name of the frame that is answered, if any is."""
        name: str | None = frame.get("request")
        if name is not None:
            return name
        # An id says enough. All else without a name answers only what was sent without one.
        nameless = frame.get("id") is None
        return next(
            (
                name
                for name, sent in self._sent.items()
                if not (nameless and sent.frame.request is not None) and _fits(frame, sent.frame)
            ),
            None,
        )

    @property
    def _most(self) -> int:
        """The most frames that may be unanswered, even if all of them are refused."""
        limits = self.limits or Limits()
        bounds = [limits.requests, limits.bad_frames and limits.bad_frames // 2]
        return max(1, min([MOST_UNANSWERED, *(int(b) for b in bounds if b is not None)]))

    def _hold(self, seconds: float | None) -> None:
        """Send nothing but what is urgent for a time, and then less at once."""
        if seconds is not None:
            until = asyncio.get_running_loop().time() + seconds * MARGIN
            self._held_until = max(self._held_until, until)
            self._window = max(1, len(self._sent) // 2)

    # Whether the server is there.

    async def _watch(self) -> None:
        """Cut the connection when nothing comes any more, not even an answer to a ping.

        A network that is gone tells nobody. Whatever comes is a sign of life.
        """
        loop, pinged = asyncio.get_running_loop(), None
        while True:
            heard, pause = self.socket.heard, self._pause
            if pinged is not None and heard >= pinged:
                pinged = None
            due = (heard if pinged is None else pinged) + pause
            late = loop.time() - due
            if late < 0:
                self._stirred.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await self._stirred.wait()
            # A program that slept has not read what came meanwhile: it asks once more.
            elif pinged is None or late > pause / 2:
                pinged = loop.time()
                with contextlib.suppress(TimeoutError, ConnectionClosed):
                    async with asyncio.timeout(pause):
                        await self.socket.ping()
            else:
                self.failure = f"nothing came from the server for {loop.time() - heard:.1f} s"
                self.socket.transport.abort()
                return

    @property
    def _pause(self) -> float:
        """Seconds of silence before a ping, and after it."""
        if not (self._sent or self._expecting()):
            return self._silence
        largest = max((sent.size for sent in self._sent.values()), default=0)
        return min(self._silence, EXPECTING + largest / SLOWEST)


def is_refusal(frame: Mapping[str, Any]) -> bool:
    """Whether a frame is an error about a frame of the client, and no terminal."""
    return frame.get("type") == "error" and frame.get("id") is None


def _too_long(message: str) -> Mapping[str, Any]:
    """Return the error for a frame that the server would not take."""
    return {"type": "error", "code": Code.TOO_LONG, "message": message, "retryable": False}


def _fits(frame: Mapping[str, Any], asked: ClientFrame) -> bool:
    """Whether a frame without a name can be the answer."""
    kind, name = frame.get("type"), frame.get("id")
    if name is not None:
        answers = kind in {"start", "done", "error"}
        return answers and isinstance(asked, Prompt | Resume) and asked.id == name
    conversation = getattr(asked, "conversation", None)
    if kind != "error":
        known = frame.get("conversation") in {None, conversation}
        return isinstance(asked, _ANSWERS.get(str(kind), ())) and known
    if frame["code"] == Code.NOT_RUNNING:
        return False
    about = frame.get("about")
    if isinstance(asked, Prompt | Resume):
        # A frame over the rate is refused before it is read.
        return about == asked.id or (about is None and frame["code"] == Code.LIMIT)
    return about in {None, conversation}
