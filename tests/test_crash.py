"""Crashes: the losses after ``kill -9``, and the state of the file.

The tests use real processes and a real file. Only the text of the last quarter second may be lost:
the save interval, and time to write. On a computer that is busy with other tests, a few kills may
lose more.
"""

import asyncio
import inspect
import json
import random
import shutil
import signal
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.support.client import Client, Frame
from tests.support.process import Process, run
from tests.support.puppet import until
from wsserver import Request, Thinking

pytestmark = pytest.mark.slow

LOSS = 0.25  # seconds before the kill whose text may be lost
MOST = 1.0  # seconds that a kill may lose on a busy computer
BUSY = 5  # kills that may lose more than LOSS
LANES = 3  # concurrent servers, each with its own file
WHAT_DO_YOU_SEE = "What do you see?"

# The state of a reply when its server is killed, and the number of such kills.
KILLS = {
    "sent": 2,  # the prompt has just been sent
    "started": 3,
    "amid": 14,  # after a random number of frames
    "stop sent": 3,
    "stop obeyed": 2,  # its terminal has not been saved yet
    "stopped": 2,
    "all said": 2,  # the client has all text, but no terminal
    "done": 2,
}


def pieces_of(prompt: str) -> Iterator[str | Thinking]:
    """Return the pieces of the model. The prompt begins with their number."""
    for number in range(int(prompt.split(maxsplit=1)[0])):
        piece = f"{number} “{prompt}” 🙂\n"
        yield Thinking(piece) if number % 7 == 3 else piece


async def model(request: Request) -> AsyncIterator[str | Thinking]:
    """Yield the pieces with short pauses, or digests of the messages of the request."""
    if request.prompt == WHAT_DO_YOU_SEE:
        seen = [(m.role, zlib.crc32(m.content.encode()), m.partial) for m in request.messages]
        yield json.dumps(seen)
        return
    for piece in pieces_of(request.prompt):
        yield piece
        await asyncio.sleep(random.uniform(0, 0.008))


def text_of(pieces: Sequence[str | Thinking], kind: str = "token") -> str:
    if kind == "token":
        return "".join(piece for piece in pieces if isinstance(piece, str))
    return "".join(piece.thinking for piece in pieces if isinstance(piece, Thinking))


class Witness(Client):
    """A client that notes when it received each frame."""

    def __init__(self, socket: ClientConnection) -> None:
        super().__init__(socket)
        self.times: list[float] = []

    async def receive(self) -> Frame:
        frame = await super().receive()
        self.times.append(time.monotonic())
        return frame

    def seq(self, generation: str, by: float = float("inf")) -> int:
        """Return the last seq received before a time: 0 after the start, -1 before it."""
        frames = zip(self.frames, self.times, strict=True)
        return max(
            (f.get("seq", 0) for f, at in frames if f.get("id") == generation and at <= by),
            default=-1,
        )


@asynccontextmanager
async def life(folder: Path, *arguments: str) -> AsyncIterator[tuple[Process, Witness]]:
    """Start the server on the file in a folder, and connect."""
    async with run(*command(folder), *arguments, cwd=folder) as process:
        url = (await process.line(r"(ws://\S+)"))[1]
        async with connect(url, proxy=None) as socket:
            yield process, Witness(socket)


def command(folder: Path) -> tuple[str, ...]:
    """Write the model into a folder; return the command that starts the server."""
    imports = "import asyncio, json, random, zlib\nfrom wsserver import Thinking\n"
    (folder / "mine.py").write_text(
        f"from __future__ import annotations\n{imports}{WHAT_DO_YOU_SEE=}\n\n"
        + inspect.getsource(pieces_of)
        + inspect.getsource(model)
    )
    serve = ("-m", "wsserver", "serve", "--port", "0", "--model", "mine:model")
    return (*serve, "--store", f"sqlite:///{file_in(folder)}")


