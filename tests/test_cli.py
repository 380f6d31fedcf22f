"""The command line, run as a process for signals and exit codes."""

import asyncio
import json
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

import wsserver
from tests.support.client import Client
from tests.support.postgres import PASSWORD, Postgres
from tests.support.process import Process, run
from wsserver import Settings
from wsserver.cli import main
from wsserver.settings import REMOVED, SECRETS

pytestmark = pytest.mark.slow

SERVE = ("-m", "wsserver", "serve", "--port", "0")


async def url(process: Process) -> str:
    return (await process.line(r"(ws://\S+)"))[1]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command in this process; return its one line on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


async def test_start_prints_addresses_and_warns_about_demo_model() -> None:
    async with run(*SERVE) as process:
        match = await process.line(r"(http://127\.0\.0\.1:\d+/)")
        assert "demo" in process.output
        assert "ANTHROPIC_API_KEY" in process.output
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            start = await chat.prompt("Hello there")
            assert start["model"] == "demo"
            assert (await chat.next("token"))["text"]
        assert match[1].replace("http", "ws") in process.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains_and_exits_with_code_0(number: signal.Signals) -> None:
    async with run(*SERVE, "--demo-rate", "0") as process:
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            start = await chat.prompt("Hello there")
            process.signal(number)
            text, done = await chat.text(start["id"])
            assert done["reason"] == "end_turn"
            assert text.endswith("start the server again.")
            closed = await chat.closed()
            assert closed.rcvd is not None
            assert closed.rcvd.code == 1012
        assert await process.end() == 0
        assert "Traceback" not in process.output


async def test_second_ctrl_c_exits_at_once() -> None:
    # The reply takes an hour, and the drain waits for it.
    slow = ("--demo-rate", "0.001", "--drain-timeout", "3600", "--shutdown-timeout", "3600")
    async with run(*SERVE, *slow) as process:
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            await chat.prompt("Hello there")
            process.signal(signal.SIGINT)
            await process.line("Ctrl-C again")
            process.signal(signal.SIGINT)
            assert await process.end() == 0
            assert "Traceback" not in process.output
            await chat.closed()


async def test_model_ignoring_cancellation_does_not_block_exit(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import asyncio, threading\n"
        "async def stubborn(request):\n"
        "    yield 'here'\n"
        "    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)\n"
        "    while True:\n"
        "        try: await asyncio.sleep(3600)\n"
        "        except asyncio.CancelledError: pass\n"
    )
    quick = ("--drain-timeout", "0", "--stop-timeout", "0.1")
    async with run(*SERVE, *quick, "--model", "mine:stubborn", cwd=tmp_path) as process:
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            await chat.prompt()
            await chat.next("token")
            process.signal(signal.SIGTERM)
            await chat.closed()
        assert await process.end() == 0
        assert "Traceback" not in process.output


async def test_flags_override_the_environment(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("async def parrot(request): yield request.prompt\n")
    environment = {"WSSERVER_MODEL": "demo", "WSSERVER_MODELS": "other-model"}
    async with run(*SERVE, "--model", "mine:parrot", cwd=tmp_path, **environment) as process:
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            start = await chat.prompt("Say this", model="other-model")
            assert await chat.text(start["id"]) == ("Say this", chat.frames[-1])
            assert start["model"] == "other-model"


@pytest.mark.parametrize(
    ("asked", "installed", "runs"),
    [
        ("auto", True, "uvloop"),
        ("auto", False, "asyncio"),
        ("uvloop", True, "uvloop"),
        ("asyncio", True, "asyncio"),
    ],
)
async def test_event_loop_setting_chooses_loop(
    asked: str, installed: bool, runs: str, tmp_path: Path
) -> None:
    if not installed:
        (tmp_path / "uvloop.py").write_text("raise ImportError\n")
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "async def mine(request): yield type(asyncio.get_running_loop()).__module__\n"
    )
    arguments = (*SERVE, "--model", "mine:mine", "--event-loop", asked)
    async with run(*arguments, cwd=tmp_path) as process:
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            text, _ = await chat.text((await chat.prompt("Which?"))["id"])
            assert text.partition(".")[0] == runs


def test_missing_uvloop_is_refused_if_required(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)  # as if it were not installed
    assert "uvloop is not installed" in fails(capsys, "serve", "--event-loop", "uvloop")


async def test_error_of_second_server_names_other_port_and_stores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with run(*SERVE) as process:
        first = await url(process)
        # As if the same command is given twice: the port is in use too.
        line = await asyncio.to_thread(fails, capsys, "serve", "--port", first.split(":")[-1][:-1])
        assert "conversations.sqlite" in line
        assert "--port" in line
        assert "--store sqlite:///PATH" in line
        assert "--store memory:" in line
        async with run(*SERVE, "--store", "memory:") as second:
            await url(second)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SECRETS))
async def test_secret_in_flag_logs_warning_without_secret(name: str) -> None:
    flag, secret = "--" + name.replace("_", "-"), "hunter2-hunter2-hunter2-hunter2-hunter2"
    async with run("-m", "wsserver", "serve", "--port", "0", flag, secret) as process:
        await process.line("can see a secret")
        await process.line("websocket")
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    assert f"{flag}-file" in process.output
    assert f"WSSERVER_{name.upper()}" in process.output
    assert "hunter2" not in process.output


@pytest.mark.slow
async def test_start_tells_where_conversations_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "chats.sqlite"
    for store, shown in [(f"sqlite:///{file}", str(file)), ("memory:", "memory, until")]:
        async with run("-m", "wsserver", "serve", "--port", "0", "--store", store) as process:
            await process.line(rf"^  store +{shown}")


