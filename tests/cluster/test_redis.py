"""How the nodes reach Redis: TLS, passwords, few rights, Sentinels; and what a partition does."""

import asyncio
import re
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import Start
from tests.support.client import client
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet
from tests.support.redis import RedisServer
from tests.support.talk import ID, ONE, TWO, exchange, opened, resume, turns
from tests.support.tools import ROOT
from wsserver.errors import ConfigError

pytestmark = pytest.mark.slow


@contextmanager
def server(*arguments: str, **keys: object) -> Iterator[RedisServer]:
    running = RedisServer(*arguments, **keys)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        running.kill()


async def check(start: Start, puppet: Puppet, url: str) -> None:
    """Check that two nodes with this address of Redis are one cluster."""
    nodes = [await start(cluster=url) for _ in range(2)]
    async with client(nodes[0]) as a, client(nodes[1]) as b:
        await exchange(a, puppet, "Q", "A", conversation=ONE)
        await opened(b)
        await a.prompt("More?", conversation=ONE, id=ID)
        reply = (await puppet.reply(1)).say("Yes, ")
        await b.next("token", id=ID)
        await b.send({"type": "stop", "id": ID})
        assert (await b.text(ID))[1]["by"] == "client"
        assert reply.closed.is_set()


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A certificate for 127.0.0.1, and its key."""
    certificate, key = f"{tmp_path}/certificate.pem", f"{tmp_path}/key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=redis -addext"
    names = ("subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate)
    subprocess.run((*command.split(), *names), check=True, capture_output=True)
    return certificate, key


async def test_tls_with_a_password(start: Start, puppet: Puppet, files: tuple[str, str]) -> None:
    with server("--requirepass", "geheim", tls=files) as redis:
        place = f"rediss://:geheim@127.0.0.1:{redis.port}/1"
        await check(start, puppet, f"{place}?ssl_ca_certs={files[0]}")
        with pytest.raises(ConfigError, match=r"^cluster: cannot use Redis: ") as raised:
            await start(cluster=place)  # an unknown certificate
        assert "geheim" not in str(raised.value)


async def test_full_redis_carries_messages(start: Start, puppet: Puppet) -> None:
    with server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as redis:
        with pytest.raises(AssertionError, match="OOM"):
            for number in range(100):
                await redis.command("SET", f"key{number}", "y" * 50_000)
        await check(start, puppet, redis.url)


async def test_rights_of_the_document_are_enough(start: Start, puppet: Puppet) -> None:
    document = (ROOT / "examples/deploy/nodes.md").read_text()
    (rights,) = re.findall(r"^    ACL SETUSER wsserver on >PASSWORD (.*)$", document, re.MULTILINE)
    user = f"wsserver on >geheim {rights}"
    with server("--user", *user.split(), "--user", "default", "off") as redis:
        await check(start, puppet, f"redis://wsserver:geheim@127.0.0.1:{redis.port}/0")
        with pytest.raises(ConfigError, match=r"^cluster: cannot use Redis: "):
            await start(cluster=f"redis://127.0.0.1:{redis.port}/0")


async def test_failover_of_sentinels(start: Start, puppet: Puppet, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = stack.enter_context(server())
        second = stack.enter_context(server("--replicaof", "127.0.0.1", str(first.port)))
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"sentinel monitor chat 127.0.0.1 {first.port} 1\n"
            "sentinel down-after-milliseconds chat 500\nsentinel failover-timeout chat 2000\n"
        )
        sentinel = stack.enter_context(server("--sentinel", config=config))
        url = f"redis+sentinel://127.0.0.1:{sentinel.port}/chat"
        nodes = [await start(cluster=url) for _ in range(2)]
        async with client(nodes[0]) as a, client(nodes[1]) as b:
            await exchange(a, puppet, "Q", "A", conversation=ONE)
            await opened(b)
            await a.prompt("More?", conversation=ONE, id=ID)
            reply = (await puppet.reply(1)).say("Yes, ")
            await b.next("token", id=ID)
            async with asyncio.timeout(BOUND):  # the Sentinel has to find the replica first
                while "slaves=1" not in await sentinel.command("INFO", "sentinel"):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            first.kill()
            reply.say("more.").end()
            async with asyncio.timeout(3 * BOUND):
                assert (await b.text(ID))[0] == "Yes, more."
            assert "role:master" in await second.command("INFO", "replication")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://127.0.0.1/",
        "redis+sentinel:///chat",
        "redis+sentinel://127.0.0.1:x/chat",
        "redis+sentinel://127.0.0.1/chat/two",
        "redis+sentinel://127.0.0.1/chat?what=1",
        "redis+sentinel://127.0.0.1/chat?what",
        "rediss://127.0.0.1/0?ssl_ca_certs=/no/such/file",
    ],
)
async def test_unusable_address_is_one_line(start: Start, url: str) -> None:
    with pytest.raises(ConfigError, match=r"^cluster: ") as raised:
        await start(cluster=url)
    assert "\n" not in str(raised.value)


async def test_partition_between_one_node_and_redis(
    start: Start, puppet: Puppet, redis: RedisServer
) -> None:
    async with Line(redis.port) as line:
        apart = await start(cluster=line.url.replace("ws", "redis", 1))
        other = await start(stop_timeout=0.5, store_timeout=0.5)
        async with client(apart) as a, client(other) as b:
            await exchange(a, puppet, "Q", "A", conversation=ONE)
            await opened(b)
            await a.prompt("More?", conversation=ONE, id=ID)
            reply = (await puppet.reply(1)).say("Yes, ")
            await b.next("token", id=ID)
            line.hush()  # no packet arrives any more, and nobody is told
            reply.say("much ").say("more")
            await a.next("token", seq=3)  # its own clients feel nothing
            refused = await b.prompt("And?", conversation=ONE)
            assert (refused["code"], refused["retryable"]) == ("unavailable", True)
            await exchange(b, puppet, "Else?", "Fine.", conversation=TWO)
            reply.say(".").end()
            assert (await a.text(ID))[0] == "Yes, much more."
            line.mend()
            assert (await b.text(ID))[0] == "Yes, much more."
            assert await turns(a) == await turns(b)
            await resume(b)
            assert len(puppet.replies) == 3
