"""Clients that do all that clients do, at random and for minutes.

::

    python -m tests.bench.soak --minutes 3 --clients 16 --every 5

Is every text right, whatever happened to it on its way, and does the server stay at its size? It
runs as a process of its own, with its conversations in a SQLite file. The exit code is 1 if a
client got what the model has not said, if memory, threads or descriptors have not levelled off,
or if the server's log has an error.
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

REPLAY, GRACE = 5.0, 2.0  # seconds; short, so that the server forgets as much as it learns
LIMITS = {"replay": REPLAY, "grace": GRACE, "reply-timeout": 20}
BOUND = 20.0  # seconds that any wait may take
CONVERSATIONS, TURNS = 4, 10  # of a client, before it deletes one
BAD_SIGNS = ("ERROR", "CRITICAL", "Traceback", "never awaited", "never retrieved", "destroyed")

MEBIBYTE = 2**20
# What may be between the means of the last third and the one before it: a share, and a number.
TOLERANCE = {"memory": (0.03, MEBIBYTE), "threads": (0.0, 1.0), "descriptors": (0.05, 3.0)}


def pieces_of(prompt: str) -> list[str]:
    """Return what the model says to a prompt, which begins with how many pieces that has."""
    count = int(prompt.split(maxsplit=1)[0])
    return [f"{n}:{zlib.crc32(f'{n} {prompt}'.encode()):x}… " for n in range(count)]


async def storyteller(request: Request) -> AsyncIterator[str]:
    """Say the pieces, with a pause on average as long as the prompt's second word says."""
    pause = float(request.prompt.split(maxsplit=2)[1])
    for piece in pieces_of(request.prompt):
        yield piece
        if pause:
            await asyncio.sleep(random.uniform(0, 2 * pause))


class Wrong(Exception):
    """The server did what it must not."""


def check(what: object, *shown: object) -> None:
    """Raise unless it is so; not an assert, as this is what the program is for."""
    if not what:
        raise Wrong(" ".join(repr(value)[:500] for value in shown))


class Reply:
    """One reply as one socket gets it: every frame is compared with what the model says."""

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
        """Wait until it is."""
        async with asyncio.timeout(BOUND):
            await self._over.wait()

    def take(self, frame: Frame) -> None:
        """Take a frame of this reply, if it is right."""
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
        """Return it as history shows it."""
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
        """Connect; a narrow one takes little at a time."""
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
        """Take frames of a reply up to its terminal, or up to a number of them."""
        while frames and reply.terminal is None:
            reply.take(await self.receive())
            frames -= 1

    def drop(self) -> None:
        """Be gone without a word."""
        self.connection.transport.abort()

    async def close(self) -> None:
        await self.connection.close()


