"""The AI SDK's own `useChat` against the server, in a real browser: `examples/ai-sdk`."""

import pytest
from playwright.async_api import Page, expect

import wsserver
from tests.browser.page import closed
from tests.support.bundle import bundle
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet
from tests.support.tools import require_npm_package
from wsserver import Code, ModelError

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

CHAT = "chat-of-the-test-1"


@pytest.fixture(scope="module")
def app() -> str:
    """The example as a script: ``start(properties)``."""
    entry = """
        import { createRoot } from 'react-dom/client'
        import { App } from './examples/ai-sdk/App.jsx'
        globalThis.start = (properties) =>
          createRoot(document.body.appendChild(document.createElement('div')))
            .render(<App {...properties} />)
    """
    require_npm_package("@ai-sdk/react")
    return bundle(entry)


async def start(page: Page, app: str, **properties: object) -> None:
    await page.add_script_tag(content=app)
    await page.evaluate("properties => start(properties)", {"id": CHAT, **properties})


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Your message").fill(text)
    await page.get_by_role("button", name="Send").click()


async def test_prompt_streams_text_and_reasoning(bare_page: Page, puppet: Puppet, app: str) -> None:
    await start(bare_page, app)
    await say(bare_page, "Count")
    model = await puppet.reply()
    assert [m.text for m in model.request.messages] == ["Count"]
    model.say(Thinking("one, two…"), "one ", "two")
    reply = bare_page.get_by_role("listitem").last
    await expect(reply).to_contain_text("one two")
    await expect(bare_page.get_by_role("status")).to_have_text("streaming")
    model.end()
    await expect(bare_page.get_by_role("status")).to_have_text("ready")
    await expect(reply.get_by_text("one, two…")).to_be_attached()


async def test_next_prompt_has_history_of_the_server(
    bare_page: Page, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await say(bare_page, "first")
    (await puppet.reply()).say("one").end()
    await expect(bare_page.get_by_role("status")).to_have_text("ready")
    await say(bare_page, "second")
    model = await puppet.reply(1)
    assert [m.text for m in model.request.messages] == ["first", "one", "second"]
    model.say("two").end()
    await expect(bare_page.get_by_role("listitem")).to_have_text(["first", "one", "second", "two"])


async def test_stop_reaches_the_model(
    bare_page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await say(bare_page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(bare_page.get_by_role("listitem").last).to_have_text("one ")
    await bare_page.get_by_role("button", name="Stop").click()
    await closed(model.closed)
    await expect(bare_page.get_by_role("status")).to_have_text("ready")
    assert not server.app.hub.live


async def test_reload_in_mid_sentence_resumes_from_the_start(
    bare_page: Page, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await say(bare_page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(bare_page.get_by_role("listitem").last).to_have_text("one two ")
    await bare_page.reload()
    question = {"id": "question", "role": "user", "parts": [{"type": "text", "text": "Count"}]}
    await start(bare_page, app, messages=[question])
    await expect(bare_page.get_by_role("listitem").last).to_have_text("one two ")
    model.say("three").end()
    await expect(bare_page.get_by_role("listitem")).to_have_text(["Count", "one two three"])
    await expect(bare_page.get_by_role("status")).to_have_text("ready")
    assert len(puppet.replies) == 1


async def test_reload_with_nothing_running_resumes_nothing(
    bare_page: Page, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await expect(bare_page.get_by_role("status")).to_have_text("ready")
    assert not puppet.replies


async def test_regenerate_replaces_the_last_reply(
    bare_page: Page, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await say(bare_page, "Count")
    (await puppet.reply()).say("one").end()
    await expect(bare_page.get_by_role("status")).to_have_text("ready")
    await bare_page.get_by_role("button", name="Again").click()
    model = await puppet.reply(1)
    assert [m.text for m in model.request.messages] == ["Count"]
    model.say("uno").end()
    await expect(bare_page.get_by_role("listitem")).to_have_text(["Count", "uno"])


async def test_error_of_the_model_and_refusal_are_shown(
    bare_page: Page, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await say(bare_page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(bare_page.get_by_role("listitem").last).to_have_text("one ")
    model.fail(ModelError(Code.OVERLOADED))
    await expect(bare_page.get_by_role("alert")).to_contain_text("overloaded")
    await say(bare_page, "x" * 40_000)
    await expect(bare_page.get_by_role("alert")).to_contain_text("bytes")


async def test_lost_connection_is_an_error_and_the_reply_is_stopped(
    bare_page: Page, server: wsserver.Server, puppet: Puppet, app: str
) -> None:
    await start(bare_page, app)
    await say(bare_page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(bare_page.get_by_role("listitem").last).to_have_text("one ")
    for connection in tuple(server.listener.connections):
        connection.abort()
    await expect(bare_page.get_by_role("status")).to_have_text("error")
    await closed(model.closed)
    assert BOUND > 3, "the model is closed once the page has had time to load again"
