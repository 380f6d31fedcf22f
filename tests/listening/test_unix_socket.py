"""Unix sockets."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

import wsserver
from tests.listening.clients import SERVE, on_unix
from tests.support.process import run
from tests.support.puppet import BOUND, Puppet, until
from wsserver import ConfigError
from wsserver.addresses import networks

pytestmark = pytest.mark.slow


async def test_prompt_works_over_unix_socket(puppet: Puppet, folder: Path) -> None:
    path = folder / "s"
    async with wsserver.serve(
        puppet, unix_socket=str(path), allow_anonymous=True, drain_timeout=0
    ) as server:
        assert server.bound == (str(path),)
        assert server.port == 0
        assert server.url == f"ws+unix:{path}:/"
        assert server.page == f"http://unix:{path}:/"
        assert path.stat().st_mode & 0o777 == 0o660
        async with on_unix(path) as chat:
            start = await chat.prompt()
            (await puppet.reply()).say("here").end()
            assert (await chat.text(start["id"]))[0] == "here"
    assert not path.exists()


async def test_unix_socket_clients_share_one_address(puppet: Puppet, folder: Path) -> None:
    path = str(folder / "socket")
    async with wsserver.serve(
        puppet, unix_socket=path, allow_anonymous=True, connections_per_address=2
    ) as server:
        addresses = server.app.admission.addresses
        counted: list[tuple[int, bool]] = []
        async with contextlib.AsyncExitStack() as stack:
            for name in (f"\0wsserver-{os.getpid()}", str(folder / "client"), ""):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                if name:
                    sock.bind(name)
                sock.connect(path)
                reader, writer = await asyncio.open_unix_connection(sock=sock)
                stack.callback(writer.close)
                writer.write(
                    b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
                )  # an unfinished request keeps the connection
                if len(counted) == 2:
                    async with asyncio.timeout(BOUND):
                        assert b" 429 " in await reader.readline()
                else:
                    await until(lambda: server.app.admission.connections == len(counted) + 1)
                counted.append((len(addresses), addresses.full(networks("unix"))))
        assert counted == [(1, False), (1, True), (1, True)]
        await until(lambda: not server.listener.connections)
        assert server.app.admission.connections == 0


async def test_unix_socket_of_dead_server_is_replaced(puppet: Puppet, folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    mode = "600"
    async with wsserver.serve(
        puppet, unix_socket=str(path), allow_anonymous=True, unix_socket_mode=mode
    ):
        assert path.stat().st_mode & 0o777 == 0o600
        async with on_unix(path) as chat:
            await chat.quiet()


async def test_unix_socket_of_running_server_is_kept(puppet: Puppet, folder: Path) -> None:
    path = folder / "s"
    async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
        with pytest.raises(ConfigError, match="in use by a running server"):
            async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
                raise AssertionError
        async with on_unix(path) as chat:
            await chat.quiet()


async def test_closing_server_keeps_socket_of_successor(puppet: Puppet, folder: Path) -> None:
    path = folder / "s"
    first = wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True)
    await first.__aenter__()
    path.rename(folder / "aside")
    async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
        await first.close()
        async with on_unix(path) as chat:
            await chat.quiet()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_other_file_at_unix_socket_path_is_kept(
    puppet: Puppet, folder: Path, kind: str
) -> None:
    path = folder / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
            raise AssertionError
    assert path.is_symlink() or path.exists()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no/such/folder/s", "cannot listen on .*: No such file"),
        ("long" * 40, "cannot listen on .*: AF_UNIX path too long"),
    ],
)
async def test_invalid_unix_socket_path_is_one_line_error(
    puppet: Puppet, folder: Path, path: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        async with wsserver.serve(puppet, unix_socket=str(folder / path)):
            raise AssertionError


async def test_locked_folder_refuses_second_starting_server(puppet: Puppet, folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)  # as the other server does until it listens
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="has locked"):
            async with wsserver.serve(puppet, unix_socket=str(folder / "s")):
                raise AssertionError
    finally:
        os.close(lock)


@pytest.mark.parametrize("mode", ["rw", "888", "66", "0o660", "660\n"])
def test_unix_socket_mode_must_be_octal(mode: str) -> None:
    with pytest.raises(ConfigError, match="unix_socket_mode: "):
        wsserver.Settings.load(unix_socket_mode=mode)


async def test_command_line_prints_unix_socket_path(folder: Path) -> None:
    path = folder / "s"
    async with run(*SERVE, "--unix-socket", str(path), "--allow-anonymous") as process:
        await process.line(rf"socket +{path}\n")
        assert "http" not in process.output
        async with on_unix(path) as chat:
            start = await chat.prompt("Hello there")
            assert (await chat.text(start["id"]))[1]["reason"] == "end_turn"
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    assert not path.exists()
