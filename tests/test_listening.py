"""Where and how it listens: TLS, unix sockets, and what a service manager hands over and hears."""

import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect, unix_connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

import wsserver
from tests.support.abuse import Peer, frame
from tests.support.client import Client, client
from tests.support.process import Process, run
from tests.support.puppet import BOUND, Puppet, until
from tests.support.sockets import sockets_of
from tests.test_http import ask
from tests.test_leak import Here
from wsserver import ConfigError, listening, peers, service_manager
from wsserver.cli import _announce, main
from wsserver.connection import Connection
from wsserver.transport import Exchange
from wsserver.websocket import READ_SIZE, Socket

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SERVE = ("-m", "wsserver", "serve", "--demo-rate", "0")
KINDS = {"rsa": "rsa:2048", "ec": "ec -pkeyopt ec_paramgen_curve:prime256v1"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder with a short name, as the path of a unix socket has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="ws-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Give a folder with certificates and keys of two kinds, which must not be written to."""
    with tempfile.TemporaryDirectory() as name:
        for kind, options in KINDS.items():
            command = f"openssl req -x509 -nodes -subj /CN={kind} -newkey {options}"
            names = ("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
            files = ("-keyout", f"{name}/{kind}.key", "-out", f"{name}/{kind}.pem")
            subprocess.run((*command.split(), *names, *files), check=True, capture_output=True)
        yield Path(name)


def put(made: Path, kind: str, folder: Path) -> dict[str, Any]:
    """Install a certificate, and return the settings that name it."""
    for suffix in ("pem", "key"):
        shutil.copy(made / f"{kind}.{suffix}", folder / f"site.{suffix}")
    return {"cert": str(folder / "site.pem"), "key": str(folder / "site.key")}


def trusting(made: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for kind in KINDS:
        context.load_verify_locations(made / f"{kind}.pem")
    return context


def shown(chat: Client) -> str:
    """Return whose certificate the server has shown to this client."""
    certificate = chat.socket.transport.get_extra_info("peercert")
    return str(certificate["subject"][0][0][1])


@contextlib.asynccontextmanager
async def on_unix(path: Path | str) -> AsyncIterator[Client]:
    async with unix_connect(str(path), "ws://localhost/") as socket_:
        yield Client(socket_)


# TLS.


async def test_a_prompt_and_its_stop_over_tls(puppet: Puppet, made: Path, folder: Path) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        assert server.url == f"wss://127.0.0.1:{server.port}/"
        assert server.page == f"https://127.0.0.1:{server.port}/"
        async with client(server, ssl=trusting(made)) as chat:
            start = await chat.prompt()
            reply = (await puppet.reply()).say("half")
            await chat.next("token")
            await chat.send({"type": "stop"})
            text, done = await chat.text(start["id"])
            assert (text, done["by"]) == ("half", "client")
            assert reply.closed.is_set()
            closing = asyncio.create_task(server.close())
            closed = await chat.closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1012
            async with asyncio.timeout(BOUND):
                await closing


async def test_nothing_is_kept_of_the_handshakes_of_those_who_stay(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        async with client(server, ssl=trusting(made)):
            gc.collect()
            assert not [kept for kept in gc.get_objects() if type(kept) is Exchange]


async def test_a_page_that_came_without_tls_is_not_our_own(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    settings = {**put(made, "rsa", folder), "hosts": "chat.example", "allow_anonymous": True}
    async with wsserver.serve(puppet, port=0, **settings) as server:
        here: dict[str, Any] = {"host": "127.0.0.1", "port": server.port, "proxy": None}
        here |= {"ssl": trusting(made), "server_hostname": "localhost"}
        url = "wss://chat.example/"
        async with connect(url, origin=Origin("https://chat.example"), **here):
            pass
        with pytest.raises(InvalidStatus) as refused:
            async with connect(url, origin=Origin("http://chat.example"), **here):
                raise AssertionError
        assert refused.value.response.status_code == 403


async def test_it_speaks_current_tls_and_http_1_only(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    both = folder / "both.pem"  # the key in the file of the certificate
    both.write_text((made / "rsa.key").read_text() + (made / "rsa.pem").read_text())
    async with wsserver.serve(puppet, port=0, cert=str(both)) as server:
        context = trusting(made)
        context.set_alpn_protocols(["h2", "http/1.1"])
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        tls = writer.get_extra_info("ssl_object")
        assert tls.version() == "TLSv1.3"
        assert tls.selected_alpn_protocol() == "http/1.1"
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(BOUND):
            assert (await reader.read()).endswith(b"ok\n")
        writer.close()
        old = trusting(made)
        with pytest.warns(DeprecationWarning, match="TLSv1 is deprecated"):
            old.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.open_connection("127.0.0.1", server.port, ssl=old)


async def test_a_reload_is_for_new_sockets_and_those_there_stream_on(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        async with client(server, ssl=trusting(made)) as old:
            start = await old.prompt()
            reply = (await puppet.reply()).say("before, ")
            await old.next("token")
            # Of another kind of key, which a context would keep beside the first.
            put(made, "ec", folder)
            async with client(server, ssl=trusting(made)) as early:
                assert shown(early) == "rsa", "not before it was told to"
            assert await server.reload()
            only_rsa = trusting(made)
            only_rsa.maximum_version = ssl.TLSVersion.TLSv1_2
            only_rsa.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
            with pytest.raises(
                (ssl.SSLError, ConnectionResetError)
            ):  # the old one is not kept for those who want it
                async with client(server, ssl=only_rsa):
                    raise AssertionError
            async with client(server, ssl=trusting(made)) as new:
                assert shown(new) == "ec"
                reply.say("after").end()
                text, done = await old.text(start["id"])
                assert (text, done["reason"]) == ("before, after", "end_turn")
                assert shown(old) == "rsa"


async def test_a_reload_that_fails_keeps_what_there_is(
    puppet: Puppet, made: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        shutil.copy(made / "ec.pem", folder / "site.pem")  # and the key is still the old one
        assert not await server.reload()
        (folder / "site.key").unlink()
        assert not await server.reload()
        errors = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert [record.exc_info for record in errors] == [None, None]
        assert "does not belong to the certificate" in errors[0].getMessage()
        assert "site.key: No such file" in errors[1].getMessage()
        async with client(server, ssl=trusting(made)) as chat:
            assert shown(chat) == "rsa"
    async with wsserver.serve(puppet, port=0) as plain:
        assert await plain.reload(), "nothing to read is no failure"


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("gone.pem", "rsa.key", "cert: cannot read {}/gone.pem: No such file or directory"),
        ("rsa.pem", "gone.key", "key: cannot read {}/gone.key: No such file or directory"),
        ("", "rsa.key", "key needs cert"),
        ("rsa.pem", "", "key: {}/rsa.pem has no private key in PEM"),
        ("rsa.key", "rsa.key", "cert: {}/rsa.key has no certificate in PEM"),
        ("rsa.pem", "ec.key", "key: {0}/ec.key does not belong to the certificate in {0}/rsa.pem"),
        ("broken.pem", "rsa.key", "cert: cannot use {0}/broken.pem with {0}/rsa.key: "),
        ("rsa.pem", "secret.key", "key: {}/secret.key is encrypted"),
        (".", "rsa.key", "cert: cannot read {}: Is a directory"),
    ],
)
def test_files_that_will_not_do_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], made: Path, folder: Path, cert: str, key: str, says: str
) -> None:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    text = (made / "rsa.pem").read_text()
    (folder / "broken.pem").write_text(text.replace("\nMII", "\nXXX"))
    if key == "secret.key":
        command = ("openssl", "pkey", "-aes128", "-passout", "pass:secret")
        files = ("-in", str(folder / "rsa.key"), "-out", str(folder / "secret.key"))
        subprocess.run((*command, *files), check=True, capture_output=True)
    given = {"--cert": cert, "--key": key}
    flags = [word for name, file in given.items() if file for word in (name, str(folder / file))]
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--port", "0", *flags])
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says.format(folder) in line


async def test_handshakes_that_fail_or_last_end_by_themselves_without_a_word(
    puppet: Puppet, made: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = put(made, "rsa", folder)
    async with wsserver.serve(puppet, port=0, open_timeout=0.1, **certificate) as server:
        for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            async with asyncio.timeout(BOUND):
                with contextlib.suppress(ConnectionError):
                    assert not (await reader.read()).startswith(b"HTTP")
            writer.close()
        async with client(server, ssl=trusting(made)) as chat:
            await chat.quiet()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_closing_does_not_hang_on_a_tls_handshake(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    certificate = put(made, "rsa", folder)
    async with wsserver.serve(
        puppet, port=0, shutdown_timeout=0.2, drain_timeout=0, open_timeout=1, **certificate
    ) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        # The server has taken it, for it takes them in turn.
        async with client(server, ssl=trusting(made)) as chat:
            await chat.quiet()
        async with asyncio.timeout(BOUND):
            await server.close()
            assert await reader.read() == b""
        writer.close()


@contextlib.asynccontextmanager
async def stuck(server: wsserver.Server, puppet: Puppet, made: Path) -> AsyncIterator[Client]:
    """Give a client that has read nothing of more than all buffers can hold."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.to_thread(sock.connect, ("127.0.0.1", server.port))
    async with client(server, ssl=trusting(made), sock=sock) as chat:
        await chat.prompt("Talk")
        reply = await puppet.reply()
        (transport,) = sockets_of(server)
        # The client's library takes a quarter of a megabyte before it stops reading.
        while transport.writable or len(reply.said) < 30_000:
            reply.say(*["0123456789abcde "] * 100)
            await until(reply.heard_out)
        yield chat


async def test_what_waits_for_a_slow_reader_behind_tls_is_as_little(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    certificate = put(made, "rsa", folder)
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **certificate) as server:
        async with stuck(server, puppet, made) as chat:
            (transport,) = sockets_of(server)
            settings = server.settings
            assert transport._waiting() <= settings.write_buffer + 4 * settings.frame_size
            reply = puppet.replies[0]
            reply.end()
            text, done = await chat.text(chat.frames[0]["id"])
            assert (text, done["reason"]) == ("".join(reply.said), "end_turn")


async def test_a_stuck_reader_behind_tls_is_aborted(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    async with wsserver.serve(
        puppet, port=0, send_timeout=1, grace=0, drain_timeout=0, **put(made, "rsa", folder)
    ) as server:
        async with stuck(server, puppet, made) as chat:
            async with asyncio.timeout(BOUND):
                await puppet.replies[0].closed.wait()
            assert not server._endpoint.connections
            await chat.closed()


async def test_what_comes_behind_tls_is_read_in_small_turns(
    puppet: Puppet, made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def measure(self: Socket, size: int) -> None:
        sizes.append(size)
        receive(self, size)

    receive = Socket.buffer_updated
    monkeypatch.setattr(Socket, "buffer_updated", measure)
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        async with client(server, ssl=trusting(made)) as chat:
            for _ in range(10):
                await chat.send(" " * 60_000)
            await chat.quiet()
    assert sum(sizes) > 600_000
    assert max(sizes) <= READ_SIZE


async def test_all_that_came_before_the_end_of_tls_is_heard(
    puppet: Puppet, made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(Connection, "receive", lambda self, message: heard.append(message))
    context = trusting(made)
    context.check_hostname = False
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        async with Peer.open(Here(server), "127.0.0.1", tls=context) as peer:
            assert b" 101 " in await peer.upgrade()
            peer.write(frame("x") * 1000)
            peer.writer.close()
            await until(lambda: not server._endpoint.connections)
    assert heard == ["x"] * 1000


# A unix socket.


async def test_a_prompt_over_a_unix_socket(puppet: Puppet, folder: Path) -> None:
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


async def test_clients_of_a_unix_socket_are_one_whatever_they_are_called(
    puppet: Puppet, folder: Path
) -> None:
    path = str(folder / "socket")
    async with wsserver.serve(
        puppet, unix_socket=path, allow_anonymous=True, connections_per_address=2
    ) as server:
        statuses: list[dict[str, int]] = []
        async with contextlib.AsyncExitStack() as stack:
            for name in (f"\0wsserver-{os.getpid()}", str(folder / "client"), ""):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                if name:
                    sock.bind(name)
                sock.connect(path)
                reader, writer = await asyncio.open_unix_connection(sock=sock)
                stack.callback(writer.close)
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")  # and so it stays
                if len(statuses) == 2:
                    async with asyncio.timeout(BOUND):
                        assert b" 429 " in await reader.readline()
                else:
                    await until(lambda: server.app.admission._open == len(statuses) + 1)
                statuses.append(dict(server.app.admission._addresses._held))
        assert statuses == [{"address unix": 1}, {"address unix": 2}, {"address unix": 2}]
        await until(lambda: not server._endpoint.connections)
        assert server.app.admission._open == 0


async def test_a_unix_socket_of_a_dead_server_is_replaced(puppet: Puppet, folder: Path) -> None:
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


async def test_a_unix_socket_of_a_living_server_is_left_to_it(puppet: Puppet, folder: Path) -> None:
    path = folder / "s"
    async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
        with pytest.raises(ConfigError, match="in use by a running server"):
            async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
                raise AssertionError
        async with on_unix(path) as chat:
            await chat.quiet()


async def test_a_server_that_goes_leaves_the_socket_of_its_successor(
    puppet: Puppet, folder: Path
) -> None:
    path = folder / "s"
    first = wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True)
    await first.__aenter__()
    path.rename(folder / "aside")
    async with wsserver.serve(puppet, unix_socket=str(path), allow_anonymous=True):
        await first.close()
        async with on_unix(path) as chat:
            await chat.quiet()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_what_is_no_socket_is_never_removed(puppet: Puppet, folder: Path, kind: str) -> None:
    path = folder / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigError, match="exists and is no socket"):
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
async def test_a_path_that_cannot_be_is_one_clear_line(
    puppet: Puppet, folder: Path, path: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        async with wsserver.serve(puppet, unix_socket=str(folder / path)):
            raise AssertionError


async def test_two_servers_that_start_at_once_do_not_take_each_others_socket(
    puppet: Puppet, folder: Path
) -> None:
    with listening._locked(folder), pytest.raises(ConfigError, match="has locked"):
        async with wsserver.serve(puppet, unix_socket=str(folder / "s")):
            raise AssertionError


@pytest.mark.parametrize("mode", ["rw", "888", "66", "0o660", "660\n"])
def test_a_mode_is_octal(mode: str) -> None:
    with pytest.raises(ConfigError, match="unix_socket_mode: "):
        wsserver.Settings.load(unix_socket_mode=mode)


async def test_the_command_line_says_where_the_unix_socket_is(folder: Path) -> None:
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


# A service manager.

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


async def test_it_listens_on_all_sockets_that_it_is_handed(folder: Path) -> None:
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
async def test_systemd_starts_it_for_the_first_client(tmp_path: Path, folder: Path) -> None:
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


def test_sockets_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert service_manager.inherited() == []
    assert "LISTEN_FDS" not in os.environ


@pytest.mark.parametrize(
    ("handed", "says"),
    [
        ("file", "Socket operation on non-socket"),
        ("datagram", "no listening"),
        ("none", "Bad file"),
    ],
)
def test_what_is_handed_over_has_to_listen(
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
    with pytest.raises(ConfigError, match="'many' is no number"):
        service_manager.inherited()


@pytest.mark.parametrize("abstract", [False, True])
async def test_the_service_manager_hears_of_start_reload_and_stop(
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
                await process.line("the certificate stays as it was")
                assert [(await heard())[0], *await heard()] == ["RELOADING=1", "READY=1"]
                await old.quiet()
                process.signal(signal.SIGTERM)
                assert await heard() == ["STOPPING=1"]
                await old.closed()
            assert await process.end() == 0
            assert "Traceback" not in process.output


def test_nothing_is_said_where_nobody_listens(
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


async def test_it_ends_with_the_terminal_that_it_was_started_from() -> None:
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
        started.signal(signal.SIGHUP)  # from somebody else; the terminal is still there
        await started.line("reloaded")
        os.close(master)
        assert await started.end() == 0
        assert "stopping" in started.output
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


# Addresses.


class Bound:
    def __init__(self, family: int, name: object) -> None:
        self.family = family
        self.name = name

    def getsockname(self) -> object:
        return self.name


def ip(host: str) -> Bound:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return Bound(family, (host, 80, 0, 0) if ":" in host else (host, 80))


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1"], True),
        (["127.8.9.1", "::1"], True),
        (["::1", "192.0.2.1"], False),
        (["0.0.0.0"], False),
        (["::"], False),
        (["::ffff:127.0.0.1"], False),
        (["fe80::1%eth0"], False),
        ([], False),
    ],
)
def test_loopback_is_for_all_or_not(hosts: list[str], expected: bool) -> None:
    assert listening.loopback(map(ip, hosts)) is expected
    assert not listening.loopback([*map(ip, hosts), Bound(socket.AF_UNIX, "/run/s")])


def test_addresses_are_named_as_people_write_them() -> None:
    assert listening.name_of(ip("192.0.2.1")) == "192.0.2.1:80"
    assert listening.name_of(ip("::1")) == "[::1]:80"
    assert listening.name_of(Bound(socket.AF_UNIX, b"\0name")) == "@name"
    assert listening.tcp_address([Bound(socket.AF_UNIX, "/s"), ip("::1")]) == ("::1", 80)


async def test_all_addresses_are_known(puppet: Puppet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        second = socket.create_server(("127.0.0.2", 0))
        async with wsserver.serve(puppet, sockets=[first, second], allow_anonymous=True) as server:
            assert server.bound == tuple(listening.name_of(sock) for sock in (first, second))
            assert server.port == first.getsockname()[1]
            assert listening.loopback(server._endpoint.bound)
            for name in server.bound:
                async with connect(f"ws://{name}/", proxy=None) as socket_:
                    await Client(socket_).quiet()


# Whose a connection is.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_kernel_tells_whose_the_other_end_of_a_connection_is(host: str) -> None:
    with socket.create_server((host, 0), family=listening.IP[":" in host]) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as own:
            end, peer = listener.accept()
            with end:
                assert peers.user_at(peer, end.getsockname()) == os.geteuid()
                own.shutdown(socket.SHUT_WR)
                assert peers.user_at(peer, end.getsockname()) == os.geteuid()
                own.close()
                assert peers.user_at(peer, end.getsockname()) == peers.NOBODY
                assert not peers.established(end)
        with socket.create_connection(listener.getsockname()[:2]) as own:
            end, peer = listener.accept()
            with end:
                assert peers.established(end)
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                own.close()  # by a reset
                assert peers.user_at(peer, end.getsockname()) == peers.ELSEWHERE
                assert not peers.established(end)


def test_who_started_the_server_through_sudo_is_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1234")
    assert peers.own_users() == frozenset({0, 1234, os.getuid(), peers.ELSEWHERE})


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_a_client_that_this_kernel_does_not_hold_is_served(loop: str) -> None:
    # As a browser on Windows is to a server in WSL.
    program = (
        "import sys\n"
        "from wsserver import cli, peers, transport\n"
        "transport.user_at = lambda *_: peers.ELSEWHERE\n"
        "cli.main(sys.argv[1:])\n"
    )
    async with run("-c", program, "serve", "--port", "0", "--event-loop", loop) as process:
        url = (await process.line(r"(ws://\S+)"))[1]
        async with connect(url, proxy=None) as chat:
            assert (await Client(chat).prompt())["type"] == "start"


async def test_where_the_kernel_does_not_tell_the_server_says_so(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with wsserver.serve(puppet, port=0) as server:
        assert not server.open_to_users
    monkeypatch.delattr(socket, "AF_NETLINK")
    async with wsserver.serve(puppet, port=0, drain_timeout=0) as server, client(server) as chat:
        assert (await chat.prompt())["type"] == "start"
        assert server.open_to_users
        _announce(server)
        assert "EVERY USER of this machine" in capsys.readouterr().out
    tokens = f"ada sha256:{'0' * 64}"
    async with wsserver.serve(puppet, port=0, tokens=tokens) as server:
        assert not server.open_to_users


async def test_a_program_of_another_user_is_refused_but_for_healthz(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wsserver.serve(puppet, port=0) as server:
        monkeypatch.setattr("wsserver.transport.user_at", lambda *_: 4321)
        for path, status in {"/": 403, "/metrics": 401, "/healthz": 200, "/readyz": 200}.items():
            assert (await ask(server, f"GET {path} HTTP/1.1\nHost: localhost\n\n"))[0] == status
        with pytest.raises(InvalidStatus):
            async with client(server):
                raise AssertionError
    tokens = f"ada sha256:{hashlib.sha256(b'good').hexdigest()}"
    async with wsserver.serve(puppet, port=0, tokens=tokens, drain_timeout=0) as server:
        bearer = {"Authorization": "Bearer good"}
        async with client(server, additional_headers=bearer) as chat:
            assert (await chat.prompt())["type"] == "start"