@pytest.mark.slow
async def test_password_of_store_in_flag_logs_warning_and_is_nowhere(postgres: Postgres) -> None:
    async with run("-m", "wsserver", "serve", "--port", "0", "--store", postgres.url()) as process:
        await process.line("can see a password")
        await process.line("websocket")
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    assert PASSWORD not in process.output


def test_port_in_use_is_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails(capsys, "serve", "--port", port)
    assert "in use" in line
    assert port in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--port", "http"], "port: "),
        (["serve", "--colour", "red"], "there is no --colour; see wsserver serve --help"),
        (["serve", "--prot=80"], "there is no --prot; did you mean --port?"),
        (["chat", "--modle", "x"], "there is no --modle; did you mean --model?"),
        (["chat", "ws://localhost:1", "Hello"], "'Hello' is too much; see wsserver chat --help"),
        (["schema", "--async"], "there is no --async; did you mean --asyncapi?"),
        (["token", "new", "ada", "--fil", "x"], "there is no --fil; did you mean --file?"),
        (["serve", "--grace", "-1"], "grace: "),
        (["serve", "--model", "gpt"], "model: 'gpt' is no model; choose demo"),
        (["serve", "--model", "no.such:model"], "no module and no provider 'no'"),
        (["serve", "--model", "mistral:large"], "no provider 'mistral'; choose demo, anthropic:"),
        (["serve", "--model", "openai:gpt-5"], "openai:gpt-5 needs OPENAI_API_KEY; or set"),
        (["serve", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["sing"], "sing"),
        ([], "COMMAND"),
    ],
)
def test_invalid_arguments_exit_with_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert says in fails(capsys, *arguments)


def test_invalid_environment_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSSERVER_SEND_TIMEOUT", "soon")
    assert "WSSERVER_SEND_TIMEOUT: " in fails(capsys, "serve")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command in this process; return its stdout."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_fits_two_screens_with_main_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(capsys, "serve", "--help").splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    first = [name for names in Settings.sections(tuning=False).values() for name in names]
    assert flags == ["--" + name.replace("_", "-") for name in first]


def test_help_of_serve_names_models_and_limits_that_are_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "serve", "--help")
    for model in ("demo", "claude-…", "openai:NAME", "module:function"):
        assert model in text
    assert "[off]" in text
    assert "[0]" not in text


@pytest.mark.parametrize("command", [[], ["token"], ["store"], ["schema"]])
def test_help_says_what_commands_do(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    usage, about, *_ = shown(capsys, *command, "--help").split("\n\n")
    assert usage.startswith(" ".join(["usage: wsserver", *command]))
    assert about[0].isupper(), "a sentence"
    assert "positional arguments" not in about


@pytest.mark.parametrize("name", REMOVED)
def test_error_of_removed_setting_names_replacement(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REMOVED[name] in fails(capsys, "serve", "--" + name.replace("_", "-"), "1")
    monkeypatch.setenv(f"WSSERVER_{name.upper()}", "1")
    line = fails(capsys, "serve")
    assert line.startswith(f"wsserver: WSSERVER_{name.upper()}: this setting was removed")
    assert REMOVED[name] in line


def test_help_all_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "serve", "--help-all")
    words = "".join(text.split())  # without spaces, because the help breaks lines also at hyphens
    for name, field in Settings.model_fields.items():
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
        assert f"[WSSERVER_{name.upper()}]" in words, name
        assert "".join((field.description or "?").split()) in words, name


async def test_failures_of_threads_and_finalizers_are_logged(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import threading\n"
        "class Bad:\n"
        "    def __del__(self): raise KeyError('a secret')\n"
        "def fail(): raise KeyError('a secret')\n"
        "async def failing(request):\n"
        "    Bad()\n"
        "    thread = threading.Thread(target=fail)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    yield 'done'\n"
    )
    async with run(*SERVE, "--model", "mine:failing", cwd=tmp_path) as process:
        async with connect(await url(process), proxy=None) as socket_:
            chat = Client(socket_)
            assert (await chat.text((await chat.prompt())["id"]))[0] == "done"
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    lines = [json.loads(line) for line in process.output.splitlines() if line.startswith("{")]
    events = {line["event"]: line for line in lines}
    for event in ("exception ignored", "thread failed"):
        assert events[event]["level"] == "error"
        assert events[event]["failure"] == "KeyError"
    assert "a secret" not in process.output


async def test_chat_with_token_flag_warns_on_stderr_only() -> None:
    async with wsserver.serve("demo", port=0, demo_rate=0) as server:
        arguments = ("chat", server.url, "--once", "Hello", "--token", "hunter2")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "wsserver", *arguments, stdout=PIPE, stderr=PIPE
        )
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    assert process.returncode == 0
    assert out.decode().startswith("This is the demo model")
    assert "WSSERVER_CHAT_TOKEN" in err.decode()
    assert "hunter2" not in (out + err).decode()


@pytest.mark.parametrize(
    ("days", "says"), [("soon", "'soon' is not a number of days"), ("9" * 12, "days are too many")]
)
def test_invalid_token_days_are_one_line_error(
    capsys: pytest.CaptureFixture[str], days: str, says: str
) -> None:
    assert says in fails(capsys, "token", "new", "alice", "--days", days)


def test_token_new_without_file_prints_line_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["token", "new", "alice", "--days", "7"])
    assert exit_.value.code == 0
    captured = capsys.readouterr()
    assert re.fullmatch(r"wss_\S+\n", captured.out)
    assert re.search(r"^alice sha256:[0-9a-f]{64} \d{4}-\d\d-\d\d$", captured.err, re.MULTILINE)


def test_version_command_prints_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"wsserver {wsserver.__version__}\n"


def test_schema_command_prints_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["schema"])
    assert exit_.value.code == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"client", "server"} <= set(schema["$defs"])
