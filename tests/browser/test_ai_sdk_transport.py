"""`ai-sdk.js` on the server's page, whose content security policy is strict."""

import json
import random
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page, WebSocketRoute

import wsserver
from tests.browser.page import cut
from tests.support.pieces import Thinking
from tests.support.proxy import Cut, Proxy
from tests.support.puppet import Puppet
from wsserver import Code, ModelError
from wsserver.content import Text, ToolUse, dump_block
from wsserver.models.base import Output

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

CHAT = "a chat, whose id is no id of ours"

# ask(request): begin a reply and collect its parts. finished(): return them, and the error.
SCRIPT = """async (url) => {
  const { ChatTransport } = await import('/ai-sdk.js')
  const pauses = { firstPause: 1, longestPause: 20 }
  globalThis.transport = new ChatTransport(url, { body: { max_tokens: 7 }, ...pauses })
  async function collect(stream) {
    const parts = globalThis.parts = []
    const reader = stream.getReader()
    try {
      for (let next; !(next = await reader.read()).done;) parts.push(next.value)
      return { parts }
    } catch ({ name, code, message }) {
      return { parts, error: { name, code, message } }
    }
  }
  globalThis.ask = async (request) => {
    globalThis.controller = new AbortController()
    const given = { trigger: 'submit-message', ...request, abortSignal: controller.signal }
    globalThis.reply = collect(await transport.sendMessages(given))
  }
  globalThis.reconnect = async (chatId) => {
    const stream = await transport.reconnectToStream({ chatId })
    if (stream) globalThis.reply = collect(stream)
    return stream !== null
  }
}"""