class Person:
    """A client with a mind of its own, and what it knows to be in its conversations."""

    def __init__(self, url: str, chance: random.Random, tally: Counter[str]) -> None:
        self.url = url
        self.chance = chance
        self.tally = tally
        self.said: dict[str, list[Reply]] = {}  # by conversation
        self.titles: dict[str, str] = {}
        self.deleted: deque[str] = deque(maxlen=20)
        self.tab: Tab

    async def live(self, until: float) -> None:
        """Do one thing after another for as long as there is time."""
        habits: dict[Callable[[], Awaitable[None]], float] = {
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
            self.takes_back_what_waits: 1,
        }
        self.tab = await Tab.open(self.url)
        while time.monotonic() < until:
            longest = max(map(len, self.said.values()), default=0)
            full = len(self.said) > CONVERSATIONS or longest >= TURNS
            (habit,) = (
                [self.deletes] if full else self.chance.choices([*habits], [*habits.values()])
            )
            try:
                await habit()
            except Exception as error:
                raise Wrong(f"{habit.__name__}: {type(error).__name__}: {error}") from error
            self.tally[habit.__name__] += 1
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

    def _keep(self, reply: Reply) -> None:
        """The reply has ended, and is now part of its conversation."""
        assert reply.terminal is not None
        self.tally["replies"] += 1
        self.tally["pieces"] += reply.seq
        if reply.conversation is not None:
            self.said.setdefault(reply.conversation, []).append(reply)
            self.titles.setdefault(reply.conversation, " ".join(reply.prompt.split()))

    # What clients do.

    async def hears_out(self) -> None:
        reply = self._reply()
        await self._prompt(reply)
        await self.tab.hear(reply)
        assert reply.terminal is not None
        check(reply.terminal["reason"] == "end_turn", reply.terminal)
        self._keep(reply)

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
        self._keep(reply)

    async def drops(self) -> None:
        """Lose the connection, some times, and go on exactly there."""
        reply = self._reply(pieces=self.chance.randint(50, 400))
        await self._prompt(reply)
        # Now and then for longer than the grace time, but never in all for the replay time.
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
                reply.take(await self.tab.receive())
            else:  # nobody knows whether the prompt has arrived
                await self._prompt(reply)
        await self.tab.hear(reply)
        assert reply.terminal is not None
        check(reply.terminal.get("by") in {None, "disconnect"}, reply.terminal)
        self._keep(reply)

    async def has_two_tabs(self) -> None:
        """Open the conversation in a second tab while a reply runs, which may stop it."""
        reply = self._reply()
        await self._prompt(reply)
        await self.tab.hear(reply, self.chance.randint(1, 50))
        stop = self.chance.random() < 0.5
        async with asyncio.TaskGroup() as group:
            group.create_task(self.tab.hear(reply))
            group.create_task(self._second_tab(reply, stop=stop))
        if stop:
            # Nothing else has been sent to the first tab: the stop was the second one's affair.
            check((await self.tab.ask(type="ping"))["type"] == "pong", reply.id)
        self._keep(reply)

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
        self._keep(reply)

    async def asks_outside(self) -> None:
        """Bring the history along, and so touch no conversation."""
        reply = self._reply(outside=True)
        messages = [{"role": "user", "content": reply.prompt}]
        await self.tab.send(type="prompt", messages=messages, id=reply.id)
        await self.tab.hear(reply)
        self._keep(reply)

    async def rereads(self) -> None:
        """Get a whole conversation, page by page."""
        if not self.said:
            return
        name, said = self.chance.choice(list(self.said.items()))
        history = await self.tab.ask(type="open", conversation=name)
        messages = history["messages"]
        while (before := history.get("before")) is not None:
            history = await self.tab.ask(type="open", conversation=name, before=before)
            messages = history["messages"] + messages
        expected = [message for reply in said for message in reply.messages()]
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
                reply.take(frame)
        check(reply.terminal.get("by") in {None, "deleted"}, reply.terminal)
        await self._is_gone(reply.conversation)

    async def _is_gone(self, conversation: str) -> None:
        self.said.pop(conversation, None)
        self.titles.pop(conversation, None)
        self.deleted.append(conversation)
        answer = await self.tab.ask(type="open", conversation=conversation)
        check(answer.get("code") == "not_found", answer)

    async def lists(self) -> None:
        """Page through the list: what is there must be, and what was deleted must not."""
        items: list[Frame] = []
        page: Frame = {"next": None}
        while "next" in page:
            before = {"before": page["next"]} if page["next"] is not None else {}
            page = await self.tab.ask(type="list", limit=self.chance.randint(5, 100), **before)
            items += page["items"]
        updated = [item["updated"] for item in items]
        check(updated == sorted(updated, reverse=True), "not in order", updated)
        titles = {item["id"]: item["title"] for item in items}
        check(len(titles) == len(items), "one is there twice", items)
        for name in self.said:
            title = self.titles[name]
            check(titles.get(name, "?").rstrip("…") in title, name, titles.get(name), title)
        check(not titles.keys() & set(self.deleted), "deleted ones are there")

    async def retries(self) -> None:
        """Put another turn in the place of the last one."""
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
            pass  # a stop that came too late
        self.said[name].pop()
        self._keep(reply)

    async def renames(self) -> None:
        if self.said:
            name, title = self.chance.choice([*self.said]), self._name()
            answer = await self.tab.ask(type="rename", conversation=name, title=title)
            check(answer == {"type": "renamed", "conversation": name, "title": title}, answer)
            self.titles[name] = title

    async def asks_again(self) -> None:
        """Send a prompt once more that was answered long ago: the same reply comes again."""
        if not self.said:
            return
        told = self.chance.choice(self.chance.choice([*self.said.values()]))
        again = Reply(told.id, told.conversation, told.prompt)
        again.retry_of = told.retry_of
        await self._prompt(again)
        await self.tab.hear(again)
        check(again.terminal == told.terminal, again.terminal, told.terminal)

    async def asks_at_once(self) -> None:
        """Ask from several tabs at the same moment: one prompt runs, all others are busy."""
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
                reply.take(answer)
                await tab.hear(reply)
                self._keep(reply)
            if tab is not self.tab:
                await tab.close()

    async def takes_back_what_waits(self) -> None:
        """Queue a prompt behind another, and stop it before it begins."""
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
            (waits if frame["id"] == waits.id else runs).take(frame)
        check(waits.terminal.get("by") == "client", waits.terminal)
        self._keep(runs)
        if waits.seq:  # it had begun
            self._keep(waits)

    async def moves(self) -> None:
        await self.tab.close()
        self.tab = await Tab.open(self.url)


