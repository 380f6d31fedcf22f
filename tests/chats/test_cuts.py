"""A client of each dialect has the whole reply, in order and once, after cuts at any byte."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import wsserver
from tests.asgi.servers import serving
from tests.chats.reading import READINGS, Reading
from tests.support.host import Host, Mounted
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import Puppet, Thinking
from tests.support.story import DROPS, ENDINGS, LASTING, PIECES, SIZE, endings, on_one_server, texts

pytestmark = pytest.mark.slow

LINES = ("data: x\n\n", "\n\ndata: [DONE]\n\n", "id: 7\n", ":\n\n", "\r\n\r\n0\r\n\r\n", "\n", "\r")
SAID = (*PIECES[:6], *LINES, Thinking(LINES[0]), *PIECES[6:])


@pytest.fixture(params=["own", "uvicorn"])
async def server(
    request: pytest.FixtureRequest, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Host]:
    monkeypatch.setattr("wsserver.chats.chats.RELOAD", 3600.0)
    if request.param == "own":
        async with wsserver.serve(puppet, **LASTING) as running:
            yield running
    else:
        chat = wsserver.asgi(puppet, allow_anonymous=True, **LASTING)
        async with serving(chat) as port:
            assert chat.app is not None
            yield Mounted(port, chat.settings, chat.app)


@pytest.fixture(params=READINGS)
def dialect(request: pytest.FixtureRequest) -> type[Reading]:
    return READINGS[request.param]


async def read_on(reading: Reading, port: int, *, talk: int = 1, turn: int = 0) -> int:
    """Read over new connections until the client has everything; return their number."""
    visits = 0
    while not reading.ended:
        await reading.visit(port, talk=talk, turn=turn + visits)
        visits += 1
    return visits


@pytest.mark.parametrize("ending", ENDINGS)
async def test_drop_at_any_event_loses_nothing(
    server: Host, puppet: Puppet, dialect: type[Reading], ending: str
) -> None:
    index = 0
    whole = False
    while not whole:
        reading = dialect(server, puppet, SAID, ending)
        await reading.visit(server.port, index, drop=DROPS[index % 2])
        whole = reading.ended
        await read_on(reading, server.port, turn=index)
        await reading.check()
        index += 1
    assert index > len(SAID)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_new_connection_for_each_event_loses_nothing(
    server: Host, puppet: Puppet, dialect: type[Reading], ending: str
) -> None:
    reading = dialect(server, puppet, SAID, ending)
    visits = 0
    while not reading.ended:
        # A client that has no place to go on from reads one event more each time.
        await reading.visit(server.port, 2 + visits, drop=DROPS[visits % 2], turn=visits)
        visits += 1
    assert visits > 2
    await reading.check()


parts = st.builds(
    lambda kind, text: kind(text),
    st.sampled_from([str, str, Thinking]),
    st.one_of(texts, st.sampled_from(LINES)),
)
cuts = st.builds(
    Cut,
    # The server has the prompt once it has answered a byte. Before that, no client can know.
    after=st.one_of(st.integers(1, 400), st.integers(1, 4000)),
    reset=st.booleans(),
    late=st.booleans(),
)


@given(
    said=st.lists(parts, max_size=12),
    ending=endings,
    cuts=st.lists(cuts, min_size=1, max_size=6),
    talk=st.integers(1, 13),
    turn=st.integers(0, 5),
)
@example(said=list(SAID), ending="done", cuts=[Cut(1)], talk=1, turn=0)
@on_one_server(40)
async def test_cuts_at_any_bytes_lose_nothing(
    server: Host,
    puppet: Puppet,
    dialect: type[Reading],
    said: list[str],
    ending: str,
    cuts: list[Cut],
    talk: int,
    turn: int,
) -> None:
    reading = dialect(server, puppet, said, ending)
    async with Proxy(server.port, *cuts) as proxy:
        await read_on(reading, proxy.port, talk=talk, turn=turn)
    await reading.check()


@pytest.mark.parametrize("offset", range(4))
async def test_cut_at_each_byte_from_head_to_end_loses_nothing(
    server: Host, puppet: Puppet, dialect: type[Reading], offset: int
) -> None:
    said = ("é🙂", Thinking("🤔"), "\n\n" * SIZE)
    async with Proxy(server.port) as proxy:
        await read_on(dialect(server, puppet, said, "done"), proxy.port)
        (total,) = proxy.passed
    for after in range(1 + offset, total, 4):
        reading = dialect(server, puppet, said, "done")
        async with Proxy(server.port, Cut(after, offset % 2 == 0, late=offset < 2)) as proxy:
            visits = await read_on(reading, proxy.port, turn=2 * after)
            assert visits <= 3
            # Events that come together share a chunk: this reply may have fewer bytes than `after`.
            assert proxy.passed[0] == after or visits == 1
        await reading.check()
