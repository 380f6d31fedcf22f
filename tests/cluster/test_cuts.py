"""A client of each dialect has the whole reply, although each connection goes to another node.

Two nodes listen by themselves, and one runs under a server of ASGI.
"""

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

import wsserver
from tests.asgi.servers import serving
from tests.chats.test_cuts import (
    dialect,
    test_cuts_at_any_bytes_lose_nothing,
    test_drop_at_any_event_loses_nothing,
    test_new_connection_for_each_event_loses_nothing,
)
from tests.cluster.conftest import Start
from tests.support.host import Host
from tests.support.puppet import Puppet
from tests.support.redis import RedisServer
from tests.support.story import LASTING
from tests.test_resume_property import (
    test_any_sequence_of_connections_gives_whole_reply,
    test_new_connection_for_each_frame_loses_nothing,
)

__all__ = [
    "dialect",
    "test_any_sequence_of_connections_gives_whole_reply",
    "test_cuts_at_any_bytes_lose_nothing",
    "test_drop_at_any_event_loses_nothing",
    "test_new_connection_for_each_event_loses_nothing",
    "test_new_connection_for_each_frame_loses_nothing",
]

pytestmark = pytest.mark.slow


class Turning:
    """All nodes as one server: each connection goes to the next node."""

    def __init__(self, first: wsserver.Server, *ports: int) -> None:
        self.settings, self.app = first.settings, first.app
        self._ports = itertools.cycle((first.port, *ports))

    @property
    def port(self) -> int:
        return next(self._ports)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"


@pytest.fixture
async def server(
    start: Start,
    puppet: Puppet,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Host]:
    monkeypatch.setattr("wsserver.chats.chats.RELOAD", 3600.0)
    lasting: dict[str, Any] = {key: value for key, value in LASTING.items() if key != "port"}
    lasting["prompts_per_minute"] = 100_000
    first, second = [await start(**lasting) for _ in range(2)]
    lasting |= {"store": first.settings.store, "cluster": redis.url}
    chat = wsserver.asgi(puppet, allow_anonymous=True, **lasting)
    async with serving(chat) as port:
        yield Turning(first, second.port, port)
