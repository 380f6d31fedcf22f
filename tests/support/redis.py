"""A real Redis server of the tests, on a port of its own and without files."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

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
    """A server that a test can kill, pause, and start again empty."""

    def __init__(self) -> None:
        self._program = require_redis()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp"]
        self._process = subprocess.Popen(
            [self._program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(STARTED):
            assert self._process.poll() is None
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.05) as line:
                    line.sendall(b"PING\r\n")
                    if line.recv(7) == b"+PONG\r\n":
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

    async def command(self, *words: str) -> None:
        """Send a command."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(" ".join(words).encode() + b"\r\n")
        assert not (await reader.readline()).startswith(b"-")
        writer.close()
        await writer.wait_closed()
