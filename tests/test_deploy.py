"""The files of examples/deploy, run with nginx, systemd and the Dockerfile's commands.

The tests replace only names, addresses and paths in these files.
"""

import asyncio
import contextlib
import grp
import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import tomllib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from websockets.asyncio.client import connect, unix_connect
from websockets.exceptions import InvalidStatus

from tests.support.client import Client
from tests.support.process import Process, run
from tests.support.puppet import BOUND
from tests.support.tools import ROOT, require_nginx, require_systemd
from wsserver import Settings
from wsserver.auth import tokens
from wsserver.descriptors import fit
from wsserver.program import LAST_MOMENT
from wsserver.settings import CHAT_TOKEN
from wsserver.sockets.listening import name_of

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "examples/deploy"
NAME = "chat.example.com"
PROGRAM = 160 * 2**20  # bytes of memory of an idle server, rounded up
CONNECTION = 20_000  # bytes of memory of an idle connection
SERVE = ("-m", "wsserver", "serve")
CLIENT, OTHER, THIRD = "127.0.0.5", "127.0.0.6", "127.0.0.7"  # addresses of this machine


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """Return a text with replacements. Each replaced text must exist."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a short path: the path of a unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ws-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """Return a folder with a certificate and its key."""
    with tempfile.TemporaryDirectory() as name:
        command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
        names = ("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}")
        files = ("-keyout", f"{name}/privkey.pem", "-out", f"{name}/fullchain.pem")
        subprocess.run((*command.split(), *names, *files), check=True, capture_output=True)
        yield Path(name)


# A model in another process, whose replies the test controls.

MODEL = """
import asyncio, os

async def model(request):
    lines, reply = await asyncio.open_unix_connection(os.environ["PUPPET"])
    try:
        async for line in lines:
            yield line.decode().rstrip("\\n")
    finally:
        reply.close()
"""


class Reply:
    """One call of the model."""

    def __init__(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, *pieces: str) -> None:
        for piece in pieces:
            self._writer.write(piece.encode() + b"\n")

    def end(self) -> None:
        self._writer.write_eof()

    async def closed(self) -> None:
        """Wait until the model has been closed."""
        async with asyncio.timeout(BOUND):
            assert await self._reader.read() == b""

    async def drop(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class Behind:
    """The server, its model, and a valid token."""

    def __init__(self, process: Process, replies: asyncio.Queue[Reply], token: str) -> None:
        self.process = process
        self.token = token
        self._replies = replies
        self._taken: list[Reply] = []

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    async def reply(self) -> Reply:
        """Wait for the next call of the model."""
        async with asyncio.timeout(BOUND):
            self._taken.append(await self._replies.get())
        return self._taken[-1]

    async def drop(self) -> None:
        for reply in self._taken:
            await reply.drop()


def unit(name: str) -> dict[str, list[str]]:
    """Return the values of a systemd unit by key; a key may repeat."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text().splitlines():
        if not line.startswith("#") and "=" in line:
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def unit_environment(folder: Path) -> dict[str, str]:
    """Return the settings of the unit, with a folder of this test and a new token."""
    lines = unit("wsserver.service")["Environment"]
    text = replaced(
        "\n".join(lines),
        ("%S", str(folder)),
        ("/etc/wsserver", str(folder)),
        ("OPERATIONS_PORT=9464", "OPERATIONS_PORT=0"),
    )
    (folder / "wsserver").mkdir()
    return dict(line.split("=", 1) for line in text.splitlines())


