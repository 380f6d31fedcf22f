"""Sockets of a service manager, and messages to it."""

import asyncio
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from tests.listening.clients import ROOT, SERVE, on_unix, put, shown, trusting
from tests.support.client import Client
from tests.support.process import Process, run
from tests.support.puppet import BOUND
from wsserver import ConfigError
from wsserver.cli import main
from wsserver.sockets import service_manager

pytestmark = pytest.mark.slow


PARENT = """
import fcntl, os, socket, sys
tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
unix.bind(sys.argv[1])
unix.listen()
given = [fcntl.fcntl(sock, fcntl.F_DUPFD, 10) for sock in (tcp, unix)]
for number, descriptor in enumerate(given, start=3):
    os.dup2(descriptor, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="a:b")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
MODEL = """
import os
async def model(request):
    yield f"{[name for name in os.environ if name.startswith('LISTEN_')]} "
    yield f"{[os.get_inheritable(descriptor) for descriptor in (3, 4)]}"
"""


async def test_server_listens_on_all_inherited_sockets(folder: Path) -> None:
    (folder / "mine.py").write_text(MODEL)
    path = folder / "s"
    serve = (*SERVE, "--model", "mine:model", "--port", "1", "--allow-anonymous")
    python_path = f"{ROOT}{os.pathsep}{folder}"
    async with run("-c", PARENT, str(path), *serve, PYTHONPATH=python_path) as process:
        url = (await process.line(r"(ws://127\.0\.0\.1:\d+/)"))[1]
        await process.line(rf"socket +{path}\n")
        async with connect(url, proxy=None) as socket_, on_unix(path) as other:
            for chat in (Client(socket_), other):
                start = await chat.prompt()
                assert (await chat.text(start["id"]))[0] == "[] [False, False]"
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
        assert path.exists(), "it is the service manager's"


ACTIVATE = shutil.which("systemd-socket-activate")


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not there")
async def test_systemd_starts_server_for_first_client(tmp_path: Path, folder: Path) -> None:
    path = folder / "s"
    environment = {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path)}
    keep = [word for item in environment.items() for word in ("-E", "=".join(item))]
    process = await asyncio.create_subprocess_exec(
        *(ACTIVATE or "", "-l", str(path), *keep, sys.executable, *SERVE, "--allow-anonymous"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        activated = Process(process)
        await activated.line("Listening on")
        async with asyncio.timeout(BOUND), on_unix(path) as chat:
            start = await chat.prompt("Hello there")
            assert (await chat.text(start["id"]))[1]["reason"] == "end_turn"
            activated.signal(signal.SIGTERM)
            await chat.closed()
        assert await activated.end() == 0
        assert f"socket     {path}" in activated.output
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def test_sockets_for_other_process_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert service_manager.inherited() == []
    assert "LISTEN_FDS" not in os.environ


@pytest.mark.parametrize(
    ("handed", "says"),
    [
        ("file", "Socket operation on non-socket"),
        ("datagram", "not a listening"),
        ("none", "Bad file"),
    ],
)
def test_inherited_descriptor_must_be_listening_socket(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], handed: str, says: str
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, Path(os.devnull).open() as file:
        descriptor = {"file": file.fileno(), "datagram": sock.fileno(), "none": 10**6}[handed]
        monkeypatch.setattr(service_manager, "FIRST_INHERITED", descriptor)
        with pytest.raises(SystemExit):
            main(["serve"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says in line
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "many")
    with pytest.raises(ConfigError, match="'many' is not a number"):
        service_manager.inherited()


@pytest.mark.parametrize("abstract", [False, True])
async def test_service_manager_is_notified_of_start_reload_and_stop(
    made: Path, folder: Path, abstract: bool
) -> None:
    name = f"@{folder.name}" if abstract else str(folder / "notify")
    given = put(made, "rsa", folder)
    tls = ("--cert", given["cert"], "--key", given["key"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        manager.setblocking(False)

        async def heard() -> list[str]:
            async with asyncio.timeout(BOUND):
                data = await asyncio.get_running_loop().sock_recv(manager, 4096)
            return data.decode().splitlines()

        async with run(*SERVE, "--port", "0", *tls, NOTIFY_SOCKET=name) as process:
            url = (await process.line(r"(wss://\S+)"))[1]
            assert await heard() == ["READY=1"]
            async with connect(url, ssl=trusting(made), proxy=None) as socket_:
                old = Client(socket_)
                put(made, "ec", folder)
                process.signal(signal.SIGHUP)
                reloading, now = await heard()
                assert reloading == "RELOADING=1"
                assert now.partition("=")[0] == "MONOTONIC_USEC"
                assert 0 < int(now.partition("=")[2]) <= asyncio.get_running_loop().time() * 1e6
                assert await heard() == ["READY=1"]
                await process.line("reloaded")
                async with connect(url, ssl=trusting(made), proxy=None) as second:
                    assert shown(Client(second)) == "ec"
                (folder / "site.pem").unlink()
                process.signal(signal.SIGHUP)
                await process.line("certificate not reloaded")
                assert [(await heard())[0], *await heard()] == ["RELOADING=1", "READY=1"]
                await old.quiet()
                process.signal(signal.SIGTERM)
                assert await heard() == ["STOPPING=1"]
                await old.closed()
            assert await process.end() == 0
            assert "Traceback" not in process.output


def test_notification_without_listener_is_ignored(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for address in ("", "vsock:2:1234"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        service_manager.notify("READY=1")
    assert caplog.records == []
    monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "gone"))
    service_manager.notify("READY=1")
    (record,) = caplog.records
    assert "READY=1" in record.getMessage()


SESSION = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


async def test_server_ends_when_terminal_closes() -> None:
    master, slave = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SESSION, str(slave), *SERVE, "--port", "0"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=(slave,),
    )
    os.close(slave)
    try:
        started = Process(process)
        await started.line("Ctrl-C stops")
        started.signal(signal.SIGHUP)  # from another program; the terminal is still open
        await started.line("reloaded")
        os.close(master)
        assert await started.end() == 0
        assert "stopping" in started.output
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
