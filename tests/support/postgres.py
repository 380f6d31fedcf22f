"""A real PostgreSQL server of the tests, in a folder and on a port of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import pytest

from tests.support.ports import free_port

__all__ = ["PASSWORD", "USER", "Postgres", "require_postgres"]

STARTED = 60.0  # seconds that a start or a stop may take
USER, PASSWORD = "tester", "geheim"


def require_postgres() -> Path:
    """Return the folder of PostgreSQL's programs; skip the test if they are not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("postgres")
    if found is not None:
        folders.insert(0, Path(found).resolve().parent)
    for folder in folders:
        if (folder / "initdb").exists():
            return folder
    if os.environ.get("CI") == "true":
        pytest.fail("PostgreSQL is not installed")
    pytest.skip("PostgreSQL is not installed")


class Postgres:
    """A server that a test can stop, kill, and start again.

    Each test has tables of its own; see :meth:`url`.
    """

    def __init__(self, folder: Path) -> None:
        self._programs = require_postgres()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self._schemas = 0

    @classmethod
    def create(cls) -> Self:
        """Make the files of a server and start it."""
        # Short, because the path of a unix socket has at most 107 characters.
        server = cls(Path(tempfile.mkdtemp(prefix="pg")))
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(server._folder, "postgres", "postgres")
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(PASSWORD)
            file.flush()
            Path(file.name).chmod(0o644)
            server._run(
                "initdb",
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C",
                "--auth=scram-sha-256",
                f"--username={USER}",
                f"--pwfile={file.name}",
                f"--pgdata={server._data}",
            )
        server.start()
        return server

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _as_user(self, *command: str) -> list[str]:
        if os.getuid():
            return list(command)
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]

    def _run(self, program: str, *arguments: str) -> None:
        command = self._as_user(str(self._programs / program), *arguments)
        done = subprocess.run(command, capture_output=True, timeout=STARTED, cwd="/", check=False)
        assert not done.returncode, done.stderr.decode()

    @property
    def pid(self) -> int:
        """The id of the first process of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self._folder,
            "fsync": "off",
            "max_connections": 200,
        }
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        command = self._as_user(str(self._programs / "postgres"), "-D", str(self._data), *flags)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        self._wait()

    def _wait(self) -> None:
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        for _ in range(600):
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            if not subprocess.run([*ready, "-t", "1"], check=False, cwd="/").returncode:
                return
        raise AssertionError("PostgreSQL does not start")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server. SIGINT ends all connections at once; SIGKILL is a crash."""
        process, self._process = self._process, None
        if process is None:
            return
        children = []
        if how is signal.SIGKILL:  # otherwise a child may answer one more request
            tasks = Path(f"/proc/{process.pid}/task/{process.pid}")
            children = [int(child) for child in (tasks / "children").read_text().split()]
        process.send_signal(how)
        process.wait(STARTED)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, how)

    def remove(self) -> None:
        """End the server, and delete its files."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def url(self) -> str:
        """Return the address of tables that no test has used."""
        self._schemas += 1
        name = f"test_{self._schemas}"
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres?search_path={name}"
