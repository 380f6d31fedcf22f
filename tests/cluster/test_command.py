"""The settings of a cluster, and its commands."""

import asyncio
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import wsserver
from tests.check.conftest import RATE, checked_replies
from tests.support.client import client
from tests.support.gateways import nginx
from tests.support.host import Host
from tests.support.process import Process, run
from tests.support.puppet import Puppet
from tests.support.redis import RedisServer
from tests.support.talk import ONE, turns
from tests.support.tools import ROOT
from wsserver.doctor import replies
from wsserver.doctor.findings import Status
from wsserver.errors import ConfigError
from wsserver.models.demo import Demo

pytestmark = pytest.mark.slow


async def test_commands_of_the_document_run(url: str, redis: RedisServer) -> None:
    document = (ROOT / "examples/deploy/nodes.md").read_text()
    snippet = document.partition("```\n")[2].partition("```")[0]
    _, serve = snippet.splitlines()
    assignment, *command = serve.replace("redis://HOST:6379/0", redis.url).split()
    assert assignment.startswith("WSSERVER_STORE=postgresql://")
    assert command[0] == "wsserver"

    def node() -> AbstractAsyncContextManager[Process]:
        return run("-m", *command, WSSERVER_STORE=url, WSSERVER_PORT="0", WSSERVER_DEMO_RATE="0")

    async with node() as one, node() as other:
        hosts = [
            cast("Host", SimpleNamespace(url=(await each.line(r"websocket +(\S+)"))[1]))
            for each in (one, other)
        ]
        async with client(hosts[0]) as a, client(hosts[1]) as b:
            await a.prompt("Hello", conversation=ONE)
            await a.next("done")
            assert len(await turns(b)) == 2
    names = [set(re.findall('"node": "([0-9a-f]+)"', each.output)) for each in (one, other)]
    assert len(names[0] | names[1]) == 2  # each line of the log names its node


async def test_readiness_shows_redis_and_lease(
    nodes: list[wsserver.Server], redis: RedisServer
) -> None:
    def ready() -> dict[str, bool]:
        try:
            with urllib.request.urlopen(nodes[0].page + "readyz") as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            found = json.load(error)
        return dict(found)

    figures = nodes[0].app.metrics.exposition()
    assert b"wsserver_cluster_mirrors 0.0" in figures
    assert b"wsserver_cluster_messages_lost_total 0.0" in figures
    before = await asyncio.to_thread(ready)
    assert before["redis"] is before["lease"] is before["store"] is True
    redis.kill()
    async with asyncio.timeout(20):
        while (await asyncio.to_thread(ready))["redis"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("store", ["memory:", "sqlite:///chats.sqlite"])
async def test_store_that_nodes_cannot_share_is_refused(
    puppet: Puppet, redis: RedisServer, store: str
) -> None:
    with pytest.raises(ConfigError, match=r"^store: the nodes of a cluster share"):
        async with wsserver.serve(puppet, port=0, store=store, cluster=redis.url):
            pass


async def test_check_finds_nodes_behind_a_proxy_as_one_server(
    url: str, redis: RedisServer, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                wsserver.serve(Demo(RATE), port=0, store=url, cluster=redis.url, drain_timeout=0)
            )
            for _ in range(2)
        ]
        upstream = "".join(f"server 127.0.0.1:{node.port};" for node in nodes)
        site = (
            "location / { proxy_pass http://nodes; proxy_http_version 1.1;"
            "proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;"
            "proxy_set_header Host $http_host; }"
        )
        address = await stack.enter_async_context(
            nginx(tmp_path, site, f"upstream nodes {{ {upstream} }}")
        )
        found = await checked_replies(address, "", replies.resume)
        assert found.of(Status.OK) == {"resume", "nodes"}


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("store", "postgresql://me:geheim@127.0.0.1:1/x"),
        ("store", "postgresql://me:geheim/x@127.0.0.1:1/x"),
        ("cluster", "redis+sentinel://me:geheim@127.0.0.1:1,127.0.0.1:2/chat"),
        ("cluster", "redis://me:geheim/x@127.0.0.1:1/0"),
        ("cluster", "me:geheim@127.0.0.1:1"),
    ],
)
async def test_password_in_a_flag_is_warned_of_and_not_shown(name: str, address: str) -> None:
    async with run("-m", "wsserver", "serve", "--port", "0", f"--{name}", address) as process:
        assert await process.end() == 2
    assert f'"variable": "WSSERVER_{name.upper()}"' in process.output
    assert "geheim" not in process.output


async def test_unusable_redis_is_one_line_error(puppet: Puppet, url: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster: ") as raised:
        async with wsserver.serve(puppet, port=0, store=url, cluster="redis://:geheim@127.0.0.1:1"):
            pass
    assert "\n" not in str(raised.value)
    assert "geheim" not in str(raised.value)


def test_server_alone_imports_neither_redis_nor_asyncpg() -> None:
    program = (
        "import asyncio, sys, wsserver\n"
        "async def main():\n"
        "    async with wsserver.serve('demo', port=0): pass\n"
        "asyncio.run(main())\n"
        "print([name for name in ('redis', 'asyncpg', 'wsserver.cluster') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
