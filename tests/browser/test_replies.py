"""Replies on the page: streaming, stopping, formatting."""

import re

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import (
    MARKUP,
    ask,
    box,
    button,
    closed,
    converse,
    idle,
    note,
    rename,
    reply,
    rows,
    text,
    title,
)
from tests.support.puppet import Puppet, Thinking
from wsserver import Code, Message, ModelError, Request, Usage
from wsserver.models.demo import Demo

SHOWN = "bold <img src=x onerror=alert(1)> <script>alert(2)</script> & a"  # of MARKUP

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_reply_appears_while_it_streams(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await expect(button(page)).to_have_accessible_name("Stop")
    await expect(reply(page)).to_have_attribute("aria-busy", "true")
    model.say("three", Usage(input_tokens=1234, output_tokens=5)).end()
    await expect(text(page)).to_have_text("one two three")
    await idle(page)
    await expect(reply(page)).to_have_attribute("aria-busy", "false")
    await expect(note(page)).to_be_empty()
    await expect(reply(page).locator(".usage")).to_have_text("puppet · 1,234 tokens in, 5 out")
    assert model.request.prompt == "Count"


async def test_empty_page_offers_prompts_that_demo_model_answers(
    page: Page, puppet: Puppet
) -> None:
    ideas = page.get_by_role("list", name="Things to try").get_by_role("button")
    prompts = await ideas.locator("span").all_text_contents()
    assert len(prompts) == 3
    kinds = []
    for prompt in prompts:
        request = Request((Message("user", prompt),), "demo", 1000)
        kinds.append([type(piece) async for piece in Demo(rate=0)(request)])
    table, tea, count = kinds
    assert wsserver.Thinking not in table
    assert wsserver.Thinking in tea
    assert count.count(str) == 1000
    await box(page).fill("Draft")
    await ideas.last.click()
    await expect(ideas).to_have_count(0)
    await expect(box(page)).to_have_value("Draft")
    (await puppet.reply()).say("1, 2").end()
    await expect(text(page)).to_have_text("1, 2")
    assert puppet.replies[0].request.prompt == prompts[-1]


async def test_next_prompt_continues_conversation(page: Page, puppet: Puppet) -> None:
    await converse(page, puppet, "First")
    await converse(page, puppet, "Second", "Another")
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["First", "Reply", "Second"]
    await expect(page.get_by_role("region", name="Messages")).to_contain_text("First")


@pytest.mark.parametrize("prompt", ["a line\n" * 400, "no line ends " * 400])
async def test_long_prompt_is_folded_until_reader_asks_for_all(
    page: Page, puppet: Puppet, prompt: str
) -> None:
    await converse(page, puppet, "Short")
    await converse(page, puppet, prompt)
    more = page.get_by_role("button", name="Show the whole message")
    for again in (False, True):
        if again:
            await page.reload()
        await expect(more).to_have_count(1)
        await expect(page.locator(".you p").first).to_be_in_viewport()
        await expect(reply(page)).to_be_in_viewport()
    await more.click()
    await expect(page.locator(".you p").first).not_to_be_in_viewport()
    assert await page.locator(".you p").last.text_content() == prompt
    await page.get_by_role("button", name="Show less").click()
    await expect(page.locator(".you p").first).to_be_in_viewport()


async def test_stop_closes_upstream_and_next_prompt_works(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await button(page).click()
    await closed(model.closed)
    await expect(note(page)).to_have_text("Stopped.")
    await expect(text(page)).to_have_text("one two")
    await idle(page)
    await box(page).fill("Again")
    await button(page).click()
    (await puppet.reply(1)).say("whole").end()
    await expect(text(page)).to_have_text("whole")
    await expect(note(page)).to_be_empty()


async def test_escape_key_stops_reply(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = await puppet.reply()
    await page.keyboard.press("Escape")
    await closed(model.closed)
    await expect(note(page)).to_have_text("Stopped.")


async def test_double_click_on_send_does_not_stop_reply(page: Page, puppet: Puppet) -> None:
    await box(page).fill("Count")
    await button(page).dblclick()
    (await puppet.reply()).say("one").end()
    await expect(text(page)).to_have_text("one")
    await idle(page)
    await expect(note(page)).to_be_empty()


async def test_shift_enter_adds_line_and_grows_text_box(page: Page, puppet: Puppet) -> None:
    await box(page).fill("one")
    before = await box(page).bounding_box()
    await box(page).press("Shift+Enter")
    await box(page).press_sequentially("two")
    after = await box(page).bounding_box()
    assert before is not None
    assert after is not None
    assert after["height"] > before["height"]
    await box(page).press("Enter")
    model = await puppet.reply()
    model.end()
    assert model.request.prompt == "one\ntwo"
    await expect(box(page)).to_have_value("")


async def test_enter_sends_nothing_if_blank(page: Page, puppet: Puppet) -> None:
    await ask(page, " \n ")
    await converse(page, puppet, "Count")
    assert [model.request.prompt for model in puppet.replies] == ["Count"]


@pytest.mark.parametrize("composing", ["keyCode: 229", "isComposing: true"])
async def test_escape_of_input_method_does_not_stop_reply(
    page: Page, puppet: Puppet, composing: str
) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await box(page).evaluate(
        "box => box.dispatchEvent(new KeyboardEvent('keydown', "
        f"{{ key: 'Escape', bubbles: true, {composing} }}))"
    )
    model.say("two").end()
    await expect(text(page)).to_have_text("one two")
    await idle(page)
    await expect(note(page)).to_be_empty()


async def test_thinking_is_collapsed(page: Page, puppet: Puppet) -> None:
    await ask(page, "Think")
    model = (await puppet.reply()).say(Thinking("Let me "), Thinking("see."))
    thinking = reply(page).locator("details p")
    await expect(thinking).to_have_text("Let me see.")
    await expect(thinking).not_to_be_visible()
    await page.get_by_text("Thinking…").click()
    await expect(thinking).to_be_visible()
    model.say("Seen.").end()
    await expect(text(page)).to_have_text("Seen.")
    await expect(reply(page).locator("summary")).to_have_text("Thought for less than a second")
    await converse(page, puppet, "Do not think", "Done.")
    await expect(reply(page).locator("details")).not_to_be_visible()


async def test_copy_buttons_copy_reply_and_code(page: Page, puppet: Puppet) -> None:
    whole = "Here:\n\n```py\nx = 1\n\ny = `2`\n```\nDone."
    await ask(page, "Code")
    (await puppet.reply()).say(whole).end()
    await idle(page)
    await page.get_by_role("button", name="Copy the code").click()
    assert await page.evaluate("navigator.clipboard.readText()") == "x = 1\n\ny = `2`"
    await page.get_by_role("button", name="Copy the reply").click()
    await expect(page.get_by_role("button", name="Copied", exact=True)).to_be_visible()
    assert await page.evaluate("navigator.clipboard.readText()") == whole


async def test_html_is_shown_as_text(page: Page, puppet: Puppet) -> None:
    await ask(page, MARKUP)
    fenced = (
        f"{MARKUP}\n```{MARKUP}\n{MARKUP}\n```\n- {MARKUP}\n# {MARKUP}\n**{MARKUP}** `{MARKUP}`"
    )
    model = (await puppet.reply()).say(Thinking(MARKUP), fenced)
    model.fail(ModelError(Code.REFUSAL, MARKUP))
    await expect(note(page)).to_have_text(MARKUP)
    await expect(text(page)).to_contain_text(SHOWN)
    await expect(reply(page).locator("details p")).to_have_text(MARKUP)
    await expect(reply(page).locator("pre")).to_have_text(MARKUP)
    await expect(reply(page).locator(".language")).to_have_text("<b>bold</b>")
    await expect(page.locator(".you p")).to_have_text(MARKUP)
    await rename(page, MARKUP)
    await expect(title(page)).to_have_text(MARKUP)
    await expect(rows(page).get_by_role("link")).to_have_text(MARKUP)
    await page.get_by_role("button", name=re.compile("^Delete")).click()
    await expect(page.get_by_role("dialog")).to_contain_text(MARKUP)
    await page.keyboard.press("Escape")
    await page.reload()
    await expect(text(page)).to_contain_text(SHOWN)
    await expect(page.locator("img, body script, [onerror]")).to_have_count(0)
    await expect(page.locator("#log a")).to_have_count(0)
