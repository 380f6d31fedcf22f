"""What ``wsserver chat`` says when it cannot connect: one sentence, with what to do."""

import asyncio
import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve

import wsserver
from tests.support.puppet import Puppet
from tests.support.replies import url_of
from tests.support.terminal import once, outcome, terminal
from wsserver import Code
from wsserver.client import ConnectionFailed, ReplyError
from wsserver.terminal.wording import describe_error, describe_failure

# Python 3.12 warns about a fork in a process with threads, as for a pseudo-terminal.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning"),
    pytest.mark.slow,
]


TOKENS = f"ada sha256:{hashlib.sha256(b'good').hexdigest()}"

NEEDS_TOKEN = "the server needs a valid token: set WSSERVER_CHAT_TOKEN to one (unauthenticated)"


async def told(url: str, **env: str) -> str:
    """Return the one line that the program says about an address; it must fail."""
    async with once(url, "--once", "Hi", **env) as process:
        code, out, err = await outcome(process)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    return err.removeprefix("wsserver: ").rstrip("\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_dead_port_says_how_to_start_server(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"ws://{host}:{free.getsockname()[1]}/"
    assert await told(url) == (
        f"no server listens at {url}: start one with `wsserver serve`, or correct the host and the "
        "port"
    )


async def test_unknown_host_says_to_correct_address() -> None:
    said = await told("ws://name:secret@no-such-host.invalid:3001/")
    assert said.startswith("there is no host 'no-such-host.invalid' (")
    assert said.endswith("): correct the address")


async def test_wrong_token_says_where_to_set_it(puppet: Puppet) -> None:
    async with wsserver.serve(puppet, port=0, tokens=TOKENS, drain_timeout=0) as server:
        said = await told(server.url, WSSERVER_CHAT_TOKEN="wrong")
        assert said.startswith(f"{server.url} refuses the token (")
        assert said.endswith("): set WSSERVER_CHAT_TOKEN to a valid one")
        async with terminal(server.url, size="300x30", WSSERVER_CHAT_TOKEN="wrong") as person:
            assert await person.leaves() == 1
            assert said in person.text


@pytest.mark.parametrize("arguments", [(), ("-c",)])
async def test_missing_token_says_where_to_set_it(
    puppet: Puppet, arguments: tuple[str, ...]
) -> None:
    async with (
        wsserver.serve(puppet, port=0, tokens=TOKENS, drain_timeout=0) as server,
        once(server.url, *arguments, "--once", "Hi") as process,
    ):
        assert await outcome(process) == (
            1,
            "",
            f"wsserver: {NEEDS_TOKEN}\n",
        )


async def test_untrusted_certificate_says_which_variable_to_set(
    puppet: Puppet, tmp_path: Path
) -> None:
    pem, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    async with wsserver.serve(
        puppet, port=0, cert=str(pem), key=str(key), drain_timeout=0
    ) as server:
        url = f"wss://127.0.0.1:{server.port}/"
        assert await told(url) == (
            f"the certificate of {url} is not trusted (self-signed certificate): correct the host "
            "name, or set SSL_CERT_FILE to the certificate of its issuer"
        )
        assert "wss://" in await told(f"ws://127.0.0.1:{server.port}/")
        async with once(url, "--once", "Hi", SSL_CERT_FILE=str(pem)) as process:
            (await puppet.reply()).say("Hello").end()
            assert await outcome(process) == (0, "Hello\n", "")


async def test_server_without_tls_says_to_use_ws(server: wsserver.Server) -> None:
    said = await told(server.url.replace("ws://", "wss://"))
    assert "does not speak TLS" in said
    assert said.endswith("try ws:// instead")


async def test_other_web_server_says_to_correct_address(server: wsserver.Server) -> None:
    said = await told(server.url + "no/such/path")
    assert "does not answer as wsserver does" in said
    assert said.endswith("correct host, port and path")


async def test_slow_connection_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/"
        async with terminal(url, size="300x30") as person:
            await person.sees(f"wsserver: connecting to {url}")
            assert await person.leaves() == 1
            assert "did not answer in time: check the address" in person.text


async def test_final_close_during_dialogue_ends_it_in_words() -> None:
    async def close(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.close(1008, "unauthenticated")

    async with serve(close, "127.0.0.1", 0) as server, terminal(url_of(server)) as person:
        await person.ready()
        person.types("Hi\r")
        assert await person.leaves() == 1
        assert "needs a token" in person.text


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("localhost:3001", "write ws://localhost:3001"),
        ("http://localhost:3001/x", "write ws://localhost:3001/x"),
        ("https://chat.example/", "write wss://chat.example/"),
        ("ftp://localhost", "such as ws://localhost:3001"),
        ("ws://", "such as ws://localhost:3001"),
        ("ws://[::1", "such as ws://localhost:3001"),
        ("ws://localhost:port", "such as ws://localhost:3001"),
    ],
)
async def test_unusable_address_says_what_to_write(url: str, hint: str) -> None:
    async with once(url, "--once", "Hi") as process:
        code, out, err = await outcome(process)
    assert (code, out) == (2, "")
    assert err == f"wsserver: {url!r} is not the address of a WebSocket server: {hint}\n"


def test_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsserver.errors import ConfigError
    from wsserver.terminal.options import Options, read_prompt

    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(ConfigError, match="a dialogue needs rich: pip install"):
        read_prompt(Options())


def test_forbidden_client_is_sent_to_operator() -> None:
    failure = ConnectionFailed("This network may not connect.", status=403)
    assert describe_failure(failure, "ws://ada:secret@host/", has_token=True) == (
        "ws://host/ refuses this client (This network may not connect): ask the operator of the "
        "server"
    )


@pytest.mark.parametrize(
    ("code", "after", "shown"),
    [
        (Code.INTERNAL, None, f"{Code.INTERNAL.meaning} (internal) Reference: abc"),
        (Code.REFUSAL, None, f"{Code.REFUSAL.meaning} (refusal)"),
        (Code.TIMEOUT, None, f"{Code.TIMEOUT.meaning} (timeout)"),
        (Code.BUSY, None, f"{Code.BUSY.meaning} (busy); try again"),
        (Code.QUOTA, 60.2, f"{Code.QUOTA.meaning} (quota); try again in 60 s"),
    ],
)
def test_error_has_time_and_reference_where_they_help(
    code: Code, after: float | None, shown: str
) -> None:
    error = ReplyError(code, code.meaning, retryable=code.retryable, retry_after=after, ref="abc")
    assert describe_error(error) == shown