def file_in(folder: Path, ending: str = "") -> Path:
    return folder / f"chat.sqlite{ending}"


def check_file(folder: Path) -> None:
    """Check a copy of the file, because opening the file would repair it."""
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    for ending in ("", "-wal"):
        if file_in(folder, ending).exists():
            shutil.copy(file_in(folder, ending), file_in(copy, ending))
    with closing(sqlite3.connect(file_in(copy))) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    shutil.rmtree(copy)


@dataclass
class Victim:
    """A reply whose server was killed, and the frames that the client received."""

    id: str
    conversation: str
    prompt: str
    chat: Witness
    killed: float

    @property
    def pieces(self) -> list[str | Thinking]:
        return list(pieces_of(self.prompt))

    def loss(self, seq: int) -> float:
        """Return for how many seconds before the kill the client had a piece that is not saved.

        Args:
            seq: the last piece that is saved; -1 if the server has nothing of the reply.
        """
        frames = zip(self.chat.frames, self.chat.times, strict=True)
        lost = (at for f, at in frames if f.get("id") == self.id and f.get("seq", 0) > seq)
        return max(0.0, self.killed - min(lost, default=self.killed))

    @property
    def terminal(self) -> Frame | None:
        ends = (f for f in self.chat.frames if f["type"] in {"done", "error"})
        return next((frame for frame in ends if frame.get("id") == self.id), None)


def check_saved(victim: Victim, text: str, thinking: str, terminal: Frame) -> None:
    """Check that the saved text is right, and that only the allowed part is missing."""
    seq, whole, chat = terminal["seq"], victim.pieces, victim.chat
    assert text == text_of(whole[:seq])
    assert thinking == text_of(whole[:seq], "thinking")
    received = chat.said(victim.id)
    assert received == text_of(whole[: chat.seq(victim.id)])
    size = min(len(received), len(text))
    assert text[:size] == received[:size]
    if victim.terminal is not None:  # a terminal that a client received is saved
        assert terminal == victim.terminal
        assert received == text
    elif terminal["type"] == "done":  # the terminal was about to be sent
        assert terminal.get("by") == "client" or seq == len(whole)
    else:
        assert (terminal["code"], terminal["retryable"]) == ("interrupted", True)


async def check_resumed(victim: Victim, chat: Witness, terminal: Frame) -> None:
    """Resume after the last piece of the client, which may not be saved."""
    had, frames = victim.chat.seq(victim.id), len(chat.frames)
    await chat.send({"type": "resume", "id": victim.id, "after": max(had, 0)})
    answer = await chat.next("start", "error")
    if had > terminal["seq"]:
        assert (answer["code"], answer["about"]) == ("gap", victim.id)
        return
    assert await chat.next("done", "error", id=victim.id) == terminal
    missed = "".join(frame["text"] for frame in chat.frames[frames:] if frame["type"] == "token")
    assert victim.chat.said(victim.id) + missed == text_of(victim.pieces[: terminal["seq"]])


async def ask(victim: Victim, chat: Witness, history: list[Frame]) -> list[Frame]:
    """Check that the conversation continues, and the messages of the model; return the turn."""
    start = await chat.prompt(WHAT_DO_YOU_SEE, conversation=victim.conversation)
    answer, done = await chat.text(start["id"])
    assert done["reason"] == "end_turn"
    asked = {"role": "user", "content": WHAT_DO_YOU_SEE, "id": start["id"]}
    assert json.loads(answer) == [
        [said["role"], zlib.crc32(said["content"].encode()), said.get("partial")]
        for said in (*history, asked)
        if said["content"]  # a turn without text is not sent to the model
    ]
    return [asked, {"role": "assistant", "content": answer, "id": start["id"]}]


