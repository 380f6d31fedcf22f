"""A store whose answers wait for the test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.support.puppet import Puppet
from wsserver.stores import MemoryStore

__all__ = ["Gated", "GatedStore", "gated_server"]


class GatedStore(MemoryStore):
    """A memory store whose answers wait until the test opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def list(self, *arguments: Any) -> Any:
        await self.gate.wait()
        return await super().list(*arguments)

    async def rename(self, *arguments: Any) -> Any:
        await self.gate.wait()
        return await super().rename(*arguments)


Gated = tuple[GatedStore, wsserver.Server]


@asynccontextmanager
async def gated_server(monkeypatch: pytest.MonkeyPatch, puppet: Puppet) -> AsyncIterator[Gated]:
    """Run a server on such a store."""
    store = GatedStore()
    monkeypatch.setattr("wsserver.stores.make", lambda *_: store)
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server:
        yield store, server
