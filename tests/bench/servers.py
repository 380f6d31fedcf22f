"""Run the measured servers as processes, and read their CPU time and memory."""

import ast
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tests.bench.events import EventLoad
from tests.bench.load import BOUND, Failure, Load
from tests.support.crowd import CROWD, MANY
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
PEERS = Path(__file__).parent / "peers"
INSTALLED = ROOT / ".tools" / "bench"
TICKS = os.sysconf("SC_CLK_TCK")
HANDSHAKE = (
    b"GET %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)

# Raise only the limits that many clients of one address would reach.
LIMITS = {
    **CROWD,
    "WSSERVER_CONNECTIONS": MANY,
    "WSSERVER_GENERATIONS": "10000",
    "WSSERVER_REPLY_SIZE": "1000000000",
    "WSSERVER_STORE": "memory:",
    "WSSERVER_DRAIN_TIMEOUT": "0",
}


STAMPED = partial(Load, stamps=True)


@dataclass(frozen=True)
class Server:
    """The command of a server.

    ``{port}`` in the command stands for the port, ``{upstream}`` in the environment for the URL of
    the model's API.
    """

    name: str
    command: Sequence[str]
    needs: Sequence[Path] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None  # file or folder of the program
    resumes: bool = False  # whether a client can resume a reply after its connection is lost
    http: bool = False  # speaks HTTP and server-sent events, and not WebSocket
    redis: bool = False  # needs a Redis, at the unix socket REDIS_SOCKET
    path: str = "/"  # of its address
    clients: Callable[[str], Load] = STAMPED  # clients of an address

    def ready(self) -> bool:
        """Whether the server is installed."""
        has_redis = not self.redis or shutil.which("redis-server") is not None
        return has_redis and all(path.exists() for path in self.needs)

    def lines(self) -> int:
        """Return the lines of the program, without empty lines, comments and docstrings."""
        assert self.source is not None
        files = self.source.rglob("*.py") if self.source.is_dir() else [self.source]
        return sum(map(lines_of_code, files))


def lines_of_code(file: Path) -> int:
    text = file.read_text()
    numbers = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith(("#", "//"))
    }
    if file.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                numbers -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(numbers)


MODULES = INSTALLED / "node_modules"
PYTHON = INSTALLED / "venv" / "bin" / "python"
DEMO = "wsserver demo"
OURS = ("-m", "wsserver", "serve", "--port", "{port}", "--model")
SERVERS = {
    server.name: server
    for server in (
        Server(
            "wsserver",
            (sys.executable, *OURS, "claude-sonnet-4-6"),
            env=LIMITS,
            source=ROOT / "wsserver",
            resumes=True,
        ),
        Server(DEMO, (sys.executable, *OURS, "demo"), env=LIMITS),
        Server(
            "bun",
            (str(MODULES / ".bin" / "bun"), "bun.ts"),
            [MODULES / "bun"],
            source=PEERS / "bun.ts",
        ),
        Server("node", ("node", "node.mjs"), [MODULES / "ws"], source=PEERS / "node.mjs"),
        # The base address of the AI SDK includes the version.
        Server(
            "ai-sdk",
            ("node", "ai-sdk.mjs"),
            [MODULES / "ai"],
            {"ANTHROPIC_BASE_URL": "{upstream}/v1"},
            source=PEERS / "ai-sdk.mjs",
        ),
        Server(
            "ai-sdk-resume",
            ("node", "ai-sdk-resume.mjs"),
            [MODULES / "resumable-stream"],
            {"ANTHROPIC_BASE_URL": "{upstream}/v1"},
            source=PEERS / "ai-sdk-resume.mjs",
            resumes=True,
            http=True,
            redis=True,
        ),
        Server(
            "fastapi",
            (str(PYTHON), "-m", "uvicorn", "fastapi_app:app", "--port", "{port}"),
            [PYTHON],
            source=PEERS / "fastapi_app.py",
        ),
    )
}

# Our server by each of its transports.
OWN = ((sys.executable, *OURS, "claude-sonnet-4-6"), LIMITS)
MOUNTED = (
    (sys.executable, "-m", "uvicorn", "tests.bench.mounted:app", "--port", "{port}"),
    {**LIMITS, "WSSERVER_MODEL": "claude-sonnet-4-6"},
)
TRANSPORTS = {
    name: Server(name, command, env=env, http=http, path=path, clients=clients)
    for name, (command, env), http, path, clients in (
        ("WebSocket", OWN, False, "/", STAMPED),
        ("SSE", OWN, True, "/", EventLoad),
        ("AI SDK", OWN, True, "/", partial(EventLoad, ai_sdk=True)),
        ("WebSocket, uvicorn", MOUNTED, False, "/chat/ws", STAMPED),
        ("SSE, uvicorn", MOUNTED, True, "/chat/", EventLoad),
    )
}


