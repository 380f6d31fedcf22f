"""Fixtures of all tests: a clean environment, and a server with a model that the test controls."""

import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

import wsserver
from tests.support.client import Client, client
from tests.support.crowd import CROWD
from tests.support.line import Line
from tests.support.postgres import Postgres
from tests.support.puppet import Puppet
from wsserver import logs
from wsserver.client import dial

# No time limit per example, because the computer may be busy.
hypothesis_settings.register_profile(
    "any computer", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("any computer")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("WSSERVER_", "ANTHROPIC_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name, value in CROWD.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def _clean_logging() -> Iterator[None]:
    """Undo :func:`wsserver.logs.set_up`, and begin a window for the lines of each test."""
    root, own = logging.getLogger(), logging.getLogger("wsserver")
    before, levels = set(root.handlers), (root.level, own.level)
    logs.write_left_out()
    yield
    if set(root.handlers) - before:
        logs.set_up("info")  # with the system clock
    for handler in set(root.handlers) - before:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture
def puppet() -> Puppet:
    return Puppet()


@pytest.fixture
async def server(puppet: Puppet) -> AsyncIterator[wsserver.Server]:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as running:
        yield running


@pytest.fixture
async def line(server: wsserver.Server) -> AsyncIterator[Line]:
    async with Line(server.port) as line:
        yield line


@pytest.fixture
def fast_reconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Python client connect again almost at once."""
    monkeypatch.setattr(dial, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(dial, "LONGEST_BACKOFF", 0.01)


@pytest.fixture
async def chat(server: wsserver.Server) -> AsyncIterator[Client]:
    async with client(server) as connected:
        yield connected


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres.create()
    yield server
    server.remove()


@pytest.fixture
def url(postgres: Postgres) -> str:
    """The address of empty tables in PostgreSQL."""
    return postgres.url()
