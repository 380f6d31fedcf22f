"""The ten-line client of the README, and pages of other origins."""

import asyncio
import contextlib
import functools
import re
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright, expect

import wsserver
from tests.browser.page import MARKUP, SWITCHES, closed
from tests.support.puppet import BOUND, Puppet
from tests.support.tools import ROOT, require_chromium

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


TEN_LINES = ROOT / "examples/ten_lines.html"


@contextlib.contextmanager
def website(folder: Path) -> Iterator[int]:
    """Serve files as `python -m http.server` does; yield the port."""
    handler = functools.partial(SilentFiles, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site.server_address[1]
        finally:
            site.shutdown()
            thread.join()


class SilentFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest_asyncio.fixture(loop_scope="session")
async def ten_lines(blank: Page, server: wsserver.Server, tmp_path: Path) -> AsyncIterator[Page]:
    """The ten-line page on its own web server, with the port of the chat server."""
    source = TEN_LINES.read_text()
    assert source.count("ws://localhost:3001") == 1
    copy = tmp_path / "ten_lines.html"
    copy.write_text(source.replace("ws://localhost:3001", server.url.rstrip("/")))
    (tmp_path / "favicon.ico").touch()
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/ten_lines.html")
        await blank.wait_for_function("ws.readyState === WebSocket.OPEN")
        yield blank


async def test_ten_line_client_streams_and_stops_reply(ten_lines: Page, puppet: Puppet) -> None:
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
    await expect(output).to_contain_text("nothing to stop")


# With an icon in the page the browser requests none, also not while the site closes.
HIJACK = """<link rel="icon" href="data:,">
<script>
const ws = new WebSocket('%s');
ws.onopen = () => { document.title = 'open'; ws.send('{"type":"list"}'); };
ws.onmessage = ({ data }) => { document.title = data; };
ws.onclose = ({ code }) => { document.title = `closed ${code}`; };
</script>"""


@pytest.mark.parametrize(
    ("page_host", "server_host", "status"),
    [
        ("evil.test", "localhost", 403),  # a page of another site (cross-site hijacking)
        ("evil.test", "127.0.0.1", 403),
        ("evil.test", "evil.test", 421),  # a foreign name of this machine (DNS rebinding)
    ],
)
async def test_page_of_foreign_origin_is_refused(
    server: wsserver.Server, tmp_path: Path, page_host: str, server_host: str, status: int
) -> None:
    """Run in a browser that resolves a foreign name to this machine."""
    (tmp_path / "index.html").write_text(HIJACK % f"ws://{server_host}:{server.port}/ws")
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


async def test_page_of_localhost_is_accepted(
    server: wsserver.Server, blank: Page, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(HIJACK % server.url)
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/")
        await expect(blank).to_have_title('{"type":"conversations","items":[]}')


async def test_first_lines_of_readme_stream_reply(
    blank: Page, server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```js\n(const ws = .*?)```", readme, re.DOTALL)
    begin, listen, ask_, *_, halt = snippet.strip().splitlines()
    begin = begin.replace("ws://localhost:3001", server.url)
    (tmp_path / "favicon.ico").touch()
    (tmp_path / "index.html").write_text(
        "<script>const prompt_ = 'Hello'; const append = (text) => { document.title += text; };\n"
        f"{begin}\n{listen}\nws.onopen = () => {{ {ask_.replace('prompt', 'prompt: prompt_')} \n}};"
        f"const halt = () => {{ {halt} }};</script>"
    )
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/")
        model = (await puppet.reply()).say("one-", "two")
        assert model.request.prompt == "Hello"
        await expect(blank).to_have_title("one-two")
        await blank.evaluate("halt()")
        await closed(model.closed)


async def test_ten_line_page_opened_as_file_says_that_it_is_not_connected(
    blank: Page, server: wsserver.Server, tmp_path: Path
) -> None:
    page = tmp_path / "ten_lines.html"
    page.write_text(TEN_LINES.read_text().replace("ws://localhost:3001", server.url))
    await blank.goto(page.as_uri())
    await expect(blank.locator("pre")).to_have_text("[The connection is closed.]")


async def test_ten_line_client_has_ten_lines() -> None:
    script = re.findall("<script>\n(.*?)</script>", TEN_LINES.read_text(), re.DOTALL)
    assert [len(found.splitlines()) for found in script] == [10]
    assert wsserver.Settings.load().port == 3001


async def test_page_of_the_tutorial_streams_and_stops(
    blank: Page, server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    tutorial = (ROOT / "examples/tutorial.md").read_text()
    (written,) = re.findall(r"```html\n(.*?)```", tutorial, re.DOTALL)
    (tmp_path / "favicon.ico").touch()
    (tmp_path / "index.html").write_text(written.replace("ws://localhost:3001", server.url))
    with website(tmp_path) as port:
        await blank.goto(f"http://localhost:{port}/")
        await blank.get_by_role("textbox").fill("Hello")
        await blank.get_by_role("button", name="Send").click()
        model = (await puppet.reply()).say("one-", "two")
        assert model.request.prompt == "Hello"
        await expect(blank.locator("pre")).to_have_text("one-two")
        await blank.get_by_role("button", name="Stop").click()
        async with asyncio.timeout(BOUND):
            await model.closed.wait()
