"""The exchanges of ``tests/conformance.json``, by raw frames and by the Python client."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import wsserver
from tests.support.conformance import EXCHANGES, Seen, play
from tests.support.line import Line
from tests.support.puppet import Puppet
from wsserver.client import Chat, ChatError, Reply, ServerError, Subscription, dial
from wsserver.client import connect as connect_client

Frame = dict[str, Any]


class Raw:
    """A minimal client of raw frames, as ``PROTOCOL.md`` describes it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._socket: ClientConnection
        self._reader: asyncio.Task[None] | None = None
        self._prompts: dict[str, Frame] = {}
        self._ids: dict[str, str] = {}  # by the short name
        self._frames: dict[str, list[Frame]] = {}
        self._stopped: set[str] = set()
        self._answer: asyncio.Future[Frame] | None = None

    async def connect(self) -> None:
        self._socket = await connect(self._url, proxy=None, subprotocols=["wsserver.v1"])  # type: ignore[list-item]
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        await self._socket.close()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for message in self._socket:
                self._take(json.loads(message))

    def _take(self, frame: Frame) -> None:
        name = str(frame.get("id") or frame.get("about"))
        if name in self._ids.values():
            if frame.get("code") == "not_running":
                return
            self._frames[name].append(frame)
        elif self._answer is not None and frame["type"] != "hello":
            self._answer.set_result(frame)

    async def _send(self, frame: Frame) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(json.dumps(frame))

    async def prompt(self, reply: str, text: str, conversation: str, on_busy: str) -> None:
        name = self._ids[reply] = secrets.token_urlsafe(16)
        self._frames[name] = []
        frame = {"prompt": text, "id": name, "conversation": conversation, "on_busy": on_busy}
        self._prompts[name] = frame
        await self._send(frame)

    async def stop(self, reply: str) -> None:
        self._stopped.add(self._ids[reply])
        await self._send({"type": "stop", "id": self._ids[reply]})

    async def resume(self, reply: str, of: str | None, named: str | None) -> None:
        name = named or self._ids[of or ""]
        self._ids[reply] = name
        self._frames[name] = []
        await self._send({"type": "resume", "id": name})

    async def seen(self, reply: str) -> Seen:
        frames = self._frames[self._ids[reply]]
        last: dict[str, Frame] = {frame["type"]: frame for frame in frames}
        return {
            "started": "start" in last,
            "queued": last.get("start", {}).get("queued"),
            "text": "".join(f["text"] for f in frames if f["type"] == "token"),
            "thinking": "".join(f["text"] for f in frames if f["type"] == "thinking"),
            "done": last.get("done"),
            "error": last.get("error"),
        }

    async def request(self, kind: str, **keys: str) -> Any:
        self._answer = asyncio.get_running_loop().create_future()
        names = {"history": "open", "conversations": "list"}
        await self._send({"type": names.get(kind, kind), **keys})
        frame = await self._answer
        self._answer = None
        if frame["type"] == "error":
            return {"error": frame["code"]}
        if kind == "history":
            told = [[m["role"], m["content"], m.get("partial")] for m in frame["messages"]]
            return {"title": frame["title"], "messages": told}
        if kind == "conversations":
            return [[item["id"], item["title"]] for item in frame["items"]]
        return {}

    async def mended(self) -> None:
        await self.close()
        await self.connect()
        for name, frames in self._frames.items():
            if frames and frames[-1]["type"] in {"done", "error"}:
                continue
            if frames:
                after = max((frame.get("seq", 0) for frame in frames), default=0)
                await self._send({"type": "resume", "id": name, "after": after})
            else:
                await self._send(self._prompts[name])
            if name in self._stopped:
                await self._send({"type": "stop", "id": name})


@pytest.fixture
async def line(server: wsserver.Server) -> AsyncIterator[Line]:
    async with Line(server.port) as line:
        yield line


@pytest.mark.parametrize("name", EXCHANGES)
async def test_raw_frames_match_exchanges(name: str, puppet: Puppet, line: Line) -> None:
    driver = Raw(line.url)
    await driver.connect()
    await play(EXCHANGES[name], driver, puppet, line)
    await driver.close()


class Python:
    """Drives the Python client, which reconnects and resumes by itself."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._replies: dict[str, Reply] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def prompt(
        self,
        reply: str,
        text: str | list[Frame],
        conversation: str | None,
        on_busy: str,
        retry_of: str | None = None,
    ) -> None:
        retried = self._replies[retry_of].id if retry_of in self._replies else retry_of
        assert on_busy in {"reject", "queue", "interrupt"}
        self._replies[reply] = self._chat.prompt(
            text if isinstance(text, str) else None,
            messages=None if isinstance(text, str) else [(m["role"], m["content"]) for m in text],
            conversation=conversation,
            on_busy=on_busy,  # type: ignore[arg-type]
            retry_of=retried,
        )

    async def stop(self, reply: str) -> None:
        await self._replies[reply].stop()

    async def resume(self, reply: str, of: str | None, named: str | None) -> None:
        self._replies[reply] = self._chat.resume(named or self._replies[of or ""].id)

    async def seen(self, reply: str) -> Seen:
        if reply not in self._replies:  # a reply of another client, not announced yet
            return {"started": False, "text": "", "thinking": "", "done": None, "error": None}
        known = self._replies[reply]
        seen: Seen = {
            "started": known.started,
            "queued": known.queued,
            "text": known.text,
            "thinking": known.thoughts,
            "done": None,
            "error": None,
        }
        if known.over:
            try:
                done = await known.done()
                seen["done"] = {"reason": done.reason, "by": done.by}
                assert done.text == known.text
                assert "".join([text async for text in known]) == done.text
            except ServerError as error:
                seen["error"] = vars(error)
        return seen

    async def request(self, kind: str, **keys: str) -> Any:
        try:
            if kind == "open":
                opened = await self._chat.open(**keys)
                self._subscriptions[keys["conversation"]] = opened
                self._tasks.append(asyncio.create_task(self._follow(opened)))
            if kind in {"history", "open"}:
                history = await self._chat.history(**keys) if kind == "history" else opened.history
                told = [[m.role, m.text, m.partial] for m in history.messages]
                return {"title": history.title, "messages": told}
            if kind == "conversations":
                return [[item.id, item.title] for item in await self._chat.conversations()]
            await getattr(self._chat, kind)(**keys)
        except ServerError as error:
            return {"error": error.code}
        return {}

    async def close_conversation(self, conversation: str) -> None:
        await self._subscriptions[conversation].close()

    async def _follow(self, subscription: Subscription) -> None:
        with contextlib.suppress(ChatError):  # the chat was closed
            async for reply in subscription:
                self._replies[reply.id] = reply

    async def mended(self) -> None:
        pass


@pytest.mark.parametrize("name", EXCHANGES)
async def test_python_client_matches_exchanges(
    name: str, puppet: Puppet, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(dial, "LONGEST_BACKOFF", 0.01)
    async with connect_client(line.url) as chat:
        await play(EXCHANGES[name], Python(chat), puppet, line)
        assert not isinstance(chat.failure, ChatError)
