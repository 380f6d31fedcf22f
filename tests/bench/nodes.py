"""Measure what several nodes cost, with a real Redis and PostgreSQL on this machine.

::

    python -m tests.bench.nodes              # three rounds, about four minutes
    python -m tests.bench.nodes --rounds 1

Each figure is the median of the rounds. The model writes the time into each token, so that a reader
knows how long the token took.
"""

import argparse
import asyncio
import json
import re
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
from websockets.asyncio.client import ClientConnection, connect

from tests.bench.load import quantile
from tests.support.postgres import Postgres
from tests.support.process import Process, run
from tests.support.redis import RedisServer
from wsserver import Request

STREAMS, RATE = 100, 50.0
WARM, WINDOW = 2.0, 8.0  # seconds
STOPS = 200
SAVED, SAVED_RATE = 500, 30.0  # replies and their tokens per second, while PostgreSQL is measured
COUNTED = 12.0  # seconds until an idle connection of PostgreSQL has counted its transactions
LIMITS = {
    "GENERATIONS_PER_PRINCIPAL": 5000,
    "GENERATIONS_PER_SOCKET": 1000,
    "GENERATIONS": 2000,
    "PROMPTS_PER_MINUTE": 100_000,
    "FRAME_BURST": 100_000,
    "CONNECTIONS_PER_ADDRESS": 5000,
    "CONNECTIONS_PER_PRINCIPAL": 5000,
    "TOKENS_PER_DAY": 0,
    "TITLES": "off",
    "DRAIN_TIMEOUT": 0,
    "LOG_LEVEL": "error",
    "MODEL": "tests.bench.nodes:model",
    "PORT": 0,
}


async def model(request: Request) -> AsyncIterator[str]:
    """Write the time at a rate, until the reply is stopped.

    The prompt has the rate and the place of the reply among all replies. The tokens of all replies
    are spread over time in the same way, however fast the server accepted the prompts.
    """
    rate, place = map(float, request.prompt.split())
    loop = asyncio.get_running_loop()
    due = (loop.time() * rate // 1 + place) / rate
    while True:
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - loop.time()))
        yield f"{time.monotonic():.6f} "