def check_end(messages: list[Frame], expected: list[Frame]) -> None:
    """Check that the newest messages, as many as fit into a frame, are the right ones."""
    check(messages == expected[len(expected) - len(messages) :], messages, expected)
    check(messages or not expected, expected)


@dataclass
class Samples:
    """How large a process was at times."""

    pid: int
    values: dict[str, list[float]] = field(default_factory=lambda: {k: [] for k in TOLERANCE})

    def take(self) -> str:
        """Look now, and return it as text."""
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
        """Say of each whether it has levelled off."""
        found = []
        for kind, (share, number) in TOLERANCE.items():
            values = self.values[kind]
            third = len(values) // 3
            second = statistics.fmean(values[third : 2 * third])
            last = statistics.fmean(values[2 * third :])
            level = last <= second * (1 + share) + number
            means = f"{shown(kind, second)} in the second third, {shown(kind, last)} in the last"
            found.append((level, f"{kind} {'' if level else 'not '}levelled off: {means}"))
        return found


def shown(kind: str, value: float) -> str:
    return f"{value / MEBIBYTE:.1f} MiB" if kind == "memory" else f"{value:.3g}"


@contextlib.asynccontextmanager
async def server(folder: Path) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Run the server with its file and its log in a folder."""
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
                check(process.returncode is None and not process.stdout.at_eof(), "no start")
        yield found[0], process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def watch(
    samples: Samples, folder: Path, options: argparse.Namespace, tally: Counter[str]
) -> None:
    """Print a line now and then, for as long as all clients are busy."""
    for number in range(1, int(options.minutes * 60 / options.every) + 1):
        await asyncio.sleep(options.every)
        print(
            f"{number * options.every:5.0f} s: {samples.take()}, {file_size(folder)} of file, "
            f"{tally['replies']} replies, {tally['pieces']} pieces",
            flush=True,
        )


def file_size(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.glob("chat.sqlite*"))
    return f"{size / MEBIBYTE:.1f} MiB"


async def soak(folder: Path, options: argparse.Namespace) -> list[tuple[bool, str]]:
    """Run it all, and return what is to be said about it in the end."""
    tally: Counter[str] = Counter()
    async with server(folder) as (url, process):
        tab = await Tab.open(url)  # what is opened with the first client is not a leak
        await tab.ask(type="list")
        await tab.close()
        await asyncio.sleep(1)
        samples, idle = Samples(process.pid), Samples(process.pid)
        print(f"before the clients: {idle.take()}")
        until = time.monotonic() + options.minutes * 60
        watching = asyncio.create_task(watch(samples, folder, options, tally))
        verdicts = []
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(options.clients):
                    chance = random.Random(f"{options.seed} {number}")
                    group.create_task(Person(url, chance, tally).live(until))
        except* Wrong as errors:
            verdicts += [(False, f"a client that {error}") for error in errors.exceptions]
        finally:
            watching.cancel()
        print(", ".join(f"{count} {what}" for what, count in sorted(tally.items())))
        if not verdicts:
            verdicts = [(True, "every client got what the model said"), *samples.verdicts()]
            await asyncio.sleep(GRACE + REPLAY + 1)
            print(f"after the clients: {idle.take()}")
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
    verdicts.append((found == "ok", f"the file is {found}"))
    return verdicts


def main() -> None:
    """Run it; exit with 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description="Do everything at once for minutes.")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two lines")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.minutes * 60 < options.every * 6:
        parser.error("that is too short for six samples")
    with tempfile.TemporaryDirectory() as folder:
        verdicts = asyncio.run(soak(Path(folder), options))
    for good, what in verdicts:
        print("ok  " if good else "FAIL", what)
    sys.exit(not all(good for good, _ in verdicts))


if __name__ == "__main__":
    main()
