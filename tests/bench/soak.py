"""Clients that use all features at random for minutes, and a check for leaks.

::

    python -m tests.bench.soak --minutes 3 --clients 16 --every 5

The server runs in its own process, with its conversations in a SQLite file. The exit code is 1 if a
client got a wrong text, if memory, threads or descriptors of the server still grow, or if the
server's log has an error.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.support.crowd import CROWD
from wsserver import Request

Frame = dict[str, Any]

REPLAY, GRACE = 5.0, 2.0  # seconds; short, so that the server drops replies during the test
LIMITS = {"replay": REPLAY, "grace": GRACE, "reply-timeout": 20}
BOUND = 20.0  # seconds for any wait
CONVERSATIONS, TURNS = 4, 10  # of a client, before it deletes a conversation
BAD_SIGNS = ("ERROR", "CRITICAL", "Traceback", "never awaited", "never retrieved", "destroyed")

COMPARED = frozenset({"role", "content", "id", "partial"})  # keys of messages in a history

MEBIBYTE = 2**20
# Growth allowed between the means of the second and the last third: a share, plus a number.
TOLERANCE = {"memory": (0.03, MEBIBYTE), "threads": (0.0, 1.0), "descriptors": (0.05, 3.0)}


def pieces_of(prompt: str) -> list[str]:
    """Return the pieces of the reply to a prompt. The prompt begins with their number."""
    count = int(prompt.split(maxsplit=1)[0])
    return [f"{n}:{zlib.crc32(f'{n} {prompt}'.encode()):x}… " for n in range(count)]


async def storyteller(request: Request) -> AsyncIterator[str]:
    """Yield the pieces. The second word of the prompt is the average pause in seconds."""
    pause = float(request.prompt.split(maxsplit=2)[1])
    for piece in pieces_of(request.prompt):
        yield piece
        if pause:
            await asyncio.sleep(random.uniform(0, 2 * pause))


class Wrong(Exception):
    """The server gave a wrong answer."""


def check(what: object, *shown: object) -> None:
    """Raise :class:`Wrong` unless the value is true. It also works with ``python -O``."""
    if not what:
        raise Wrong(" ".join(repr(value)[:500] for value in shown))


class Reply:
    """One reply as one socket gets it. Every frame is compared with the pieces of the model."""

    def __init__(self, name: str, conversation: str | None, prompt: str) -> None:
        self.id = name
        self.conversation = conversation
        self.prompt = prompt
        self.retry_of: str | None = None
        self.pieces = pieces_of(prompt)
        self.started = False
        self.seq = 0
        self.terminal: Frame | None = None
        self._over = asyncio.Event()

    async def over(self) -> None:
        """Wait for the terminal."""
        async with asyncio.timeout(BOUND):
            await self._over.wait()

    def receive(self, frame: Frame) -> None:
        """Check a frame of this reply.

        Raises:
            Wrong: it is not the frame that has to come next.
        """
        check(frame.get("id") == self.id and self.terminal is None, frame, self.id, self.terminal)
        if frame["type"] == "start":
            check(frame.get("conversation") == self.conversation, frame, self.conversation)
            self.started = True
            return
        check(self.started, frame)
        if frame["type"] == "token":
            said = "".join(self.pieces[self.seq : frame["seq"]])
            check(frame["seq"] > self.seq and frame["text"] == said, frame, self.seq, said)
            self.seq = frame["seq"]
        else:
            check(frame["type"] == "done" and frame["seq"] == self.seq, frame, self.seq)
            check("saved" not in frame, frame)
            whole = self.seq == len(self.pieces)
            check(frame["reason"] == "stopped" or whole, frame, len(self.pieces))
            self.terminal = frame
            self._over.set()

    def messages(self) -> list[Frame]:
        """Return the messages of this turn in a history, with the keys in :data:`COMPARED`."""
        assert self.terminal is not None
        reply = {"role": "assistant", "content": "".join(self.pieces[: self.seq]), "id": self.id}
        if "by" in self.terminal:
            reply["partial"] = self.terminal["by"]
        return [{"role": "user", "content": self.prompt, "id": self.id}, reply]


class Tab:
    """One socket."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    @classmethod
    async def open(cls, url: str, *, narrow: bool = False) -> "Tab":
        """Connect. A narrow tab has small buffers, so that it reads slowly."""
        options: dict[str, Any] = {}
        if narrow:
            host, port = re.findall(r"//(.+):(\d+)", url)[0]
            options["sock"] = sock = socket.socket()
            options["max_queue"] = 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        return cls(await connect(url, proxy=None, compression=None, **options))

    async def send(self, **frame: object) -> None:
        await self.connection.send(json.dumps(frame))

    async def receive(self) -> Frame:
        async with asyncio.timeout(BOUND):
            frame: Frame = json.loads(await self.connection.recv())
        return frame

    async def ask(self, **frame: object) -> Frame:
        await self.send(**frame)
        return await self.receive()

    async def hear(self, reply: Reply, frames: int = sys.maxsize) -> None:
        """Receive frames of a reply up to its terminal, or at most ``frames`` of them."""
        while frames and reply.terminal is None:
            reply.receive(await self.receive())
            frames -= 1

    def drop(self) -> None:
        """Abort the connection without a close frame."""
        self.connection.transport.abort()

    async def close(self) -> None:
        await self.connection.close()


