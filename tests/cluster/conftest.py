"""Real servers of Redis and PostgreSQL, and nodes on them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

import wsserver
from tests.support.postgres import Postgres
from tests.support.puppet import Puppet
from tests.support.redis import RedisServer


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.kill()


Start = Callable[..., Awaitable[wsserver.Server]]
"""Starts a node with some settings of its own."""


@pytest.fixture
async def start(puppet: Puppet, postgres: Postgres, redis: RedisServer) -> AsyncIterator[Start]:
    url = postgres.url()
    async with AsyncExitStack() as stack:

        async def node(**settings: Any) -> wsserver.Server:
            settings = {"store": url, "cluster": redis.url, "drain_timeout": 0, **settings}
            return await stack.enter_async_context(wsserver.serve(puppet, port=0, **settings))

        yield node


@pytest.fixture
async def nodes(start: Start) -> list[wsserver.Server]:
    """Three nodes in one process. All use one model."""
    return [await start() for _ in range(3)]
