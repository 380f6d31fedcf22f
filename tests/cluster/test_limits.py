"""The limits of a principal hold on all nodes together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.cluster.conftest import Start
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet
from tests.support.talk import ID, ONE, TWO
from wsserver import End, Usage

pytestmark = pytest.mark.slow


@asynccontextmanager
async def chats(start: Start, number: int, **settings: Any) -> AsyncIterator[list[Client]]:
    """Clients of three nodes, one node after the other."""
    nodes = [await start(frame_burst=1000, **settings) for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_client(nodes[each % 3])) for each in range(number)]
    opened = [task.result() for task in tasks]
    try:
        yield [chat for _, chat in opened]
    finally:
        for context, _ in opened:
            await context.__aexit__(None, None, None)


async def _client(node: wsserver.Server) -> tuple[Any, Client]:
    context = client(node)
    return context, await context.__aenter__()


async def prompted(people: list[Client], **keys: Any) -> list[dict[str, Any]]:
    """Send one prompt of each client at the same time."""
    return await asyncio.gather(
        *(
            chat.prompt(conversation=f"conversation-{number:04}", **keys)
            for number, chat in enumerate(people)
        )
    )


async def test_replies_at_once_are_counted_on_all_nodes(start: Start, puppet: Puppet) -> None:
    async with chats(start, 12, generations_per_principal=3, titles="off") as people:
        answers = await prompted(people)
        assert sorted(answer["type"] for answer in answers) == ["error"] * 9 + ["start"] * 3
        assert {answer["code"] for answer in answers if answer["type"] == "error"} == {"limit"}
        place = [answer["type"] for answer in answers].index("start")
        await people[place].send({"type": "stop"})
        await people[place].next("done")
        again = await prompted(people[place + 1 :] + people[:place])
        assert [answer["type"] for answer in again].count("start") == 1


async def test_prompts_of_a_minute_are_counted_on_all_nodes(start: Start) -> None:
    async with chats(start, 12, prompts_per_minute=5) as people:
        answers = await prompted(people)
        refused = [answer for answer in answers if answer["type"] == "error"]
        assert len(refused) == 7
        assert all(0 < answer["retry_after"] <= 12 for answer in refused)


@pytest.mark.parametrize("rounds", [1, 2])
async def test_budget_is_spent_on_all_nodes(start: Start, puppet: Puppet, rounds: int) -> None:
    limits = {"dollars_per_day": 0.01 * rounds, "prices": "puppet=1/10", "titles": "off"}
    async with chats(start, 3, **limits) as (a, b, c):
        for number in range(rounds):
            assert (await a.prompt(conversation=ONE))["type"] == "start"
            (await puppet.reply(number)).say("x", End(usage=Usage(1000, 900))).end()
            await a.next("done")
        for chat in (b, c):
            assert (await chat.prompt(conversation=TWO))["code"] == "quota"


async def test_running_replies_reserve_the_budget_on_all_nodes(
    start: Start, puppet: Puppet
) -> None:
    limits = {"dollars_per_day": 0.01, "prices": "puppet=1/10"}
    async with chats(start, 3, **limits) as people:
        for number, chat in enumerate(people[:2]):
            await chat.prompt(conversation=f"conversation-{number:04}", max_tokens=700)
        replies = [await puppet.reply(number) for number in range(2)]
        assert [reply.request.max_tokens for reply in replies] == [700, 299]
        refused = await people[2].prompt(conversation="conversation-0002")
        assert (refused["code"], "dollars" in refused["message"]) == ("limit", True)
        await people[0].send({"type": "stop"})
        await people[0].next("done")
        assert (await people[2].prompt(conversation="conversation-0002"))["type"] == "start"


async def test_prompt_outside_of_conversations_runs_once(start: Start, puppet: Puppet) -> None:
    async with chats(start, 3) as people:
        asked = {"messages": [{"role": "user", "content": "Hello"}], "id": ID}

        async def ask(chat: Client) -> dict[str, Any]:
            while True:
                await chat.send(asked)
                answer = await chat.next("start", "error")
                if answer["type"] == "start":
                    return answer
                assert answer["code"] == "unavailable"  # the reply is being accepted elsewhere

        async with asyncio.timeout(BOUND):
            await asyncio.gather(*map(ask, people))
        (await puppet.reply()).say("Once").end()
        assert [(await chat.text(ID))[0] for chat in people] == ["Once"] * 3
        assert len(puppet.replies) == 1