class Person:
    """A client that acts at random, and the expected contents of its conversations."""

    def __init__(self, url: str, chance: random.Random, tally: Counter[str]) -> None:
        self.url = url
        self.chance = chance
        self.tally = tally
        self.said: dict[str, list[Reply]] = {}  # by conversation
        self.titles: dict[str, str] = {}
        self.deleted: deque[str] = deque(maxlen=20)
        self.tab: Tab

    async def live(self, until: float) -> None:
        """Do random actions until a time of the monotonic clock."""
        actions: dict[Callable[[], Awaitable[None]], float] = {
            self.hears_out: 4,
            self.stops: 4,
            self.drops: 4,
            self.has_two_tabs: 3,
            self.reads_slowly: 1,
            self.asks_outside: 1,
            self.rereads: 2,
            self.deletes: 1,
            self.deletes_amid: 1,
            self.lists: 1,
            self.moves: 1,
            self.retries: 2,
            self.renames: 1,
            self.asks_again: 1,
            self.asks_at_once: 1,
            self.stops_waiting_prompt: 1,
        }
        self.tab = await Tab.open(self.url)
        while time.monotonic() < until:
            longest = max(map(len, self.said.values()), default=0)
            full = len(self.said) > CONVERSATIONS or longest >= TURNS
            (action,) = (
                [self.deletes] if full else self.chance.choices([*actions], [*actions.values()])
            )
            try:
                await action()
            except Exception as error:
                raise Wrong(f"{action.__name__}: {type(error).__name__}: {error}") from error
            self.tally[action.__name__] += 1
        await self.tab.close()

    def _name(self) -> str:
        return f"soak-{self.chance.getrandbits(96):024x}"

    def _reply(self, *, pieces: int = 0, pause: float = 0.003, outside: bool = False) -> Reply:
        pieces = pieces or self.chance.randint(1, 200)
        names = [*self.said, self._name()]
        name = self._name()
        conversation = None if outside else self.chance.choice(names)
        return Reply(name, conversation, f"{pieces} {pause} Überrasche mich, {name}")

    async def _prompt(self, reply: Reply) -> None:
        await self.tab.send(
            prompt=reply.prompt,
            id=reply.id,
            conversation=reply.conversation,
            retry_of=reply.retry_of,  # null counts as left out
        )

    def _record(self, reply: Reply) -> None:
        """Add an ended reply to the expected contents of its conversation."""
        assert reply.terminal is not None
        self.tally["replies"] += 1
        self.tally["pieces"] += reply.seq
        if reply.conversation is not None:
            self.said.setdefault(reply.conversation, []).append(reply)
            self.titles.setdefault(reply.conversation, " ".join(reply.prompt.split()))

    # The actions.

    async def hears_out(self) -> None:
        reply = self._reply()
        await self._prompt(reply)
        await self.tab.hear(reply)
        assert reply.terminal is not None
        check(reply.terminal["reason"] == "end_turn", reply.terminal)
        self._record(reply)

    async def stops(self) -> None:
        reply = self._reply()
        await self._prompt(reply)
        await self.tab.hear(reply, self.chance.choice([0, 1, 2, self.chance.randint(3, 200)]))
        await self.tab.send(type="stop", id=reply.id)
        await self.tab.hear(reply)
        await self.tab.send(type="ping")
        answer = await self.tab.receive()
        if answer["type"] == "error":  # the reply was over already
            assert reply.terminal is not None
            check(answer["code"] == "not_running", answer)
            check(reply.terminal["reason"] == "end_turn", reply.terminal)
            answer = await self.tab.receive()
        check(answer["type"] == "pong", answer)
        check(reply.terminal is not None, reply.id)
        self._record(reply)

    async def drops(self) -> None:
        """Lose the connection up to three times, and continue after the last piece."""
        reply = self._reply(pieces=self.chance.randint(50, 400))
        await self._prompt(reply)
        # Some pauses are longer than the grace time. Their sum is less than the replay time.
        first = self.chance.choice([0, 0.1, 0.5, GRACE - 0.5, GRACE + 0.5])
        for away in (first, 0.5, 0)[: self.chance.randint(1, 3)]:
            await self.tab.hear(reply, self.chance.choice([0, 1, self.chance.randint(2, 100)]))
            self.tab.drop()
            await asyncio.sleep(away)
            self.tab = await Tab.open(self.url)
            if reply.terminal is not None:
                break
            if reply.started:
                await self.tab.send(type="resume", id=reply.id, after=reply.seq)
                reply.receive(await self.tab.receive())
            else:  # the prompt may not have arrived
                await self._prompt(reply)
        await self.tab.hear(reply)
        assert reply.terminal is not None
        check(reply.terminal.get("by") in {None, "disconnect"}, reply.terminal)
        self._record(reply)

    async def has_two_tabs(self) -> None:
        """Open the conversation in a second tab while a reply runs. That tab may stop the reply."""
        reply = self._reply()
        await self._prompt(reply)
        await self.tab.hear(reply, self.chance.randint(1, 50))
        stop = self.chance.random() < 0.5
        async with asyncio.TaskGroup() as group:
            group.create_task(self.tab.hear(reply))
            group.create_task(self._second_tab(reply, stop=stop))
        if stop:
            # The first tab gets no answer to the stop of the second tab.
            check((await self.tab.ask(type="ping"))["type"] == "pong", reply.id)
        self._record(reply)

    async def _second_tab(self, reply: Reply, *, stop: bool) -> None:
        tab = await Tab.open(self.url)
        history = await tab.ask(type="open", conversation=reply.conversation)
        check(history["type"] == "history", history)
        assert reply.conversation is not None
        before = [m for said in self.said.get(reply.conversation, []) for m in said.messages()]
        if history["running"]:
            check(history["running"] == [reply.id], history["running"], reply.id)
            check_end(history["messages"], before)
            same = Reply(reply.id, reply.conversation, reply.prompt)
            if stop:
                await tab.hear(same, self.chance.randint(0, 20))
                await tab.send(type="stop", id=reply.id)
            await tab.hear(same)
            assert same.terminal is not None
            await reply.over()
            check(same.terminal == reply.terminal, same.terminal, reply.terminal)
        else:
            await reply.over()
            check_end(history["messages"], [*before, *reply.messages()])
        await tab.close()

    async def reads_slowly(self) -> None:
        reply = self._reply(pieces=self.chance.randint(1000, 4000), pause=0)
        await self.tab.close()
        self.tab = await Tab.open(self.url, narrow=True)
        await self._prompt(reply)
        while reply.terminal is None:
            await self.tab.hear(reply, 1)
            await asyncio.sleep(self.chance.uniform(0, 0.01))
        self._record(reply)

    async def asks_outside(self) -> None:
        """Send a prompt with ``messages``, which belongs to no conversation."""
        reply = self._reply(outside=True)
        messages = [{"role": "user", "content": reply.prompt}]
        await self.tab.send(type="prompt", messages=messages, id=reply.id)
        await self.tab.hear(reply)
        self._record(reply)

    async def rereads(self) -> None:
        """Read a whole conversation, page by page."""
        if not self.said:
            return
        name, said = self.chance.choice(list(self.said.items()))
        history = await self.tab.ask(type="open", conversation=name)
        messages = history["messages"]
        while (before := history.get("before")) is not None:
            history = await self.tab.ask(type="open", conversation=name, before=before)
            messages = history["messages"] + messages
        expected = [message for reply in said for message in reply.messages()]
        messages = compared(messages)
        check(messages == expected, "history of", name, messages, expected)

    async def deletes(self) -> None:
        if self.said:
            name = max(self.said, key=lambda name: len(self.said[name]))
            answer = await self.tab.ask(type="delete", conversation=name)
            check(answer == {"type": "deleted", "conversation": name}, answer)
            await self._is_gone(name)

    async def deletes_amid(self) -> None:
        """Delete a conversation while a reply runs in it."""
        reply = self._reply()
        assert reply.conversation is not None
        await self._prompt(reply)
        await self.tab.hear(reply, self.chance.randint(1, 20))
        await self.tab.send(type="delete", conversation=reply.conversation)
        deleted = False
        while not deleted or reply.terminal is None:
            frame = await self.tab.receive()
            if frame == {"type": "deleted", "conversation": reply.conversation}:
                deleted = True
            else:
                reply.receive(frame)
        check(reply.terminal.get("by") in {None, "deleted"}, reply.terminal)
        await self._is_gone(reply.conversation)

    async def _is_gone(self, conversation: str) -> None:
        self.said.pop(conversation, None)
        self.titles.pop(conversation, None)
        self.deleted.append(conversation)
        answer = await self.tab.ask(type="open", conversation=conversation)
        check(answer.get("code") == "not_found", answer)

    async def lists(self) -> None:
        """Read all pages of the list: it has all conversations, and no deleted ones."""
        items: list[Frame] = []
        page: Frame = {"next": None}
        while "next" in page:
            before = {"before": page["next"]} if page["next"] is not None else {}
            page = await self.tab.ask(type="list", limit=self.chance.randint(5, 100), **before)
            items += page["items"]
        updated = [item["updated"] for item in items]
        check(updated == sorted(updated, reverse=True), "not in order", updated)
        titles = {item["id"]: item["title"] for item in items}
        check(len(titles) == len(items), "a conversation is listed twice", items)
        for name in self.said:
            title = self.titles[name]
            check(titles.get(name, "?").rstrip("…") in title, name, titles.get(name), title)
        check(not titles.keys() & set(self.deleted), "a deleted conversation is listed")

    async def retries(self) -> None:
        """Replace the last turn by a retry."""
        if not self.said:
            return
        name = self.chance.choice([*self.said])
        reply = self._reply()
        reply.conversation, reply.retry_of = name, self.said[name][-1].id
        await self._prompt(reply)
        await self.tab.hear(reply, self.chance.randint(0, 50))
        if reply.terminal is None and self.chance.random() < 0.5:
            await self.tab.send(type="stop", id=reply.id)
        await self.tab.hear(reply)
        while (await self.tab.ask(type="ping"))["type"] != "pong":
            pass  # `not_running`: the stop came too late
        self.said[name].pop()
        self._record(reply)

    async def renames(self) -> None:
        if self.said:
            name, title = self.chance.choice([*self.said]), self._name()
            answer = await self.tab.ask(type="rename", conversation=name, title=title)
            check(answer == {"type": "renamed", "conversation": name, "title": title}, answer)
            self.titles[name] = title

    async def asks_again(self) -> None:
        """Send an old prompt again under its id: the same reply must come."""
        if not self.said:
            return
        told = self.chance.choice(self.chance.choice([*self.said.values()]))
        again = Reply(told.id, told.conversation, told.prompt)
        again.retry_of = told.retry_of
        await self._prompt(again)
        await self.tab.hear(again)
        check(again.terminal == told.terminal, again.terminal, told.terminal)

    async def asks_at_once(self) -> None:
        """Send prompts from several tabs at once: one prompt runs, the others get ``busy``."""
        name = self._name()
        tabs = [self.tab, *[await Tab.open(self.url) for _ in range(3)]]
        replies = []
        for tab in tabs:
            reply = self._reply(pieces=30)
            reply.conversation = name
            replies.append(reply)
            await tab.send(prompt=reply.prompt, id=reply.id, conversation=name)
        answers = [await tab.receive() for tab in tabs]
        kinds = sorted(str(answer.get("code", answer["type"])) for answer in answers)
        check(kinds == ["busy", "busy", "busy", "start"], answers)
        for tab, reply, answer in zip(tabs, replies, answers, strict=True):
            if answer["type"] == "start":
                reply.receive(answer)
                await tab.hear(reply)
                self._record(reply)
            if tab is not self.tab:
                await tab.close()

    async def stops_waiting_prompt(self) -> None:
        """Queue a prompt, and stop it before it begins."""
        runs, waits = self._reply(pieces=100), self._reply()
        waits.conversation = runs.conversation
        await self._prompt(runs)
        await self.tab.hear(runs, 2)
        await self.tab.send(
            prompt=waits.prompt, id=waits.id, conversation=waits.conversation, on_busy="queue"
        )
        await self.tab.send(type="stop", id=waits.id)
        while runs.terminal is None or waits.terminal is None:
            frame = await self.tab.receive()
            (waits if frame["id"] == waits.id else runs).receive(frame)
        check(waits.terminal.get("by") == "client", waits.terminal)
        self._record(runs)
        if waits.seq:  # the prompt had begun before the stop
            self._record(waits)

    async def moves(self) -> None:
        await self.tab.close()
        self.tab = await Tab.open(self.url)


