"""A server whose model speaks Chat Completions, and a fake of that API."""

from collections.abc import AsyncIterator

import pytest

import wsserver
from tests.support.completions import completion
from tests.support.upstream import Upstream


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as running:
        running.default = completion("Hello world")
        yield running


@pytest.fixture
async def server(
    monkeypatch: pytest.MonkeyPatch, upstream: Upstream
) -> AsyncIterator[wsserver.Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream.url}/v1")
    async with wsserver.serve(model="openai:a-model", port=0, drain_timeout=0) as running:
        yield running
