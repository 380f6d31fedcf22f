"""A thousand random operations of fifty clients on three nodes, while everything fails in turn."""

import asyncio
import itertools
import random
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_rolling import Nodes
from tests.support.line import Line
from tests.support.ports import free_port
from tests.support.postgres import Postgres
from tests.support.redis import RedisServer
from wsserver.client import Chat, Reply, ReplyError, connect

pytestmark = pytest.mark.slow
CLIENTS, OPERATIONS, CONVERSATIONS = 50, 1000, 20
WORDS, PACE = 25, 0.03
LEASE = 2.0
REFUSALS = {"busy", "limit", "unavailable", "store"}
ENDS = {"end_turn", "client", "replaced", "interrupted"}
SETTINGS: dict[str, Any] = {
    "model": "wordy:wordy",
    "lease": LEASE,
    "titles": "off",
    "stop-timeout": 2,
    "store-timeout": 2,
    "grace": 120,
    "queue-size": 50,
    "prompts-per-minute": 100_000,
    "generations-per-principal": 1000,
    "generations-per-socket": 1000,
    "connections-per-address": 1000,
    "connections-per-principal": 1000,
    "tokens-per-day": 0,
}

# The model of the nodes. It notes when each reply begins and ends, by a clock that all share.
MODEL = f"""
import asyncio, os, time

notes = os.open("notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what, prompt):
    os.write(notes, f"{{what}} {{prompt}} {{time.monotonic()}} {{os.getpid()}}\\n".encode())

async def wordy(request):
    note("begin", request.prompt)
    try:
        for number in range({WORDS}):
            yield f"{{request.prompt}}:{{number}} "
            await asyncio.sleep({PACE})
    finally:
        note("end", request.prompt)
"""

# A node that loses, doubles and reorders messages of other nodes.
PROGRAM = """
import random
from wsserver.cluster.peers import Peers

receive, dice = Peers.receive, random.Random()

def mistreat(self, topic, sender, messages):
    kept = [message for message in messages if dice.random() > 0.03]
    kept += [message for message in messages if dice.random() < 0.03]
    if dice.random() < 0.1:
        dice.shuffle(kept)
    receive(self, topic, sender, kept)

Peers.receive = mistreat
from wsserver.cli import main
main()
"""


def whole(prompt: str) -> str:
    return "".join(f"{prompt}:{number} " for number in range(WORDS))


@dataclass
class World:
    """Everything that the clients did."""

    dice: random.Random
    replies: list[tuple[Reply, str, str, bool]] = field(default_factory=list)
    ids: dict[str, tuple[str, str]] = field(default_factory=dict)  # prompt and conversation

    async def act(self, chat: Chat, number: int) -> None:
        what = self.dice.random()
        if what < 0.55 or not self.ids:
            conversation = f"conversation-no-{self.dice.randrange(CONVERSATIONS):02}"
            prompt = f"{conversation}/{number}"
            how: Any = self.dice.choice(["queue", "queue", "reject", "interrupt"])
            reply = chat.prompt(prompt, conversation=conversation, on_busy=how)
            self.ids[reply.id] = prompt, conversation
            self.replies.append((reply, prompt, conversation, True))
        elif what < 0.85:
            name = self.dice.choice(list(self.ids)[-60:])
            self.replies.append((chat.resume(name), *self.ids[name], False))
        else:
            own = [r for r, _, _, mine in self.replies[-60:] if mine and not r.over]
            if own:
                self.dice.choice(own).request_stop()


async def outcome_of(reply: Reply) -> str:
    try:
        done = await reply.done()
    except ReplyError as error:
        return error.code
    return (done.by or done.reason) if done.saved else "not saved"


def notes_of(folder: Path) -> tuple[Counter[str], dict[str, list[tuple[float, float, int, str]]]]:
    """Return how often each prompt was run, and the times of the replies of each conversation."""
    begins: Counter[str] = Counter()
    spans: dict[str, tuple[float, float, int]] = {}
    for line in (folder / "notes").read_text().splitlines():
        what, prompt, at, pid = line.split()
        if what == "begin":
            begins[prompt] += 1
            spans[prompt] = float(at), float("inf"), int(pid)
        else:
            spans[prompt] = spans[prompt][0], float(at), int(pid)
    found: dict[str, list[tuple[float, float, int, str]]] = defaultdict(list)
    for prompt, (began, ended, process) in spans.items():
        found[prompt.split("/")[0]].append((began, ended, process, prompt))
    return begins, {name: sorted(replies) for name, replies in found.items()}