def check_end(messages: list[Frame], expected: list[Frame]) -> None:
    """Check that a page of a history has the newest messages."""
    messages = compared(messages)
    check(messages == expected[len(expected) - len(messages) :], messages, expected)
    check(messages or not expected, expected)


def compared(messages: list[Frame]) -> list[Frame]:
    """Return messages of a history with the keys in :data:`COMPARED` only."""
    return [{key: m[key] for key in m.keys() & COMPARED} for m in messages]


@dataclass
class Samples:
    """The sizes of a process over time."""

    pid: int
    values: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in TOLERANCE})

    def add(self) -> str:
        """Add a sample, and return the sample as text."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        seen: dict[str, float] = {
            "memory": int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024,
            "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
            "descriptors": len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
        }
        for kind, value in seen.items():
            self.values[kind].append(value)
        return ", ".join(f"{shown(kind, value)} {kind}" for kind, value in seen.items())

    def verdicts(self) -> list[tuple[bool, str]]:
        """Return for each value whether it has stopped growing, and a sentence about it."""
        found = []
        for kind, (share, number) in TOLERANCE.items():
            values = self.values[kind]
            third = len(values) // 3
            second = statistics.fmean(values[third : 2 * third])
            last = statistics.fmean(values[2 * third :])
            level = last <= second * (1 + share) + number
            means = f"{shown(kind, second)} in the second third, {shown(kind, last)} in the last"
            found.append((level, f"{kind} {'stable' if level else 'still growing'}: {means}"))
        return found


def shown(kind: str, value: float) -> str:
    return f"{value / MEBIBYTE:.1f} MiB" if kind == "memory" else f"{value:.3g}"


@contextlib.asynccontextmanager
async def server(folder: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Run the server, with its store and its log in a folder; yield its address and process."""
    arguments = ["--port", "0", "--model", "tests.bench.soak:storyteller"]
    arguments += ["--store", f"sqlite:///{folder / 'chat.sqlite'}"]
    for name, value in LIMITS.items():
        arguments += [f"--{name}", str(value)]
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "wsserver", "serve", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **CROWD},
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(BOUND):
            while not (found := re.search(r"ws://\S+", (await process.stdout.readline()).decode())):
                check(process.returncode is None and not process.stdout.at_eof(), "not started")
        yield found[0], process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def watch(
    samples: Samples, folder: Path, options: argparse.Namespace, tally: Counter[str]
) -> None:
    """Print a line every few seconds while the clients run."""
    for number in range(1, int(options.minutes * 60 / options.every) + 1):
        await asyncio.sleep(options.every)
        print(
            f"{number * options.every:5.0f} s: {samples.add()}, {file_size(folder)} of store, "
            f"{tally['replies']} replies, {tally['pieces']} pieces",
            flush=True,
        )


