"""A server whose model is Claude, and helpers of its tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import wsserver
from tests.support.client import Client
from tests.support.upstream import event

__all__ = ["claude", "escaped", "goes_on", "stop"]


@asynccontextmanager
async def claude(
    monkeypatch: pytest.MonkeyPatch, url: str, **given: Any
) -> AsyncIterator[wsserver.Server]:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
    async with wsserver.serve(port=0, drain_timeout=0, **given) as server:
        yield server


def escaped(text: str, kind: str = "text") -> bytes:
    return event(
        "content_block_delta", index=0, delta={"type": f"{kind}_delta", kind: "@"}
    ).replace(b"@", text.encode())


async def stop(chat: Client, start: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    await chat.send({"type": "stop", "id": start["id"]})
    text, done = await chat.text(start["id"])
    assert (done["type"], done["by"]) == ("done", "client")
    return text, done


async def goes_on(chat: Client) -> None:
    assert await chat.quiet() == []
    start = await chat.prompt("And on")
    assert (await chat.text(start["id"]))[0] == "Hello world"