class Bench:
    """The services of one round, and the servers of one case."""

    def __init__(self, database: Postgres, redis: RedisServer) -> None:
        self.database = database
        self.redis = redis

    async def server(
        self, stack: AsyncExitStack, store: str, *, alone: bool = False
    ) -> tuple[Process, str]:
        environment = {f"WSSERVER_{name}": str(value) for name, value in LIMITS.items()}
        environment["WSSERVER_STORE"] = store
        if not alone:
            environment["WSSERVER_CLUSTER"] = self.redis.url
        process = await stack.enter_async_context(
            run("-m", "wsserver", "serve", cwd=None, **environment)
        )
        return process, (await process.line(r"websocket +(\S+)"))[1]

    async def owners(self) -> dict[str, float]:
        """Measure the owners of replies: without a cluster, with local and with remote readers.

        All three run at the same time: the speed of a core of this machine changes by the minute.
        """
        async with AsyncExitStack() as stack:
            cases = [await self._stream(stack, where, []) for where in ("alone", "local", "remote")]
            await asyncio.sleep(2 * WARM)
            pids = [process.process.pid for processes in cases for process in processes]
            used, began, through = [cpu(pid) for pid in pids], time.monotonic(), await self._bytes()
            await asyncio.sleep(2 * WINDOW)
            tokens = STREAMS * RATE * (time.monotonic() - began)
            through = await self._bytes() - through
            alone, local, remote, other = (
                (cpu(pid) - before) / tokens * 1e6 for pid, before in zip(pids, used, strict=True)
            )
            return {
                "alone: owner's CPU per token (us)": alone,
                "local: owner's CPU per token (us)": local,
                "remote: owner's CPU per token (us)": remote,
                "remote: CPU per token of the other node (us)": other,
                "remote: bytes per token to Redis": through / tokens,
                "owner's CPU per token, local to alone": local / alone,
                "owner's CPU per token, remote to local": remote / local,
            }

    async def readers(self, where: str) -> dict[str, float]:
        """Measure what the readers of replies get, on the owner's node or on another one."""
        async with AsyncExitStack() as stack:
            taken: list[float] = []
            await self._stream(stack, where, taken)
            await asyncio.sleep(2 * WARM)
            taken.clear()
            began, redis, sent = time.monotonic(), cpu(self.redis.pid), await self._publications()
            await asyncio.sleep(WINDOW)
            sent = await self._publications() - sent
            redis, took = cpu(self.redis.pid) - redis, time.monotonic() - began
            found = {
                f"{where}: latency of a token, p50 (ms)": quantile(taken, 0.5) * 1e3,
                f"{where}: latency of a token, p99 (ms)": quantile(taken, 0.99) * 1e3,
                f"{where}: publications a second": sent / took,
            }
            if where == "remote":
                found["remote: Redis' CPU per publication (us)"] = redis / sent * 1e6
            return found

    async def _stream(self, stack: AsyncExitStack, where: str, taken: list[float]) -> list[Process]:
        """Start servers, and replies whose readers note how long each token took.

        Args:
            where: ``alone`` without a cluster, ``local`` or ``remote``.

        Returns:
            The owner of the replies, and the node of the readers if it is another one.
        """
        store = self.database.url()
        servers = [await self.server(stack, store, alone=where == "alone")]
        if where == "remote":
            servers.append(await self.server(stack, store))
        url, other = servers[0][1], servers[-1][1]
        reading = [
            asyncio.create_task(self._read(stack, url, other, number, taken))
            for number in range(STREAMS)
        ]
        stack.callback(lambda: [task.cancel() for task in reading])
        return [process for process, _ in servers]

    async def _bytes(self) -> float:
        """Return how many bytes Redis has received so far."""
        stats = await self.redis.command("INFO", "stats")
        found = re.search(r"total_net_input_bytes:(\d+)", stats)
        assert found is not None, stats
        return float(found[1])

    async def _publications(self) -> float:
        """Return how many messages Redis has taken so far."""
        stats = await self.redis.command("INFO", "commandstats")
        found = re.search(r"cmdstat_publish:calls=(\d+)", stats)
        return float(found[1]) if found else 0.0

    async def _read(
        self, stack: AsyncExitStack, url: str, other: str, number: int, taken: list[float]
    ) -> None:
        name = f"reply-number-{number:06}"
        asking = await opened(stack, url)
        paced = f"{RATE} {number / STREAMS}"
        prompt = {"prompt": paced, "conversation": f"conversation-{number:06}", "id": name}
        await ask(asking, prompt)
        reader = asking
        if other != url:
            reader = await opened(stack, other)
            await ask(reader, {"type": "resume", "id": name})
            await asking.close()
        while True:
            frame = json.loads(await reader.recv())
            now = time.monotonic()
            taken.extend(now - float(said) for said in frame["text"].split())

    async def stops(self) -> dict[str, float]:
        """Measure stops from another node, each acknowledged after its request was closed."""
        async with AsyncExitStack() as stack:
            store = self.database.url()
            _, url = await self.server(stack, store)
            _, elsewhere = await self.server(stack, store)
            asking, stopping = await opened(stack, url), await opened(stack, elsewhere)
            taken = []
            for number in range(STOPS):
                name = f"stopped-reply-{number:06}"
                prompt = {"prompt": f"{RATE} 0", "conversation": f"conversation-{number:06}"}
                await asking.send(json.dumps({**prompt, "id": name}))
                await until(asking, "token", name)
                await stopping.send(json.dumps({"type": "resume", "id": name}))
                await until(stopping, "token", name)
                began = time.monotonic()
                stop = {"type": "stop", "id": name, "request": name}
                await stopping.send(json.dumps(stop))
                while json.loads(await stopping.recv())["type"] != "stopped":
                    pass
                taken.append(time.monotonic() - began)
            return {
                "stop from another node, p50 (ms)": quantile(taken, 0.5) * 1e3,
                "stop from another node, p99 (ms)": quantile(taken, 0.99) * 1e3,
            }

    async def saving(self) -> dict[str, float]:
        """Measure what PostgreSQL gets while many replies run."""
        async with AsyncExitStack() as stack:
            store = self.database.url()
            node, url = await self.server(stack, store)
            asking = await opened(stack, url)
            for number in range(SAVED):
                paced = f"{SAVED_RATE} {number / SAVED}"
                prompt = {"prompt": paced, "conversation": f"conversation-{number:06}"}
                await asking.send(json.dumps(prompt))
                while json.loads(await asking.recv())["type"] != "start":
                    pass
            drain = asyncio.create_task(read_all(asking))
            stack.callback(drain.cancel)
            watching = await asyncpg.connect(store.partition("?")[0])
            stack.push_async_callback(watching.close)
            await asyncio.sleep(COUNTED)
            before, began = await transactions(watching), time.monotonic()
            log = await written(watching)
            used, database = cpu(node.process.pid), cpu_below(self.database.pid)
            await asyncio.sleep(WINDOW)
            took = time.monotonic() - began
            statements = (await transactions(watching) - before) / took
            database = (cpu_below(self.database.pid) - database) / took
            log = (await written(watching) - log) / took / 1000
            return {
                f"PostgreSQL: cores for {SAVED} replies": database,
                f"PostgreSQL: KB of write-ahead log a second for {SAVED} replies": log,
                f"PostgreSQL: statements a second for {SAVED} replies": statements,
                "node: cores for these": (cpu(node.process.pid) - used) / took,
            }


