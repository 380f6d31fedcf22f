"""What relaying a token costs, and how soon a stop reaches the model.

::

    python -m tests.bench.relay --streams 100 --rate 50 --seconds 10 --stops 200

runs the fake upstream and the server as processes of their own and is the clients itself. CPU is
the server process's own user and system time between two moments at which all streams run.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect

from tests.support.crowd import CROWD

SEQ = re.compile(r'"seq":(\d+)')
TICKS = os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> float:
    """Return the seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.asynccontextmanager
async def program(pattern: str, *arguments: str, **env: str) -> AsyncIterator[tuple[str, int]]:
    """Run a Python program until it prints an address; give that and the process's id."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **env},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        while not (match := re.search(pattern, (await process.stdout.readline()).decode())):
            pass
        yield match[0], process.pid
    finally:
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


class Reader:
    """One client that reads a stream and counts."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.tokens = 0
        self.frames = 0

    async def run(self) -> None:
        """Prompt and read until the terminal."""
        await self.socket.send('{"prompt": "go"}')
        async for message in self.socket:
            assert isinstance(message, str)
            self.frames += 1
            if message.startswith('{"type":"token"'):
                seq = SEQ.search(message)
                self.tokens = int(seq[1]) if seq else 0
            elif not message.startswith('{"type":"start"'):
                return


async def run_streams(url: str, count: int) -> tuple[list[Reader], list["asyncio.Task[None]"]]:
    readers = [Reader(await connect(url, proxy=None, compression=None)) for _ in range(count)]
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    async with asyncio.timeout(30):
        while not all(reader.tokens for reader in readers):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return readers, tasks


async def measure_cpu(url: str, pid: int, upstream_pid: int, streams: int, seconds: float) -> None:
    readers, tasks = await run_streams(url, streams)
    await asyncio.sleep(1)
    began = time.monotonic()
    before = cpu(pid), cpu(upstream_pid), sum(r.tokens for r in readers)
    frames_before = sum(r.frames for r in readers)
    load_before = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    tokens = sum(r.tokens for r in readers) - before[2]
    frames = sum(r.frames for r in readers) - frames_before
    load = resource.getrusage(resource.RUSAGE_SELF)
    used = load.ru_utime + load.ru_stime - load_before.ru_utime - load_before.ru_stime
    print(
        f"{streams} streams, {tokens / took:,.0f} tokens/s in {frames / took:,.0f} frames/s: "
        f"{(cpu(pid) - before[0]) / tokens * 1e6:.1f} us of server CPU per token "
        f"(upstream at {(cpu(upstream_pid) - before[1]) / took:.0%}, clients at {used / took:.0%} "
        "of a core)"
    )
    for reader in readers:
        await reader.socket.send('{"type": "stop"}')
    await asyncio.gather(*tasks)
    await asyncio.gather(*(reader.socket.close() for reader in readers))


async def measure_stops(url: str, upstream: str, stops: int) -> None:
    def closes() -> list[float]:
        with urllib.request.urlopen(f"{upstream}/stats") as answer:
            found: list[float] = json.load(answer)["closes"]
            return found

    known = len(await asyncio.to_thread(closes))
    readers, tasks = await run_streams(url, stops)
    sent = []
    for reader in readers:
        sent.append(time.monotonic())
        await reader.socket.send('{"type": "stop"}')
        await asyncio.sleep(0.02)  # one at a time, while the others run
    await asyncio.gather(*tasks)
    await asyncio.gather(*(reader.socket.close() for reader in readers))
    closed = (await asyncio.to_thread(closes))[known:]
    took = sorted((end - begin) * 1000 for begin, end in zip(sent, closed, strict=True))
    print(
        f"{stops} stops with up to {stops} streams running: upstream closed after "
        f"p50 {statistics.median(took):.2f} ms, p99 {took[int(len(took) * 0.99) - 1]:.2f} ms"
    )


async def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description="Measure CPU per token and stop latency.")
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second and stream")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--stops", type=int, default=200)
    options = parser.parse_args()
    pieces = ("--pieces", "100000", "--interval", str(1 / options.rate))
    async with program(r"http://\S+", "-m", "tests.support.upstream", *pieces) as (base, upstream):
        serve = ("-m", "wsserver", "serve", "--port", "0", "--model", "claude-sonnet-4-6")
        limits = {"WSSERVER_REPLY_SIZE": "100000000", "WSSERVER_DRAIN_TIMEOUT": "0"}
        limits |= {"WSSERVER_LOG_LEVEL": "warning", "WSSERVER_STORE": "memory:"}
        async with program(
            r"ws://\S+", *serve, ANTHROPIC_BASE_URL=base, ANTHROPIC_API_KEY="x", **limits, **CROWD
        ) as (url, pid):
            await measure_cpu(url, pid, upstream, options.streams, options.seconds)
            await measure_stops(url, base, options.stops)


if __name__ == "__main__":
    asyncio.run(main())