@dataclass
class Lane:
    """One file, its expected content, and the servers that are killed one after another."""

    folder: Path
    chance: random.Random
    histories: dict[str, list[Frame]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    async def run(self, moments: list[str]) -> None:
        self.folder.mkdir()
        victim = None
        for number, moment in enumerate((*moments, None)):
            try:
                async with life(self.folder) as (process, chat):
                    if victim is not None:
                        await self.check(victim, chat)
                    if moment is None:
                        return
                    victim = await self.kill(process, chat, moment)
                    assert not [line for line in ("ERROR", "Traceback") if line in process.output]
                check_file(self.folder)
            except Exception as error:
                before = moments[number - 1] if number else "nothing"
                error.add_note(f"{self.folder.name}, life {number}: after {before!r}, {moment!r}")
                raise

    async def kill(self, process: Process, chat: Witness, moment: str) -> Victim:
        """Start a reply, and kill the server when the reply has the wanted state."""
        chance = self.chance
        name = f"reply-{chance.getrandbits(64):016x}"
        known = [*self.histories, f"conversation-{name}"]
        conversation = chance.choice(known[-2:])  # the last conversation, or a new one
        prompt = f"{15 if moment in {'all said', 'done'} else 400} {name}"
        await chat.send({"prompt": prompt, "id": name, "conversation": conversation})
        if moment != "sent":
            await chat.next("start", id=name)
        if moment in {"amid", "stop sent", "stop obeyed", "stopped"}:
            for _ in range(chance.randint(1, 200)):
                await chat.next("token", "thinking", id=name)
        if moment in {"stop sent", "stop obeyed", "stopped"}:
            await chat.send({"type": "stop", "id": name})
        if moment == "stop obeyed":
            await chat.quiet()
        if moment in {"stopped", "done"}:
            await chat.next("done", id=name)
        while moment == "all said" and chat.seq(name) < 15:
            await chat.receive()
        killed = time.monotonic()
        process.signal(signal.SIGKILL)
        await chat.closed()  # frames in flight still arrive
        assert await process.end() == -signal.SIGKILL
        return Victim(name, conversation, prompt, chat, killed)

    async def check(self, victim: Victim, chat: Witness) -> None:
        """Resume a reply after the restart, and check it."""
        history = self.histories.get(victim.conversation, [])
        await chat.send({"type": "open", "conversation": victim.conversation})
        opened = await chat.next("history", "error")
        await chat.send({"type": "resume", "id": victim.id})
        terminal = None
        if (await chat.next("start", "error"))["type"] == "start":
            text, terminal = await chat.text(victim.id)
            check_saved(victim, text, chat.said(victim.id, "thinking"), terminal)
            self.losses.append(victim.loss(terminal["seq"]))
            await check_resumed(victim, chat, terminal)
            reply = {"role": "assistant", "content": text, "id": victim.id}
            if why := terminal.get("by") or terminal.get("code"):
                reply["partial"] = why
            history = [*history, {"role": "user", "content": victim.prompt, "id": victim.id}, reply]
        else:
            assert chat.frames[-1]["code"] == "not_found"
            assert victim.terminal is None
            self.losses.append(victim.loss(-1))
        if history:
            keys = ("role", "content", "id", "partial")
            shown = [{key: m[key] for key in keys if key in m} for m in opened["messages"]]
            assert shown == history
            assert opened["running"] == []
            if terminal is not None:
                blocks = opened["messages"][-1].get("blocks", ())
                thinking = "".join(b["thinking"] for b in blocks if b["type"] == "thinking")
                assert thinking == chat.said(victim.id, "thinking")
        else:
            assert opened["code"] == "not_found"
        self.histories[victim.conversation] = history + await ask(victim, chat, history)


async def test_kill_9_loses_at_most_last_quarter_second(
    tmp_path: Path,
) -> None:
    chance = random.Random(9)
    moments = [moment for moment, times in KILLS.items() for _ in range(times)]
    assert len(moments) == 30
    chance.shuffle(moments)
    lanes = [Lane(tmp_path / f"lane {n}", random.Random(n)) for n in range(LANES)]
    async with asyncio.TaskGroup() as group:
        for number, lane in enumerate(lanes):
            group.create_task(lane.run(moments[number::LANES]))
    losses = sorted(loss for lane in lanes for loss in lane.losses)
    assert len(losses) == len(moments)
    assert losses[-1 - BUSY] <= LOSS
    assert losses[-1] <= MOST


@pytest.mark.parametrize("ending", ["", ".lock", "-wal"])
async def test_kill_9_during_file_creation_leaves_usable_file(tmp_path: Path, ending: str) -> None:
    async with run(*command(tmp_path), cwd=tmp_path) as process:
        await until(file_in(tmp_path, ending).exists)
        process.signal(signal.SIGKILL)
        assert await process.end() == -signal.SIGKILL
    check_file(tmp_path)
    async with life(tmp_path) as (process, chat):
        start = await chat.prompt("3 words")
        assert (await chat.text(start["id"]))[0] == text_of(list(pieces_of("3 words")))


async def test_kill_9_keeps_queued_prompts(tmp_path: Path) -> None:
    conversation, running, queued = "conversation-one", "the-running-reply", "the-queued-reply-"
    async with life(tmp_path) as (process, chat):
        await chat.prompt("4000 words", id=running, conversation=conversation)
        await chat.next("token", id=running)
        start = await chat.prompt("5 more", id=queued, conversation=conversation, on_busy="queue")
        assert start["queued"] == 1
        await chat.send({"type": "open", "conversation": conversation})
        await chat.next("history")  # the prompts accepted before are saved by now
        process.signal(signal.SIGKILL)
        assert await process.end() == -signal.SIGKILL
    check_file(tmp_path)
    async with life(tmp_path) as (_, again):
        await again.send({"type": "open", "conversation": conversation})
        told = (await again.next("history"))["messages"]
        assert [(m["role"], m["id"], m.get("partial")) for m in told] == [
            ("user", running, None),
            ("assistant", running, "interrupted"),
            ("user", queued, None),
            ("assistant", queued, "interrupted"),
        ]
        for name in (running, queued):
            await again.send({"type": "resume", "id": name})
            text, error = await again.text(name)
            assert (error["code"], error["retryable"]) == ("interrupted", True)
            assert error["usage"].get("estimated", False) == (name == running)
            assert bool(text) == bool(error["usage"]["output_tokens"]) == (name == running)


async def test_sigterm_without_drain_time_loses_nothing(tmp_path: Path) -> None:
    prompts = {f"a-reply-of-a-name-{letter}": f"400 {letter}" for letter in "ab"}
    async with life(tmp_path, "--drain-timeout", "0") as (process, chat):
        for number, (name, prompt) in enumerate(prompts.items(), start=1):
            await chat.prompt(prompt, id=name, conversation=f"conversation-{name}")
            for _ in range(number * 40):
                await chat.next("token", id=name)
        process.signal(signal.SIGTERM)
        closed = await chat.closed()
        assert closed.rcvd is not None
        assert closed.rcvd.code == 1012
        assert await process.end() == 0
        assert "Traceback" not in process.output
    check_file(tmp_path)
    async with life(tmp_path) as (_, again):
        for name, prompt in prompts.items():
            await again.send({"type": "resume", "id": name})
            text, terminal = await again.text(name)
            assert (terminal["reason"], terminal["by"]) == ("stopped", "shutdown")
            assert [frame for frame in chat.frames if frame.get("id") == name][-1] == terminal
            assert terminal["seq"] == chat.seq(name) > 40
            assert text == chat.said(name) == text_of(list(pieces_of(prompt))[: terminal["seq"]])
            await again.send({"type": "open", "conversation": f"conversation-{name}"})
            reply = (await again.next("history"))["messages"][1]
            assert (reply["content"], reply["partial"]) == (text, "shutdown")
