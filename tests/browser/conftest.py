"""Fixtures for tests in a real browser: one chromium for all, and a page of the server."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

import wsserver
from tests.browser.page import SWITCHES, stop_clock, visit
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet
from tests.support.tools import require_chromium, require_libraries


@pytest.fixture(autouse=True)
def short_timeouts() -> Iterator[None]:
    expect.set_options(timeout=BOUND * 1000)
    yield
    expect.set_options(timeout=None)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    require_libraries()
    path = require_chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="session")
async def server(puppet: Puppet) -> AsyncIterator[wsserver.Server]:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def line(server: wsserver.Server) -> AsyncIterator[Line]:
    async with Line(server.port) as line:
        yield line


@pytest_asyncio.fixture(loop_scope="session")
async def blank(browser: Browser, server: wsserver.Server) -> AsyncIterator[Page]:
    """An empty page. The test fails after an uncaught exception, a message on the console (as for a
    violation of the content security policy), or a dialog (as of an injected script)."""
    context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(BOUND * 1000)
    complaints: list[str] = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda message: complaints.append(message.text))
    context.on("dialog", lambda dialog: complaints.append(dialog.message))
    yield await context.new_page()
    await context.close()
    # The browser reports a server that it cannot reach.
    assert [text for text in complaints if not text.startswith("WebSocket connection to")] == []


@pytest_asyncio.fixture(loop_scope="session")
async def page(blank: Page, server: wsserver.Server) -> Page:
    await visit(blank, server)
    return blank


@pytest_asyncio.fixture(loop_scope="session")
async def timed(blank: Page, server: wsserver.Server) -> Page:
    """The page, with a stopped clock that the test controls."""
    await blank.clock.install()
    await visit(blank, server)
    await stop_clock(blank)
    return blank


@pytest_asyncio.fixture(loop_scope="session")
async def bare_page(browser: Browser, server: wsserver.Server) -> AsyncIterator[Page]:
    """A page of the server without a script."""
    page = await browser.new_page()
    page.set_default_timeout(BOUND * 1000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(server.page + "healthz")
    yield page
    await page.close()
    assert complaints == []
