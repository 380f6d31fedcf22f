"""Wherever the line is lost, who resumes has what the model said, to the byte and once."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

import wsserver
from tests.support.client import Client, Frame, client
from tests.support.proxy import Cut, Proxy, reset
from tests.support.puppet import Puppet, Reply, Thinking, until
from tests.test_slow_reader import Sluggard, sluggard
from wsserver import Code, ModelError, Server
from wsserver.generation import State
from wsserver.live import Generation
from wsserver.stores.base import Entry

pytestmark = pytest.mark.slow

SIZE = 32  # characters by which larger pieces are cut, and up to which they are merged
# Nothing is too late here, and nobody waits too long.
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
    """Let the examples share the server: each has a generation of its own."""
    return hypothesis_settings(
        max_examples=examples,
        deadline=None,
        # One that fails may do so by waiting in vain: too long to make it smaller.
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def cut_up(said: Sequence[str], size: int = SIZE) -> list[str]:
    """Return the pieces that have a seq: without empty ones, and large ones in parts."""
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
    """A reply: what the model will say, how it will end, and how far it has come."""

    def __init__(
        self,
        server: Server,
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
        self._next = 0  # of what is to be said
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
        """The number of the last piece that the model has said so far."""
        return len(cut_up(self.said[: self._next], self.server.settings.frame_size))

    @property
    def left(self) -> int:
        """How many pieces are still to be said."""
        return len(self.said) - self._next

    async def tell(self, count: int) -> None:
        """Have the model say so many pieces more; after the last one it ends."""
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
                async with client(self.server) as other:
                    await other.send({"type": "stop", "id": self.name})
                    await other.quiet()

    async def tell_more(self, than: int, count: int = 1) -> None:
        """Have the model say something, if all has been read up to here."""
        while self.seq <= than and not self.over:
            await self.tell(count)

    async def tell_all(self) -> None:
        """Have the model say the rest, and wait for the end."""
        await self.tell(len(self.said) + 1)
        await until(lambda: self.generation.state is State.ENDED)

    @property
    def generation(self) -> Generation:
        found = self.server._hub.known("anonymous", self.name)
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
    """What one client has of a story, over all its sockets."""

    def __init__(self, story: Story, after: int = 0) -> None:
        self.story = story
        self.after = after
        self.last = after  # the seq that it resumes from
        self.heard = {"token": "", "thinking": ""}
        self.start: Frame | None = None
        self.terminal: Frame | None = None
        self.following = False  # on this socket there was a start, and no terminal yet

    def take(self, frame: Frame) -> None:
        kind, story = frame["type"], self.story
        assert frame["id"] == story.name
        if kind == "start":
            assert not self.following
            self.following = True
            assert frame.get("after", 0) in {0, self.last}
            start = {k: value for k, value in frame.items() if k not in {"prompt", "after"}}
            assert self.start in (None, start), "it is found again as it was"
            self.start = start
            return
        assert self.following, "all comes between a start and a terminal"
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
            assert self.terminal in (None, frame), "there is one terminal, and no other"
            self.terminal = frame
            self.following = False

    def lose(self) -> None:
        """The socket is gone."""
        self.following = False

    def start_over(self) -> None:
        """The prompt was sent again: all comes again from the beginning."""
        self.following = False
        self.last = 0
        self.heard = {"token": "", "thinking": ""}

    async def hear(self, chat: Client, frames: int = 10**9, talk: int = 1) -> None:
        """Receive so many frames, or up to the terminal; let the model speak where none waits."""
        for _ in range(frames):
            if self.following:
                await self.story.tell_more(self.last, talk)
            self.take(await chat.receive())
            if not self.following:
                return

    async def catch_up(self, chat: Client) -> None:
        """Receive all that was said so far, and nothing else."""
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
    """Connect; in the end be gone without having read what came."""
    # Without a bound on its queue: a client whose queue is full cannot say farewell.
    async with connect(url, proxy=None, compression=None, max_queue=None) as socket:
        try:
            yield Client(socket)
        finally:
            if drop == "rst":
                reset(socket.transport)
            elif drop == "fin":
                socket.transport.abort()
            # Else it says farewell.


def resumption(story: Story, after: int) -> Frame:
    return {"type": "resume", "id": story.name, "after": after}


async def begin(server: Server, story: Story) -> None:
    """Ask, and be gone."""
    async with line(server.url) as chat:
        await chat.send(story.prompt)
        await story.reply()


async def come_back(chat: Client, transcript: Transcript) -> None:
    """Resume from what was received; send the prompt where the server knows of none."""
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
    """Who has it all gets nothing but the start and the same terminal."""
    async with line(url) as chat:
        await come_back(chat, transcript)
        transcript.take(await chat.receive())
        assert [frame["type"] for frame in chat.frames[:-1]] == ["start"]
        assert chat.frames[-1] == transcript.terminal
        assert not await chat.quiet()


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/db"


@pytest.fixture
async def server(puppet: Puppet, store: str) -> AsyncIterator[Server]:
    async with wsserver.serve(puppet, store=store, **LASTING) as running:
        yield running


# Dropped between frames.


@pytest.mark.parametrize("meanwhile", ["nothing", "something", "all"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_drop_at_any_frame_loses_nothing(
    server: Server, puppet: Puppet, ending: str, meanwhile: str
) -> None:
    frames = len(cut_up(PIECES)) + 2  # a start, and a terminal
    for index in range(frames + 1):
        story = Story(server, puppet, ending=ending)
        transcript = Transcript(story)
        async with line(server.url, DROPS[index % 3]) as chat:
            await chat.send(story.prompt)
            await transcript.hear(chat, index)
            if meanwhile != "nothing":
                await story.reply()  # it was accepted, whether or not the client knows
        if meanwhile == "something":
            await story.tell(3)
        elif meanwhile == "all":
            await story.tell_all()
        complete = transcript.terminal is not None
        assert complete == (index == frames)
        kind = "error" if ending == "error" else "done"
        async with line(server.url) as chat:
            await come_back(chat, transcript)
            await transcript.hear(chat)
            assert not await chat.quiet(), "nothing follows the terminal"
            if complete:
                assert [frame["type"] for frame in chat.frames] == ["start", kind, "pong"]
        transcript.check()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_socket_for_each_frame_is_enough(
    server: Server, puppet: Puppet, ending: str
) -> None:
    story = Story(server, puppet, ending=ending)
    transcript = Transcript(story)
    sockets = 0
    while transcript.terminal is None:
        async with line(server.url, DROPS[sockets % 3]) as chat:
            await come_back(chat, transcript)
            await transcript.hear(chat, 1, talk=2)
        sockets += 1
    assert sockets > 8
    transcript.check()
    await check_again(server.url, transcript)


visits = st.lists(
    st.tuples(
        st.integers(0, 8),  # frames that are received
        st.integers(1, 5),  # pieces that are said where none waits
        st.integers(0, 4),  # pieces that are said while nobody is there
        st.sampled_from(DROPS),
    ),
    max_size=6,
)


@given(said=st.lists(pieces, max_size=12), ending=endings, visits=visits)
@on_one_server(30)
async def test_any_sequence_of_visits_gives_the_whole_reply(
    server: Server,
    puppet: Puppet,
    said: list[str],
    ending: str,
    visits: list[tuple[int, int, int, str]],
) -> None:
    story = Story(server, puppet, said, ending)
    transcript = Transcript(story)
    for frames, talk, alone, drop in visits:
        async with line(server.url, drop) as chat:
            await come_back(chat, transcript)
            await transcript.hear(chat, frames, talk)
            await story.reply()
        await story.tell(alone)
    async with line(server.url) as chat:
        await come_back(chat, transcript)
        await transcript.hear(chat)
    transcript.check()
    await check_again(server.url, transcript)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_slow_reader_that_is_dropped_at_any_frame_loses_nothing(
    puppet: Puppet, ending: str
) -> None:
    said = [kind(text * 3000) for text in "a🙂é" * 5 for kind in (str, Thinking)]
    async with wsserver.serve(puppet, **{**LASTING, "frame_size": 10_000}) as server:
        short = Story(server, puppet, ("short",))
        await begin(server, short)
        await short.tell_all()
        index = 0
        complete = False
        while not complete:
            story = Story(server, puppet, said, ending)
            transcript = Transcript(story)
            await until(lambda: not server._endpoint.connections)
            async with sluggard(server) as slow:
                await slow.send(json.dumps(story.prompt))
                await overwhelm(server, story)
                await read_late(slow, transcript, index)
                complete = transcript.terminal is not None
            if index % 2:
                async with sluggard(server) as slow:
                    await slow.send(json.dumps(resumption(short, 0)))
                    await read_late(slow, Transcript(short))
                    await slow.send(json.dumps(resumption(story, transcript.last)))
                    transcript.lose()
                    await read_late(slow, transcript)
            else:
                async with line(server.url) as chat:
                    await come_back(chat, transcript)
                    await transcript.hear(chat)
            transcript.check()
            index += 1
        assert index > 20


async def overwhelm(server: Server, story: Story) -> None:
    """Have all said, more than the buffers of the one reader can hold."""
    reply = await story.reply()
    (socket,) = server._connections
    while socket.writable:
        assert not story.over, "the reader cannot be that fast"
        await story.tell(1)
        await until(reply.heard_out)
    await story.tell_all()


async def read_late(slow: Sluggard, transcript: Transcript, frames: int = 10**9) -> None:
    """Take so many frames, or all up to the terminal."""
    for _ in range(frames):
        while not slow.texts:
            assert await slow.read()
        frame = json.loads(slow.texts[0])
        del slow.events[0]
        transcript.take(frame)
        if not transcript.following:
            return


async def test_a_slow_reader_is_told_of_a_prompt_before_anything_is_said(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, **{**LASTING, "frame_size": 10_000}) as server:
        before = Story(server, puppet, ("Hello",), conversation=secrets.token_urlsafe(16))
        await begin(server, before)
        await before.tell_all()
        await until(lambda: not server._endpoint.connections)
        async with sluggard(server) as slow:
            await slow.send(json.dumps({"type": "open", "conversation": before.conversation}))
            await slow.until('"history"')
            slow.events.clear()
            large = Story(
                server, puppet, ["a" * 10_000] * 100, conversation=secrets.token_urlsafe(16)
            )
            await slow.send(json.dumps(large.prompt))
            await overwhelm(server, large)
            silent = Story(server, puppet, ("well",), conversation=before.conversation)
            await begin(server, silent)
            await slow.until(f'"start","id":"{silent.name}"')
            await silent.tell_all()
            for story in (large, silent):
                await slow.until(f'"done","id":"{story.name}"')
                transcript = Transcript(story)
                for frame in map(Client.parse, slow.texts):
                    if frame["id"] == story.name:
                        transcript.take(frame)
                transcript.check()


async def test_two_tabs_that_are_dropped_each_at_its_own_frame_lose_nothing(
    server: Server, puppet: Puppet
) -> None:
    said = ("Grüße ", Thinking("🤔"), "", "🙂" * (SIZE + 1))
    frames = len(cut_up(said)) + 2
    for first in range(frames + 1):
        before = Story(server, puppet, ("Hello",), conversation=secrets.token_urlsafe(16))
        async with line(server.url) as asker:
            await asker.send(before.prompt)
            await before.tell_all()
        for second in range(frames + 1):
            ending = ENDINGS[(first + second) % 3]
            story = Story(server, puppet, said, ending, conversation=before.conversation)
            one, two = transcripts = Transcript(story), Transcript(story)
            async with line(server.url, "fin") as tab, line(server.url, "rst") as other:
                await open_conversation(tab, story)  # before the prompt
                async with line(server.url, "fin") as asker:
                    await asker.prompt(story.name, **story.prompt)
                await one.hear(tab, first // 2)
                await open_conversation(other, story)  # after it
                await two.hear(other, second)
                await one.hear(tab, first - first // 2)
            await story.tell(second % 3)
            async with line(server.url) as tab, line(server.url) as other:
                await come_back(tab, one)
                await come_back(other, two)
                await two.hear(other)
                await one.hear(tab)
            for transcript in transcripts:
                transcript.check()
            assert one.terminal == two.terminal


async def open_conversation(chat: Client, story: Story) -> None:
    await chat.send({"type": "open", "conversation": story.conversation})
    history = await chat.next("history")
    assert history["running"] == [story.name for _ in story.replies()]


# Dropped between bytes.


LOST = (ConnectionClosed, InvalidHandshake, EOFError, OSError)


async def follow_through(
    proxy: Proxy, transcript: Transcript, *, talk: int = 1, resumes: bool = True
) -> int:
    """Come back as often as the line is cut, until the terminal is there; return how often."""
    sockets = 0
    while transcript.terminal is None:
        with suppress(*LOST):
            async with line(proxy.url) as chat:
                if sockets and (resumes or transcript.last):
                    await come_back(chat, transcript)
                else:
                    transcript.start_over()
                    await chat.send(transcript.story.prompt)
                await transcript.hear(chat, talk=talk)
        sockets += 1
    return sockets


@given(
    said=st.lists(pieces, max_size=12),
    ending=endings,
    cuts=st.lists(cuts, min_size=1, max_size=8),
    talk=st.integers(1, 13),
    resumes=st.booleans(),
)
@example(said=list(PIECES), ending="done", cuts=[Cut(0)], talk=1, resumes=True)
@on_one_server(40)
async def test_cuts_at_any_bytes_lose_nothing(
    server: Server,
    puppet: Puppet,
    said: list[str],
    ending: str,
    cuts: list[Cut],
    talk: int,
    resumes: bool,
) -> None:
    story = Story(server, puppet, said, ending)
    transcript = Transcript(story)
    async with Proxy(server.port, *cuts) as proxy:
        await follow_through(proxy, transcript, talk=talk, resumes=resumes)
    transcript.check()
    await check_again(server.url, transcript)


def short_story(server: Server, puppet: Puppet) -> Story:
    return Story(server, puppet, ("é🙂", Thinking("🤔")))


@pytest.mark.parametrize("store", ["memory:"])  # which knows nothing of bytes
@pytest.mark.parametrize("offset", range(4))
async def test_a_cut_at_each_byte_from_the_handshake_to_the_terminal_loses_nothing(
    server: Server, puppet: Puppet, offset: int
) -> None:
    async with Proxy(server.port) as proxy, line(proxy.url) as chat:
        story = short_story(server, puppet)
        await chat.send(story.prompt)
        await Transcript(story).hear(chat)
        (total,) = proxy.passed
    reset, late = offset % 2 == 0, offset < 2
    for after in range(offset, total, 4):
        transcript = Transcript(short_story(server, puppet))
        async with Proxy(server.port, Cut(after, reset, late)) as proxy:
            sockets = await follow_through(proxy, transcript, resumes=after % 8 == offset)
            assert sockets == 2
            assert proxy.passed[0] == after
        transcript.check()


async def test_a_prompt_whose_start_is_lost_is_answered_once(
    server: Server, puppet: Puppet
) -> None:
    async with Proxy(server.port) as proxy, line(proxy.url) as chat:
        (handshake,) = proxy.passed
        start = await chat.prompt()
        whole = proxy.passed[0]
        assert whole > handshake
        assert start["type"] == "start"
    for after in range(handshake, whole):
        story = short_story(server, puppet)
        transcript = Transcript(story)
        async with Proxy(server.port, Cut(after, late=True)) as proxy:
            with suppress(*LOST):
                async with line(proxy.url) as chat:
                    await chat.send(story.prompt)
                    await chat.receive()
            assert not chat.frames
            await story.reply()  # it has been accepted all the same
            async with line(proxy.url) as chat:
                await chat.send(resumption(story, 0) if after % 2 else story.prompt)
                await transcript.hear(chat)
        transcript.check()


# From any piece, at any time.


class Gate:
    """Holds back what a server is about to save, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
        self.opened = asyncio.Event()
        self.reached = asyncio.Event()
        commit = server._store.commit

        async def commit_later(entries: Sequence[Entry]) -> None:
            self.reached.set()
            await self.opened.wait()
            await commit(entries)

        monkeypatch.setattr(server._store, "commit", commit_later)

    async def reached_or(self, other: asyncio.Future[None]) -> None:
        """Wait until something is held back, or until there was nothing to save."""
        await until(lambda: self.reached.is_set() or other.done())