@contextlib.asynccontextmanager
async def serving(folder: Path, **settings: str) -> AsyncIterator[Behind]:
    """Run the server with the settings of the unit, at a unix socket."""
    replies: asyncio.Queue[Reply] = asyncio.Queue()

    def called(reader: StreamReader, writer: StreamWriter) -> None:
        replies.put_nowait(Reply(reader, writer))

    (folder / "mine.py").write_text(MODEL)
    token, line = tokens.new("alice")
    environment = {
        **unit_environment(folder),
        "WSSERVER_UNIX_SOCKET": str(folder / "s"),
        "WSSERVER_MODEL": "mine:model",
        "PUPPET": str(folder / "puppet"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        **settings,
    }
    tokens.add(folder / "tokens", line)
    listener = await asyncio.start_unix_server(called, folder / "puppet")
    try:
        async with run(*SERVE, cwd=None, **environment) as process:
            behind = Behind(process, replies, token)
            await process.line("Ctrl-C stops")
            try:
                yield behind
            finally:
                await behind.drop()
    finally:
        listener.close()


# nginx.


class Nginx:
    """A running nginx with the site of examples/deploy.

    Args:
        folder: the folder of its files.
        made: the folder of the certificate.
        process: the nginx process.
        port: the TLS port at 127.0.0.1.
        plain: the HTTP port.
    """

    def __init__(self, folder: Path, made: Path, process: Process, port: int, plain: int) -> None:
        self._folder = folder
        self._tls = ssl.create_default_context(cafile=str(made / "fullchain.pem"))
        self.process = process
        self.port = port
        self.plain = plain

    @property
    def origin(self) -> str:
        return f"https://{NAME}:{self.port}"

    @contextlib.asynccontextmanager
    async def client(
        self, headers: dict[str, str] | None = None, path: str = "/", **options: object
    ) -> AsyncIterator[Client]:
        """Connect through nginx."""
        address = options.pop("address", CLIENT)
        async with connect(
            f"wss://{NAME}:{self.port}{path}",
            host="127.0.0.1",
            port=self.port,
            ssl=self._tls,
            local_addr=(str(address), 0),
            additional_headers=headers,
            proxy=None,
            **options,  # type: ignore[arg-type]
        ) as socket_:
            yield Client(socket_)

    async def refused(self, headers: dict[str, str] | None = None, **options: object) -> int:
        """Connect, and return the status of the refusal."""
        with pytest.raises(InvalidStatus) as error:
            async with self.client(headers, **options):  # type: ignore[arg-type]
                raise AssertionError("it was let in")
        status = error.value.response.status_code
        if status in {429, 503}:
            assert int(error.value.response.headers["Retry-After"]) > 0
        return status

    async def get(self, path: str, *, tls: bool = True) -> tuple[int, str]:
        """Send an HTTP request; return the status, the head and the body."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.port if tls else self.plain,
            ssl=self._tls if tls else None,
            server_hostname=NAME if tls else None,
        )
        try:
            async with asyncio.timeout(BOUND):
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {NAME}\r\n".encode())
                writer.write(b"Connection: close\r\n\r\n")
                answer = (await reader.read()).decode(errors="replace")
                return int(answer.split()[1]), answer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def reload(self, shutdown: str) -> None:
        """Reload nginx with another time limit for old workers; wait until the old worker retires.

        A worker keeps the configuration of its start.
        """
        configure(self._folder, shutdown)
        self.process.signal(signal.SIGHUP)
        await self.process.line("gracefully shutting down")


def configure(folder: Path, shutdown: str) -> None:
    """Write the nginx configuration around the site, into a folder of this test."""
    user = ""
    if os.geteuid() == 0:  # the workers would run as a user without access to the folder
        group = grp.getgrgid(os.getegid()).gr_name
        user = f"user {pwd.getpwuid(0).pw_name} {group};"
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "main.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log stderr notice; worker_processes 1;\n"
        f"{shutdown}\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off;\n{paths}include {folder}/site.conf; }}\n"
    )


@contextlib.asynccontextmanager
async def nginx(
    folder: Path, made: Path, *replacements: tuple[str, str], shutdown: str = ""
) -> AsyncIterator[Nginx]:
    """Run the site of examples/deploy in front of the server at the unix socket."""
    program = require_nginx()
    with contextlib.ExitStack() as stack:
        # nginx inherits listening sockets, as in an upgrade of its program, so that no other
        # program can take the ports.
        sockets = [
            stack.enter_context(socket.create_server((host, 0)))
            for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.2")
        ]
        plain, plain_6, secure, secure_6 = (name_of(sock) for sock in sockets)
        site = replaced(
            (DEPLOY / "nginx.conf").read_text(),
            ("listen 80;", f"listen {plain};"),
            ("listen [::]:80;", f"listen {plain_6};"),
            ("listen 443 ssl;", f"listen {secure} ssl;"),
            ("listen [::]:443 ssl;", f"listen {secure_6} ssl;"),
            ("/run/wsserver.sock", str(folder / "s")),
            (f"/etc/letsencrypt/live/{NAME}", str(made)),
            *replacements,
        )
        (folder / "site.conf").write_text(site)
        configure(folder, shutdown)
        descriptors = [sock.fileno() for sock in sockets]
        process = await asyncio.create_subprocess_exec(
            *(program, "-p", str(folder), "-c", str(folder / "main.conf"), "-e", "stderr"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "NGINX": "".join(f"{number};" for number in descriptors)},
            pass_fds=descriptors,
            start_new_session=True,
        )
        try:
            running = Process(process)
            await running.line("start worker process ")
            port, plain_port = (sockets[i].getsockname()[1] for i in (2, 0))
            yield Nginx(folder, made, running, port, plain_port)
            running.signal(signal.SIGTERM)
            assert await running.end() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its workers
            await process.communicate()


async def test_nginx_passes_pieces_at_once_and_stop_closes_model(folder: Path, made: Path) -> None:
    async with serving(folder) as behind, nginx(folder, made) as front:
        spoofed = {"X-Forwarded-For": "192.0.2.66", "Forwarded": "for=192.0.2.66"}
        async with front.client(behind.bearer | spoofed, path="/ws") as chat:
            start = await chat.prompt()
            reply = await behind.reply()
            for number in range(1, 6):
                reply.say(f"{number} ")  # no other piece has come before this one
                token = await chat.next("token")
                assert (token["text"], token["seq"]) == (f"{number} ", number)
            await chat.send({"type": "stop"})
            text, done = await chat.text(start["id"])
            assert (text, done["reason"], done["by"]) == ("1 2 3 4 5 ", "stopped", "client")
            await reply.closed()
        told = await behind.process.line('"event": "connection"')
        assert f'"address": "{CLIENT}"' in told.string, "the client's, and not what it claims"
        assert '"code": 1000' in told.string
        # The server restarts, with its close code.
        async with front.client(behind.bearer) as chat:
            await chat.quiet()
            behind.process.signal(signal.SIGTERM)
            closed = await chat.closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1012
        assert await behind.process.end() == 0
        assert await front.refused(behind.bearer) == 502


async def test_nginx_passes_only_own_pages_and_clients_with_token(folder: Path, made: Path) -> None:
    async with serving(folder) as behind, nginx(folder, made) as front:
        own = {"Origin": front.origin}
        async with front.client(own) as chat:
            assert (await chat.prompt())["code"] == "unauthenticated"
            await chat.send({"type": "auth", "token": behind.token})
            assert (await chat.next("authenticated"))["principal"] == "alice"
            start = await chat.prompt()
            reply = await behind.reply()
            reply.say("for alice")
            reply.end()
            assert (await chat.text(start["id"]))[0] == "for alice"
        assert await front.refused() == 401
        assert await front.refused({"Authorization": "Bearer wrong"}) == 401
        for page in ("https://example.com", f"http://{NAME}:{front.port}", f"https://{NAME}"):
            assert await front.refused(behind.bearer | {"Origin": page}) == 403, page

        status, page = await front.get("/")
        assert status == 200
        assert "Strict-Transport-Security" in page
        assert "<!doctype html>" in page.lower()
        for name in re.findall(r'(?:href|src)="([\w./-]+)"', page):
            assert (await front.get(f"/{name}"))[0] == 200, name
        assert (await front.get("/ws"))[0] == 426
        assert (await front.get("/healthz"))[0] == 200
        secret = ("/metrics", "/readyz", "//metrics", "/ws/../metrics", "/%6detrics", "/metrics/")
        for path in (*secret, "/healthz/../readyz", "/metrics?x", "/else"):
            status, answer = await front.get(path)
            assert status == 404, path
            assert "<center>nginx" in answer, "the server was not even asked"
        status, answer = await front.get("/a?b=c", tls=False)
        assert status == 301
        assert f"Location: https://{NAME}/a?b=c\r\n" in answer


async def test_reply_continues_over_nginx_reloads(folder: Path, made: Path) -> None:
    async with serving(folder) as behind, nginx(folder, made) as front:
        async with front.client(behind.bearer) as first:
            name = (await first.prompt())["id"]
            reply = await behind.reply()
            reply.say("one ")
            await first.next("token")
            # The old worker has no time limit, and keeps its socket; the next has a short limit.
            await front.reload("worker_shutdown_timeout 1ms;")
            reply.say("two ")
            assert (await first.next("token"))["text"] == "two "
            async with front.client(behind.bearer) as second:
                await second.send({"type": "resume", "id": name, "after": 1})
                seq = (await second.next("token"))["seq"]
                await front.reload("")
                assert (await second.closed()).rcvd is None, "it has been cut"
            reply.say("three ")
            assert (await first.next("token"))["text"] == "three "
        # The first client has gone too, so no client follows the reply.
        async with front.client(behind.bearer) as third:
            await third.send({"type": "resume", "id": name, "after": seq})
            reply.say("four")
            reply.end()
            text, done = await third.text(name)
            assert (second.said(name), text) == ("two ", "three four")
            assert (done["reason"], done["seq"]) == ("end_turn", 4)


async def test_server_limits_pass_through_nginx(folder: Path, made: Path) -> None:
    limits = {"WSSERVER_CONNECTIONS": "3", "WSSERVER_CONNECTIONS_PER_ADDRESS": "2"}
    async with serving(folder, **limits) as behind, nginx(folder, made) as front:
        async with front.client(behind.bearer), front.client(behind.bearer):
            async with front.client(behind.bearer, address=OTHER):
                assert await front.refused(behind.bearer, address=THIRD) == 503
            async with asyncio.timeout(BOUND):
                while (status := await front.refused(behind.bearer)) == 503:
                    pass  # until the server has noticed that the third client has gone
            assert status == 429


async def test_nginx_limits_connections_per_second(folder: Path, made: Path) -> None:
    slow = (("rate=10r/s", "rate=1r/m"), ("burst=100", "burst=3"))
    async with nginx(folder, made, *slow) as front:
        answers = [await front.refused() for _ in range(6)]
        assert answers == [502, 502, 502, 502, 429, 429]
        assert await front.refused(address=OTHER) == 502, "each address has its own"


def test_nginx_limits_exceed_server_limits() -> None:
    site = (DEPLOY / "nginx.conf").read_text()
    settings = Settings()
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        match = re.search(rf"^ *{name} (\d+)s;$", site, re.MULTILINE)
        assert match is not None, name
        assert int(match[1]) > settings.ping_interval + settings.ping_timeout
    match = re.search(r"worker_connections (\d+);", site)
    assert match is not None
    assert int(match[1]) >= 2 * settings.connections


# systemd.


def test_systemd_units_are_valid_and_restricted(folder: Path) -> None:
    analyze = require_systemd("systemd-analyze")
    service = (DEPLOY / "wsserver.service").read_text()
    program = ("/opt/wsserver/bin/wsserver", shutil.which("true") or "")
    (folder / "wsserver.service").write_text(replaced(service, program))
    shutil.copy(DEPLOY / "wsserver.socket", folder)
    names = ("./wsserver.service", "./wsserver.socket")
    for arguments in (
        ("verify", *names),
        ("security", "--offline=true", "--threshold=20", names[0]),
    ):
        done = subprocess.run(
            (analyze, "--no-pager", *arguments),
            check=False,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BOUND,
        )
        # It only warns about lines that it cannot parse, and exits with 0.
        warned = re.findall(r"^.*wsserver\.(?:service|socket):.*$", done.stdout, re.MULTILINE)
        warned = [line for line in warned if "Overall exposure" not in line]
        assert (done.returncode, warned) == (0, []), done.stdout


def test_systemd_unit_limits_fit_default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    service, settings = unit("wsserver.service"), Settings()
    assert int(service["TimeoutStopSec"][0]) > settings.shutdown_timeout + LAST_MOMENT
    assert service["MemoryMax"] == ["1G"]
    assert settings.memory + PROGRAM + CONNECTION * settings.connections <= 2**30
    limit = int(service["LimitNOFILE"][0])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert fit(settings) is settings
    assert service["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


async def test_systemd_starts_unit_for_first_client(tmp_path: Path) -> None:
    activate = require_systemd("systemd-socket-activate")
    with tempfile.TemporaryDirectory(prefix="ws-") as name:
        folder = Path(name)
        (listen,) = unit("wsserver.socket")["ListenStream"]
        path = replaced(listen, ("/run", name))
        assert f"server unix:{listen};" in (DEPLOY / "nginx.conf").read_text()
        environment = {**unit_environment(folder), "PYTHONPATH": str(ROOT)}
        environment["WSSERVER_DEMO_RATE"] = "0"
        token, line = tokens.new("alice")
        tokens.add(folder / "tokens", line)
        command = shlex.split(unit("wsserver.service")["ExecStart"][0])
        assert command[0] == "/opt/wsserver/bin/wsserver"
        keep = [word for item in environment.items() for word in ("-E", "=".join(item))]
        process = await asyncio.create_subprocess_exec(
            *(activate, "-l", path, *keep, sys.executable, "-m", "wsserver", *command[1:]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            activated = Process(process)
            await activated.line("Listening on")
            headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": "192.0.2.7"}
            async with unix_connect(
                path, f"ws://{NAME}/", additional_headers=headers, open_timeout=BOUND
            ) as socket_:
                chat = Client(socket_)
                start = await chat.prompt("Hello there")
                assert (await chat.text(start["id"]))[1]["reason"] == "end_turn"
            with pytest.raises(InvalidStatus, match="401"):
                async with unix_connect(path, f"ws://{NAME}/"):
                    raise AssertionError
            with pytest.raises(InvalidStatus, match="421"):
                async with unix_connect(path, "ws://else.example/", additional_headers=headers):
                    raise AssertionError
            activated.signal(signal.SIGTERM)
            assert await activated.end() == 0
            assert '"address": "192.0.2.7"' in activated.output
            assert (folder / "wsserver/conversations.sqlite").exists()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


# The container.


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile and their arguments."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    words = (line.partition(" ") for line in joined.splitlines() if line)
    return [(word, rest.strip()) for word, _, rest in words]


def the_last(name: str) -> str:
    return [rest for word, rest in instructions() if word == name][-1]


def exec_form(text: str) -> list[str]:
    """Return a command in exec form."""
    words: list[str] = json.loads(text)
    return words


def image_environment() -> dict[str, str]:
    pairs = (word.split("=", 1) for word in shlex.split(the_last("ENV")))
    return {name: value for name, value in pairs if name.startswith("WSSERVER_")}


def image_command() -> tuple[str, ...]:
    program, *arguments = exec_form(the_last("ENTRYPOINT")) + exec_form(the_last("CMD"))
    assert program == "wsserver"
    return ("-m", "wsserver", *arguments)


def test_image_copies_needed_files() -> None:
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    needed.append("hatch_build.py")
    needed += project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(needed) <= set(copied)
    (extras,) = re.findall(
        r'pip install .*"\.\[([\w,]+)\]"',
        next(rest for word, rest in instructions() if word == "RUN"),
    )
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    base = {rest.split()[0] for word, rest in instructions() if word == "FROM"}
    assert len(base) == 1, "what was built with one Python may not run with another"
    (version,) = re.findall(r"python:(\d+)\.(\d+)-slim", base.pop())
    (least,) = re.findall(r">=(\d+)\.(\d+)", project["project"]["requires-python"])
    assert tuple(map(int, version)) >= tuple(map(int, least))


def test_image_user_is_unprivileged_and_owns_volume() -> None:
    user = the_last("USER").partition(":")[0]
    assert int(user) > 0
    made = the_last("RUN")
    assert f"--uid {user} " in made
    assert f"--owner={user} " in made
    assert made.endswith(" " + the_last("VOLUME"))
    settings = Settings.load(
        **{k.removeprefix("WSSERVER_").lower(): v for k, v in image_environment().items()}
    )
    assert settings.store.startswith(f"sqlite:///{the_last('VOLUME')}/")
    assert the_last("EXPOSE").split() == [str(settings.port), str(settings.operations_port)]


async def test_image_does_not_serve_anonymous_clients() -> None:
    image = image_environment() | {"WSSERVER_PORT": "0", "WSSERVER_STORE": "memory:"}
    assert image["WSSERVER_HOST"] == "0.0.0.0"
    no_file = {"WSSERVER_TOKEN_FILE": "/nowhere/tokens"}
    for changed, says in (
        (no_file, "token_file: "),
        ({"WSSERVER_TOKEN_FILE": ""}, "without a token"),
    ):
        async with run(
            *image_command(), cwd=None, **image | changed, PYTHONPATH=str(ROOT)
        ) as process:
            assert await process.end() == 2
            assert process.output.count("\n") == 1
            assert says in process.output


async def test_image_health_check_tells_state_of_server(folder: Path) -> None:
    image = image_environment()
    assert image["WSSERVER_TOKEN_FILE"].startswith("/etc/wsserver/")
    image |= {
        "WSSERVER_HOST": "127.0.0.1",
        "WSSERVER_PORT": "0",
        "WSSERVER_OPERATIONS_HOST": "127.0.0.1",
        "WSSERVER_OPERATIONS_PORT": "0",
        "WSSERVER_TOKEN_FILE": str(folder / "tokens"),
        "WSSERVER_STORE": replaced(image["WSSERVER_STORE"], (the_last("VOLUME"), str(folder))),
    }
    tokens.add(folder / "tokens", tokens.new("alice")[1])
    program, *probe = exec_form(the_last("HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    async with run(*image_command(), cwd=None, **image, PYTHONPATH=str(ROOT)) as process:
        port = (await process.line(r"ws://127\.0\.0\.1:(\d+)/"))[1]
        # As if the environment has a proxy.
        environment = {"WSSERVER_PORT": port, "http_proxy": "http://127.0.0.1:9"}
        async with run(*probe, cwd=None, **environment) as asked:
            assert await asked.end() == 0, asked.output
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
        async with run(*probe, cwd=None, **environment) as asked:
            assert await asked.end() == 1


# All files.


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_settings_named_in_deployment_files_exist(path: Path) -> None:
    known = {CHAT_TOKEN, *(f"WSSERVER_{name.upper()}" for name in Settings.model_fields)}
    for name in re.findall(r"WSSERVER_[A-Z_]+", path.read_text()):
        assert any(fnmatch(one, name + ("*" if name.endswith("_") else "")) for one in known), name
    flags = {"--" + name.lower().replace("_", "-") for name in Settings.model_fields}
    for command in re.findall(r"wsserver serve([^`;]*)", path.read_text()):
        assert set(re.findall(r"--[a-z-]+", command)) <= flags
