"""Keyboard shortcuts of the page."""

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import box, converse, rows, title, violations, visit
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_shortcuts_reach_list_search_box_and_reply(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First", "One")
    press = page.keyboard.press
    await press("Alt+Shift+KeyC")
    assert await page.evaluate("navigator.clipboard.readText()") == "One"
    await press("Alt+Shift+KeyK")
    await expect(page.get_by_role("searchbox", name="Search titles")).to_be_focused()
    await press("Alt+Shift+KeyM")
    await expect(box(page)).to_be_focused()
    await press("Alt+Shift+KeyL")
    await expect(rows(page)).to_have_count(0)
    await press("Alt+Shift+KeyK")  # shows the list
    await expect(page.get_by_role("searchbox", name="Search titles")).to_be_focused()
    await expect(rows(page)).to_have_count(1)
    await press("Alt+Shift+KeyN")
    await expect(title(page)).to_have_text("New conversation")
    await expect(box(page)).to_have_value("")


async def test_keys_have_their_names_of_a_mac(blank: Page, server: wsserver.Server) -> None:
    await blank.add_init_script(
        "Object.defineProperty(Navigator.prototype, 'platform', { value: 'MacIntel' })"
    )
    await visit(blank, server)
    await box(blank).blur()
    await blank.keyboard.press("?")
    await expect(blank.get_by_role("dialog")).to_contain_text("⌘+Enter")


@pytest.mark.parametrize("width", [1200, 320])
async def test_question_mark_lists_shortcuts_but_can_be_typed(page: Page, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 640})
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    await box(page).press_sequentially("What?")
    await expect(box(page)).to_have_value("What?")
    await expect(dialog).to_be_hidden()
    await box(page).blur()
    await page.keyboard.press("?")
    await expect(dialog).to_be_visible()
    assert await violations(page) == []
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
