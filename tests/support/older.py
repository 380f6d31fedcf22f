"""A server of the protocol before ``hello``: a relay in front of a current server."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

__all__ = ["NEW_KEYS", "older"]

NEW_KEYS = {"request", "retry_of", "size"}


@contextlib.asynccontextmanager
async def older(url: str, **settings: Any) -> AsyncIterator[str]:
    """Yield the address of an older server, which refuses newer keys."""

    async def relay(client: ServerConnection) -> None:
        assert client.request is not None
        token = client.request.headers.get("Authorization")
        headers = {} if token is None else {"Authorization": token}
        async with connect(url, proxy=None, additional_headers=headers, max_size=None) as server:
            down = asyncio.create_task(answer(client, server))
            with contextlib.suppress(ConnectionClosed):
                async for message in client:
                    frame = json.loads(message)
                    if new := NEW_KEYS & frame.keys():
                        about = frame.get("id", frame.get("conversation"))
                        error = {"type": "error", "code": "invalid_frame", "retryable": False}
                        text = f"{new}: no such key."
                        await client.send(json.dumps({**error, "message": text, "about": about}))
                    else:
                        await server.send(message)
            await server.close()
            await down

    async def answer(client: ServerConnection, server: Any) -> None:
        try:
            async for message in server:
                frame = json.loads(message)
                assert frame["type"] != "hello", "the relay offers no subprotocol"
                frame.pop("expires_in", None)
                await client.send(json.dumps(frame))
        except ConnectionClosed:
            pass
        await client.close(server.close_code if server.close_code != 1006 else 1011)

    async with serve(relay, "127.0.0.1", 0, **settings) as listener:
        yield f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
