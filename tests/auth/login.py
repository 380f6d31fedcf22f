"""Servers with the tokens of ada and bob, and sockets that have authenticated."""

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import wsserver
from tests.support.client import Client, client
from tests.support.puppet import Puppet

ID = "0123456789abcdef"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@contextlib.asynccontextmanager
async def serving(puppet: Puppet, **given: Any) -> AsyncIterator[wsserver.Server]:
    lines = f"ada sha256:{digest('ada-token')}, bob sha256:{digest('bob-token')}"
    options: dict[str, Any] = {"port": 0, "tokens": lines, "drain_timeout": 0} | given
    async with wsserver.serve(puppet, **options) as server:
        yield server


@contextlib.asynccontextmanager
async def entered(server: wsserver.Server, token: str) -> AsyncIterator[Client]:
    async with client(server) as chat:
        await chat.send({"type": "auth", "token": token})
        await chat.next("authenticated")
        yield chat
