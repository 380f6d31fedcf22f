"""A program with its own model. Start it with: python examples/embedding.py."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import wsserver


async def shout(request: wsserver.Request) -> AsyncIterator[str]:
    for word in request.prompt.split():
        await asyncio.sleep(0.1)
        yield word.upper() + " "


async def main() -> None:
    async with wsserver.serve(shout) as server:  # settings are keywords, such as port=8080
        print(f"Open {server.page} in a browser. Ctrl-C stops.", flush=True)
        await server.serve_forever()


with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(main())
