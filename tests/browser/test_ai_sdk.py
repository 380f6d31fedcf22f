"""The AI SDK's own `useChat` in a real browser, over plain HTTP and over a WebSocket."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

import wsserver
from tests.browser.page import closed, cut
from tests.support.bundle import bundle, example
from tests.support.pieces import Thinking
from tests.support.puppet import BOUND, Puppet, until
from tests.support.sockets import sockets_of
from tests.support.tools import ROOT, require_npm_package
from wsserver import Code, ModelError

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

EXAMPLE = ROOT / "examples/ai-sdk"
CHAT = "chat-of-the-test-1"
HTTP, WEBSOCKET = "http", "websocket"
both = pytest.mark.parametrize("transport", [HTTP, WEBSOCKET])
websocket = pytest.mark.parametrize("transport", [WEBSOCKET])


@pytest.fixture(scope="module")
def app() -> str:
    """The example as a script: ``start(properties)``, and ``transports`` to choose from."""
    entry = """
        import { StrictMode } from 'react'
        import { createRoot } from 'react-dom/client'
        import { DefaultChatTransport } from 'ai'
        import { ChatTransport } from './wsserver/web/ai-sdk.js'
        import { App } from './examples/ai-sdk/App.jsx'
        globalThis.transports = { http: new DefaultChatTransport(), websocket: new ChatTransport() }
        globalThis.start = ({ transport, ...properties }) =>
          createRoot(document.body.appendChild(document.createElement('div'))).render(
            <StrictMode><App {...properties} transport={transports[transport]} /></StrictMode>)
    """
    require_npm_package("@ai-sdk/react")
    return bundle(entry)


class Chat:
    """The page of one chat."""

    def __init__(self, page: Page, app: str, transport: str) -> None:
        self.page = page
        self.items = page.get_by_role("listitem")
        self.status = page.get_by_role("status")
        self.alert = page.get_by_role("alert")
        self._app = app
        self._transport = transport

    async def start(self, **properties: object) -> "Chat":
        await self.page.add_script_tag(content=self._app)
        given = {"id": CHAT, "transport": self._transport, **properties}
        await self.page.evaluate("properties => start(properties)", given)
        return self

    async def reload(self, **properties: object) -> None:
        await self.page.reload()
        await self.start(**properties)

    async def say(self, text: str) -> None:
        await self.page.get_by_label("Your message").fill(text)
        await self.button("Send").click()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name)

    async def ready(self) -> None:
        await expect(self.status).to_have_text("ready")


@pytest_asyncio.fixture(loop_scope="session")
async def chat(bare_page: Page, app: str, transport: str) -> Chat:
    return await Chat(bare_page, app, transport).start()


QUESTION = {"id": "question", "role": "user", "parts": [{"type": "text", "text": "Count"}]}


@both
async def test_prompt_streams_text_and_reasoning(chat: Chat, puppet: Puppet) -> None:
    await chat.say("Count")
    model = await puppet.reply()
    assert [m.text for m in model.request.messages] == ["Count"]
    model.say(Thinking("one, two…"), "one ", "two")
    await expect(chat.items.last).to_contain_text("one two")
    await expect(chat.status).to_have_text("streaming")
    model.end()
    await chat.ready()
    await expect(chat.items.last.get_by_text("one, two…")).to_be_attached()


@both
async def test_next_prompt_has_history_of_the_server(chat: Chat, puppet: Puppet) -> None:
    for number, (prompt, said) in enumerate([("first", "one"), ("second", "two"), ("3rd", "3")]):
        await chat.say(prompt)
        (await puppet.reply(number)).say(said).end()
        await chat.ready()
    messages = [m.text for m in puppet.replies[-1].request.messages]
    assert messages == ["first", "one", "second", "two", "3rd"]
    await expect(chat.items).to_have_text([*messages, "3"])


@both
async def test_stop_closes_the_model_and_keeps_the_text(
    chat: Chat, server: wsserver.Server, puppet: Puppet
) -> None:
    await chat.say("Count")
    model = (await puppet.reply()).say("one ")
    await expect(chat.items.last).to_have_text("one ")
    await chat.button("Stop").click()
    await chat.ready()
    await closed(model.closed)
    await until(lambda: not server.app.hub.live)
    await expect(chat.items).to_have_text(["Count", "one "])
    await chat.say("Go on")
    (await puppet.reply(1)).say("two").end()
    assert [m.text for m in puppet.replies[1].request.messages] == ["Count", "one ", "Go on"]
    await expect(chat.items.last).to_have_text("two")


@websocket
async def test_stop_before_first_token_closes_the_model(chat: Chat, puppet: Puppet) -> None:
    await chat.say("Count")
    model = await puppet.reply()
    await chat.button("Stop").click()
    await closed(model.closed)
    await chat.ready()
    await chat.button("Again").click()
    second = await puppet.reply(1)
    assert [m.text for m in second.request.messages] == ["Count"]
    second.say("one").end()
    await expect(chat.items.last).to_have_text("one")


@both
async def test_reload_in_mid_sentence_resumes_from_the_start(chat: Chat, puppet: Puppet) -> None:
    await chat.say("Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(chat.items.last).to_have_text("one two ")
    await chat.reload(messages=[QUESTION])
    await expect(chat.items.last).to_have_text("one two ")
    model.say("three").end()
    await expect(chat.items).to_have_text(["Count", "one two three"])
    await chat.ready()
    assert len(puppet.replies) == 1


@websocket
async def test_resumed_reply_is_stopped_at_once(chat: Chat, puppet: Puppet) -> None:
    await chat.say("Count")
    model = (await puppet.reply()).say("one ")
    await expect(chat.items.last).to_have_text("one ")
    await chat.reload(messages=[QUESTION])
    await expect(chat.items.last).to_have_text("one ")
    assert not model.closed.is_set()
    await chat.button("Stop").click()
    await closed(model.closed)
    await expect(chat.items).to_have_text(["Count", "one "])


@both
async def test_reload_with_nothing_running_resumes_nothing(chat: Chat, puppet: Puppet) -> None:
    await chat.ready()
    assert not puppet.replies


@both
async def test_regenerate_replaces_the_last_reply(chat: Chat, puppet: Puppet) -> None:
    await chat.say("Count")
    (await puppet.reply()).say("one").end()
    await chat.ready()
    await chat.button("Again").click()
    model = await puppet.reply(1)
    assert [m.text for m in model.request.messages] == ["Count"]
    model.say("uno").end()
    await expect(chat.items).to_have_text(["Count", "uno"])
    await chat.ready()
    await chat.say("And?")
    model = await puppet.reply(2)
    assert [m.text for m in model.request.messages] == ["Count", "uno", "And?"]
    model.say("due").end()
    await chat.ready()


@both
async def test_error_of_the_model_and_refusal_are_shown(chat: Chat, puppet: Puppet) -> None:
    await chat.say("Count")
    model = (await puppet.reply()).say("one ")
    await expect(chat.items.last).to_have_text("one ")
    model.fail(ModelError(Code.OVERLOADED))
    await expect(chat.alert).to_contain_text("overloaded")
    await expect(chat.items.last).to_have_text("one ")
    await chat.say("x" * 40_000)
    await expect(chat.alert).to_contain_text("bytes")
    await chat.say("Go on")
    model = await puppet.reply(1)
    assert [m.text for m in model.request.messages] == ["Count", "one ", "Go on"]
    model.fail(ModelError(Code.OVERLOADED))
    await expect(chat.alert).to_contain_text("overloaded")
    await chat.button("Again").click()
    model = await puppet.reply(2)
    assert [m.text for m in model.request.messages] == ["Count", "one ", "Go on"]
    model.say("two").end()
    await expect(chat.items.last).to_have_text("two")
    await chat.ready()


@pytest.mark.parametrize("transport", [HTTP])
async def test_lost_connection_over_http_is_an_error_and_stops_the_reply(
    chat: Chat, server: wsserver.Server, puppet: Puppet
) -> None:
    await chat.say("Count")
    model = (await puppet.reply()).say("one ")
    await expect(chat.items.last).to_have_text("one ")
    cut(server)
    await expect(chat.status).to_have_text("error")
    await closed(model.closed)
    assert BOUND > 3, "the model is closed once the page has had time to load again"


@websocket
async def test_lost_connections_over_a_websocket_are_invisible(
    chat: Chat, server: wsserver.Server, puppet: Puppet
) -> None:
    await chat.say("Count")
    model = await puppet.reply()
    said = ""
    for number in range(4):
        said += f"{number} "
        model.say(f"{number} ")
        await expect(chat.items.last).to_have_text(said)
        cut(server)
        await expect(chat.status).to_have_text("streaming")
    model.say("end").end()
    await expect(chat.items).to_have_text(["Count", f"{said}end"])
    await chat.ready()
    assert len(puppet.replies) == 1


@websocket
async def test_second_tab_follows_the_reply_and_stops_it(
    chat: Chat, app: str, browser: Browser, server: wsserver.Server, puppet: Puppet
) -> None:
    await chat.say("Count")
    model = (await puppet.reply()).say("one ")
    page = await browser.new_page()
    await page.goto(server.page + "healthz")
    second = await Chat(page, app, WEBSOCKET).start(messages=[QUESTION])
    await expect(second.items).to_have_text(["Count", "one "])
    model.say("two ")
    for each in (chat, second):
        await expect(each.items).to_have_text(["Count", "one two "])
    await second.button("Stop").click()
    await closed(model.closed)
    for each in (chat, second):
        await each.ready()
        await expect(each.items).to_have_text(["Count", "one two "])
    await page.close()


@websocket
async def test_chats_share_one_socket(chat: Chat, server: wsserver.Server, puppet: Puppet) -> None:
    await chat.page.evaluate("start({ id: 'another-chat-of-the-test', transport: 'websocket' })")
    boxes, buttons = chat.page.get_by_label("Your message"), chat.button("Send")
    for number in range(2):
        await boxes.nth(number).fill(f"prompt {number}")
        await buttons.first.click()
        (await puppet.reply(number)).say(f"begin {number}")
        await expect(chat.items.nth(2 * number + 1)).to_have_text(f"begin {number}")
    for number in (1, 0):
        puppet.replies[number].say(", end").end()
        await expect(chat.items.nth(2 * number + 1)).to_have_text(f"begin {number}, end")
    assert len(sockets_of(server)) == 1


@pytest_asyncio.fixture(loop_scope="session")
async def site(server: wsserver.Server, tmp_path: Path) -> AsyncIterator[str]:
    async with example("ai-sdk", server, tmp_path) as address:
        yield address


async def test_example_keeps_its_chat_over_a_reload(
    bare_page: Page, puppet: Puppet, site: str
) -> None:
    await bare_page.goto(site)
    chat = Chat(bare_page, "", WEBSOCKET)
    await chat.say("first")
    (await puppet.reply()).say("one").end()
    await chat.ready()
    await chat.say("second")
    model = (await puppet.reply(1)).say("two ")
    await expect(chat.items).to_have_text(["first", "one", "second", "two "])
    await bare_page.reload()
    await expect(chat.items).to_have_text(["first", "one", "second", "two "])
    model.say("three").end()
    await chat.ready()
    await expect(chat.items).to_have_text(["first", "one", "second", "two three"])
    await bare_page.reload()
    await expect(chat.items).to_have_text(["first", "one", "second", "two three"])
    await chat.button("Again").click()
    (await puppet.reply(2)).say("again").end()
    await expect(chat.items).to_have_text(["first", "one", "second", "again"])
    await chat.ready()


async def test_lines_of_the_document_chat(
    bare_page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    document = (ROOT / "examples/http.md").read_text()
    (lines,) = re.findall(r"```jsx\n(.*?)```", document, re.DOTALL)
    lines = lines.replace("'./ai-sdk.js'", "'./wsserver/web/ai-sdk.js'")
    lines = lines.replace("wss://chat.example.com/ws", f"{server.url}ws")
    loading, using = lines.split("const initial")
    waiting, using = using.split("\n", 1)
    script = bundle(f"""
        import {{ useEffect }} from 'react'
        import {{ createRoot }} from 'react-dom/client'
        import {{ useChat }} from '@ai-sdk/react'
        {loading}
        const id = '{CHAT}'
        function App({{ initial }}) {{
            {using}
            useEffect(() => {{ sendMessage({{ text: 'Hello' }}) }}, [])
            return messages.flatMap((message) => message.parts.map((part) => part.text))
        }}
        const start = async () => {{
            const initial{waiting}
            createRoot(document.body).render(<App initial={{initial}} />)
        }}
        start()
    """)
    await bare_page.add_script_tag(content=script)
    (await puppet.reply()).say("Hi there").end()
    await expect(bare_page.locator("body")).to_contain_text("HelloHi there")
