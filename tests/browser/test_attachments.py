"""Prompts with images, documents and other blocks, which other clients send."""

from typing import Any

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import ask, box, cut, idle, prompts, queue, state, text, violations
from tests.support.client import client
from tests.support.images import png
from tests.support.puppet import Puppet
from wsserver import Code, ModelError
from wsserver.content import dump_content

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

CONVERSATION = "0123456789abcdef"


IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": png()},
}
REMOTE = {"type": "image", "source": {"type": "url", "url": "https://example.invalid/duck.png"}}
DOCUMENT = {
    "type": "document",
    "title": "Tea",
    "source": {"type": "text", "media_type": "text/plain", "data": "Tea is a drink."},
}
QUESTION = {"type": "text", "text": "What is this?"}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "12 °C"}


async def send(server: wsserver.Server, puppet: Puppet, content: Any, number: int = 0) -> None:
    """Ask from another client, and wait for the whole reply."""
    async with client(server) as other:
        await other.send({"prompt": content, "conversation": CONVERSATION})
        start = await other.next("start")
        (await puppet.reply(number)).say("A duck").end()
        await other.text(start["id"])


async def visit(page: Page, server: wsserver.Server) -> None:
    await page.goto(f"{server.page}#{CONVERSATION}")
    await expect(prompts(page)).to_have_count(1)


def attachments(page: Page) -> Any:
    return page.get_by_role("list", name="Attachments").get_by_role("listitem")


async def test_attachments_are_shown_from_history(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, [IMAGE, REMOTE, DOCUMENT, {"type": "x_y"}, QUESTION])
    await visit(page, server)
    await expect(prompts(page)).to_have_text(["What is this?"])
    await expect(attachments(page)).to_have_text(["", "Image", "Document: Tea", "x y"])
    image = attachments(page).get_by_role("img", name="Image")
    assert await image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 60
    link = attachments(page).get_by_role("link", name="Image")  # a stranger's image is not loaded
    await expect(link).to_have_attribute("href", "https://example.invalid/duck.png")
    await expect(link).to_have_attribute("rel", "noopener noreferrer")
    assert await violations(page) == []


async def test_prompt_stays_unfolded_when_its_history_is_loaded_again(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, [IMAGE, {"type": "text", "text": "What is this?\n" * 100}])
    await visit(page, server)
    await page.get_by_role("button", name="Show the whole message").click()
    less = page.get_by_role("button", name="Show less")
    await expect(less).to_be_visible()
    cut(server)
    await expect(state(page)).not_to_have_text("Connected")
    await expect(state(page)).to_have_text("Connected")
    await send(server, puppet, "Once more?", 1)  # its answer comes after that of the history
    await expect(prompts(page)).to_have_count(2)
    await expect(less).to_be_visible()


@pytest.mark.parametrize(
    "source",
    [
        {"type": "url", "url": "javascript:alert(1)"},
        {"type": "base64", "media_type": "text/html", "data": "PGI+"},
        {"type": "base64", "media_type": "image/png", "data": 'x"><script>alert(1)</script>'},
    ],
)
async def test_hostile_attachment_is_harmless(
    page: Page, server: wsserver.Server, puppet: Puppet, source: Any
) -> None:
    await send(server, puppet, [{"type": "image", "source": source}, QUESTION])
    await visit(page, server)
    await expect(attachments(page)).to_have_count(1)
    await expect(attachments(page).get_by_role("link")).to_have_count(0)


async def test_attachments_of_other_client_appear_while_reply_runs(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, "First")
    await visit(page, server)
    async with client(server) as other:
        await other.send({"prompt": [IMAGE, QUESTION], "conversation": CONVERSATION})
        model = (await puppet.reply(1)).say("A ")
        await expect(prompts(page)).to_have_text(["First", "What is this?"])
        await expect(attachments(page)).to_have_text(["Image"])
        model.say("duck").end()
        await expect(attachments(page).get_by_role("img")).to_be_visible()
    await page.get_by_role("button", name="Regenerate the reply").click()
    request = (await puppet.reply(2)).request
    assert dump_content(request.messages[-1].blocks) == [IMAGE, QUESTION]


async def test_regenerate_sends_all_blocks_again(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    content = [DOCUMENT, QUESTION, IMAGE]
    await send(server, puppet, content)
    await visit(page, server)
    await page.get_by_role("button", name="Regenerate the reply").click()
    model = await puppet.reply(1)
    assert dump_content(model.request.messages[-1].blocks) == content
    model.say("A goose").end()
    for _ in range(2):  # also in the history
        await expect(text(page)).to_have_text("A goose")
        await expect(prompts(page)).to_have_text(["What is this?"])
        await expect(attachments(page)).to_have_text(["Document: Tea", ""])
        await page.reload()


async def test_edit_changes_text_and_keeps_other_blocks(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, [IMAGE, QUESTION, DOCUMENT])
    await visit(page, server)
    await page.get_by_role("button", name="Edit the message").click()
    await expect(page.locator("#editing")).to_contain_text("It keeps the attachments.")
    await ask(page, "What colour is it?")
    model = await puppet.reply(1)
    changed = {"type": "text", "text": "What colour is it?"}
    assert dump_content(model.request.messages[-1].blocks) == [IMAGE, changed, DOCUMENT]
    await expect(attachments(page)).to_have_text(["", "Document: Tea"])
    model.end()


async def test_image_without_text_can_be_asked_about(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, [IMAGE])
    await visit(page, server)
    await box(page).press("ArrowUp")
    await ask(page, "What is this?")
    model = await puppet.reply(1)
    assert dump_content(model.request.messages[-1].blocks) == [IMAGE, QUESTION]
    model.end()


async def test_result_of_tool_can_be_repeated_and_not_edited(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, [RESULT])
    await visit(page, server)
    await expect(attachments(page)).to_have_text(["Tool result"])
    await expect(page.get_by_role("button", name="Edit the message")).to_have_count(0)
    await page.get_by_role("button", name="Regenerate the reply").click()
    model = await puppet.reply(1)
    assert dump_content(model.request.messages[-1].blocks) == [RESULT]
    model.end()


async def test_retry_of_failed_reply_keeps_attachments(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, "First")
    await visit(page, server)
    async with client(server) as other:
        await other.send({"prompt": [IMAGE, QUESTION], "conversation": CONVERSATION})
        (await puppet.reply(1)).say("A").fail(ModelError(Code.OVERLOADED))
        await page.get_by_role("button", name="Retry").click()
        model = await puppet.reply(2)
    assert dump_content(model.request.messages[-1].blocks) == [IMAGE, QUESTION]
    model.end()


async def test_waiting_prompt_with_attachments_can_only_be_removed(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await send(server, puppet, "First")
    await visit(page, server)
    await ask(page, "Second")
    model = await puppet.reply(1)
    async with client(server) as other:
        frame = {"prompt": [IMAGE, QUESTION], "conversation": CONVERSATION, "on_busy": "queue"}
        await other.send(frame)
        await expect(queue(page).get_by_role("button")).to_have_count(1)
        await queue(page).get_by_role("button", name="Remove the message").click()
        await other.next("done", by="client")
    await expect(prompts(page)).to_have_text(["First", "Second"])
    model.end()
    await idle(page)