class Program:
    """A running program. A failure shows the end of its output."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.log = log
        self.pid = process.pid

    def check(self) -> None:
        """Check that the program still runs.

        Raises:
            Failure: the program has ended. The message has the end of its output.
        """
        if (code := self.process.poll()) is not None:
            output = self.log.read_text(errors="replace")[-2000:]
            raise Failure(f"{self.process.args!r} ended with {code}:\n{output}")

    def tree(self) -> list[int]:
        """Return the ids of the process and its descendants."""
        found = [self.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def cpu(self) -> float:
        """Return the seconds of CPU time that the processes used."""
        return sum(map(cpu, self.tree()))

    def memory(self) -> float:
        """Return the bytes of memory of the processes (PSS)."""
        total = 0
        for pid in self.tree():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
        return total


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process and its threads."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def system_time(pid: int) -> float:
    """Return the seconds that a process spent in system calls; the resolution is 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[12]) / TICKS


def busy() -> float:
    """Return the CPU seconds of all programs of this machine; the resolution is 10 ms."""
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / TICKS


@contextlib.contextmanager
def program(
    command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> Iterator[Program]:
    """Run a program, and stop it at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env={**os.environ, **(env or {})},
            )
        try:
            yield Program(process, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Upstream:
    """The process of the fake of the model's API."""

    def __init__(self, running: Program, url: str) -> None:
        self.program = running
        self.url = url

    def plan(self, **how: float) -> None:
        """Set how the next requests are answered, and reset the counts."""
        self._ask("/plan", json.dumps(how).encode())

    def stats(self) -> dict[str, Any]:
        """Return the counts; see `tests/bench/upstream.py`."""
        return self._ask("/stats", None)

    def writes(self) -> dict[int, list[float]]:
        """Return the times at which the tokens of each numbered stream were written."""
        return {int(number): moments for number, moments in self._ask("/writes", None).items()}

    def _ask(self, path: str, body: bytes | None) -> dict[str, Any]:
        self.program.check()
        with urllib.request.urlopen(self.url + path, body, BOUND) as answer:
            result: dict[str, Any] = json.load(answer)
            return result


@contextlib.contextmanager
def upstream() -> Iterator[Upstream]:
    """Run the fake of the model's API."""
    with program((sys.executable, "-m", "tests.bench.upstream")) as running:
        end = monotonic() + BOUND
        while not (url := running.log.read_text()).endswith("\n"):
            running.check()
            if monotonic() > end:
                raise Failure("the upstream did not start in time")
            sleep(0.01)
        yield Upstream(running, url.strip())


@dataclass
class Running:
    """A server that has answered on its port."""

    server: Server
    program: Program
    url: str
    started: float  # seconds from the start of the process until it answered


@contextlib.contextmanager
def serve(server: Server, base: str) -> Iterator[Running]:
    """Run a server that uses the upstream `base`, and wait until the server answers."""
    port = free_port()
    env = {"ANTHROPIC_API_KEY": "x", "ANTHROPIC_BASE_URL": base, "PORT": str(port)}
    env |= {"NODE_ENV": "production"}
    env |= {name: value.replace("{upstream}", base) for name, value in server.env.items()}
    command = [part.replace("{port}", str(port)) for part in server.command]
    cwd = ROOT if server.command[0] == sys.executable else INSTALLED
    with contextlib.ExitStack() as stack:
        if server.redis:
            env["REDIS_SOCKET"] = stack.enter_context(redis())
        began = monotonic()
        running = stack.enter_context(program(command, cwd=cwd, env=env))
        status = b"HTTP/1.1 " if server.http else b"HTTP/1.1 101 "
        while not answers(port, server.path, status):
            running.check()
            if monotonic() > began + BOUND:
                raise Failure(f"{server.name} did not answer on its port in time")
            sleep(0.002)
        started = monotonic() - began
        try:
            scheme = "http" if server.http else "ws"
            yield Running(server, running, f"{scheme}://127.0.0.1:{port}{server.path}", started)
        except Failure:
            sleep(0.1)  # if the server ends now, its output says more than the client's error
            running.check()
            raise


@contextlib.contextmanager
def redis() -> Iterator[str]:
    """Run a Redis without persistence, and yield the path of its unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "redis")
        command = ("redis-server", "--port", "0", "--unixsocket", str(path), "--save", "")
        with program(command, cwd=Path(folder)) as running:
            end = monotonic() + BOUND
            while not path.exists():
                running.check()
                if monotonic() > end:
                    raise Failure("Redis did not start in time")
                sleep(0.01)
            yield str(path)


def answers(port: int, path: str, status: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), BOUND) as sock:
            sock.sendall(HANDSHAKE % (path.encode(), port))
            return sock.recv(4096).startswith(status)
    except OSError:
        return False
