"""TLS: certificates, handshakes, and slow clients behind it."""

import asyncio
import contextlib
import gc
import logging
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

import wsserver
from tests.listening.clients import put, shown, trusting
from tests.support.abuse import Peer, frame
from tests.support.client import Client, client
from tests.support.puppet import BOUND, Puppet, until
from tests.support.sockets import sockets_of
from tests.test_leak import Here
from wsserver.cli import main
from wsserver.connections.connection import Connection
from wsserver.sockets.exchange import Exchange
from wsserver.sockets.tcp import READ_SIZE
from wsserver.sockets.websocket import Socket

pytestmark = pytest.mark.slow


async def test_prompt_and_stop_work_over_tls(puppet: Puppet, made: Path, folder: Path) -> None:
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


async def test_handshake_objects_are_freed_after_handshake(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        async with client(server, ssl=trusting(made)):
            gc.collect()
            assert not [kept for kept in gc.get_objects() if type(kept) is Exchange]


async def test_http_origin_is_refused_over_tls(puppet: Puppet, made: Path, folder: Path) -> None:
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


async def test_server_speaks_tls_1_3_and_http_1_1(puppet: Puppet, made: Path, folder: Path) -> None:
    both = folder / "both.pem"  # key and certificate in one file
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


async def test_reload_changes_certificate_for_new_sockets_only(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        async with client(server, ssl=trusting(made)) as old:
            start = await old.prompt()
            reply = (await puppet.reply()).say("before, ")
            await old.next("token")
            # With another kind of key, which a TLS context would keep beside the first one.
            put(made, "ec", folder)
            async with client(server, ssl=trusting(made)) as early:
                assert shown(early) == "rsa", "not before it was told to"
            assert await server.reload()
            only_rsa = trusting(made)
            only_rsa.maximum_version = ssl.TLSVersion.TLSv1_2
            only_rsa.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
            with pytest.raises(
                (ssl.SSLError, ConnectionResetError)
            ):  # the old certificate is not offered any more
                async with client(server, ssl=only_rsa):
                    raise AssertionError
            async with client(server, ssl=trusting(made)) as new:
                assert shown(new) == "ec"
                reply.say("after").end()
                text, done = await old.text(start["id"])
                assert (text, done["reason"]) == ("before, after", "end_turn")
                assert shown(old) == "rsa"


async def test_failed_reload_keeps_certificate(
    puppet: Puppet, made: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with wsserver.serve(puppet, port=0, **put(made, "rsa", folder)) as server:
        shutil.copy(made / "ec.pem", folder / "site.pem")  # the key file still has the old key
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
def test_unusable_certificate_files_are_one_line_error(
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


async def test_failed_and_slow_tls_handshakes_end_without_log(
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


async def test_close_does_not_wait_for_tls_handshake(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    certificate = put(made, "rsa", folder)
    async with wsserver.serve(
        puppet, port=0, shutdown_timeout=0.2, drain_timeout=0, open_timeout=1, **certificate
    ) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        # The server has accepted it, because it accepts connections in order.
        async with client(server, ssl=trusting(made)) as chat:
            await chat.quiet()
        async with asyncio.timeout(BOUND):
            await server.close()
            assert await reader.read() == b""
        writer.close()


@contextlib.asynccontextmanager
async def stuck(server: wsserver.Server, puppet: Puppet, made: Path) -> AsyncIterator[Client]:
    """Yield a client that has not read a reply larger than all buffers."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.to_thread(sock.connect, ("127.0.0.1", server.port))
    async with client(server, ssl=trusting(made), sock=sock) as chat:
        await chat.prompt("Talk")
        reply = await puppet.reply()
        (transport,) = sockets_of(server)
        # The client library reads a quarter of a megabyte before it stops.
        while (transport.writable or len(reply.said) < 30_000) and not reply.closed.is_set():
            reply.say(*["0123456789abcde "] * 100)
            await until(lambda: reply.heard_out() or reply.closed.is_set())
        yield chat


async def test_unsent_data_of_slow_tls_reader_fits_write_buffer(
    puppet: Puppet, made: Path, folder: Path
) -> None:
    certificate = put(made, "rsa", folder)
    async with wsserver.serve(puppet, port=0, drain_timeout=0, **certificate) as server:
        async with stuck(server, puppet, made) as chat:
            (transport,) = sockets_of(server)
            settings = server.settings
            assert transport.waiting <= settings.write_buffer + 4 * settings.frame_size
            reply = puppet.replies[0]
            reply.end()
            text, done = await chat.text(chat.frames[0]["id"])
            assert (text, done["reason"]) == ("".join(reply.said), "end_turn")


async def test_stuck_tls_reader_is_aborted(puppet: Puppet, made: Path, folder: Path) -> None:
    async with wsserver.serve(
        puppet, port=0, send_timeout=1, grace=0, drain_timeout=0, **put(made, "rsa", folder)
    ) as server:
        async with stuck(server, puppet, made) as chat:
            async with asyncio.timeout(BOUND):
                await puppet.replies[0].closed.wait()
            assert not server.listener.connections
            await chat.closed()


async def test_tls_data_is_read_in_small_turns(
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


async def test_data_before_close_notify_is_handled(
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
            await until(lambda: not server.listener.connections)
    assert heard == ["x"] * 1000
