"""Servers for tests that are not in Python. Commands and answers are lines of JSON.

``python -m tests.support.stage``. The model runs each prompt as a script, such as
``say one; think hm; wait GATE; say two; end max_tokens`` or ``say half; fail overloaded 7``.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import wsserver
from tests.support.line import Line
from tests.support.puppet import BOUND
from tests.support.sockets import sockets_of
from wsserver import Code, End, Handshake, ModelError, Principal, Request, Thinking
from wsserver.stores.base import StoredGeneration

__all__ = ["Stage", "Troupe"]


class Troupe:
    """A model that runs its prompts as scripts.

    Attributes:
        asked: number of calls, by prompt.
        closed: number of calls that have ended, by prompt.
    """

    name = "troupe"

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.closed: dict[str, asyncio.Semaphore] = {}
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    def closings(self, prompt: str) -> asyncio.Semaphore:
        return self.closed.setdefault(prompt, asyncio.Semaphore(0))

    async def __call__(self, request: Request, /) -> AsyncGenerator[str | Thinking | End]:
        prompt = request.prompt
        self.asked[prompt] = self.asked.get(prompt, 0) + 1
        try:
            for line in prompt.split("; "):
                word, _, rest = line.partition(" ")
                match word:
                    case "say":
                        yield rest
                    case "count":  # in many pieces
                        for number in range(int(rest)):
                            yield f"{number} "
                    case "think":
                        yield Thinking(rest)
                    case "recall":  # the messages before
                        yield " | ".join(m.content for m in request.messages[:-1])
                    case "wait":
                        await self.gate(rest).wait()
                    case "end":
                        yield End(rest)
                    case "fail":
                        code, _, after = rest.partition(" ")
                        raise ModelError(
                            Code[code.upper()], retry_after=float(after) if after else None
                        )
        finally:
            self.closings(prompt).release()


class Stage:
    """Runs servers and executes commands."""

    def __init__(self) -> None:
        self._troupe = Troupe()
        self._servers: list[tuple[wsserver.Server, contextlib.AsyncExitStack, Line]] = []
        self._tokens: dict[str, tuple[str, float | None]] = {}

    async def do_serve(
        self, settings: Mapping[str, Any], tokens: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Start a server behind a proxy. ``tokens`` are names and lifetimes in seconds, or None."""
        stack = contextlib.AsyncExitStack()
        given = {"port": 0, "drain_timeout": 0.0, **settings}
        if tokens is not None:
            self._tokens.update(tokens)
            given["authenticate"] = self._identify
        server = await stack.enter_async_context(wsserver.serve(self._troupe, **given))
        line = await stack.enter_async_context(Line(server.port))
        self._servers.append((server, stack, line))
        return {"server": len(self._servers) - 1, "url": line.url, "port": server.port}

    async def _identify(self, token: str | None, _: Handshake) -> Principal | None:
        name, life = self._tokens.get(token or "", ("", None))
        return Principal(name, None if life is None else time.time() + life) if name else None

    async def do_close(self, server: int) -> None:
        await self._servers[server][0].close()

    async def do_line(self, server: int, how: str, **given: int | None) -> None:
        getattr(self._servers[server][2], how)(**given)

    async def do_dismiss(self, server: int, code: int, reason: str) -> None:
        """Close all sockets."""
        for socket in sockets_of(self._servers[server][0]):
            socket.end(code, reason)
            await socket.wait_closed()

    async def do_release(self, gate: str) -> None:
        self._troupe.gate(gate).set()

    async def do_asked(self, prompt: str) -> int:
        return self._troupe.asked.get(prompt, 0)

    async def do_closed(self, prompt: str) -> None:
        """Wait until the model has closed a call for a prompt."""
        await self._troupe.closings(prompt).acquire()

    async def do_saved(self, server: int, reply: str, pieces: int) -> None:
        """Wait until a number of pieces of a reply is in the store."""
        store = self._servers[server][0].app.store
        async with asyncio.timeout(BOUND):
            while not (
                isinstance(found := await store.find("anonymous", reply), StoredGeneration)
                and len(found.pieces) >= pieces
            ):
                pass

    async def do_jam(self, server: int) -> None:
        """Make every later commit of the store hang."""

        async def never(*_: object) -> None:
            await asyncio.Event().wait()

        self._servers[server][0].app.store.commit = never  # type: ignore[assignment]

    async def do_connections(self, server: int) -> int:
        """Return the number of connection attempts."""
        return self._servers[server][2].tried

    async def obey(self, order: dict[str, Any]) -> None:
        number, what = order.pop("n"), order.pop("do")
        try:
            answer = {"n": number, "answer": await getattr(self, f"do_{what}")(**order)}
        except Exception as error:  # noqa: BLE001
            answer = {"n": number, "error": repr(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    async def leave(self) -> None:
        for server, _, _ in self._servers:
            server.hurry()
        await asyncio.gather(*(stack.aclose() for _, stack, _ in self._servers))


async def main() -> None:
    stage = Stage()
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    async with asyncio.TaskGroup() as group:
        tasks = set()
        async for line in orders:
            tasks.add(group.create_task(stage.obey(json.loads(line))))
        for task in tasks:
            task.cancel()
    await stage.leave()


if __name__ == "__main__":
    asyncio.run(main())