class Asker:
    """Calls of the transport."""

    def __init__(self, page: Page, puppet: Puppet) -> None:
        self.page = page
        self._puppet = puppet

    async def ask(self, *messages: dict[str, Any], **keys: object) -> None:
        request = {"chatId": CHAT, "messages": list(messages), **keys}
        await self.page.evaluate("request => void ask(request)", request)

    async def reply(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.page.evaluate("reply")
        return found

    async def says(self, text: str) -> None:
        """Wait until the text of the reply is one."""
        await self.page.wait_for_function(
            "text => parts.map(({ type, delta }) => type === 'text-delta' ? delta : '').join('')"
            " === text",
            arg=text,
        )

    async def say(
        self, said: str, *messages: dict[str, Any], **keys: object
    ) -> tuple[list[str], dict[str, Any]]:
        """Make a request that the model answers. Return what the model got, and the message."""
        number = len(self._puppet.replies)
        await self.ask(*messages, **keys)
        model = await self._puppet.reply(number)
        model.say(said).end()
        parts = (await self.reply())["parts"]
        message = {**text("assistant", said), "id": parts[0]["messageId"]}
        return [message.text for message in model.request.messages], message


def text(role: str, said: str) -> dict[str, Any]:
    return {"id": said, "role": role, "parts": [{"type": "text", "text": said}]}


@pytest_asyncio.fixture(loop_scope="session")
async def asker(blank: Page, server: wsserver.Server, puppet: Puppet) -> Asker:
    await blank.goto(server.page)
    await blank.evaluate(SCRIPT, "/ws")
    return Asker(blank, puppet)


PAGE = {"type": "web_search_result_location", "url": "https://example.com/a", "title": "A"}
PAPER = {"type": "page_location", "document_index": 0, "document_title": None}
CITED = Text("It rains.", {"citations": [PAGE, PAPER, {**PAGE, "cited_text": "rain"}]})


async def test_parts_are_those_of_the_dialect_over_http(asker: Asker, puppet: Puppet) -> None:
    said: list[Output] = [Thinking("hm"), CITED, ToolUse("tool-1", "look", {}), "Bye", "."]
    await asker.ask(text("user", "Weather?"))
    (await puppet.reply()).say(*said).end()
    mine = (await asker.reply())["parts"]
    assert puppet.replies[0].request.max_tokens == 7
    body = {"id": "a-chat-of-this-test-2", "messages": [text("user", "Weather?")]}
    await asker.page.evaluate(
        """(body) => {
          const headers = { 'Content-Type': 'application/json' }
          const given = { method: 'POST', headers, body: JSON.stringify(body) }
          globalThis.response = (async () => (await fetch('/api/chat', given)).text())()
        }""",
        body,
    )
    (await puppet.reply(1)).say(*said).end()
    lines = (await asker.page.evaluate("response")).split("\n\n")
    theirs = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for parts in (mine, theirs):
        start = parts.pop(0)
        assert (start["type"], start["messageMetadata"]["model"]) == ("start", "puppet")
    assert merged(mine) == merged(theirs)


def merged(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parts with consecutive deltas merged."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if "delta" in part and "delta" in found[-1]:
            found[-1] = {**part, "delta": found[-1]["delta"] + part["delta"]}
        else:
            found.append(part)
    return found


async def test_stop_ends_the_stream_once_the_model_is_closed(asker: Asker, puppet: Puppet) -> None:
    await asker.ask(text("user", "Count"))
    model = (await puppet.reply()).say("one")
    await asker.says("one")
    await asker.page.evaluate("controller.abort()")
    parts = (await asker.reply())["parts"]
    assert model.closed.is_set()
    assert parts[-1] == {"type": "abort", "reason": "client"}
    assert parts[-2]["messageMetadata"]["reason"] == "stopped"


async def test_error_has_code_and_comes_after_all_text(asker: Asker, puppet: Puppet) -> None:
    await asker.ask(text("user", "Count"))
    (await puppet.reply()).say("one").fail(ModelError(Code.OVERLOADED))
    reply = await asker.reply()
    assert reply["error"]["name"] == "ReplyError"
    assert reply["error"]["code"] == "overloaded"
    assert [part["type"] for part in reply["parts"][-2:]] == ["text-end", "message-metadata"]
    await asker.ask(text("user", "x" * 40_000))
    reply = await asker.reply()
    assert (reply["parts"], reply["error"]["code"]) == ([], "too_long")


async def test_reconnect_in_the_same_turn_is_no_stop(asker: Asker, puppet: Puppet) -> None:
    await asker.ask(text("user", "Count"))
    model = (await puppet.reply()).say("one ")
    await asker.says("one ")
    assert await asker.page.evaluate("id => { controller.abort(); return reconnect(id) }", CHAT)
    model.say("two").end()
    await asker.says("one two")
    assert (await asker.reply())["parts"][-1]["finishReason"] == "stop"
    assert not await asker.page.evaluate("reconnect", CHAT)


async def test_history_has_the_turn_that_runs(
    asker: Asker, server: wsserver.Server, puppet: Puppet
) -> None:
    image = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,aGk="}
    url = "data:text/markdown;base64,IyBIacO2"
    file = {"type": "file", "mediaType": "text/markdown", "filename": "a.md", "url": url}
    first = {**text("user", "What?"), "parts": [text("user", "What?")["parts"][0], image, file]}
    await asker.ask(first)
    (await puppet.reply()).say(Thinking("hm"), CITED).end()
    one = (await asker.reply())["parts"][0]["messageId"]
    _, _, document = puppet.replies[0].request.messages[0].blocks
    source = {"type": "text", "media_type": "text/plain", "data": "# Hiö"}
    assert dump_block(document) == {"type": "document", "source": source, "title": "a.md"}
    await asker.ask(first, {**text("assistant", "It rains."), "id": one}, text("user", "And?"))
    (await puppet.reply(1)).say("two")
    await asker.says("two")
    cut(server)
    question, answer, prompt = await asker.page.evaluate("id => transport.history(id)", CHAT)
    assert [part["type"] for part in question["parts"]] == ["text", "file", "file"]
    assert question["parts"][1]["url"] == image["url"]
    assert question["parts"][2]["url"] == url.replace("markdown", "plain")
    assert answer["id"] == one
    kinds = ["reasoning", "text", "source-url", "source-document", "source-url"]
    assert [part["type"] for part in answer["parts"]] == kinds
    assert answer["metadata"]["usage"]
    assert (prompt["role"], prompt["parts"][0]["text"]) == ("user", "And?")
    assert await asker.page.evaluate("transport.history('another chat')") == []
    puppet.replies[1].end()
    await asker.reply()
    assert await asker.page.evaluate("reconnect", CHAT), "it ended after the history"
    await asker.says("two")
    await asker.reply()
    assert not await asker.page.evaluate("reconnect", CHAT)


async def test_history_leaves_out_files_without_a_source(asker: Asker) -> None:
    def lie(route: WebSocketRoute) -> None:
        blocks = [{"type": "image", "source": None}, {"type": "text", "text": "Hi"}]
        prompt = {"role": "user", "content": "Hi", "id": "first", "blocks": blocks}

        def answer(message: str | bytes) -> None:
            request = json.loads(message).get("request")
            history = {"type": "history", "request": request, "messages": [prompt], "running": []}
            route.send(json.dumps({**history, "conversation": "conversation-0123456789"}))

        route.on_message(answer)
        route.send(json.dumps({"type": "hello", "protocol": "wsserver.v1", "limits": {}}))

    await asker.page.route_web_socket("**/ws", lie)
    found = await asker.page.evaluate("id => transport.history(id)", "conversation-0123456789")
    assert [part["type"] for part in found[0]["parts"]] == ["text"]


async def test_edits_replace_the_last_turn_or_send_all_messages(asker: Asker) -> None:
    first, second, third = (text("user", each) for each in "123")
    _, one = await asker.say("one", first)
    _, two = await asker.say("two", first, one, second)
    got, two = await asker.say("zwei", first, one, second, messageId=second["id"])
    assert got == ["1", "one", "2"]
    got, three = await asker.say("three", first, one, second, two, third)
    assert got == ["1", "one", "2", "zwei", "3"]
    edited = text("user", "2!")
    got, again = await asker.say("deux", first, one, edited, messageId=second["id"])
    assert got == ["1", "one", "2!"]
    got, _ = await asker.say("trois", first, one, edited, again, text("user", "3!"))
    assert got == ["1", "one", "2!", "deux", "3!"]
    got, _ = await asker.say("four", first, one, second, two, third, three, text("user", "4"))
    assert got == ["1", "one", "2", "zwei", "3", "three", "4"]
    got, _ = await asker.say("five", first, one, text("user", "5"))
    assert got == ["1", "one", "2", "zwei", "3", "three", "4", "four", "5"], (
        "a tab that misses turns"
    )


async def test_chat_that_the_server_does_not_know_is_answered_as_it_is(asker: Asker) -> None:
    history = [text("system", "Be brief."), text("user", "1"), text("assistant", "one")]
    got, _ = await asker.say("two", *history, text("user", "2"))
    assert got == ["1", "one", "2"]


async def test_reply_to_an_unknown_chat_survives_a_reload(
    asker: Asker, server: wsserver.Server, puppet: Puppet
) -> None:
    history = [text("user", "1"), text("assistant", "one"), text("user", "2")]
    await asker.ask(*history)
    model = (await puppet.reply()).say("tw")
    await asker.says("tw")
    await asker.page.goto(server.page)
    await asker.page.evaluate(SCRIPT, "/ws")
    assert await asker.page.evaluate("reconnect", CHAT)
    model.say("o").end()
    await asker.says("two")
    assert (await asker.reply())["parts"][-1]["finishReason"] == "stop"
    assert not await asker.page.evaluate("reconnect", CHAT)
    assert len(puppet.replies) == 1
    await asker.page.evaluate(
        "id => sessionStorage.setItem(`wsserver.${id}`, 'a'.repeat(16))", CHAT
    )
    await asker.ask(text("user", "1"))
    (await puppet.reply(1)).say("one")
    assert await asker.page.evaluate("reconnect", CHAT), "the id of a reply that was forgotten"
    await asker.says("one")


@pytest.mark.parametrize("seed", range(4))
async def test_text_is_exact_if_connections_are_cut_anywhere(
    bare_page: Page, server: wsserver.Server, puppet: Puppet, seed: int
) -> None:
    chance = random.Random(seed)
    cuts = [Cut(chance.randrange(1_500), reset=chance.random() < 0.5) for _ in range(8)]
    said = ""
    async with Proxy(server.port, *cuts) as proxy:
        await bare_page.evaluate(SCRIPT, proxy.url)
        asker = Asker(bare_page, puppet)
        await asker.ask(text("user", "Count"))
        model = await puppet.reply()
        for number in range(40):
            said += f"{number} "
            model.say(f"{number} ")
            if chance.random() < 0.3:
                await asker.says(said)
        model.end()
        await asker.says(said)
        parts = (await asker.reply())["parts"]
        assert proxy.cuts <= 6
    assert parts[-1]["finishReason"] == "stop"
    assert [part["type"] for part in parts].count("start") == 1
    assert len(puppet.replies) == 1
