"""Random operations of many clients on three nodes, over a bus that loses, doubles and reorders."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

import wsserver
from tests.support.client import Client, client
from tests.support.redis import RedisServer
from wsserver import Request
from wsserver.cluster.peers import Peers

pytestmark = pytest.mark.slow
CLIENTS, OPERATIONS, CONVERSATIONS = 24, 360, 6
WORDS = 40


class Model:
    """Says numbered words, and notes two replies of one conversation at once."""

    name = "chaos"

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.collisions: list[str] = []

    async def __call__(self, request: Request, /) -> AsyncIterator[str]:
        conversation = request.prompt.split()[0]
        self.calls[request.prompt] += 1
        self.running[conversation] += 1
        if self.running[conversation] > 1:
            self.collisions.append(request.prompt)
        try:
            for word in words(request.prompt):
                yield word
                await asyncio.sleep(0.002)
        finally:
            self.running[conversation] -= 1


def words(prompt: str) -> list[str]:
    return [f"{prompt}:{number} " for number in range(WORDS)]


def unreliable(monkeypatch: pytest.MonkeyPatch, dice: random.Random) -> None:
    """Lose, double and reorder messages between nodes."""
    receive = Peers.receive

    def mistreat(self: Peers, topic: str, sender: str, messages: list[bytes]) -> None:
        kept = [message for message in messages if dice.random() > 0.05]
        kept += [message for message in messages if dice.random() < 0.05]
        if dice.random() < 0.2:
            dice.shuffle(kept)
        receive(self, topic, sender, kept)

    monkeypatch.setattr(Peers, "receive", mistreat)


class Person:
    """One client of one node, with all that it has seen of each reply."""

    def __init__(self, chat: Client, dice: random.Random) -> None:
        self.chat = chat
        self.dice = dice
        self.open: set[str] = set()  # replies whose terminal has not come
        self.seqs: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.prompts: dict[str, str] = {}
        self.ends: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []

    async def act(self, number: int, prompts: dict[str, str]) -> None:
        """Do something. New prompts are added to ``prompts``."""
        conversation = f"conversation-no-{self.dice.randrange(CONVERSATIONS)}"
        what, frame = self.dice.random(), {"type": "open", "conversation": conversation}
        if what < 0.5 or not prompts:
            name = f"reply-number-{number:06}"
            prompts[name] = self.prompts[name] = f"{conversation} {number}"
            how = self.dice.choice(["queue", "queue", "interrupt", "reject"])
            frame = {"prompt": prompts[name], "id": name, "conversation": conversation}
            frame["on_busy"] = how
        elif what < 0.8:
            name = self.dice.choice(list(prompts))
            if what < 0.65 and name in self.seqs:
                return
            frame = {"type": "resume" if what < 0.65 else "stop", "id": name}
        await self.chat.send(frame)

    async def read(self) -> None:
        """Read all frames, and check their order."""
        with contextlib.suppress(Exception):
            while True:
                self.take(await self.chat.receive())

    def take(self, frame: dict[str, Any]) -> None:
        name = frame.get("id")
        if name is None:
            return
        kind = frame["type"]
        if kind == "start":
            after = frame.get("after", 0)
            if name not in self.seqs:
                self.seqs[name], self.texts[name] = after, ""
            self.open.add(name)
            self.ends.pop(name, None)  # a resume that waited while the reply ended
            self.prompts.setdefault(name, frame.get("prompt", ""))
        elif kind == "token":
            if name in self.ends or name not in self.open:
                self.faults.append(f"content outside of a reply: {frame}")
            if frame["seq"] > self.seqs[name]:
                self.texts[name] += frame["text"]
                self.seqs[name] = frame["seq"]
        elif name in self.open:
            self.open.discard(name)
            self.ends[name] = frame


async def stored_replies(node: wsserver.Server) -> dict[str, str]:
    """Return the texts of all replies in the store, by id."""
    stored: dict[str, str] = {}
    async with client(node) as chat:
        for number in range(CONVERSATIONS):
            before: int | None = 2**53 - 1
            while before:
                asked = {"type": "open", "conversation": f"conversation-no-{number}"}
                await chat.send({**asked, "before": before})
                history = await chat.next("history", "error")
                for message in history.get("messages", ()):
                    if message["role"] == "assistant":
                        stored[message["id"]] = message["content"]
                before = history.get("before")
    return stored


def compare(person: Person, prompts: dict[str, str], stored: dict[str, str]) -> int:
    """Compare what a person has seen with the store; return the number of compared replies."""
    compared = 0
    for name, end in person.ends.items():
        if end["type"] == "error" and "seq" not in end:
            continue  # refused
        whole, text = "".join(words(prompts[name])), person.texts[name]
        assert whole.startswith(text), (name, text[-80:])
        if name in stored:
            assert stored[name] == text, (name, end)
            compared += 1
        if end.get("reason") == "end_turn":
            assert text == whole
    return compared


async def test_random_operations_on_three_nodes(
    url: str, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice, model = random.Random(seed), Model()
    settings: dict[str, Any] = {
        "store": url,
        "cluster": redis.url,
        "drain_timeout": 0,
        "stop_timeout": 0.7,
        "store_timeout": 0.7,
        "titles": "off",
        "frame_burst": 10_000,
        "prompts_per_minute": 10_000,
        "generations_per_principal": 1000,
        "generations_per_socket": 1000,
        "connections_per_address": 1000,
        "grace": 60,
    }
    unreliable(monkeypatch, dice)
    prompts: dict[str, str] = {}  # by id
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(wsserver.serve(model, port=0, **settings))
            for _ in range(3)
        ]
        people = []
        for number in range(CLIENTS):
            chat = await stack.enter_async_context(client(nodes[number % 3]))
            people.append(Person(chat, dice))
        reading = [asyncio.create_task(person.read()) for person in people]

        for number in range(OPERATIONS):
            await dice.choice(people).act(number, prompts)
            await asyncio.sleep(dice.random() * 0.02)
            if number % 120 == 60:
                await redis.command("CLIENT", "KILL", "TYPE", "pubsub")
        async with asyncio.timeout(50):  # every reply that was begun ends on every socket
            while any(person.open for person in people):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        stored = await stored_replies(nodes[0])
    assert model.collisions == []
    assert [call for call, count in model.calls.items() if count > 1] == []
    assert [fault for person in people for fault in person.faults] == []
    assert sum(compare(person, prompts, stored) for person in people) > OPERATIONS / 4
