"""Servers of ASGI applications, in the event loop of the test, on a free port."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hypercorn
import hypercorn.asyncio
import uvicorn

from tests.support.puppet import BOUND

__all__ = ["SERVERS", "serving"]

SERVERS = ("uvicorn", "hypercorn")


@asynccontextmanager
async def serving(app: Any, server: str = "uvicorn") -> AsyncIterator[int]:
    """Serve an application and give the port; at the end, its lifespan has ended."""
    # Without the protocol, asyncio would not set TCP_NODELAY on accepted sockets.
    with socket.socket(proto=socket.IPPROTO_TCP) as bound:
        bound.bind(("127.0.0.1", 0))
        run = _uvicorn if server == "uvicorn" else _hypercorn
        async with run(app, bound):
            yield bound.getsockname()[1]


@asynccontextmanager
async def _uvicorn(app: Any, bound: socket.socket) -> AsyncIterator[None]:
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    # In a test nobody sends signals to the server.
    running = asyncio.create_task(server._serve([bound]))  # noqa: SLF001
    try:
        async with asyncio.timeout(BOUND):
            while not server.started and not running.done():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
        if running.done():
            running.result()
        yield
    finally:
        server.should_exit = True
        async with asyncio.timeout(BOUND):
            await running


@asynccontextmanager
async def _hypercorn(app: Any, bound: socket.socket) -> AsyncIterator[None]:
    config = hypercorn.Config()
    config.bind = [f"fd://{os.dup(bound.fileno())}"]  # which the server closes
    config.graceful_timeout = 1
    config.loglevel = "WARNING"
    stop = asyncio.Event()
    wait: Callable[..., Awaitable[None]] = stop.wait  # type: ignore[assignment]
    running = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=wait))
    try:
        await _listening(bound, running)
        yield
    finally:
        stop.set()
        async with asyncio.timeout(BOUND):
            await running


async def _listening(bound: socket.socket, running: asyncio.Task[None]) -> None:
    """Wait until connections are accepted."""
    async with asyncio.timeout(BOUND):
        while not running.done():
            try:
                _, writer = await asyncio.open_connection(*bound.getsockname())
            except ConnectionRefusedError:
                await asyncio.sleep(0)
            else:
                writer.close()
                return
    running.result()
