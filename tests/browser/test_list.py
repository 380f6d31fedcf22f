"""The list of conversations: groups by date, and the search."""

from datetime import datetime, timedelta

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import converse, rename, rows, violations
from tests.support.client import client
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_times_have_group_by_local_day(page: Page) -> None:
    now = datetime(2026, 3, 10, 0, 30)  # noqa: DTZ001 (of the browser)
    ages = (0, 1, 2, 8, 9, 60, 100)
    times = [(now - timedelta(days=days)).isoformat() for days in ages]
    times.append((now - timedelta(minutes=31)).isoformat())
    found = await page.evaluate(
        """([now, times]) => import('./groups.js').then(({ groupOf }) =>
            times.map((time) => groupOf(new Date(time) / 1000, new Date(now))))""",
        [now.isoformat(), times],
    )
    assert found == [
        *("Today", "Yesterday", "Previous 7 days", "March", "March", "January"),
        *("November 2025", "Yesterday"),
    ]


async def test_search_filters_titles_and_follows_changes(page: Page, puppet: Puppet) -> None:
    search = page.get_by_role("searchbox", name="Search titles")
    await expect(search).to_be_hidden()
    await converse(page, puppet, "Tea in China")
    for name in ("Tea in Japan", "Coffee"):
        await page.get_by_role("link", name="New conversation").click()
        await converse(page, puppet, name)
    await expect(rows(page)).to_have_text(["Coffee", "Tea in Japan", "Tea in China"])
    await expect(page.locator("#list h2")).to_have_text(["Today"])
    await search.fill("china TEA")
    await expect(rows(page)).to_have_text(["Tea in China"])
    await expect(page.locator("#matches")).to_have_text("1 title found.")
    await search.fill("tea")
    await expect(rows(page)).to_have_count(2)
    await rename(page, "Green tea")
    await expect(rows(page)).to_have_text(["Green tea", "Tea in China"])
    await search.fill("milk")
    await expect(page.locator("#matches")).to_have_text("No titles found.")
    assert await violations(page) == []
    await search.press("Escape")
    await expect(rows(page)).to_have_count(3)
    await expect(page.locator("#matches")).to_have_text("")


async def test_search_finds_titles_that_the_page_has_not_loaded(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    async with client(server) as other:
        for number in range(32):
            start = await other.prompt(
                f"Number {number}" if number else "Oldest", conversation=f"{number:032}"
            )
            (await puppet.reply(number)).end()
            await other.text(start["id"])
    await page.reload()
    await expect(rows(page)).to_have_count(30)
    search = page.get_by_role("searchbox", name="Search titles")
    await search.fill("old")
    await expect(rows(page)).to_have_text(["Oldest"])
    await expect(page.locator("#matches")).to_have_text("1 title found.")
    await expect(search).to_be_focused()