class Faults:
    """Lets each part fail once, at a random node where it concerns one."""

    def __init__(
        self,
        dice: random.Random,
        nodes: Nodes,
        flags: dict[int, tuple[str, str]],
        *,
        redis: RedisServer,
        database: Postgres,
        lines: dict[int, Line],
    ) -> None:
        self.dice = dice
        self.nodes = nodes
        self.flags = flags
        self.redis = redis
        self.database = database
        self.lines = lines
        self.hits: list[tuple[int, float]] = []  # processes that were killed or paused, and when

    async def run(self) -> None:
        faults: list[Callable[[int], Awaitable[None]]] = [
            self.kill,
            self.pause,
            self.part,
            self.cut,
            self.empty,
            self.freeze,
            self.restart,
        ]
        self.dice.shuffle(faults)
        for fault in faults:
            await asyncio.sleep(1.5)
            await fault(self.dice.choice(list(self.flags)))
        await asyncio.sleep(1)

    def hit(self, port: int, how: signal.Signals) -> None:
        now = asyncio.get_running_loop().time()
        self.hits.append((self.nodes.signal(port, how), now))

    async def kill(self, port: int) -> None:
        self.hit(port, signal.SIGKILL)
        await self.nodes.forget(port)
        await asyncio.sleep(0.5)
        await self.nodes.start(port, *self.flags[port])

    async def pause(self, port: int) -> None:
        self.hit(port, signal.SIGSTOP)
        await asyncio.sleep(LEASE + 1)
        self.nodes.signal(port, signal.SIGCONT)

    async def part(self, port: int) -> None:
        self.lines[port].hush()
        await asyncio.sleep(3)
        self.lines[port].mend()

    async def cut(self, _: int) -> None:
        for _ in range(3):
            await self.redis.command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.sleep(0.5)

    async def empty(self, _: int) -> None:
        self.redis.kill()
        await asyncio.sleep(0.5)
        self.redis.start()

    async def freeze(self, _: int) -> None:
        self.redis.signal(signal.SIGSTOP)
        await asyncio.sleep(3)
        self.redis.signal(signal.SIGCONT)

    async def restart(self, _: int) -> None:
        await asyncio.to_thread(self.database.stop)
        await asyncio.to_thread(self.database.start)


@asynccontextmanager
async def everything(folder: Path, dice: random.Random) -> AsyncIterator[Faults]:
    """Three nodes, each with a line of its own to one Redis, and their database."""
    (folder / "wordy.py").write_text(MODEL)
    ports = [free_port() for _ in range(3)]
    async with AsyncExitStack() as stack:
        database = Postgres.create()
        stack.callback(database.remove)
        redis = RedisServer()
        stack.callback(redis.kill)
        lines = {port: await stack.enter_async_context(Line(redis.port)) for port in ports}
        settings = {**SETTINGS, "store": database.url()}
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        nodes = Nodes(["-c", PROGRAM, "serve", *flags], folder)
        stack.push_async_callback(nodes.kill)
        own = {
            port: ("--cluster", line.url.replace("ws", "redis", 1)) for port, line in lines.items()
        }
        for port in ports:
            await nodes.start(port, *own[port])
        yield Faults(dice, nodes, own, redis=redis, database=database, lines=lines)


@pytest.mark.timeout(240)
async def test_thousand_operations_while_everything_fails(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    world = World(random.Random(seed))
    async with everything(tmp_path, world.dice) as faults, AsyncExitStack() as stack:
        ports = list(faults.flags)
        chats = [
            await stack.enter_async_context(connect(f"ws://127.0.0.1:{ports[number % 3]}/"))
            for number in range(CLIENTS)
        ]
        failing = asyncio.create_task(faults.run())
        for number in range(OPERATIONS):
            await world.act(world.dice.choice(chats), number)
            await asyncio.sleep(world.dice.random() * 0.06)
        await failing
        await over(world, faults)
        outcomes = [await outcome_of(reply) for reply, *_ in world.replies]
        stored = await replies_in(chats[0])
    check(world, outcomes, stored)
    begins, replies = notes_of(tmp_path)
    assert [prompt for prompt, count in begins.items() if count > 1] == []
    for of_one in replies.values():
        for (since, ended, pid, before), (began, _, _, after) in itertools.pairwise(of_one):
            # A process that is killed or paused ends its replies then, whatever it notes later.
            hits = [at for process, at in faults.hits if process == pid and at > since]
            assert min(ended, *hits, float("inf")) <= began, (before, after)


async def over(world: World, faults: Faults) -> None:
    """Wait until all replies have ended."""
    ends = [asyncio.create_task(outcome_of(reply)) for reply, *_ in world.replies]
    _, open_ends = await asyncio.wait(ends, timeout=60)
    left = [
        (prompt, reply.id, reply.started, reply.text[-40:], own)
        for (reply, prompt, _, own), end in zip(world.replies, ends, strict=True)
        if end in open_ends
    ]
    if left:
        print(faults.nodes.output, left, sep="\n")
    assert left == []


async def replies_in(chat: Chat) -> dict[str, str]:
    """Return the texts of all replies in the store, by id."""
    stored: dict[str, str] = {}
    for number in range(CONVERSATIONS):
        history = await chat.history(f"conversation-no-{number:02}")
        for message in history.messages:
            if message.role == "assistant":
                assert message.id is not None
                assert message.id not in stored
                stored[message.id] = message.text
    return stored


def check(world: World, outcomes: list[str], stored: dict[str, str]) -> None:
    """Compare what the clients saw with each other and with the store."""
    print(Counter(outcomes))
    for (reply, prompt, _, own), outcome in zip(world.replies, outcomes, strict=True):
        text = reply.text
        assert whole(prompt).startswith(text), (prompt, text)
        if outcome in REFUSALS or (outcome == "not_found" and not own):
            assert not text
            continue
        if outcome == "not saved":  # the store was away, and has a part at most
            assert whole(prompt).startswith(stored.get(reply.id, ""))
            continue
        assert outcome in ENDS, (prompt, outcome)
        if outcome == "end_turn":
            assert text == whole(prompt)
            assert reply.id in stored, prompt  # nothing that was told as whole is lost
        if reply.id in stored and outcome != "interrupted":
            # A stop may overtake a prompt that was sent on a lost connection.
            assert stored[reply.id] == text or not reply.started, (prompt, outcome)
    assert outcomes.count("end_turn") > OPERATIONS / 10
