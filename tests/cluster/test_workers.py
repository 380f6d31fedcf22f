"""Several processes on one port: `wsserver serve --workers N`."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from websockets.asyncio.client import connect as connect_raw
from websockets.exceptions import InvalidStatus

import wsserver
from tests.listening.clients import on_unix
from tests.support.client import Client, client
from tests.support.host import Host
from tests.support.ports import free_port
from tests.support.process import Process, run
from tests.support.puppet import BOUND, Puppet
from tests.support.redis import RedisServer
from tests.support.talk import ID, ONE, opened
from wsserver.auth.tokens import new
from wsserver.client import connect
from wsserver.errors import ConfigError

pytestmark = pytest.mark.slow
COUNT = "Count to a thousand"
FRAGILE = """
import os
from pathlib import Path

if Path("broken").exists():
    os.abort()

async def reply(request):
    yield "Hi!"
"""
WHOLE = ", ".join(str(number) for number in range(1, 1001))


@asynccontextmanager
async def workers(
    url: str, redis: RedisServer, number: int = 3, *, folder: Path | None = None, **more: Any
) -> AsyncIterator[tuple[Process, Host]]:
    settings: dict[str, Any] = {
        "workers": number,
        "store": url,
        "cluster": redis.url,
        "lease": 2,
        "model": "demo",
        "demo_rate": 200,
        **more,
    }
    flags = [
        part
        for key, value in settings.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    path = {} if folder is None else {"PYTHONPATH": str(folder)}
    async with run("-m", "wsserver", "serve", "--port", "0", *flags, cwd=folder, **path) as process:
        address = (await process.line(r"websocket +(\S+)"))[1]
        await process.line(rf"workers +{number}$")
        await process.line("Ctrl-C stops")
        yield process, cast("Host", SimpleNamespace(url=address))
        if process.process.returncode is None:
            process.signal(signal.SIGTERM)
            assert await process.end() == 0


def pids(output: str) -> list[int]:
    """Return the process ids of all workers that were started."""
    return [int(pid) for pid in re.findall(r'"worker started".*"pid": (\d+)', output)]


@asynccontextmanager
async def clients(host: Host, number: int) -> AsyncIterator[list[Client]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(client(host)) for _ in range(number)]


async def counted(chat: Client, number: int) -> None:
    while (await chat.next("token", id=ID))["seq"] < number:
        pass


async def test_clients_of_all_workers_share_conversations(url: str, redis: RedisServer) -> None:
    async with workers(url, redis) as (process, host), clients(host, 12) as people:
        assert len(set(pids(process.output))) == 3
        await people[0].prompt(COUNT, conversation=ONE, id=ID)
        await counted(people[0], 50)
        for chat in people[1:]:
            assert (await opened(chat))["running"] == [ID]
        await people[-1].send({"type": "stop", "id": ID})
        ends = [(await chat.text(ID)) for chat in people]
        assert len({text for text, _ in ends}) == 1
        assert {end["by"] for _, end in ends} == {"client"}


async def test_killed_worker_is_replaced_and_clients_go_on(url: str, redis: RedisServer) -> None:
    async with (
        workers(url, redis, demo_rate=0) as (process, host),
        AsyncExitStack() as stack,
    ):
        chats = [await stack.enter_async_context(connect(host.url)) for _ in range(9)]
        before = pids(process.output)
        os.kill(before[1], signal.SIGKILL)
        await process.line(f'"worker died".*"pid": {before[1]}, "code": -9')
        new = int((await process.line(r'"worker started".*"pid": (\d+)'))[1])
        assert new not in before
        for chat in chats:
            reply = chat.prompt("Hi")
            assert (await reply.done()).reason == "end_turn"


async def test_worker_that_dies_again_and_again_is_replaced_after_growing_pauses(
    url: str, redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    async with workers(url, redis, 2, folder=tmp_path, model="fragile:reply") as (process, host):
        (tmp_path / "broken").touch()
        os.kill(pids(process.output)[1], signal.SIGKILL)
        pauses = [
            float((await process.line(r'"worker died", "worker": 1, .*"pause": ([\d.]+)'))[1])
            for _ in range(3)
        ]
        assert pauses == [0.5, 1.0, 2.0]
        async with connect(host.url) as chat:  # the other one works
            assert "".join([text async for text in chat.prompt("Hi")]) == "Hi!"
        (tmp_path / "broken").unlink()
        pid = int((await process.line(r'"worker started", "worker": 1, "pid": (\d+)'))[1])
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
        assert f'"pid": {pid}, "code"' not in process.output


async def test_worker_that_cannot_be_started_is_started_later(url: str, redis: RedisServer) -> None:
    async with workers(url, redis, 2, demo_rate=0) as (process, host):
        supervisor, pid = process.process.pid, pids(process.output)[1]
        limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(pid, signal.SIGKILL)
        await process.line('"worker not started", "worker": 1, "reason": "Too many open files"')
        async with connect(host.url) as chat:  # the other one works
            assert (await chat.prompt("Hi").done()).reason == "end_turn"
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
        await process.line('"worker started", "worker": 1')


async def test_shutdown_lets_all_replies_finish(url: str, redis: RedisServer) -> None:
    async with workers(url, redis, 2) as (process, host), clients(host, 6) as people:
        for number, chat in enumerate(people):
            await chat.prompt(COUNT, conversation=f"conversation-{number:04}", id=f"{ID}-{number}")
        process.signal(signal.SIGTERM)
        for number, chat in enumerate(people):
            text, done = await chat.text(f"{ID}-{number}")
            assert (text, done["reason"]) == (WHOLE, "end_turn")
            closed = await chat.closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1012
        with pytest.raises(ConnectionRefusedError):
            await connect_raw(host.url)
        assert await process.end() == 0


async def test_second_signal_ends_all_workers_at_once(url: str, redis: RedisServer) -> None:
    async with workers(url, redis, 2) as (process, host), clients(host, 2) as people:
        for chat in people:
            await chat.prompt(COUNT)
            await chat.next("token")
        process.signal(signal.SIGINT)
        await process.line('"event": "stopping"')
        process.signal(signal.SIGINT)
        assert await process.end() == 0


async def test_workers_end_when_their_supervisor_is_killed(url: str, redis: RedisServer) -> None:
    async with workers(url, redis) as (process, _):
        process.signal(signal.SIGKILL)
        async with asyncio.timeout(BOUND):
            for pid in pids(process.output):
                while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110, ASYNC240
                    await asyncio.sleep(0.05)


async def test_reload_reaches_all_workers(url: str, redis: RedisServer, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    secret, line = new("ada", None)
    tokens.write_text(line + "\n")
    async with workers(url, redis, token_file=tokens) as (process, host):
        later, line = new("bob", None)
        tokens.write_text(f"{line}\n")
        process.signal(signal.SIGHUP)
        for _ in range(3):
            await process.line('"event": "reloaded"')
        for _ in range(6):
            async with connect(host.url, token=later) as chat:
                await chat.conversations()
                assert chat.principal == "bob"
            with pytest.raises(InvalidStatus):
                await connect_raw(
                    host.url, additional_headers={"Authorization": f"Bearer {secret}"}
                )


async def test_each_worker_has_an_operations_port(url: str, redis: RedisServer) -> None:
    port = free_port()

    def ready(number: int) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port + number}/readyz") as answer:
            return bool(json.load(answer)["ready"])

    async with workers(url, redis, operations_port=port):
        for number in range(3):
            assert await asyncio.to_thread(ready, number)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "no_such_module:reply"], "no_such_module"),
        (["--port", "-1"], "port"),
        (["--cluster", "redis://127.0.0.1:1"], "cluster: cannot use Redis"),
    ],
)
async def test_settings_that_no_worker_can_use_are_one_line(
    url: str, redis: RedisServer, flags: list[str], reason: str
) -> None:
    common = ["--workers", "3", "--store", url, "--cluster", redis.url, "--port", "0"]
    async with run("-m", "wsserver", "serve", *common, *flags) as process:
        assert await process.end() == 2
    lines = [line for line in process.output.splitlines() if line.startswith("wsserver: ")]
    assert len(lines) == 1
    assert reason in lines[0]


async def test_workers_need_what_nodes_share() -> None:
    async with run("-m", "wsserver", "serve", "--workers", "2", "--port", "0") as process:
        assert await process.end() == 2
    assert process.output.startswith("wsserver: workers: several processes need a store in")


async def test_workers_share_a_unix_socket(url: str, redis: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "s"
    flags = ["--workers", "2", "--demo-rate", "5000", "--allow-anonymous"]
    async with run(
        "-m",
        "wsserver",
        "serve",
        *flags,
        "--unix-socket",
        str(path),
        WSSERVER_STORE=url,
        WSSERVER_CLUSTER=redis.url,
    ) as process:
        await process.line("Ctrl-C stops")
        async with AsyncExitStack() as stack:
            for number in range(6):
                chat = await stack.enter_async_context(on_unix(path))
                await chat.prompt("Hello", id=f"on-a-unix-socket-{number}")
                await chat.next("done")
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    assert not path.exists()


async def test_port_in_use_is_one_line(url: str, redis: RedisServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        common = ["--workers", "2", "--store", url, "--cluster", redis.url, "--port", port]
        async with run("-m", "wsserver", "serve", *common) as process:
            assert await process.end() == 2
    assert "is in use; choose another with --port" in process.output


async def test_embedded_server_starts_no_workers(puppet: Puppet) -> None:
    with pytest.raises(ConfigError, match=r"^workers: only the command"):
        async with wsserver.serve(puppet, port=0, workers=2):
            pass
