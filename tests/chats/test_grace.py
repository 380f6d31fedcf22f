"""The grace time of a reply whose clients leave one after the other."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.asgi.test_scopes import ID, Server, post, running
from tests.support.clock import ClockLoop
from tests.support.puppet import Puppet
from wsserver import Asgi

CHAT = "a-chat-of-two-pages"


def on_clock(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test whose time passes at once."""
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        runner.run(test())


async def visit(chat: Asgi, method: str, path: str) -> None:
    """Begin to follow the reply, and leave."""
    client = Server(chat, "http", path, method=method)
    client.receive("http.disconnect")
    await client.done()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_client_that_leaves_does_not_shorten_the_grace_of_another(
    puppet: Puppet, method: str
) -> None:
    async def test() -> None:
        async with running(puppet, grace=30) as chat:
            first = post(chat)
            first.post(
                b'{"prompt": "Hello?", "conversation": "%b", "id": "%b"}'
                % (CHAT.encode(), ID.encode())
            )
            reply = await puppet.reply()
            first.receive("http.disconnect")
            await first.done()
            left = asyncio.get_running_loop().time()
            await visit(chat, method, f"/api/chat/{CHAT}/stream")
            await reply.closed.wait()
            assert asyncio.get_running_loop().time() - left == pytest.approx(30, abs=0.1)

    on_clock(test)


def test_client_that_cannot_come_back_does_not_stop_a_reply_that_another_expects(
    puppet: Puppet,
) -> None:
    async def test() -> None:
        async with running(puppet, grace=30) as chat:
            owner = post(chat)  # chose no id: it stops the reply by leaving it
            owner.post(b'{"prompt": "Hello?", "conversation": "%b"}' % CHAT.encode())
            reply = await puppet.reply()
            assert chat.app is not None
            (generation,) = chat.app.hub.scheduler.live
            await visit(chat, "GET", f"/api/chat/{generation.id}")
            left = asyncio.get_running_loop().time()
            owner.receive("http.disconnect")
            await owner.done()
            await reply.closed.wait()
            assert asyncio.get_running_loop().time() - left == pytest.approx(30, abs=0.1)

    on_clock(test)
