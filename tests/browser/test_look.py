"""Theme, hidden list, export, print, and the tab's title on the page."""

import re

import pytest
from playwright.async_api import Page, expect

from tests.browser.page import ask, box, converse, idle, text, violations
from tests.support.puppet import Puppet, Thinking

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

PAPER = "getComputedStyle(document.documentElement).backgroundColor"
LIGHT, DARK = "rgb(251, 250, 248)", "rgb(26, 26, 28)"


async def test_theme_is_kept_and_overrides_system(page: Page) -> None:
    picker = page.get_by_label("Theme")
    for scheme, theme, paper in (
        ("dark", "System", DARK),
        ("dark", "Light", LIGHT),
        ("light", "Dark", DARK),
        ("light", "System", LIGHT),
    ):
        await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        await picker.select_option(theme)
        assert await page.evaluate(PAPER) == paper
        assert await violations(page) == []
        await page.reload()
        await expect(picker).to_have_value(theme.lower())
        assert await page.evaluate(PAPER) == paper


async def test_hidden_list_stays_hidden_after_reload(page: Page) -> None:
    side = page.get_by_role("navigation", name="Conversations")
    button = page.get_by_role("button", name="List of conversations")
    await expect(side).to_be_visible()
    await button.click()
    for _ in range(2):
        await expect(side).to_be_hidden()
        await expect(button).to_have_attribute("aria-expanded", "false")
        await page.reload()
    await button.click()
    await expect(side).to_be_visible()


async def test_icon_under_pointer_shows_its_name(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    copy = page.get_by_role("button", name="Copy the reply")
    await copy.hover()
    await expect(copy).to_have_attribute("title", "Copy the reply")


@pytest.mark.parametrize("touch", [False, True])
async def test_copy_icon_of_each_turn_begins_where_text_does(
    page: Page, puppet: Puppet, touch: bool
) -> None:
    devtools = await page.context.new_cdp_session(page)
    await devtools.send("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    await converse(page, puppet, "First")
    await converse(page, puppet, "Second")
    left = "icon => icon.getBoundingClientRect().left"
    for turn in await page.locator(".turn").all():
        begin = await turn.locator(".text").evaluate(left)
        icon = await turn.locator(".to-copy").evaluate(left)
        assert begin - 4 <= icon <= begin  # the icon has a margin of its own


async def test_code_can_be_copied_while_its_middle_is_shown(page: Page, puppet: Puppet) -> None:
    await ask(page, "Long code")
    (await puppet.reply()).say("```py\n" + "x = 1\n" * 200 + "```\n").end()
    await idle(page)
    await page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    await expect(page.get_by_role("button", name="Copy the code")).to_be_in_viewport(ratio=1)
    bar = await page.locator("main > .bar").evaluate("bar => bar.getBoundingClientRect().bottom")
    header = page.locator("figcaption")
    assert await header.evaluate("header => header.getBoundingClientRect().top") == bar


async def test_print_shows_whole_code_and_addresses_without_controls(
    page: Page, puppet: Puppet
) -> None:
    code = "\n".join(f"line {number}" for number in range(200))
    await ask(page, "Print")
    (await puppet.reply()).say(f"[A link](https://example.com/)\n\n```\n{code}\n```\n").end()
    await idle(page)
    await ask(page, "A wide table")
    row = "|" + " word |" * 16
    model = (await puppet.reply(1)).say(
        Thinking("Hm."), "\n".join([row, "|" + "-|" * 16, row, row])
    )
    model.end()
    await expect(text(page).locator("tr")).to_have_count(3)
    await page.get_by_label("Theme").select_option("Dark")
    await page.set_viewport_size({"width": 680, "height": 900})  # of A4, in points
    await page.emulate_media(media="print")
    for hidden in ("#side", "#prompt", "#state", ".copy", ".regenerate", "summary"):
        await expect(page.locator(hidden).last).to_be_hidden()
    fits = "({ scrollWidth, clientWidth }) => scrollWidth <= clientWidth"
    assert await page.locator("html").evaluate(fits)
    assert await text(page).locator(".table").evaluate(fits)
    pages = len(re.findall(rb"/Type /Page\b", await page.pdf(format="A4")))
    assert pages >= 4, "the code is on several sheets"
    height = "pre => pre.scrollHeight - pre.clientHeight"
    assert await page.locator("pre").evaluate(height) <= 0
    address = "a => getComputedStyle(a, '::after').content"
    assert "https://example.com/" in await page.locator(".text a").evaluate(address)
    assert await page.evaluate(PAPER) == LIGHT


async def test_title_marks_reply_that_ended_in_hidden_tab(page: Page, puppet: Puppet) -> None:
    show = """state => {
        Object.defineProperty(document, 'visibilityState', { value: state, configurable: true })
        document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))
    }"""
    await converse(page, puppet, "First")
    await expect(page).to_have_title("First · wsserver")
    await ask(page, "Second")
    model = await puppet.reply(1)
    await page.evaluate(show, "hidden")
    icon = page.locator("link[rel=icon]")
    plain = await icon.get_attribute("href")
    model.say("Done").end()
    await expect(page).to_have_title("● First · wsserver")
    assert await icon.get_attribute("href") != plain
    await page.evaluate(show, "visible")
    await expect(page).to_have_title("First · wsserver")
    await expect(icon).to_have_attribute("href", str(plain))
    await expect(box(page)).to_be_visible()
