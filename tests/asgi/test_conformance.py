"""The exchanges of ``tests/conformance.json`` under the servers of ASGI."""

from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.asgi.servers import SERVERS, serving
from tests.support.line import Line
from tests.support.puppet import Puppet
from tests.test_conformance import (
    test_python_client_matches_exchanges,
    test_raw_frames_match_exchanges,
)

__all__ = ["test_python_client_matches_exchanges", "test_raw_frames_match_exchanges"]

pytestmark = pytest.mark.slow


@pytest.fixture(params=SERVERS)
async def line(request: pytest.FixtureRequest, puppet: Puppet) -> AsyncIterator[Line]:
    chat = wsserver.asgi(puppet, allow_anonymous=True, drain_timeout=0)
    async with serving(chat, request.param) as port, Line(port) as line:
        yield line
