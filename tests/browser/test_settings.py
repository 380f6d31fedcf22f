"""Model, system prompt and temperature of a conversation on the page."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Locator, Page, expect

import wsserver
from tests.browser.page import (
    alert,
    ask,
    box,
    converse,
    idle,
    note,
    prompts,
    rows,
    second_tab,
    text,
    violations,
    visit,
)
from tests.support.puppet import Puppet
from wsserver import Request

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]
STORED = "Object.keys(localStorage).filter((key) => key.startsWith('settings '))"


@pytest_asyncio.fixture(loop_scope="session")
async def choice(blank: Page, puppet: Puppet) -> AsyncIterator[Page]:
    """The page of a server with three models."""
    models = ("small", "large")
    async with wsserver.serve(puppet, port=0, drain_timeout=0, models=models) as server:
        await visit(blank, server)
        yield blank


def opener(page: Page) -> Locator:
    return page.locator("#settings")


def dialog(page: Page) -> Locator:
    return page.get_by_role("dialog", name="Settings of this conversation")


def system(page: Page) -> Locator:
    return page.get_by_role("textbox", name="System prompt")


def temperature(page: Page) -> Locator:
    return page.get_by_role("slider", name="Temperature")


def model(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Model")


async def choose(page: Page, **values: str) -> None:
    await opener(page).click()
    if "model" in values:
        await model(page).select_option(values["model"])
    if "system" in values:
        await system(page).fill(values["system"])
    if "temperature" in values:
        await temperature(page).fill(values["temperature"])
    await page.get_by_role("button", name="Done").click()
    await expect(dialog(page)).to_be_hidden()


def sent(request: Request) -> tuple[str | None, float | None]:
    return request.system, request.temperature


async def test_prompts_send_settings_of_their_conversation(page: Page, puppet: Puppet) -> None:
    await expect(opener(page)).to_have_accessible_name("Settings")
    await choose(page, system="Be brief.", temperature="0.3")
    name = "Settings: system prompt, temperature 0.3"
    await expect(opener(page)).to_have_accessible_name(name)
    await converse(page, puppet, "First")
    await page.reload()
    await expect(opener(page)).to_have_accessible_name(name)
    await converse(page, puppet, "Second")
    await page.get_by_role("button", name="Regenerate").click()
    (await puppet.reply(2)).say("Again").end()
    await expect(text(page)).to_have_text("Again")
    await idle(page)
    await box(page).press("ArrowUp")
    await ask(page, "Third")
    (await puppet.reply(3)).say("Reply").end()
    await expect(prompts(page)).to_have_text(["First", "Third"])
    await idle(page)
    assert [sent(each.request) for each in puppet.replies] == [("Be brief.", 0.3)] * 4
    await page.get_by_role("link", name="New conversation").click()
    await expect(opener(page)).to_have_accessible_name("Settings")
    await converse(page, puppet, "Other")
    assert sent(puppet.replies[4].request) == (None, None)


async def test_reset_restores_defaults(page: Page, puppet: Puppet) -> None:
    await choose(page, system="Be brief.", temperature="0")
    await opener(page).click()
    await page.get_by_role("button", name="Reset").click()
    await expect(system(page)).to_have_value("")
    await expect(temperature(page)).to_have_attribute("aria-valuetext", "the default")
    await expect(page.get_by_role("button", name="Reset")).to_be_hidden()
    await page.keyboard.press("Escape")
    await expect(opener(page)).to_have_accessible_name("Settings")
    await converse(page, puppet, "First")
    assert sent(puppet.replies[0].request) == (None, None)


async def test_escape_closes_dialog_keeps_changes_and_stops_no_reply(
    page: Page, puppet: Puppet
) -> None:
    await ask(page, "First")
    said = (await puppet.reply()).say("One ")
    await expect(text(page)).to_have_text("One")
    await opener(page).focus()
    await page.keyboard.press("Enter")
    await expect(system(page)).to_be_focused()
    await page.keyboard.type("Be brief.")
    await page.keyboard.press("Tab")
    await page.keyboard.press("ArrowLeft")
    await page.keyboard.press("Escape")
    await expect(dialog(page)).to_be_hidden()
    await expect(opener(page)).to_be_focused()
    said.say("Two").end()
    await expect(text(page)).to_have_text("One Two")
    await expect(note(page)).to_have_text("")
    await converse(page, puppet, "Second")
    assert [sent(each.request) for each in puppet.replies] == [(None, None), ("Be brief.", 0.9)]


async def test_prompt_sends_chosen_model(choice: Page, puppet: Puppet) -> None:
    page = choice
    await expect(opener(page)).to_have_text("puppet")
    await converse(page, puppet, "First")
    await choose(page, model="large")
    await expect(opener(page)).to_have_text("large")
    await expect(opener(page)).to_have_accessible_name("Settings: model large")
    await converse(page, puppet, "Second")
    await page.get_by_role("link", name="New conversation").click()
    await expect(opener(page)).to_have_text("large")
    await converse(page, puppet, "Third")
    await choose(page, model="small")
    await page.reload()
    await converse(page, puppet, "Fourth")
    await page.get_by_role("link", name="First").click()
    await expect(opener(page)).to_have_text("large")
    await converse(page, puppet, "Fifth")
    models = [each.request.model for each in puppet.replies]
    assert models == ["puppet", "large", "large", "small", "large"]


async def test_one_model_has_no_picker(page: Page) -> None:
    await expect(opener(page)).to_have_text("Settings")
    await opener(page).click()
    await expect(system(page)).to_be_visible()
    await expect(model(page)).to_be_hidden()


async def test_model_that_server_no_longer_offers_is_not_sent(choice: Page, puppet: Puppet) -> None:
    page = choice
    await choose(page, model="large")
    await page.evaluate("localStorage.setItem('model', JSON.stringify({ name: 'gone' }))")
    await page.evaluate("sessionStorage.clear()")
    await page.reload()
    await expect(opener(page)).to_have_text("puppet")
    told = "The server no longer offers the model “gone”. Your next message goes to “puppet”."
    await expect(alert(page)).to_have_text(told)
    await converse(page, puppet, "First")
    assert puppet.replies[0].request.model == "puppet"
    await page.get_by_role("link", name="New conversation").click()
    await page.reload()
    await expect(opener(page)).to_have_text("puppet")
    await expect(alert(page)).to_be_hidden()


async def test_person_is_told_of_model_that_disappears_while_page_is_open(
    blank: Page, puppet: Puppet
) -> None:
    serve = partial(wsserver.serve, puppet, drain_timeout=0, store="memory:")
    async with serve(port=0, models=("small", "large")) as server:
        port = server.port
        await visit(blank, server)
        await choose(blank, model="large", system="Be brief.")
    async with serve(port=port, models=("small",)):
        await blank.evaluate("dispatchEvent(new Event('online'))")
        await expect(alert(blank)).to_contain_text("no longer offers the model “large”")
        await expect(opener(blank)).to_have_accessible_name("Settings: model puppet, system prompt")


async def test_long_system_prompt_survives_reload(page: Page) -> None:
    await choose(page, system="word " * 30_000)
    await page.reload()
    await expect(opener(page)).to_have_accessible_name("Settings: system prompt")
    await opener(page).click()
    await expect(system(page)).to_have_value("word " * 30_000)


async def test_storage_cleared_in_other_tab_restores_defaults(page: Page, puppet: Puppet) -> None:
    await choose(page, system="Be brief.")
    await page.locator("#theme").select_option("dark")
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await box(page).fill("Draft")
    await tab.evaluate("localStorage.clear()")
    await expect(opener(page)).to_have_accessible_name("Settings")
    await expect(page.locator("html")).to_have_attribute("data-theme", "system")
    await expect(box(page)).to_have_value("Draft")
    await converse(page, puppet, "Second")
    assert sent(puppet.replies[1].request) == (None, None)


async def test_refused_model_leaves_text_in_box(choice: Page, puppet: Puppet) -> None:
    page = choice
    await choose(page, model="large")
    await page.evaluate("""() => {
        const send = WebSocket.prototype.send
        WebSocket.prototype.send = function (data) {
            return send.call(this, data.replace('"large"', '"unknown"'))
        }
    }""")
    await ask(page, "My long text")
    await expect(note(page)).to_contain_text("does not offer this model. Choose another one.")
    await expect(box(page)).to_have_value("My long text")
    assert puppet.replies == []


async def test_deleted_conversation_takes_its_settings_along(page: Page, puppet: Puppet) -> None:
    await choose(page, system="Secret")
    await converse(page, puppet, "First")
    assert len(await page.evaluate(STORED)) == 1
    await rows(page).first.hover()
    await rows(page).get_by_role("button", name="Delete").click()
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(alert(page)).to_have_text("This conversation was deleted.")
    assert await page.evaluate(STORED) == []
    await expect(opener(page)).to_have_accessible_name("Settings")


async def test_browser_keeps_settings_of_fifty_conversations(page: Page, puppet: Puppet) -> None:
    await page.evaluate("""() => {
        for (let number = 0; number < 50; number++) {
            const kept = { system: 'Old', at: number }
            localStorage.setItem(`settings ${number}`, JSON.stringify(kept))
        }
    }""")
    await choose(page, system="New")
    await converse(page, puppet, "First")
    stored = await page.evaluate(STORED)
    assert len(stored) == 50
    assert "settings 0" not in stored
    assert "settings 1" in stored


async def test_settings_of_conversation_are_the_same_in_all_tabs(
    page: Page, puppet: Puppet
) -> None:
    await converse(page, puppet, "First")
    tab = await second_tab(page)
    await choose(page, system="Be brief.")
    await expect(opener(tab)).to_have_accessible_name("Settings: system prompt")
    await converse(tab, puppet, "Second")
    assert puppet.replies[1].request.system == "Be brief."


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 320])
async def test_dialog_fits_and_axe_reports_no_violation(
    choice: Page, width: int, scheme: Any
) -> None:
    page = choice
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": width, "height": 600})
    await opener(page).click()
    await system(page).fill("word " * 300)
    await temperature(page).fill("1.5")
    assert await violations(page) == []
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not await page.evaluate(wide)
    await page.get_by_role("button", name="Done").click()
    assert await violations(page) == []
    assert not await page.evaluate(wide)
