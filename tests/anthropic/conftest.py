"""A server whose model is Claude, and a fake Messages API."""

from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.support.claude import claude
from tests.support.upstream import Upstream


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as running:
        yield running


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")


@pytest.fixture
async def server(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> AsyncIterator[wsserver.Server]:
    async with claude(monkeypatch, upstream.url) as running:
        yield running
