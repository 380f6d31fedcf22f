"""The page while connections are lost and servers restart."""

import json
import re
import signal
from pathlib import Path

import pytest
from playwright.async_api import Page, WebSocketRoute, expect

import wsserver
from tests.browser.page import (
    LONGEST_PAUSE,
    alert,
    ask,
    box,
    closed,
    converse,
    cut,
    dismiss,
    idle,
    note,
    reply,
    state,
    stop_clock,
    text,
    visit,
)
from tests.support.client import client
from tests.support.ports import free_port
from tests.support.process import Process, run
from tests.support.puppet import Puppet, Thinking
from tests.support.tools import ROOT

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


async def test_reply_continues_after_lost_connection(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = (await puppet.reply()).say(Thinking("Hm. "), "one ", "two ")
    await expect(text(timed)).to_have_text("one two")
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await expect(note(timed)).to_contain_text("The connection was lost.")
    await expect(text(timed)).to_have_text("one two")
    model.say(Thinking("Well. "), "three ")  # no client is connected
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(state(timed)).to_have_text("Connected")
    await expect(text(timed)).to_have_text("one two three")
    await expect(note(timed)).to_be_empty()
    model.say("four").end()
    await idle(timed)
    await expect(text(timed)).to_have_text("one two three four")
    await expect(reply(timed).locator("details p")).to_have_text("Hm. Well.")
    await expect(timed.locator("article")).to_have_count(1)
    assert len(puppet.replies) == 1

    await ask(timed, "And on")  # in the same conversation over another socket
    (await puppet.reply(1)).end()
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["Count", "one two three four", "And on"]


async def test_reply_ended_while_offline_is_shown_whole(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    cut(server)
    model.say("two").end()
    await idle(page)
    await expect(text(page)).to_have_text("one two")
    await expect(note(page)).to_be_empty()
    await expect(page.locator("article")).to_have_count(1)
    assert len(puppet.replies) == 1


async def test_page_reconnects_when_network_is_back(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    await page.context.set_offline(True)
    cut(server)
    await expect(state(page)).to_have_text(re.compile(r"trying again…|Connecting…"))
    await expect(note(page)).to_contain_text("The connection was lost.")
    model.say("two ")
    await page.context.set_offline(False)
    await expect(text(page)).to_have_text("one two")
    model.end()
    await idle(page)
    await expect(note(page)).to_be_empty()


async def test_turns_of_other_tabs_appear_after_reconnect(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First")
    conversation = timed.url.partition("#")[2]
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    async with client(server) as other:
        start = await other.prompt("Second", conversation=conversation)
        (await puppet.reply(1)).say("Meanwhile").end()
        await other.text(start["id"])
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(timed.locator(".you p")).to_have_text(["First", "Second"])
    await expect(timed.locator(".text")).to_have_text(["Reply", "Meanwhile"])


async def test_conversation_deleted_while_offline_stays_visible_with_note(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await converse(timed, puppet, "First")
    conversation = timed.url.partition("#")[2]
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    async with client(server) as other:
        await other.send({"type": "delete", "conversation": conversation})
        await other.next("deleted")
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await timed.clock.resume()
    await expect(alert(timed)).to_contain_text("no longer has this conversation")
    await expect(text(timed)).to_have_text("Reply")
    await converse(timed, puppet, "Second", "Afresh")
    assert [message.content for message in puppet.replies[1].request.messages] == ["Second"]
    await expect(alert(timed)).to_be_hidden()


async def test_stop_without_connection_is_sent_on_reconnect(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = await puppet.reply()
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await timed.keyboard.press("Escape")
    await timed.clock.resume()
    await expect(note(timed)).to_have_text("Stopped.")
    await idle(timed)
    await timed.clock.fast_forward(LONGEST_PAUSE)
    await closed(model.closed)


async def test_prompt_without_connection_is_sent_on_reconnect(
    blank: Page,
) -> None:
    await blank.add_init_script("Math.random = () => 0")  # without pauses
    async with wsserver.serve(Puppet(), port=0) as first:
        port = first.port
        await visit(blank, first)
    await ask(blank, "Hello")
    await expect(note(blank)).to_have_text("Not sent yet.")
    model = Puppet()
    async with wsserver.serve(model, port=port):
        (await model.reply()).say("Back").end()
        await expect(text(blank)).to_have_text("Back")
        await expect(note(blank)).to_be_empty()


async def test_final_close_code_does_not_reconnect(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = await puppet.reply()
    dismiss(server, 1008, "too many unusable frames")
    await expect(state(page)).to_have_text(
        "The server closed the connection: too many unusable frames. "
        "Reload the page to connect again."
    )
    await expect(note(page)).to_contain_text("The connection was closed")
    await expect(box(page)).to_be_disabled()
    model.end()


async def test_server_shutdown_is_shown(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    await server.close()
    await expect(note(page)).to_have_text("Stopped, because the server shut down.")
    await expect(text(page)).to_have_text("one")
    await expect(state(page)).to_have_text(re.compile(r"trying again…|Connecting…"))


async def test_reply_is_marked_interrupted_after_server_crash(blank: Page, tmp_path: Path) -> None:
    port = free_port()
    store = f"sqlite:///{tmp_path / 'chat.sqlite'}"
    where = ("--port", str(port), "--store", store)
    serve = ("-m", "wsserver", "serve", *where, "--demo-rate", "20")

    async def started(process: Process) -> str:
        return (await process.line(r"http://\S+"))[0].rstrip("/")

    async with run(*serve, PYTHONPATH=str(ROOT)) as process:
        await blank.goto(await started(process))
        await ask(blank, "Hello")
        await expect(text(blank)).to_contain_text("from your own")
        process.signal(signal.SIGKILL)
        await process.end()
    await expect(note(blank)).to_contain_text("The connection was lost.")
    before = await text(blank).inner_text()
    async with run(*serve, PYTHONPATH=str(ROOT)) as process:
        await started(process)
        await expect(note(blank)).not_to_contain_text("The connection was lost.")
        await expect(blank.get_by_role("button", name="Retry")).to_be_visible()
        assert (await text(blank).inner_text()).startswith(before[:50])
        await ask(blank, "What did I just say?")
        await expect(text(blank)).to_contain_text("You said: “Hello”")
        await idle(blank)
        await blank.reload()
        await expect(text(blank)).to_contain_text("You said: “Hello”")
        first = blank.locator(".reply").first
        await expect(first.locator(".note")).to_have_text(
            "The server crashed during the reply. Try again."
        )


async def test_text_after_gap_is_replaced_by_text_of_server(
    blank: Page, server: wsserver.Server
) -> None:
    """A scripted server sends three pieces, crashes, and has two of them after its restart."""
    connections = 0

    async def script(socket: WebSocketRoute) -> None:
        nonlocal connections
        connections += 1
        socket.send(json.dumps({"type": "hello", "protocol": "wsserver.v1", "limits": {}}))

        def answer(message: str | bytes) -> None:
            frame = json.loads(message)
            kind, request = frame["type"], {"request": frame.get("request")}
            about = {"id": frame.get("id"), "model": "m"}
            if kind == "list":
                socket.send(json.dumps({"type": "conversations", "items": [], **request}))
            elif kind == "ping":
                socket.send(json.dumps({"type": "pong", **request}))
            elif kind == "prompt":
                socket.send(json.dumps({"type": "start", **about, **request}))
                for seq, word in enumerate(("one ", "two ", "three"), 1):
                    token = {"type": "token", "id": frame["id"], "seq": seq, "text": word}
                    socket.send(json.dumps(token))
            elif kind == "resume" and frame["after"]:
                error = {"type": "error", "code": "gap", "message": "Less.", "retryable": False}
                socket.send(json.dumps({**error, **request}))
            elif kind == "resume":
                socket.send(json.dumps({"type": "start", **about, **request}))
                token = {"type": "token", "id": frame["id"], "seq": 2, "text": "one two "}
                socket.send(json.dumps(token))
                error = {"type": "error", "code": "interrupted", "message": "The server died."}
                socket.send(json.dumps({**error, "id": frame["id"], "seq": 2, "retryable": True}))

        socket.on_message(answer)
        sockets.append(socket)

    sockets: list[WebSocketRoute] = []
    await blank.route_web_socket(re.compile("/ws$"), script)
    await visit(blank, server)
    await ask(blank, "Count")
    await expect(text(blank)).to_have_text("one two three")
    await sockets[0].close(code=1011)
    await expect(note(blank)).to_have_text("The server died.")
    await expect(text(blank)).to_have_text("one two")
    assert connections == 2
