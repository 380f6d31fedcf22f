"""The page of a server that sends what no honest server sends."""

import json
from typing import Any

import pytest
from playwright.async_api import Page, WebSocketRoute, expect

import wsserver
from tests.browser.page import alert, note, state, violations

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

CONVERSATION = "conversation-0123456789"
NAMES = ["constructor", "__proto__", "toString"]  # of Object.prototype
HELLO = {"type": "hello", "protocol": "wsserver.v1", "models": ["one"], "limits": {}}
PROMPT = {"role": "user", "content": "Hi", "id": "first"}
REPLY = {"role": "assistant", "content": "Yes", "id": "first"}
START = {"type": "start", "id": "second", "conversation": CONVERSATION, "model": "one"}
DONE = {"type": "done", "id": "second", "seq": 0, "reason": "end_turn", "usage": {}}


def history(*messages: Any) -> dict[str, Any]:
    return {
        "type": "history",
        "conversation": CONVERSATION,
        "title": "Title",
        "messages": messages or [PROMPT, REPLY],
        "running": [],
    }


async def lie(page: Page, server: wsserver.Server, *frames: Any, hello: Any = HELLO) -> None:
    """Open a conversation whose server answers ``open`` with these frames."""

    def route(socket: WebSocketRoute) -> None:
        def answer(message: str | bytes) -> None:
            asked = json.loads(message)
            answers: dict[str, list[Any]] = {
                "ping": [{"type": "pong"}],
                "list": [{"type": "conversations", "items": []}],
                "open": list(frames),
            }
            for number, frame in enumerate(answers.get(asked["type"], [])):
                request = {} if number else {"request": asked.get("request")}
                socket.send(json.dumps({**frame, **request}))

        socket.on_message(answer)
        socket.send(json.dumps(hello))

    await page.route_web_socket("**/ws", route)
    await page.goto(f"{server.page}#{CONVERSATION}")


@pytest.mark.parametrize("name", NAMES)
async def test_names_of_object_prototype_are_words_like_others(
    blank: Page, server: wsserver.Server, name: str
) -> None:
    blocks = [{"type": name}, {"type": "image", "source": None}]
    saved = history({**PROMPT, "blocks": blocks}, {**REPLY, "partial": name})
    start = {**START, "prompt": "Now", "blocks": ["text", name]}
    stopped = {**DONE, "reason": "stopped", "by": name}
    await lie(blank, server, saved, start, stopped)
    words = name.replace("_", " ")
    attachments = blank.locator(".attachments")
    await expect(attachments.nth(0)).to_have_text(f"{words}Image", use_inner_text=False)
    await expect(attachments.nth(1)).to_contain_text(words)
    await expect(note(blank)).to_have_text("Stopped.")
    failure = f"The reply failed ({words}). Try again."
    await expect(blank.locator(".note").first).to_have_text(failure)
    exported = await blank.evaluate(
        "given => import('./export.js').then(({ toMarkdown }) => toMarkdown('Title', given))",
        saved["messages"],
    )
    assert f"*{words}*" in exported
    assert f"*{failure}*" in exported


@pytest.mark.parametrize(
    "frame",
    [
        history({**PROMPT, "blocks": [None]}),
        history({**PROMPT, "began": 1e300}),
        {**START, "prompt": "Now", "blocks": 5},
        {**DONE, "reason": 5},
        {**HELLO, "models": 5},
    ],
)
async def test_frame_that_violates_protocol_ends_connection_in_words(
    blank: Page, server: wsserver.Server, frame: Any
) -> None:
    await lie(blank, server, history(), frame)
    await expect(state(blank)).to_contain_text("the server violates the protocol")
    await expect(state(blank)).to_contain_text("Reload the page to connect again.")


async def test_long_words_of_server_fit_small_screen(blank: Page, server: wsserver.Server) -> None:
    word = "m" * 250
    document = {"type": "document", "title": word, "source": {"type": "url", "url": "https://a.b"}}
    thinking = {"type": "thinking", "thinking": word}
    saved = history(
        {**PROMPT, "content": word, "blocks": [{"type": "text", "text": word}, document]},
        {**REPLY, "content": word, "blocks": [thinking], "model": word, "partial": word},
    )
    refusal = {"type": "error", "code": "internal", "message": word, "ref": word}
    await blank.set_viewport_size({"width": 320, "height": 640})
    await lie(blank, server, {**saved, "title": word}, refusal, hello={**HELLO, "models": [word]})
    await expect(alert(blank)).to_have_text(word)
    await expect(alert(blank)).to_have_attribute("tabindex", "0")
    assert await alert(blank).evaluate("(words) => words.offsetHeight") <= 640 / 5
    assert await violations(blank) == []
    await blank.locator("details").evaluate("(details) => { details.open = true }")
    await expect(blank.locator("details p")).to_be_visible()
    wide = """[...document.querySelectorAll('main *')].filter((element) =>
        element.getBoundingClientRect().right > innerWidth).map(({ className }) => className)"""
    assert await blank.evaluate(wide) == []
