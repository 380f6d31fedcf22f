"""Real servers of Redis and PostgreSQL, and nodes on them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

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


@pytest.fixture
async def nodes(
    puppet: Puppet, postgres: Postgres, redis: RedisServer
) -> AsyncIterator[list[wsserver.Server]]:
    """Three nodes in one process. All use one model."""
    url = postgres.url()
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                wsserver.serve(puppet, port=0, store=url, cluster=redis.url, drain_timeout=0)
            )
            for _ in range(3)
        ]
