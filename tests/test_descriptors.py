"""File descriptors: settings that fit the limit, and accepting without descriptors."""

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from typing import Any

import pytest

import wsserver
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet, until
from tests.test_http import ask
from wsserver import ConfigError, Settings
from wsserver.descriptors import OPERATORS, fit, lingering, raise_limit
from wsserver.sockets import listening

HEALTH = "GET /healthz HTTP/1.1\nHost: localhost\n\n"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """Return a function that fakes the limit of this process, and returns a list of its changes."""

    def give(soft: int, hard: int | None = None) -> list[tuple[int, int]]:
        changes: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard or soft))
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changes.append(limits))
        return changes

    return give


@pytest.mark.parametrize("few", [200, 256, 1024, 4096, 10_000])
@pytest.mark.parametrize(
    "given",
    [{}, {"operations_port": 0}, {"generations": 5}, {"connections": 50}],
    ids=["defaults", "a port for operators", "few replies", "few connections"],
)
def test_connections_and_replies_fit_descriptor_limit(
    few: int,
    given: dict[str, Any],
    limit: Callable[..., object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    limit(few)
    asked = Settings.load(**given)
    got = fit(asked)
    taken = got.connections + got.generations + lingering(got) + 16 + 20
    assert taken <= few
    assert got.connections <= asked.connections
    assert got.generations == asked.generations or got.generations >= got.connections - 1
    lowered = (got.connections, got.generations) != (asked.connections, asked.generations)
    assert len(caplog.records) == lowered
    if lowered:
        assert taken > few * 0.85 - 40  # no descriptors are wasted
        event = caplog.records[0].event  # type: ignore[attr-defined]
        assert (event["limit"], event["connections"]) == (few, got.connections)


def test_high_descriptor_limit_changes_no_setting(
    limit: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings()
    for enough in (16_384, resource.RLIM_INFINITY):
        limit(enough)
        assert fit(settings) is settings
    assert not caplog.records


def test_too_few_descriptors_are_one_line_error(limit: Callable[..., object]) -> None:
    limit(64)
    with pytest.raises(ConfigError, match=r"^64 file descriptors are too few.*ulimit -n"):
        fit(Settings())


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (1024, 4096, [(4096, 4096)]),
        (4096, 4096, []),
        (20_000, 1_000_000, []),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, []),
    ],
)
def test_soft_limit_is_raised_up_to_hard_limit(
    soft: int, hard: int, raised: list[tuple[int, int]], limit: Callable[..., Any]
) -> None:
    changes = limit(soft, hard)
    raise_limit(Settings())
    assert changes == raised


@pytest.mark.parametrize("hard", [1_000_000, resource.RLIM_INFINITY])
def test_soft_limit_is_not_raised_beyond_need(hard: int, limit: Callable[..., Any]) -> None:
    changes = limit(1024, hard)
    raise_limit(Settings())
    ((soft, same),) = changes
    assert 10_800 < soft < 12_000
    assert same == hard


async def test_embedded_server_lowers_settings_and_keeps_soft_limit(
    limit: Callable[..., Any], puppet: Puppet
) -> None:
    changes = limit(300, 100_000)
    async with wsserver.serve(puppet, port=0) as server:
        assert server.settings.connections < 150
    assert changes == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_connections_wait_without_descriptors_and_log_stays_short(
    number: int, puppet: Puppet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0
    enough = asyncio.Event()
    accept = socket.socket.accept

    def fail(sock: socket.socket) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            enough.set()
        raise OSError(number, "none left")

    monkeypatch.setattr(listening, "PAUSE", 0.01)
    async with (
        wsserver.serve(puppet, port=0, drain_timeout=0) as server,
        client(server) as chat,
    ):
        monkeypatch.setattr(socket.socket, "accept", fail)
        waiting = [asyncio.create_task(ask(server, HEALTH)) for _ in range(20)]
        async with asyncio.timeout(BOUND):
            await enough.wait()
        assert (await chat.prompt())["type"] == "start"  # connected clients are served
        assert not any(task.done() for task in waiting)
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert {status for status, *_ in await asyncio.gather(*waiting)} == {200}
    told = [record for record in caplog.records if record.levelname != "INFO"]
    assert len(told) <= attempts  # at most one for each attempt
    assert {record.getMessage().partition(" reason")[0] for record in told} == {
        "cannot accept connections"
    }


async def test_probes_are_answered_while_all_connections_are_taken(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, connections=10) as server:
        held = []
        for _ in range(60):
            held.append(await asyncio.open_connection("127.0.0.1", server.port))
            assert (await ask(server, HEALTH))[0] == 200
        most = 10 + 16 + lingering(server.settings) + 8
        assert len(server.listener.connections) <= most
        for _, writer in held:
            writer.transport.abort()


async def test_operators_port_bounds_connections_and_the_rest_wait(
    puppet: Puppet,
) -> None:
    async with wsserver.serve(puppet, port=0, operations_port=0) as server:
        operators = server.operators
        assert operators is not None
        port = server.operations_port
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(OPERATORS + 10)]
        await until(lambda: len(operators.connections) == OPERATORS)
        waiting = asyncio.create_task(ask(server, HEALTH, port))
        for _, writer in held:
            writer.transport.abort()
        assert (await waiting)[0] == 200


async def test_host_name_is_bound_at_each_address(puppet: Puppet) -> None:
    for sock in (bound := await listening.bound("localhost", 0)):
        assert sock.getsockname()[1] > 0
        sock.close()
    assert len(bound) >= 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"in use: 127\.0\.0\.1 port {port}$"):
            await listening.bound("127.0.0.1", port)
    with pytest.raises(OSError, match="assign"):
        await listening.bound("192.0.2.1", 0)
