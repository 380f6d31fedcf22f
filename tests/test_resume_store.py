"""Ended replies that are only in the store are resumed at any piece."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsserver
from tests.support.puppet import Puppet
from tests.support.story import (
    DROPS,
    ENDINGS,
    LASTING,
    PIECES,
    Gate,
    Story,
    Transcript,
    begin,
    check_again,
    come_back,
    crowd,
    cut_up,
    endings,
    line,
    on_one_server,
    pieces,
    resumption,
    say,
)
from wsserver import Server

pytestmark = pytest.mark.slow


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/db"


@pytest.fixture
async def server(puppet: Puppet, store: str) -> AsyncIterator[Server]:
    async with wsserver.serve(puppet, store=store, **LASTING) as running:
        yield running


# From the store.


@pytest.mark.parametrize("ending", ENDINGS)
async def test_ended_reply_dropped_from_memory_is_found_in_store(
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
            assert server.app.hub.known("anonymous", story.name) is None
            transcript = Transcript(story, after)
            await come_back(chat, transcript)
            await transcript.hear(chat)
            transcript.check()
            assert transcript.start == first.start
            assert transcript.terminal == first.terminal


@pytest.mark.parametrize("ending", ENDINGS)
async def test_drop_at_any_frame_and_restart_lose_nothing(
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


async def test_ended_reply_is_resumed_from_any_piece_after_restart(
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
                await server.close()  # the close stops running replies
                story.over = True
            await first[-1].hear(chat)
            first[-1].check()
    for _ in range(2):
        async with wsserver.serve(puppet, **settings) as server:
            for known in first:
                story = known.story
                transcripts = [Transcript(story, after) for after in range(len(story.log) + 1)]
                async with crowd(server, len(transcripts)) as chats:
                    # At once: one resume reads the file, the others find the reply in memory.
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
    # The model writes some pieces before and some during a save.
    parts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5),
    after=st.floats(0, 1),
    alone=st.booleans(),
)
@on_one_server(25)
async def test_reply_saved_in_any_parts_is_whole_after_restart(
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
                saving = asyncio.create_task(server.app.hub.journal.flush())
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