def file_size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.glob("chat.sqlite*"))
    return f"{size / MEBIBYTE:.1f} MiB"


async def soak(folder: Path, options: argparse.Namespace) -> list[tuple[bool, str]]:
    """Run the server and the clients, and return the verdicts."""
    tally: Counter[str] = Counter()
    async with server(folder) as (url, process):
        tab = await Tab.open(url)  # the first client allocates objects that stay
        await tab.ask(type="list")
        await tab.close()
        await asyncio.sleep(1)
        samples, idle = Samples(process.pid), Samples(process.pid)
        print(f"before the clients: {idle.add()}")
        until = time.monotonic() + options.minutes * 60
        watching = asyncio.create_task(watch(samples, folder, options, tally))
        verdicts = []
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(options.clients):
                    chance = random.Random(f"{options.seed} {number}")
                    group.create_task(Person(url, chance, tally).live(until))
        except* Wrong as errors:
            verdicts += [(False, f"client failed: {error}") for error in errors.exceptions]
        finally:
            watching.cancel()
        print(", ".join(f"{count} {what}" for what, count in sorted(tally.items())))
        if not verdicts:
            verdicts = [(True, "every client got the right texts"), *samples.verdicts()]
            await asyncio.sleep(GRACE + REPLAY + 1)
            print(f"after the clients: {idle.add()}")
            before, after = idle.values["descriptors"]
            verdicts.append(
                (after <= before, f"{before:.0f} descriptors before, {after:.0f} after")
            )
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(2 * BOUND):
            code = await process.wait()
        verdicts.append((code == 0, f"exit code {code}"))
    log = (folder / "log").read_text().splitlines()
    bad = [line for line in log if any(sign in line for sign in BAD_SIGNS)]
    warnings = [line for line in log if " WARNING " in line]
    verdicts.append((not bad, f"{len(bad)} errors in the log, {len(warnings)} warnings"))
    print(*bad[:20], *warnings[:5], sep="\n", end="\n" if bad or warnings else "")
    with contextlib.closing(sqlite3.connect(folder / "chat.sqlite")) as database:
        ((found,),) = database.execute("PRAGMA integrity_check")
    verdicts.append((found == "ok", f"integrity check of the store: {found}"))
    return verdicts


def main() -> None:
    """Run the soak test; exit with 1 if a verdict is bad."""
    parser = argparse.ArgumentParser(
        description="Use all features at random for minutes, and check for leaks."
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two lines")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.minutes * 60 < options.every * 6:
        parser.error("--minutes is too short for six samples")
    with tempfile.TemporaryDirectory() as folder:
        verdicts = asyncio.run(soak(Path(folder), options))
    for good, what in verdicts:
        print("ok  " if good else "FAIL", what)
    sys.exit(not all(good for good, _ in verdicts))


if __name__ == "__main__":
    main()
