"""A client that resumes after a break at any byte has the whole reply, each piece once."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidHandshake

import wsserver
from tests.support.client import Client
from tests.support.host import Host
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import Puppet, Thinking, until
from tests.support.story import (
    DROPS,
    ENDINGS,
    LASTING,
    PIECES,
    SIZE,
    Gate,
    Story,
    Transcript,
    begin,
    check_again,
    come_back,
    crowd,
    cut_up,
    cuts,
    endings,
    line,
    on_one_server,
    pieces,
    resumption,
    say,
)
from tests.test_slow_reader import Sluggard, sluggard
from wsserver import Server
from wsserver.generation import State

pytestmark = pytest.mark.slow


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/db"


@pytest.fixture
async def server(puppet: Puppet, store: str) -> AsyncIterator[Host]:
    async with wsserver.serve(puppet, store=store, **LASTING) as running:
        yield running


# Dropped between frames.


@pytest.mark.parametrize("meanwhile", ["nothing", "something", "all"])
@pytest.mark.parametrize("ending", ENDINGS)
async def test_drop_at_any_frame_loses_nothing(
    server: Host, puppet: Puppet, ending: str, meanwhile: str
) -> None:
    frames = len(cut_up(PIECES)) + 2  # a start, and a terminal
    for index in range(frames + 1):
        story = Story(server, puppet, ending=ending)
        transcript = Transcript(story)
        async with line(server.url, DROPS[index % 3]) as chat:
            await chat.send(story.prompt)
            await transcript.hear(chat, index)
            if meanwhile != "nothing":
                await (
                    story.reply()
                )  # the server has accepted the prompt, even if the client does not know
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
async def test_new_connection_for_each_frame_loses_nothing(
    server: Host, puppet: Puppet, ending: str
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
        st.integers(0, 8),  # frames that the client receives
        st.integers(1, 5),  # pieces that the model says when the client has everything
        st.integers(0, 4),  # pieces that the model says while no client is connected
        st.sampled_from(DROPS),
    ),
    max_size=6,
)


@given(said=st.lists(pieces, max_size=12), ending=endings, visits=visits)
@on_one_server(30)
async def test_any_sequence_of_connections_gives_whole_reply(
    server: Host,
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
async def test_slow_reader_dropped_at_any_frame_loses_nothing(puppet: Puppet, ending: str) -> None:
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
            await until(lambda: not server.listener.connections)
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
    """Have the model write more than the buffers of the reader can hold."""
    reply = await story.reply()
    (socket,) = server.app.connections
    while socket.writable:
        assert not story.over, "the reader has not read everything yet"
        await story.tell(1)
        await until(reply.heard_out)
    await story.tell_all()


async def read_late(slow: Sluggard, transcript: Transcript, frames: int = 10**9) -> None:
    """Read so many frames, or all up to the terminal."""
    for _ in range(frames):
        while not slow.texts:
            assert await slow.read()
        frame = json.loads(slow.texts[0])
        del slow.events[0]
        transcript.take(frame)
        if not transcript.following:
            return


async def test_slow_reader_gets_start_before_text(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, **{**LASTING, "frame_size": 10_000}) as server:
        before = Story(server, puppet, ("Hello",), conversation=secrets.token_urlsafe(16))
        await begin(server, before)
        await before.tell_all()
        await until(lambda: not server.listener.connections)
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


async def test_two_tabs_dropped_at_different_frames_lose_nothing(
    server: Host, puppet: Puppet
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


DIGITS = 4  # by which the number `thought` of two replies may differ
LOST = (ConnectionClosed, InvalidHandshake, EOFError, OSError)


async def follow_through(
    proxy: Proxy, transcript: Transcript, *, talk: int = 1, resumes: bool = True
) -> int:
    """Reconnect after each cut until the terminal comes; return the number of connections."""
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
    server: Host,
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


def short_story(server: Host, puppet: Puppet) -> Story:
    return Story(server, puppet, ("é🙂", Thinking("🤔")))


@pytest.mark.parametrize("store", ["memory:"])  # the cuts do not depend on the store
@pytest.mark.parametrize("offset", range(4))
async def test_cut_at_each_byte_from_handshake_to_terminal_loses_nothing(
    server: Host, puppet: Puppet, offset: int
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
            if sockets == 1:  # a shorter `thought` has fewer digits
                assert total - DIGITS <= proxy.passed[0] <= after
            else:
                assert (sockets, proxy.passed[0]) == (2, after)
        transcript.check()


async def test_prompt_with_lost_start_runs_once(server: Host, puppet: Puppet) -> None:
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
            await story.reply()  # the server has accepted the prompt
            async with line(proxy.url) as chat:
                await chat.send(resumption(story, 0) if after % 2 else story.prompt)
                await transcript.hear(chat)
        transcript.check()


# From any piece, at any time.


@pytest.mark.parametrize("ending", ENDINGS)
async def test_resume_after_any_piece_at_any_time_gets_rest(
    server: Host, puppet: Puppet, ending: str
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
        # The same while the reply ends, and after its end.
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
async def test_resume_while_reply_ends_gets_text_then_terminal(
    server: Host, puppet: Puppet, monkeypatch: pytest.MonkeyPatch, ending: str, held: str
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
async def test_resume_at_end_of_reply_gets_everything(
    server: Host, puppet: Puppet, ending: str
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
async def test_repeated_resumes_on_one_socket_start_at_their_after(
    server: Host, puppet: Puppet, ending: str
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
        assert not await chat.quiet(), "all resumes together get one terminal"
        transcript.check()
        for after in range(story.seq + 1):
            again = Transcript(story, after)
            await come_back(chat, again)
            await again.hear(chat)
            again.check()
            assert again.terminal == transcript.terminal
        assert not await chat.quiet()


async def test_second_resume_replaces_first(server: Host, puppet: Puppet) -> None:
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


async def test_resume_after_open_starts_at_its_after(server: Host, puppet: Puppet) -> None:
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
            await open_conversation(chat, story)  # an open does not restart what the socket follows
            resumed = Transcript(story, after)
            await come_back(chat, resumed)
            await resumed.catch_up(chat)
        await resumed.hear(chat)
        assert not await chat.quiet()
        resumed.check()


async def test_refused_resume_changes_nothing(server: Host, puppet: Puppet) -> None:
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
