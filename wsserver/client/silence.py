"""Detects a dead connection: one on which nothing arrives, not even the answer to a ping."""

import asyncio
import contextlib
from collections.abc import Callable

from websockets.exceptions import ConnectionClosed

from wsserver.client.dial import Socket


async def wait_for_silence(
    socket: Socket, limit: Callable[[], float], limit_changed: asyncio.Event
) -> float:
    """Send a ping after each silence, and return when the ping stays unanswered as well.

    A network that fails closes no connection, so the socket reports no error. Any data counts as
    an answer to the ping.

    Args:
        socket: the connection.
        limit: returns the allowed seconds of silence, before a ping and after it.
        limit_changed: set by the caller when ``limit`` may have become shorter.

    Returns:
        Seconds since the last data.
    """
    loop = asyncio.get_running_loop()
    pinged_at: float | None = None
    while True:
        seconds = limit()
        if pinged_at is not None and socket.last_data_at >= pinged_at:
            pinged_at = None
        due = (socket.last_data_at if pinged_at is None else pinged_at) + seconds
        late = loop.time() - due
        if late < 0:
            limit_changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await limit_changed.wait()
        # A process that was suspended has not read the data that arrived meanwhile. It then looks
        # much later than `due`, and sends another ping instead of giving up.
        elif pinged_at is None or late > seconds / 2:
            pinged_at = loop.time()
            with contextlib.suppress(TimeoutError, ConnectionClosed):
                async with asyncio.timeout(seconds):
                    await socket.ping()
        else:
            return loop.time() - socket.last_data_at
