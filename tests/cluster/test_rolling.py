"""Two nodes behind nginx are replaced one after the other under many clients."""

import asyncio
import collections
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import async_playwright

from tests.browser.page import SWITCHES
from tests.support.gateways import nginx
from tests.support.ports import free_port
from tests.support.process import Process, run
from tests.support.redis import RedisServer
from tests.support.tools import ROOT, require_chromium
from wsserver.client import connect

pytestmark = pytest.mark.slow
PYTHON_CLIENTS, PAGE_CLIENTS = 80, 20
WORDS = 50

MODEL = f"""
import asyncio
from pathlib import Path

async def counting(request):
    with Path("calls").open("a") as calls:
        calls.write(request.prompt + "\\n")
    for number in range({WORDS}):
        yield f"{{request.prompt}}:{{number}} "
        await asyncio.sleep(0.04)
"""

CLIENTS = """async ([number, url]) => {
    const { connect } = await import('/client.js');
    window.ended = {}; window.failed = []; window.leaving = false;
    window.people = Promise.all(Array.from({ length: number }, async (_, person) => {
        const chat = connect(url);
        for (let round = 0; !window.leaving; round++) {
            const reply = chat.prompt(`page-${person}-${round}`);
            try {
                const { reason } = await reply.done;
                window.ended[reply.prompt] = [reply.text, reason];
            } catch (error) {
                window.failed.push(`${reply.prompt}: ${error.code} ${error.message}`);
            }
        }
        chat.close();
    }));
}"""


def whole(prompt: str) -> str:
    return "".join(f"{prompt}:{number} " for number in range(WORDS))


@dataclass
class Nodes:
    """The processes of nodes, by port."""

    flags: list[str]
    folder: Path
    running: dict[int, tuple[AsyncExitStack, Process]] = field(default_factory=dict)
    output: str = ""  # of all nodes, after their starts

    async def start(self, port: int, *flags: str) -> None:
        stack = AsyncExitStack()
        command = (*self.flags, "--port", str(port), *flags)
        process = await stack.enter_async_context(
            run(*command, cwd=self.folder, PYTHONPATH=str(self.folder))
        )
        self.running[port] = stack, process
        await process.line(r"websocket +(\S+)")
        reading = asyncio.create_task(self._read(process))  # a full pipe would stop the node
        stack.push_async_callback(asyncio.wait, {reading})
        stack.callback(reading.cancel)

    async def _read(self, process: Process) -> None:
        assert process.process.stdout is not None
        while data := await process.process.stdout.read(65536):
            self.output += data.decode(errors="replace")

    async def end(self, port: int) -> int:
        """Let a node leave; return its exit code."""
        stack, process = self.running.pop(port)
        async with stack:
            process.signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                return await process.process.wait()

    def signal(self, port: int, number: signal.Signals) -> int:
        """Send a signal to a node; return its process id."""
        _, process = self.running[port]
        process.signal(number)
        return process.process.pid

    async def forget(self, port: int) -> None:
        """Clear away a node that has died."""
        stack, process = self.running.pop(port)
        await process.process.wait()
        await stack.aclose()

    async def kill(self) -> None:
        for stack, _ in self.running.values():
            await stack.aclose()


@asynccontextmanager
async def nodes(url: str, redis: RedisServer, folder: Path) -> AsyncIterator[Nodes]:
    (folder / "counting.py").write_text(MODEL)
    settings: dict[str, Any] = {
        "model": "counting:counting",
        "store": url,
        "cluster": redis.url,
        "titles": "off",
        "proxies": "127.0.0.1",
        "connections-per-address": 1000,
        "connections-per-principal": 1000,
        "generations-per-principal": 1000,
        "prompts-per-minute": 100_000,
        "tokens-per-day": 0,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = ["-m", "wsserver", "serve", "--allow-anonymous", *flags]
    running = Nodes(command, folder)
    try:
        yield running
    finally:
        await running.kill()


def site_of(ports: list[int]) -> tuple[str, str]:
    """Return what the site of the document has for `http` and for `server`."""
    text = (ROOT / "examples/deploy/nginx-nodes.conf").read_text()
    for name, port in zip(("node-a", "node-b"), ports, strict=True):
        assert text.count(f"server {name}:3001") == 1
        text = text.replace(f"server {name}:3001", f"server 127.0.0.1:{port}")
    http, _, server = text.partition("\nserver {\n")
    return http, server.replace("listen 80;", "", 1).rstrip().removesuffix("}")


async def person(
    url: str, number: int, leaving: asyncio.Event, ended: dict[str, tuple[str, str]]
) -> None:
    async with connect(url) as chat:
        rounds = 0
        while not leaving.is_set():
            prompt, rounds = f"python-{number}-{rounds}", rounds + 1
            reply = chat.prompt(prompt)
            text = "".join([piece async for piece in reply])
            ended[prompt] = text, (await reply.done()).reason


@pytest.mark.timeout(150)
async def test_nodes_are_replaced_under_a_hundred_clients(
    url: str, redis: RedisServer, tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    http, site = site_of(ports)
    ended: dict[str, tuple[str, str]] = {}
    leaving = asyncio.Event()
    async with (
        nodes(url, redis, tmp_path) as cluster,
        nginx(tmp_path, site, http, connections=1024) as address,
        async_playwright() as playwright,
    ):
        for port in ports:
            await cluster.start(port)
        browser = await playwright.chromium.launch(
            executable_path=require_chromium(), args=SWITCHES
        )
        page = await browser.new_page()
        await page.goto(address.replace("ws", "http", 1) + "healthz")
        await page.evaluate(CLIENTS, [PAGE_CLIENTS, address])
        async with asyncio.TaskGroup() as people:
            for number in range(PYTHON_CLIENTS):
                people.create_task(person(address, number, leaving, ended))
            while len(ended) < PYTHON_CLIENTS / 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            for port in ports:
                assert await cluster.end(port) == 0
                before = len(ended)
                await cluster.start(port)
                while len(ended) < before + PYTHON_CLIENTS:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            leaving.set()
        await page.evaluate("window.leaving = true; window.people")
        failed = await page.evaluate("window.failed")
        ended |= json.loads(await page.evaluate("JSON.stringify(window.ended)"))
        await browser.close()
    assert failed == []
    assert {prompt: text for prompt, (text, _) in ended.items() if text != whole(prompt)} == {}
    assert {reason for _, reason in ended.values()} == {"end_turn"}
    calls = collections.Counter((tmp_path / "calls").read_text().split())
    assert set(calls.values()) == {1}
    assert calls.keys() == ended.keys()
