"""Two tabs that do anything, in any order, show the same conversation."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import box, button, cut, rename, rows, second_tab, state, visit
from tests.support.puppet import BOUND
from wsserver import Request, Thinking

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

STEPS = 25
# A prompt that never reached the server stays in its tab, to be edited or removed.
SHOWN = """() => [...document.querySelectorAll('article')]
    .filter((turn) => turn.querySelector('.queue').hidden)
    .map((turn) => [
        turn.querySelector('.you p').textContent,
        turn.querySelector('.text').textContent,
    ])"""


async def talk(request: Request) -> AsyncIterator[str | Thinking]:
    """Say some words, one in each turn of the event loop; the text depends on the prompt."""
    yield Thinking("Hm.")
    for number in range(20):
        await asyncio.sleep(0)
        yield f"{request.prompt} **{number}** "
    if request.prompt.endswith("7"):
        await asyncio.sleep(3600)  # only a stop ends it


class Tabs:
    """Two tabs of one browser. Each action is one of a user, in one of the tabs."""

    def __init__(self, server: wsserver.Server, tabs: tuple[Page, Page], seed: int) -> None:
        self.server = server
        self.tabs = tabs
        self.random = random.Random(seed)
        self.number = 0
        self.done: list[str] = []
        self.shown: list[object] = []  # of each tab, when the tabs were compared last

    async def step(self) -> None:
        action = self.random.choice(
            [
                *(self.ask, self.interrupt, self.queue, self.stop, self.edit, self.regenerate),
                *(self.rename, self.delete, self.begin, self.switch, self.reload, self.lose),
            ]
        )
        tab = self.random.choice(self.tabs)
        self.done.append(f"{action.__name__} {self.tabs.index(tab)}")
        await action(tab)
        await self.settle()

    async def ask(self, tab: Page, key: str = "Enter") -> None:
        self.number += 1
        await box(tab).fill(f"Prompt {self.number}")
        await box(tab).press(key)

    async def interrupt(self, tab: Page) -> None:
        await self.ask(tab)
        await self.ask(tab, "Control+Enter")

    async def queue(self, tab: Page) -> None:
        await self.ask(tab)
        await self.ask(tab)

    async def stop(self, tab: Page) -> None:
        await self.ask(tab)
        await box(tab).press("Escape")

    async def edit(self, tab: Page) -> None:
        await box(tab).press("ArrowUp")
        await self.ask(tab)

    async def regenerate(self, tab: Page) -> None:
        again = tab.get_by_role("button", name="Regenerate").last
        if await again.is_visible():
            await again.click()

    async def rename(self, tab: Page) -> None:
        if await rows(tab).count():
            await rename(tab, f"Title {self.random.random()}")

    async def delete(self, tab: Page) -> None:
        count = await rows(tab).count()
        if not count:
            return
        row = rows(tab).first
        await row.hover()
        await row.get_by_role("button", name="Delete").click()
        await tab.get_by_role("button", name="Delete", exact=True).click()
        for each in self.tabs:
            await expect(rows(each)).to_have_count(count - 1)

    async def begin(self, tab: Page) -> None:
        await tab.get_by_role("link", name="New conversation").click()

    async def switch(self, tab: Page) -> None:
        count = await rows(tab).count()
        if count:
            await rows(tab).nth(self.random.randrange(count)).get_by_role("link").click()

    async def reload(self, tab: Page) -> None:
        await tab.reload()

    async def lose(self, tab: Page) -> None:
        await tab.context.set_offline(True)
        cut(self.server)
        await self.ask(tab)
        await tab.context.set_offline(False)

    async def settle(self) -> None:
        """Let all replies end, open the same conversation in both tabs, and compare the tabs."""
        for tab in self.tabs:
            await expect(state(tab)).to_have_text("Connected", timeout=20_000)
        leader, follower = self.random.sample(self.tabs, 2)
        address = await leader.evaluate("location.hash")
        await follower.evaluate(
            "hash => { if (location.hash !== hash) location.hash = hash }", address
        )
        async with asyncio.timeout(BOUND):
            while True:
                for tab in self.tabs:  # of a reply that only a stop ends
                    await box(tab).fill("")
                    if await button(tab).get_attribute("aria-label") == "Stop":
                        await box(tab).press("Escape")
                self.shown = [await tab.evaluate(SHOWN) for tab in self.tabs]
                ended = [await button(tab).get_attribute("aria-label") for tab in self.tabs]
                if self.shown[0] == self.shown[1] and ended == ["Send", "Send"]:
                    return
                await asyncio.sleep(0.05)  # polls the page, as `expect` does


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1])
async def test_tabs_show_the_same_after_any_actions(blank: Page, seed: int) -> None:
    async with wsserver.serve(
        talk, port=0, drain_timeout=0, frame_rate=1e6, frame_burst=10**6, prompts_per_minute=10**6
    ) as server:
        await visit(blank, server)
        tab = await second_tab(blank)
        tabs = Tabs(server, (blank, tab), seed)
        try:
            for _ in range(STEPS):
                await tabs.step()
        except BaseException:
            print(tabs.done, tabs.shown)
            raise
