"""The page at / and the ten-line client, in a real browser."""

import asyncio
import contextlib
import functools
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, WebSocketRoute, async_playwright, expect

import wsserver
from tests.support.puppet import BOUND, Puppet, Thinking
from tests.support.tools import ROOT, require_chromium
from wsserver import Code, End, ModelError

SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BEAT = 15_000  # milliseconds between the page's heartbeats, and its longest pause
MARKUP = "<b>bold</b> <img src=x onerror=alert(1)> <script>alert(2)</script> &amp; [a](b)"
TEN_LINES = ROOT / "examples/ten_lines.html"

# One event loop for all, so that one browser can serve all.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    expect.set_options(timeout=BOUND * 1000)
    yield
    expect.set_options(timeout=None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    path = require_chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def server(puppet: Puppet) -> AsyncIterator[wsserver.Server]:
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def blank(browser: Browser, server: wsserver.Server) -> AsyncIterator[Page]:
    """An empty page; the test fails if it complains, as it does where the policy is violated."""
    page = await browser.new_page()
    page.set_default_timeout(BOUND * 1000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    yield page
    await page.close()
    # The browser itself reports a server that is away.
    assert [text for text in complaints if not text.startswith("WebSocket connection to")] == []


@pytest_asyncio.fixture(loop_scope="module")
async def page(blank: Page, server: wsserver.Server) -> Page:
    await visit(blank, server)
    return blank


@pytest_asyncio.fixture(loop_scope="module")
async def timed(blank: Page, server: wsserver.Server) -> Page:
    """The page with its clock in the test's hands, stopped."""
    await blank.add_init_script("""
        Object.assign(globalThis, { sockets: [], heard: [] });
        globalThis.WebSocket = class extends WebSocket {
            constructor(...given) {
                super(...given);
                sockets.push(this);
                this.addEventListener('message', ({ data }) => {
                    if (data.includes('pong')) heard.push(data);
                });
            }
        };
    """)
    await blank.clock.install()
    await visit(blank, server)
    await stop_clock(blank)
    return blank


async def visit(page: Page, server: wsserver.Server) -> None:
    await page.goto(server.page)
    await expect(state(page)).to_have_text("Connected")


async def stop_clock(page: Page) -> None:
    await page.clock.pause_at(await page.evaluate("Date.now() / 1000 + 1"))


def state(page: Page) -> Locator:
    return page.get_by_role("status")


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your message")


def button(page: Page) -> Locator:
    return page.get_by_role("button")


def reply(page: Page) -> Locator:
    return page.locator(".reply").last


def text(page: Page) -> Locator:
    return reply(page).locator(".text")


def note(page: Page) -> Locator:
    return reply(page).locator(".note")


async def ask(page: Page, prompt: str) -> None:
    await box(page).fill(prompt)
    await box(page).press("Enter")


def cut(server: wsserver.Server) -> None:
    """Break all connections, as a network does."""
    for socket in tuple(server._sockets):
        socket.abort()


async def closed(event: asyncio.Event) -> None:
    async with asyncio.timeout(BOUND):
        await event.wait()


# A conversation.


async def test_a_reply_appears_as_it_is_made(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await expect(button(page)).to_have_text("Stop")
    await expect(reply(page)).to_have_attribute("aria-busy", "true")
    model.say("three").end()
    await expect(text(page)).to_have_text("one two three")
    await expect(button(page)).to_have_text("Send")
    await expect(reply(page)).to_have_attribute("aria-busy", "false")
    await expect(note(page)).to_be_empty()
    assert model.request.prompt == "Count"


async def test_the_conversation_goes_on(page: Page, puppet: Puppet) -> None:
    await ask(page, "First")
    (await puppet.reply()).say("Reply").end()
    await expect(button(page)).to_have_text("Send")
    await ask(page, "Second")
    (await puppet.reply(1)).end()
    await expect(button(page)).to_have_text("Send")
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["First", "Reply", "Second"]
    await expect(page.get_by_role("log", name="Conversation")).to_contain_text("First")


async def test_stop_stops_the_model_and_the_next_prompt_works(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ", "two ")
    await expect(text(page)).to_have_text("one two")
    await button(page).click()
    await closed(model.closed)
    await expect(note(page)).to_have_text("Stopped.")
    await expect(text(page)).to_have_text("one two")
    await expect(button(page)).to_have_text("Send")
    await box(page).fill("Again")
    await button(page).click()
    (await puppet.reply(1)).say("whole").end()
    await expect(text(page)).to_have_text("whole")
    await expect(note(page)).to_be_empty()


async def test_escape_stops(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = await puppet.reply()
    await page.keyboard.press("Escape")
    await closed(model.closed)
    await expect(note(page)).to_have_text("Stopped.")


async def test_a_double_click_on_send_does_not_stop(page: Page, puppet: Puppet) -> None:
    await box(page).fill("Count")
    await button(page).dblclick()
    (await puppet.reply()).say("one").end()
    await expect(text(page)).to_have_text("one")
    await expect(button(page)).to_have_text("Send")
    await expect(note(page)).to_be_empty()


async def test_shift_enter_breaks_the_line(page: Page, puppet: Puppet) -> None:
    await box(page).fill("one")
    await box(page).press("Shift+Enter")
    await box(page).press_sequentially("two")
    await box(page).press("Enter")
    model = await puppet.reply()
    model.end()
    assert model.request.prompt == "one\ntwo"
    await expect(box(page)).to_have_value("")


async def test_enter_sends_neither_blanks_nor_while_a_reply_streams(
    page: Page, puppet: Puppet
) -> None:
    await ask(page, " \n ")
    await ask(page, "Count")
    model = (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    await ask(page, "Draft")
    await expect(box(page)).to_have_value("Draft")
    model.end()
    await expect(button(page)).to_have_text("Send")
    await box(page).press("Enter")
    (await puppet.reply(1)).end()
    assert [model.request.prompt for model in puppet.replies] == ["Count", "Draft"]


async def test_thinking_is_folded_away(page: Page, puppet: Puppet) -> None:
    await ask(page, "Think")
    model = (await puppet.reply()).say(Thinking("Let me "), Thinking("see."))
    thinking = reply(page).locator("details p")
    await expect(thinking).to_have_text("Let me see.")
    await expect(thinking).not_to_be_visible()
    await page.get_by_text("Thinking").click()
    await expect(thinking).to_be_visible()
    model.say("Seen.").end()
    await expect(text(page)).to_have_text("Seen.")
    await ask(page, "Do not think")
    (await puppet.reply(1)).say("Done.").end()
    await expect(text(page)).to_have_text("Done.")
    await expect(reply(page).locator("details")).not_to_be_visible()


async def test_markup_stays_text(page: Page, puppet: Puppet) -> None:
    await ask(page, MARKUP)
    model = (await puppet.reply()).say(Thinking(MARKUP), MARKUP)
    model.fail(ModelError(Code.REFUSAL, MARKUP))
    await expect(note(page)).to_have_text(MARKUP)
    await expect(text(page)).to_have_text(MARKUP)
    await expect(reply(page).locator("details p")).to_have_text(MARKUP)
    await expect(page.locator(".you .text")).to_have_text(MARKUP)
    await expect(page.get_by_role("log").locator("b, img, script, a")).to_have_count(0)


# What goes wrong.


async def test_a_failed_reply_keeps_its_text_and_says_why(page: Page, puppet: Puppet) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("Half an")
    model.fail(ModelError(Code.OVERLOADED, "It is busy.", retry_after=2.5))
    await expect(note(page)).to_have_text("It is busy. Try again in 3 s.")
    await expect(text(page)).to_have_text("Half an")
    await expect(button(page)).to_have_text("Send")


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("end_turn", ""),
        ("max_tokens", "Cut short, as it reached the longest length allowed."),
        ("pause_turn", "Ended early: pause turn."),
    ],
)
async def test_an_early_end_is_noted(page: Page, puppet: Puppet, reason: str, says: str) -> None:
    await ask(page, "Count")
    (await puppet.reply()).say("one", End(reason)).end()
    await expect(button(page)).to_have_text("Send")
    await expect(note(page)).to_have_text(says)


async def test_what_the_server_refuses_goes_back_into_the_box(page: Page, puppet: Puppet) -> None:
    long = "x" * 40_000  # over the prompt_size
    await ask(page, long)
    await expect(note(page)).to_contain_text("The prompt has 40000 bytes; 32768 are allowed.")
    await expect(box(page)).to_have_value(long)
    await expect(button(page)).to_have_text("Send")
    assert puppet.replies == []


async def test_what_the_server_hangs_up_on_is_not_sent_again(page: Page, puppet: Puppet) -> None:
    long = "x" * 70_000  # over the message_size
    await ask(page, long)
    await expect(note(page)).to_have_text("This is too long for the server.")
    await expect(box(page)).to_have_value(long)
    await expect(state(page)).to_have_text("Connected")
    await ask(page, "Short")
    (await puppet.reply()).say("Fine").end()
    await expect(text(page)).to_have_text("Fine")


# The connection.


async def test_a_reply_goes_on_after_a_lost_connection(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await timed.clock.resume()
    await ask(timed, "Count")
    model = (await puppet.reply()).say(Thinking("Hm. "), "one ", "two ")
    await expect(text(timed)).to_have_text("one two")
    await stop_clock(timed)
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await expect(note(timed)).to_contain_text("Cut off, as the connection was lost.")
    await expect(text(timed)).to_have_text("one two")
    model.say(Thinking("Well. "), "three ")  # said to nobody
    await timed.clock.fast_forward(BEAT)
    await timed.clock.resume()
    await expect(state(timed)).to_have_text("Connected")
    await expect(text(timed)).to_have_text("one two three")
    await expect(note(timed)).to_be_empty()
    model.say("four").end()
    await expect(button(timed)).to_have_text("Send")
    await expect(text(timed)).to_have_text("one two three four")
    await expect(reply(timed).locator("details p")).to_have_text("Hm. Well.")
    await expect(timed.locator("article")).to_have_count(2)
    assert len(puppet.replies) == 1

    await ask(timed, "And on")  # in the same conversation, though over another socket
    (await puppet.reply(1)).end()
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["Count", "one two three four", "And on"]


async def test_a_reply_that_ended_meanwhile_is_shown_whole(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "Count")
    model = (await puppet.reply()).say("one ")
    await expect(text(page)).to_have_text("one")
    cut(server)
    model.say("two").end()
    await expect(button(page)).to_have_text("Send")
    await expect(text(page)).to_have_text("one two")
    await expect(note(page)).to_be_empty()
    assert len(puppet.replies) == 1


async def test_the_conversation_goes_on_over_another_socket(
    page: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(page, "First")
    (await puppet.reply()).say("Reply").end()
    await expect(button(page)).to_have_text("Send")
    cut(server)
    await ask(page, "Second")
    (await puppet.reply(1)).say("Another").end()
    await expect(text(page)).to_have_text("Another")
    said = [message.content for message in puppet.replies[1].request.messages]
    assert said == ["First", "Reply", "Second"]


async def test_stop_works_without_a_connection(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(timed, "Count")
    model = await puppet.reply()
    cut(server)
    await expect(state(timed)).to_have_text("Not connected, trying again…")
    await timed.keyboard.press("Escape")
    await expect(note(timed)).to_have_text("Stopped.")
    await expect(button(timed)).to_have_text("Send")
    assert not model.closed.is_set()
    await timed.clock.fast_forward(BEAT)
    await closed(model.closed)


async def test_a_prompt_written_while_the_server_is_away_is_sent_once_it_is_back(
    blank: Page,
) -> None:
    await blank.add_init_script("Math.random = () => 0")  # no pauses
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


async def test_pauses_between_attempts_grow_up_to_a_limit(blank: Page) -> None:
    await blank.add_init_script("""
        Math.random = () => 1;
        const pauses = [], setTimer = setTimeout;
        globalThis.seven = new Promise((resolve) => {
            globalThis.setTimeout = (call, pause) => {
                if (pauses.push(pause) === 7) resolve(pauses);
                else setTimer(call);
            };
        });
    """)
    async with wsserver.serve(Puppet(), port=0) as away:
        await visit(blank, away)
    assert await blank.evaluate("seven") == [500, 1000, 2000, 4000, 8000, 15_000, 15_000]


async def test_a_silent_connection_is_given_up(blank: Page, server: wsserver.Server) -> None:
    heard: list[list[str]] = []

    def swallow(route: WebSocketRoute) -> None:
        messages: list[str] = []
        heard.append(messages)
        route.on_message(lambda message: messages.append(json.loads(message)["type"]))

    await blank.route_web_socket(re.compile("/ws$"), swallow)
    await blank.clock.install()
    await visit(blank, server)
    await stop_clock(blank)
    await blank.clock.fast_forward(BEAT)
    await expect(state(blank)).to_have_text("Connected")
    await blank.clock.fast_forward(BEAT)
    await expect(state(blank)).to_have_text("Not connected, trying again…")
    await blank.clock.fast_forward(BEAT)
    await expect(state(blank)).to_have_text("Connected")
    assert [types.count("ping") for types in heard] == [1, 0]


async def test_heartbeats_keep_a_working_connection(timed: Page) -> None:
    for beat in range(4):
        await timed.clock.fast_forward(BEAT)
        await timed.evaluate(
            """before => heard.length > before || new Promise((resolve) =>
                sockets[0].addEventListener('message', () => resolve()))""",
            beat,
        )
    assert await timed.evaluate("heard") == ['{"type":"pong"}'] * 4
    assert await timed.evaluate("sockets.length") == 1


async def test_a_page_that_is_turned_away_does_not_come_back(
    timed: Page, server: wsserver.Server, puppet: Puppet
) -> None:
    await ask(timed, "Count")
    model = await puppet.reply()
    for socket in tuple(server._sockets):
        await socket.close(1008, "too many unusable frames")
    await expect(state(timed)).to_have_text(
        "The server closed the connection: too many unusable frames. "
        "Reload the page to connect again."
    )
    await expect(note(timed)).to_have_text("The connection was closed.")
    await expect(box(timed)).to_be_disabled()
    await timed.clock.fast_forward(BEAT)
    await timed.clock.fast_forward(BEAT)
    assert await timed.evaluate("sockets.length") == 1
    model.end()


async def test_a_shutdown_is_told(page: Page, server: wsserver.Server, puppet: Puppet) -> None:
    await ask(page, "Count")
    (await puppet.reply()).say("one")
    await expect(text(page)).to_have_text("one")
    await server.close()
    await expect(note(page)).to_have_text("Stopped, as the server shut down.")
    await expect(text(page)).to_have_text("one")
    await expect(state(page)).to_have_text("Not connected, trying again…")


# How it looks and what it may do.


async def test_the_policy_stops_what_is_not_the_page_s_own(
    browser: Browser, server: wsserver.Server
) -> None:
    page = await browser.new_page()
    await visit(page, server)
    violated = await page.evaluate("""() => new Promise((resolve) => {
        const violated = [];
        addEventListener('securitypolicyviolation', (event) => {
            violated.push(event.effectiveDirective);
            if (violated.length === 4) resolve(violated.sort());
        });
        const add = (name, values) => document.body.append(
            Object.assign(document.createElement(name), values));
        add('script', { textContent: 'document.title = "Taken over"' });
        add('style', { textContent: 'body { display: none }' });
        add('img', { src: 'https://example.invalid/' });
        new WebSocket('wss://example.invalid/').onerror = () => {};
    })""")
    assert violated == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
    await expect(page).to_have_title("wsserver")
    await page.close()


async def test_it_fits_a_phone(page: Page, puppet: Puppet) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    await ask(page, "x" * 300)
    (await puppet.reply()).say(Thinking("y" * 300), "z" * 300).end()
    await page.get_by_text("Thinking").click()
    await expect(button(page)).to_have_text("Send")
    assert await page.evaluate("document.documentElement.scrollWidth") == 390
    await expect(button(page)).to_be_in_viewport(ratio=1)


async def test_it_follows_dark_mode(page: Page) -> None:
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(colour)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(colour) != light


async def test_it_follows_the_text_unless_the_reader_has_scrolled_away(
    page: Page, puppet: Puppet
) -> None:
    await page.set_viewport_size({"width": 390, "height": 400})
    await ask(page, "Count")
    model = (await puppet.reply()).say("line\n" * 100)
    await expect(text(page)).to_contain_text("line")
    below = "document.documentElement.scrollHeight - innerHeight - scrollY"
    assert await page.evaluate(below) < 2
    assert await page.evaluate("scrollY") > 1000
    await page.evaluate("scrollTo(0, 100)")
    model.say("more\n" * 100, "end").end()
    await expect(text(page)).to_contain_text("end")
    await expect(button(page)).to_have_text("Send")
    assert await page.evaluate("scrollY") == 100


# The ten-line client.


@contextlib.contextmanager
def website(folder: Path) -> Iterator[int]:
    """Serve files as `python -m http.server` does, and give the port."""
    handler = functools.partial(SilentFiles, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site.server_address[1]
        site.shutdown()
        thread.join()


class SilentFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest_asyncio.fixture(loop_scope="module")
async def ten_lines(blank: Page, server: wsserver.Server, tmp_path: Path) -> AsyncIterator[Page]:
    """It, from a web server of its own, with the port of the test's server."""
    source = TEN_LINES.read_text()
    assert source.count("ws://localhost:3001") == 1
    copy = tmp_path / "ten_lines.html"
    copy.write_text(source.replace("ws://localhost:3001", server.url.rstrip("/")))
    (tmp_path / "favicon.ico").touch()
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/ten_lines.html")
        await blank.wait_for_function("ws.readyState === WebSocket.OPEN")
        yield blank


async def test_ten_lines_are_a_client(ten_lines: Page, puppet: Puppet) -> None:
    output = ten_lines.locator("pre")
    await ten_lines.get_by_label("Prompt").fill("Count")
    await ten_lines.get_by_role("button", name="Send").click()
    model = (await puppet.reply()).say("one ", "two ")
    await expect(output).to_have_text("one two")
    await ten_lines.get_by_role("button", name="Stop").click()
    await closed(model.closed)
    await expect(output).to_have_text("one two [stopped]")
    await ten_lines.get_by_role("button", name="Send").click()
    (await puppet.reply(1)).say(MARKUP).end()
    await expect(output).to_have_text(f"one two [stopped] {MARKUP} [end_turn]")
    await ten_lines.get_by_role("button", name="Stop").click()
    await expect(output).to_contain_text("nothing (of that `id`) to stop")


HIJACK = """<script>
const ws = new WebSocket('%s');
ws.onopen = () => { document.title = 'open'; ws.send('{"type":"list"}'); };
ws.onmessage = ({ data }) => { document.title = data; };
ws.onclose = ({ code }) => { document.title = `closed ${code}`; };
</script>"""


@pytest.mark.parametrize(
    ("page_host", "server_host", "status"),
    [
        ("evil.test", "localhost", 403),  # a page elsewhere (cross-site hijacking)
        ("evil.test", "127.0.0.1", 403),
        ("evil.test", "evil.test", 421),  # a name that leads here (DNS rebinding)
    ],
)
async def test_a_page_elsewhere_cannot_use_the_server(
    server: wsserver.Server, tmp_path: Path, page_host: str, server_host: str, status: int
) -> None:
    """In a browser for which a foreign name leads to this machine."""
    (tmp_path / "index.html").write_text(HIJACK % f"ws://{server_host}:{server.port}/ws")
    (tmp_path / "favicon.ico").touch()
    rules = "MAP evil.test 127.0.0.1"
    args = [*SWITCHES, f"--host-resolver-rules={rules}", "--no-proxy-server"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=require_chromium(), args=args)
        page = await browser.new_page()
        with website(tmp_path) as port:
            await page.goto(f"http://{page_host}:{port}/")
            await expect(page).to_have_title("closed 1006")
        await browser.close()
    exposition = server.metrics.exposition().decode()
    why = {403: "origin", 421: "host"}[status]
    assert f'wsserver_connections_total{{outcome="{why}"}} 1.0' in exposition
    assert 'wsserver_connections_total{outcome="served"} 0.0' in exposition


async def test_a_page_of_localhost_can(
    server: wsserver.Server, blank: Page, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(HIJACK % server.url)
    (tmp_path / "favicon.ico").touch()
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/")
        await expect(blank).to_have_title('{"type":"conversations","items":[]}')


async def test_the_page_asks_for_a_token_where_one_is_wanted(puppet: Puppet, blank: Page) -> None:
    async def named(token: str | None, _: object) -> wsserver.Principal | None:
        return wsserver.Principal("ada") if token == "sesame" else None

    async with wsserver.serve(puppet, authenticate=named, port=0, drain_timeout=0) as server:
        await blank.goto(server.page)
        field = blank.get_by_label("Your token")
        await expect(field).to_be_focused()
        await field.fill("wrong")
        await field.press("Enter")
        await expect(blank.locator("#state")).to_contain_text("your token is not good")
        await expect(field).to_be_focused()
        await field.fill("sesame")
        await field.press("Enter")
        await expect(field).to_be_hidden()
        box = blank.get_by_label("Your message")
        await expect(box).to_be_focused()
        await box.fill("Hello")
        await box.press("Enter")
        (await puppet.reply()).say("Hi ada").end()
        await expect(blank.locator(".reply .text")).to_have_text("Hi ada")
        await blank.reload()  # it remembers
        await blank.get_by_label("Your message").fill("Again")
        await blank.get_by_label("Your message").press("Enter")
        (await puppet.reply(1)).say("Hi again").end()
        await expect(blank.locator(".reply .text")).to_have_text("Hi again")


async def test_ten_lines_are_ten() -> None:
    script = re.findall("<script>\n(.*?)</script>", TEN_LINES.read_text(), re.DOTALL)
    assert [len(found.splitlines()) for found in script] == [10]
    assert wsserver.Settings.load().port == 3001