@asynccontextmanager
async def crowd(server: Server, size: int) -> AsyncIterator[list[Client]]:
    async with AsyncExitStack() as lines:
        yield [await lines.enter_async_context(line(server.url)) for _ in range(size)]


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_resume_after_any_piece_at_any_time_brings_the_rest(
    server: Server, puppet: Puppet, ending: str
) -> None:
    story = Story(server, puppet, ending=ending)
    await begin(server, story)
    followers: list[tuple[Client, Transcript]] = []
    async with AsyncExitStack() as lines:
        while not story.over:
            for after in range(story.seq + 1):
                chat = await lines.enter_async_context(line(server.url))
                transcript = Transcript(story, after)
                await come_back(chat, transcript)
                followers.append((chat, transcript))
            await story.tell(1)
        # And as it ends, and when it has.
        for _ in range(2):
            for after in range(story.seq + 1):
                chat = await lines.enter_async_context(line(server.url))
                transcript = Transcript(story, after)
                await come_back(chat, transcript)
                followers.append((chat, transcript))
            await story.tell_all()
        for chat, transcript in followers:
            await transcript.hear(chat)
            assert not await chat.quiet()
            transcript.check()
            assert transcript.terminal == followers[0][1].terminal


@pytest.mark.parametrize("held", ["closing", "saving"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_resume_after_any_piece_while_it_ends_gets_the_text_now_and_the_terminal_then(
    server: Server, puppet: Puppet, monkeypatch: pytest.MonkeyPatch, ending: str, held: str
) -> None:
    story = Story(server, puppet, ending=ending)
    await begin(server, story)
    reply = await story.reply()
    if held == "saving":
        release = Gate(monkeypatch, server).opened
    else:
        release = reply.hold = asyncio.Event()
    await story.tell(len(PIECES) + 1)
    if held == "saving":
        await until(lambda: story.generation.state is State.SAVING)
    else:
        await until(reply.heard_out)
    transcripts = [Transcript(story, after) for after in range(len(story.log) + 1)]
    async with crowd(server, len(transcripts)) as chats:
        for chat, transcript in zip(chats, transcripts, strict=True):
            await come_back(chat, transcript)
            await transcript.catch_up(chat)
            assert transcript.terminal is None
        assert story.generation.state is not State.ENDED
        release.set()
        for chat, transcript in zip(chats, transcripts, strict=True):
            await transcript.hear(chat)
            assert not await chat.quiet()
            transcript.check()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_resume_that_meets_the_end_gets_all_whichever_comes_first(
    server: Server, puppet: Puppet, ending: str
) -> None:
    async def come_back_after(turns: int, chat: Client, transcript: Transcript) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await come_back(chat, transcript)
        await transcript.hear(chat)
        transcript.check()

    afters = [0, 5, len(cut_up(PIECES))]
    async with crowd(server, len(afters)) as chats:
        for turns in range(0, 60, 4):
            story = Story(server, puppet, ending=ending)
            await begin(server, story)
            await say(story, len(PIECES))
            returns = (
                come_back_after(turns, chat, Transcript(story, after))
                for chat, after in zip(chats, afters, strict=True)
            )
            await asyncio.gather(story.tell(1), *returns)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_resumes_on_one_socket_each_go_on_from_where_they_say(
    server: Server, puppet: Puppet, ending: str
) -> None:
    story = Story(server, puppet, ending=ending)
    async with line(server.url) as chat:
        await chat.send(story.prompt)
        transcript = Transcript(story)
        transcript.take(await chat.receive())
        while not story.over:
            for after in range(story.seq + 1):
                transcript = Transcript(story, after)
                await come_back(chat, transcript)
                await transcript.catch_up(chat)
            await story.tell(1)
            if not story.over:
                await transcript.catch_up(chat)
        await transcript.hear(chat)
        assert not await chat.quiet(), "for all of them there is one terminal"
        transcript.check()
        for after in range(story.seq + 1):
            again = Transcript(story, after)
            await come_back(chat, again)
            await again.hear(chat)
            again.check()
            assert again.terminal == transcript.terminal
        assert not await chat.quiet()


async def test_of_two_resumes_in_a_row_the_second_holds(server: Server, puppet: Puppet) -> None:
    told = 5
    seq = len(cut_up(PIECES[:told]))
    for first in range(seq + 1):
        for second in range(seq + 1):
            story = Story(server, puppet)
            await begin(server, story)
            await story.tell(told)
            async with line(server.url) as chat:
                await until((await story.reply()).heard_out)
                one, two = Transcript(story, first), Transcript(story, second)
                await chat.send(resumption(story, first))
                await chat.send(resumption(story, second))
                one.take(await chat.receive())
                while one.last < seq:
                    one.take(await chat.receive())
                await two.hear(chat)
                assert not await chat.quiet()
                two.check()


async def test_a_resume_on_top_of_an_open_goes_on_from_where_it_says(
    server: Server, puppet: Puppet
) -> None:
    conversation = secrets.token_urlsafe(16)
    story = Story(server, puppet, conversation=conversation)
    await begin(server, story)
    await story.tell(6)
    async with line(server.url) as chat:
        await open_conversation(chat, story)
        shown = Transcript(story)
        shown.take(await chat.receive())
        await shown.catch_up(chat)
        for after in range(story.seq + 1):
            await open_conversation(chat, story)  # which does not restart what is followed
            resumed = Transcript(story, after)
            await come_back(chat, resumed)
            await resumed.catch_up(chat)
        await resumed.hear(chat)
        assert not await chat.quiet()
        resumed.check()


async def test_a_resume_that_is_refused_changes_nothing(server: Server, puppet: Puppet) -> None:
    story = Story(server, puppet)
    transcript = Transcript(story)
    unknown = Story(server, puppet)

    async def refused(chat: Client) -> None:
        for after in (story.seq + 1, story.seq + 2, 2**63, 10**30):
            await chat.send(resumption(story, after))
            error = await chat.receive()
            assert (error["type"], error["code"], error["about"]) == ("error", "gap", story.name)
            assert "id" not in error
        for after in (0, 1):
            await chat.send(resumption(unknown, after))
            error = await chat.receive()
            assert (error["code"], error["about"]) == ("not_found", unknown.name)
        assert not await chat.quiet()

    async with line(server.url) as chat, line(server.url) as other:
        await chat.send(story.prompt)
        transcript.take(await chat.receive())
        while not story.over:
            await refused(chat)
            await refused(other)
            await story.tell(1)
            if not story.over:
                await transcript.catch_up(chat)
        await transcript.hear(chat)
        transcript.check()
        await refused(chat)
        await refused(other)


# From the store.


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ended_reply_that_the_server_has_forgotten_is_found_in_the_store(
    puppet: Puppet, store: str, ending: str
) -> None:
    settings = {**LASTING, "store": store, "replay_size": 1}
    async with wsserver.serve(puppet, **settings) as server, line(server.url) as chat:
        story = Story(server, puppet, ending=ending)
        first = Transcript(story)
        await chat.send(story.prompt)
        await first.hear(chat)
        first.check()
        for after in range(len(story.log) + 1):
            assert server._hub.known("anonymous", story.name) is None
            transcript = Transcript(story, after)
            await come_back(chat, transcript)
            await transcript.hear(chat)
            transcript.check()
            assert transcript.start == first.start
            assert transcript.terminal == first.terminal


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_drop_at_any_frame_and_a_restart_lose_nothing(
    puppet: Puppet, tmp_path: Path, ending: str
) -> None:
    settings = {**LASTING, "store": f"sqlite:///{tmp_path}/db"}
    transcripts: list[Transcript] = []
    async with wsserver.serve(puppet, **settings) as server:
        for index in range(len(cut_up(PIECES)) + 3):
            story = Story(server, puppet, ending=ending, alone=index % 3 == 0)
            transcripts.append(Transcript(story))
            async with line(server.url, DROPS[index % 2]) as chat:
                await chat.send(story.prompt)
                await transcripts[-1].hear(chat, index)
                await story.tell_all()
    async with wsserver.serve(puppet, **settings) as server:
        for transcript in transcripts:
            async with line(server.url) as chat:
                await come_back(chat, transcript)
                await transcript.hear(chat)
                assert not await chat.quiet()
            transcript.check()
            await check_again(server.url, transcript)


async def test_after_each_restart_an_ended_reply_is_resumed_from_any_piece(
    puppet: Puppet, tmp_path: Path
) -> None:
    settings = {**LASTING, "store": f"sqlite:///{tmp_path}/db"}
    first: list[Transcript] = []
    async with wsserver.serve(puppet, **settings) as server, crowd(server, 4) as chats:
        for chat, ending in zip(chats, (*ENDINGS, "shutdown"), strict=True):
            story = Story(server, puppet, ending=ending, alone=ending == "error")
            first.append(Transcript(story))
            await chat.send(story.prompt)
            if ending == "shutdown":
                await say(story, len(PIECES))
                await server.close()  # which ends what still runs
                story.over = True
            await first[-1].hear(chat)
            first[-1].check()
    for _ in range(2):
        async with wsserver.serve(puppet, **settings) as server:
            for known in first:
                story = known.story
                transcripts = [Transcript(story, after) for after in range(len(story.log) + 1)]
                async with crowd(server, len(transcripts)) as chats:
                    # All at once: one of them finds it in the file, the others where that put it.
                    for chat, transcript in zip(chats, transcripts, strict=True):
                        await chat.send(resumption(story, transcript.after))
                    for chat, transcript in zip(chats, transcripts, strict=True):
                        await transcript.hear(chat)
                        assert not await chat.quiet()
                        transcript.check()
                        assert (transcript.start, transcript.terminal) == (
                            known.start,
                            known.terminal,
                        )
                    transcript = Transcript(story)
                    await chats[0].send(story.prompt)
                    await transcript.hear(chats[0])
                    transcript.check()
                    assert transcript.terminal == known.terminal
                    await chats[0].send(resumption(story, known.last + 1))
                    assert (await chats[0].receive())["code"] == "gap"


@given(
    said=st.lists(pieces, max_size=12),
    ending=endings,
    # Pieces that are said before and while a part of them is saved.
    parts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5),
    after=st.floats(0, 1),
    alone=st.booleans(),
)
@on_one_server(25)
async def test_in_whatever_parts_it_was_saved_a_reply_is_whole_after_a_restart(
    puppet: Puppet,
    tmp_path_factory: pytest.TempPathFactory,
    said: list[str],
    ending: str,
    parts: list[tuple[int, int]],
    after: float,
    alone: bool,
) -> None:
    settings = {**LASTING, "store": f"sqlite:///{tmp_path_factory.mktemp('store')}/db"}
    async with wsserver.serve(puppet, **settings) as server:
        story = Story(server, puppet, said, ending, alone=alone)
        await begin(server, story)
        for before, meanwhile in parts:
            await say(story, before)
            with pytest.MonkeyPatch.context() as monkeypatch:
                gate = Gate(monkeypatch, server)
                saving = asyncio.create_task(server._hub._journal.flush())
                await gate.reached_or(saving)
                await say(story, meanwhile)
                gate.opened.set()
                await saving
        await story.tell_all()
    async with wsserver.serve(puppet, **settings) as server, line(server.url) as chat:
        transcript = Transcript(story, round(after * len(story.log)))
        await come_back(chat, transcript)
        await transcript.hear(chat)
        transcript.check()
        again = Transcript(story)
        await chat.send(story.prompt)
        await again.hear(chat)
        again.check()


async def say(story: Story, count: int) -> None:
    """Have the model say so many pieces more, but not end."""
    await story.tell(min(count, story.left))
    await until((await story.reply()).heard_out)
