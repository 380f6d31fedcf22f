"""Tokens on the page."""

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import ask, box, converse, cut, idle, state, text, violations
from tests.support.puppet import Puppet

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_page_asks_for_token_if_server_requires_tokens(puppet: Puppet, blank: Page) -> None:
    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token == "sesame" else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        field = blank.get_by_label("Your token")
        await expect(field).to_be_focused()
        assert await violations(blank) == []
        await field.fill("wrong")
        await field.press("Enter")
        await expect(state(blank)).to_contain_text("your token is invalid")
        await expect(field).to_be_focused()
        await field.fill("sesame")
        await field.press("Enter")
        await expect(field).to_be_hidden()
        await expect(box(blank)).to_be_focused()
        await ask(blank, "Hello")
        (await puppet.reply()).say("Hi ada").end()
        await expect(text(blank)).to_have_text("Hi ada")
        await idle(blank)
        await blank.reload()  # the page remembers the token
        await expect(text(blank)).to_have_text("Hi ada")
        await ask(blank, "Again")
        (await puppet.reply(1)).say("Hi again").end()
        await expect(text(blank)).to_have_text("Hi again")
        await expect(field).to_be_hidden()


async def test_token_over_the_limit_of_frames_is_invalid(puppet: Puppet, blank: Page) -> None:
    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token == "sesame" else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        field = blank.get_by_label("Your token")
        await field.fill("x" * 70_000)  # over the message_size
        await field.press("Enter")
        await expect(state(blank)).to_contain_text("your token is invalid")
        await field.fill("sesame")
        await field.press("Enter")
        await expect(state(blank)).to_have_text("Connected")


FORBIDDEN = (
    "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } })"
)
FULL = """for (let size = 2 ** 23; size >= 1; size /= 2) {
    try { localStorage.setItem(`full ${size}`, 'x'.repeat(size)) } catch { }
}"""


@pytest.mark.parametrize("storage", [FORBIDDEN, FULL], ids=["forbidden", "full"])
async def test_page_works_without_room_in_local_storage(
    puppet: Puppet, blank: Page, storage: str
) -> None:
    await blank.add_init_script(storage)

    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token == "sesame" else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        await blank.get_by_label("Your token").fill("sesame")
        await blank.get_by_label("Your token").press("Enter")
        await converse(blank, puppet, "Hello")


async def test_token_of_one_tab_is_used_by_other_tabs(puppet: Puppet, blank: Page) -> None:
    good = {"old"}

    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token in good else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        tab = await blank.context.new_page()
        for each in (blank, tab):
            await each.goto(server.page)
            await expect(each.get_by_label("Your token")).to_be_visible()
        await blank.get_by_label("Your token").fill("old")
        await blank.get_by_label("Your token").press("Enter")
        await expect(state(tab)).to_have_text("Connected")
        await expect(tab.get_by_label("Your token")).to_be_hidden()
        await converse(tab, puppet, "Hello")
        good.clear()
        cut(server)
        for each in (blank, tab):
            await expect(each.get_by_label("Your token")).to_be_visible()
            await expect(state(each)).to_contain_text("your token is invalid")
        await expect(text(tab)).to_have_text("Reply")  # and the token can still be read
        good.add("new")
        await tab.get_by_label("Your token").fill("new")
        await tab.get_by_label("Your token").press("Enter")
        await expect(state(blank)).to_have_text("Connected")
        await converse(tab, puppet, "Again")
