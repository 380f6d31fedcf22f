"""A client that vanishes: run in a network namespace of its own, whose network goes away.

::

    unshare --user --map-root-user --net python -m tests.chats.vanished
"""

import asyncio
import os
import subprocess
from typing import Any

import wsserver
from tests.chats.events import Chat
from tests.support.puppet import BOUND, Puppet

PROMPT = {"prompt": "Hello?"}


def network(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


async def main() -> None:
    network("up")
    puppet = Puppet()
    times: dict[str, Any] = {
        "ping_interval": 0.2,
        "ping_timeout": 0.5,
        "send_timeout": 0.5,
        "drain_timeout": 0,
    }
    async with wsserver.serve(puppet, port=0, **times) as server, Chat.open(server) as chat:
        await chat.prompt(PROMPT)
        reply = await puppet.reply()
        network("down")  # neither side gets a FIN or an acknowledgement
        async with asyncio.timeout(BOUND):
            await reply.closed.wait()
        print("the reply is stopped", flush=True)
        os._exit(0)  # without a network, the client cannot close its connection


if __name__ == "__main__":
    asyncio.run(main())
