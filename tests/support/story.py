"""A reply that the model writes step by step, and its frames over many sockets."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect

from tests.support.client import Client, Frame, client
from tests.support.host import Host
from tests.support.proxy import Cut, reset
from tests.support.puppet import Puppet, Reply, Thinking, until
from wsserver import Code, ModelError
from wsserver.generation import State
from wsserver.hub.live import Generation
from wsserver.stores.base import Entry

__all__ = [
    "DROPS",
    "ENDINGS",
    "FAMILY",
    "LASTING",
    "PIECES",
    "SIZE",
    "Gate",
    "Story",
    "Transcript",
    "begin",
    "check_again",
    "come_back",
    "crowd",
    "cut_up",
    "cuts",
    "endings",
    "joined",
    "line",
    "on_one_server",
    "pieces",
    "resumption",
    "say",
    "texts",
]

SIZE = 32  # characters: larger pieces are split, smaller ones merged up to it
# No time limit ends a reply or a connection in these tests.
LASTING: dict[str, Any] = {
    "port": 0,
    "frame_size": SIZE,
    "drain_timeout": 0,
    "grace": 3600,
    "grace_tokens": 10**9,
    "replay": 3600,
    "silence_timeout": 3600,
    "reply_timeout": 3600,
    "stop_timeout": 3600,
    "store_timeout": 3600,
    "send_timeout": 3600,
    "ping_interval": 3600,
}
FAMILY = "👩\u200d👩\u200d👧"
PIECES: Sequence[str] = (
    "Grüße ",
    "",
    Thinking("hm, 🤔"),
    Thinking(""),
    Thinking("𐍈"),
    '\0\x7f\u2028\\"\r\n',
    FAMILY,
    "🙂" * (3 * SIZE + 1),
    Thinking("é" * 2 * SIZE),
    "𐍈𐍈",
    "",
)
ENDINGS = ("done", "error", "stop")
DROPS = ("fin", "rst", "close")


def cut_up(said: Sequence[str], size: int = SIZE) -> list[str]:
    """Return the pieces as in the log: without empty pieces, and with large pieces split."""
    return [
        type(piece)(piece[start : start + size])
        for piece in said
        for start in range(0, len(piece), size)
    ]


def joined(said: Sequence[str]) -> dict[str, str]:
    return {
        "token": "".join(piece for piece in said if type(piece) is not Thinking),
        "thinking": "".join(piece for piece in said if type(piece) is Thinking),
    }


class Story:
    """A reply: the pieces of the model, the ending, and the progress."""

    def __init__(
        self,
        server: Host,
        puppet: Puppet,
        said: Sequence[str] = PIECES,
        ending: str = "done",
        *,
        conversation: str | None = None,
        alone: bool = False,
    ) -> None:
        self.server = server
        self.puppet = puppet
        self.said = said
        self.ending = ending
        self.name = secrets.token_urlsafe(16)
        self.conversation = conversation
        self.prompt: Frame = {"id": self.name}
        if alone:
            self.prompt["messages"] = [{"role": "user", "content": self.name}]
        else:
            self.prompt["prompt"] = self.name
        if conversation is not None:
            self.prompt["conversation"] = conversation
        self.log = cut_up(said, server.settings.frame_size)
        self.over = False
        self._before = len(puppet.replies)
        self._next = 0  # the index of the next piece
        self._reply: Reply | None = None

    def replies(self) -> list[Reply]:
        since = self.puppet.replies[self._before :]
        return [reply for reply in since if reply.request.prompt == self.name]

    async def reply(self) -> Reply:
        if self._reply is None:
            await until(self.replies)
            (self._reply,) = self.replies()
        return self._reply

    @property
    def seq(self) -> int:
        """The seq of the last piece that the model has said."""
        return len(cut_up(self.said[: self._next], self.server.settings.frame_size))

    @property
    def said_so_far(self) -> Sequence[str]:
        """The pieces that the model has said."""
        return self.said[: self._next]

    @property
    def left(self) -> int:
        """The number of pieces that the model has not said."""
        return len(self.said) - self._next

    async def tell(self, count: int) -> None:
        """Have the model say more pieces. After the last piece the reply ends."""
        reply = await self.reply()
        part = self.said[self._next : self._next + count]
        self._next += len(part)
        reply.say(*part)
        if len(part) < count and not self.over:
            self.over = True
            if self.ending == "done":
                reply.end()
            elif self.ending == "error":
                reply.fail(ModelError(Code.OVERLOADED))
            else:
                await until(reply.heard_out)
                await self.stop()

    async def stop(self) -> None:
        """Stop the reply as another client of the same principal."""
        async with client(self.server) as other:
            await other.send({"type": "stop", "id": self.name})
            await other.quiet()

    async def tell_more(self, than: int, count: int = 1) -> None:
        """Have the model say more if the client has everything so far."""
        while self.seq <= than and not self.over:
            await self.tell(count)

    async def tell_all(self) -> None:
        """Have the model say the rest, and wait for the end."""
        await self.tell(len(self.said) + 1)
        await until(lambda: self.generation.state is State.ENDED)

    @property
    def generation(self) -> Generation:
        found = self.server.app.hub.known("anonymous", self.name)
        assert found is not None
        return found

    def check_terminal(self, frame: Frame) -> None:
        assert frame["seq"] == len(self.log)
        assert frame["type"] == ("error" if self.ending == "error" else "done")
        if self.ending == "error":
            assert frame["code"] == "overloaded"
        else:
            expected = {
                "done": ("end_turn", None),
                "stop": ("stopped", "client"),
                "shutdown": ("stopped", "shutdown"),
            }
            assert (frame["reason"], frame.get("by")) == expected[self.ending]


class Transcript:
    """The frames of a story that one client has received over all its sockets."""

    def __init__(self, story: Story, after: int = 0) -> None:
        self.story = story
        self.after = after
        self.last = after  # the seq after which the client resumes
        self.heard = {"token": "", "thinking": ""}
        self.start: Frame | None = None
        self.terminal: Frame | None = None
        self.following = False  # this socket is between start and terminal

    def take(self, frame: Frame) -> None:
        kind, story = frame["type"], self.story
        assert frame["id"] == story.name
        if kind == "start":
            assert not self.following
            self.following = True
            assert frame.get("after", 0) in {0, self.last}
            start = {k: value for k, value in frame.items() if k not in {"prompt", "after"}}
            assert self.start in (None, start), "each `start` is the same"
            self.start = start
            return
        assert self.following, "frames come between a start and a terminal"
        if kind in self.heard:
            assert self.terminal is None, "no text follows the terminal"
            seq = frame["seq"]
            assert self.last < seq <= len(story.log)
            part = story.log[self.last : seq]
            assert {type(piece) is Thinking for piece in part} == {kind == "thinking"}
            assert "".join(part) == frame["text"]
            self.heard[kind] += frame["text"]
            self.last = seq
        else:
            assert frame["seq"] == self.last, "the terminal comes after all text"
            assert self.terminal in (None, frame), "each terminal is the same"
            self.terminal = frame
            self.following = False

    def lose(self) -> None:
        """The connection is lost."""
        self.following = False

    def start_over(self) -> None:
        """Expect the whole reply again, because the prompt was sent again."""
        self.following = False
        self.last = 0
        self.heard = {"token": "", "thinking": ""}

    async def hear(self, chat: Client, frames: int = 10**9, talk: int = 1) -> None:
        """Receive frames up to a number or the terminal. The model writes more when needed."""
        for _ in range(frames):
            if self.following:
                await self.story.tell_more(self.last, talk)
            self.take(await chat.receive())
            if not self.following:
                return

    async def catch_up(self, chat: Client) -> None:
        """Receive all text that the model has written, and no other frame."""
        while self.last < self.story.seq:
            self.take(await chat.receive())
        assert not await chat.quiet()

    def check(self) -> None:
        assert self.terminal is not None
        self.story.check_terminal(self.terminal)
        assert self.last == len(self.story.log)
        if self.after == 0:
            assert self.heard == joined(self.story.said)
        else:
            assert self.heard == joined(self.story.log[self.after :])
        assert len(self.story.replies()) == 1, "the model was asked once"


@asynccontextmanager
async def line(url: str, drop: str = "fin") -> AsyncIterator[Client]:
    """Connect. At the end drop the connection with unread data."""
    # The queue has no bound: a client with a full queue cannot close properly.
    async with connect(url, proxy=None, compression=None, max_queue=None) as socket:
        try:
            yield Client(socket)
        finally:
            if drop == "rst":
                reset(socket.transport)
            elif drop == "fin":
                socket.transport.abort()
            # Else the client sends a close frame.


def resumption(story: Story, after: int) -> Frame:
    return {"type": "resume", "id": story.name, "after": after}


async def begin(server: Host, story: Story) -> None:
    """Send the prompt and disconnect."""
    async with line(server.url) as chat:
        await chat.send(story.prompt)
        await story.reply()


async def come_back(chat: Client, transcript: Transcript) -> None:
    """Resume after the last piece. If the server does not know the reply, send the prompt."""
    transcript.lose()
    story = transcript.story
    await chat.send(resumption(story, transcript.last))
    frame = await chat.receive()
    if frame["type"] == "error" and "id" not in frame:
        assert (frame["code"], frame["about"]) == ("not_found", story.name)
        assert transcript.last == 0
        await chat.send(story.prompt)
        frame = await chat.receive()
    transcript.take(frame)


async def check_again(url: str, transcript: Transcript) -> None:
    """Resume after the last piece: only the start and the same terminal come."""
    async with line(url) as chat:
        await come_back(chat, transcript)
        transcript.take(await chat.receive())
        assert [frame["type"] for frame in chat.frames[:-1]] == ["start"]
        assert chat.frames[-1] == transcript.terminal
        assert not await chat.quiet()


endings = st.sampled_from(ENDINGS)
texts = st.one_of(
    st.text(max_size=5),
    st.text("a🙂é", max_size=3).map(lambda text: text * SIZE),
)
pieces = st.builds(lambda kind, text: kind(text), st.sampled_from([str, str, Thinking]), texts)
cuts = st.builds(
    Cut,
    after=st.one_of(st.integers(0, 350), st.integers(0, 2500)),
    reset=st.booleans(),
    late=st.booleans(),
)


def on_one_server(examples: int) -> hypothesis_settings:
    """Let the examples share one server. Each example has its own generation."""
    return hypothesis_settings(
        max_examples=examples,
        # No shrinking: a failing example may wait for its time limit each time.
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class Gate:
    """Holds back the commits of a server until the gate is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Host) -> None:
        self.opened = asyncio.Event()
        self.reached = asyncio.Event()
        commit = server.app.store.commit

        async def commit_later(entries: Sequence[Entry]) -> None:
            self.reached.set()
            await self.opened.wait()
            await commit(entries)

        monkeypatch.setattr(server.app.store, "commit", commit_later)

    async def reached_or(self, other: asyncio.Future[None]) -> None:
        """Wait until a commit is held back, or until the other future is done."""
        await until(lambda: self.reached.is_set() or other.done())


@asynccontextmanager
async def crowd(server: Host, size: int) -> AsyncIterator[list[Client]]:
    async with AsyncExitStack() as lines:
        yield [await lines.enter_async_context(line(server.url)) for _ in range(size)]


async def say(story: Story, count: int) -> None:
    """Have the model say more pieces without an end."""
    await story.tell(min(count, story.left))
    await until((await story.reply()).heard_out)
