"""Large prompts and replies between nodes."""

import pytest

from tests.cluster.conftest import Start
from tests.support.client import client
from tests.support.puppet import Puppet
from tests.support.talk import ID, ONE, exchange, opened

pytestmark = pytest.mark.slow
LARGE = 6_000_000


async def test_large_prompt_is_forwarded(start: Start, puppet: Puppet) -> None:
    sizes = {"message_size": 2 * LARGE, "prompt_size": LARGE, "max_unsent": 60_000_000}
    a_node, b_node = [await start(**sizes) for _ in range(2)]
    async with client(a_node, max_size=None) as a, client(b_node, max_size=None) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        text = "x" * (LARGE - 100)
        start_ = await b.prompt(text, conversation=ONE, id=ID)
        assert start_["type"] == "start", start_
        reply = (await puppet.reply(1)).say("half")
        await b.next("token")
        assert (await opened(a))["type"] == "history"
        reply.end()
        assert (await b.text(ID))[0] == "half"


async def test_large_prompt_that_runs_elsewhere_is_followed(start: Start, puppet: Puppet) -> None:
    sizes = {"message_size": 2 * LARGE, "prompt_size": LARGE, "max_unsent": 60_000_000}
    a_node, b_node = [await start(**sizes) for _ in range(2)]
    async with client(a_node, max_size=None) as a, client(b_node, max_size=None) as b:
        await a.prompt("x" * (LARGE - 100), conversation=ONE, id=ID)
        reply = (await puppet.reply()).say("half")
        await a.next("token")
        assert (await opened(b))["type"] == "history"
        reply.end()
        assert (await b.text(ID))[0] == "half"


async def test_large_piece_is_followed(start: Start, puppet: Puppet) -> None:
    a_node, b_node = [await start(reply_size=10_000_000) for _ in range(2)]
    async with client(a_node, max_size=None) as a, client(b_node, max_size=None) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await opened(b)
        await a.prompt("Long", conversation=ONE, id=ID)
        (await puppet.reply(1)).say("x" * 5_000_000).end()
        for chat in (a, b):
            text, done = await chat.text(ID)
            assert (len(text), done["reason"]) == (5_000_000, "end_turn")