async def opened(stack: AsyncExitStack, url: str) -> ClientConnection:
    return await stack.enter_async_context(connect(url, proxy=None, max_queue=None))


async def ask(socket: ClientConnection, frame: dict[str, Any]) -> None:
    await socket.send(json.dumps(frame))
    answer = json.loads(await socket.recv())
    assert answer["type"] == "start", answer


async def until(socket: ClientConnection, kind: str, name: str) -> None:
    while True:
        frame = json.loads(await socket.recv())
        assert frame["type"] != "error", frame
        if (frame["type"], frame.get("id")) == (kind, name):
            return


async def read_all(socket: ClientConnection) -> None:
    while True:
        await socket.recv()


async def transactions(connection: Any) -> float:
    """Return the transactions of the database so far; a batch of a journal is one."""
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    return float(
        await connection.fetchval(
            "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        )
    )


async def written(connection: Any) -> float:
    """Return the bytes of the write-ahead log so far."""
    return float(await connection.fetchval("SELECT pg_current_wal_lsn() - '0/0'"))


def cpu(pid: int) -> float:
    """Return the CPU seconds of all threads of a process, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def cpu_below(pid: int) -> float:
    """Return the CPU seconds of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return cpu(pid) + sum(cpu(int(child)) for child in children)


async def one_round() -> dict[str, float]:
    database, redis = Postgres.create(), RedisServer()
    try:
        bench = Bench(database, redis)
        found = await bench.saving()  # in the first minute, before autovacuum adds transactions
        found |= await bench.owners()
        for where in ("local", "remote"):
            found |= await bench.readers(where)
        return found | await bench.stops()
    finally:
        database.remove()
        redis.kill()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.nodes")
    parser.add_argument("--rounds", type=int, default=3, help="each takes 75 seconds")
    rounds = [asyncio.run(one_round()) for _ in range(parser.parse_args().rounds)]
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"{statistics.median(values):10.2f}  {name}  ({each})")


if __name__ == "__main__":
    main()
