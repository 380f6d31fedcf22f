"""A real Redis server of the tests, on a port of its own and without files."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.ports import free_port

__all__ = ["RedisServer", "require_redis"]

STARTED = 200  # attempts to connect, 50 ms each


def require_redis() -> str:
    """Return the path of redis-server; skip the test if it is not installed."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail("redis-server is not installed")
    pytest.skip("redis-server is not installed")


class RedisServer:
    """A server that a test can kill, pause, and start again empty.

    Args:
        arguments: further arguments of redis-server.
        tls: certificate and key; the server then speaks TLS only.
        config: a configuration file, which the server may change.
    """

    def __init__(
        self, *arguments: str, tls: tuple[str, str] | None = None, config: Path | None = None
    ) -> None:
        self._program = require_redis()
        self._arguments = arguments
        self._tls = tls
        self._config = config
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The id of the first process of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        arguments = ["--bind", "127.0.0.1", "--save", "", "--dir", "/tmp", *self._arguments]
        if self._config is not None:
            arguments = [str(self._config), *arguments]
        if self._tls is None:
            arguments += ["--port", str(self.port)]
        else:
            certificate, key = self._tls
            arguments += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            arguments += ["--tls-cert-file", certificate, "--tls-key-file", key]
        self._process = subprocess.Popen(
            [self._program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(STARTED):
            assert self._process.poll() is None
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.05) as line:
                    if self._tls is not None:
                        return
                    line.sendall(b"PING\r\n")
                    if line.recv(7)[:5] in {b"+PONG", b"-NOAU"}:  # perhaps it needs a password
                        return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("Redis does not start")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the server at once. It forgets everything."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)

    async def command(self, *words: str) -> str:
        """Send a command; return its answer, if that is one text."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(" ".join(words).encode() + b"\r\n")
            answer = await reader.readline()
            assert not answer.startswith(b"-"), answer
            if answer[:1] == b"$":
                answer = await reader.readexactly(int(answer[1:]) + 2)
            return answer.decode().strip()
        finally:
            writer.close()
            await writer.wait_closed()
