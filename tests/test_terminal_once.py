"""``wsserver chat --once``, and errors before ``wsserver chat`` begins."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wsserver
from tests.support.completions import failure
from tests.support.line import Line
from tests.support.puppet import BOUND, Puppet, until
from tests.support.terminal import once, outcome, terminal
from tests.support.upstream import Upstream
from wsserver import Code, End, ModelError
from wsserver.cli import main
from wsserver.client import connect
from wsserver.terminal import Options, Terminal

CONVERSATION = "a-conversation-of-mine"

pytestmark = pytest.mark.slow


async def test_once_prints_only_text(server: wsserver.Server, puppet: Puppet) -> None:
    async with once(
        server.url, "--once", "Hi", "--system", "Be kind", "--conversation", CONVERSATION
    ) as process:
        reply = await puppet.reply()
        reply.say("Héllo\x1b[1m\r\n", "you").end()
        assert await outcome(process) == (0, "Héllo\x1b[1m\r\nyou\n", "")
        assert reply.request.system == "Be kind"
    async with connect(server.url) as chat:
        assert [known.id for known in await chat.conversations()] == [CONVERSATION]


async def test_once_reads_prompt_from_pipe(server: wsserver.Server, puppet: Puppet) -> None:
    async with once(server.url, "--once", "-", given="two\nlines 🦆\n") as process:
        reply = await puppet.reply()
        assert reply.request.prompt == "two\nlines 🦆\n"
        reply.say("x").end()
        assert process.stdout is not None
        async with asyncio.timeout(BOUND):
            assert await process.stdout.read() == b"x\n"
            assert await process.wait() == 0


async def test_piped_text_comes_before_prompt(server: wsserver.Server, puppet: Puppet) -> None:
    async with once(server.url, "--once", "Summarise", given="one\ntwo\n\n") as process:
        reply = await puppet.reply()
        assert reply.request.prompt == "one\ntwo\n\nSummarise"
        reply.say("x").end()
        assert await outcome(process) == (0, "x\n", "")


@pytest.mark.parametrize("prompt", ["-", "Summarise"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
async def test_binary_stdin_is_refused(prompt: str, locale: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        'printf "\\211PNG\\377" | "$0" -m wsserver chat --once "$1"',
        *(sys.executable, prompt),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LC_ALL": locale},
    )
    code, out, err = await outcome(process)
    assert (code, out) == (2, "")
    assert err.startswith("wsserver: stdin is not UTF-8 text: convert it")


async def test_file_comes_before_prompt_and_device_does_not(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("a note\n")
    for number, (name, prompt) in enumerate(
        [(str(tmp_path / "notes"), "a note\n\nSummarise"), ("/dev/null", "Summarise")]
    ):
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            'exec "$0" -m wsserver chat "$1" --once Summarise <"$2"',
            *(sys.executable, server.url, name),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        reply = await puppet.reply(number)
        assert reply.request.prompt == prompt
        reply.say("x").end()
        assert await outcome(process) == (0, "x\n", "")


async def test_piped_text_over_size_limit_is_refused_with_its_size(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with once(server.url, "--once", "Summarise", given=5_000_000 * "x") as process:
        code, out, err = await outcome(process)
    assert (code, out) == (1, "")
    assert "The prompt has 5,000,011 bytes; 32,768 are allowed." in err


async def test_last_line_of_once_ends_once(server: wsserver.Server, puppet: Puppet) -> None:
    for number, (text, shown) in enumerate([("a\nb", "a\nb\n"), ("a\n", "a\n"), ("", "")]):
        async with once(server.url, "--once", "Hi") as process:
            (await puppet.reply(number)).say(text).end()
            assert await outcome(process) == (0, shown, "")


async def test_once_continues_last_conversation(server: wsserver.Server, puppet: Puppet) -> None:
    for number, arguments in enumerate([(), ("-c",)]):
        async with once(server.url, "--once", f"Prompt {number}", *arguments) as process:
            (await puppet.reply(number)).say("x").end()
            assert await outcome(process) == (0, "x\n", "")
    assert [m.content for m in puppet.replies[1].request.messages] == ["Prompt 0", "x", "Prompt 1"]


async def test_once_tells_lost_connection_and_continues(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, once(line.url, "--once", "Hi") as process:
        said = (await puppet.reply()).say("Once ")
        assert process.stdout is not None
        async with asyncio.timeout(BOUND):
            assert await process.stdout.read(5) == b"Once "
        line.cut()
        said.say("upon").end()
        line.mend()
        code, out, err = await outcome(process)
    assert (code, out) == (0, "upon\n")
    assert err == (
        "wsserver: connection lost, trying again… The text so far stays.\n"
        "wsserver: connected again\n"
    )


async def test_once_without_url_starts_private_server() -> None:
    async with once("--once", "Hello", WSSERVER_DEMO_RATE="0", WSSERVER_TOKEN_FILE="") as process:
        code, out, err = await outcome(process)
    assert (code, out[:23]) == (0, "This is the demo model:")
    assert "demo" in err


@pytest.mark.parametrize(("limit", "taken"), [("", True), ("32768", False)])
async def test_private_server_takes_whole_files(
    monkeypatch: pytest.MonkeyPatch, limit: str, taken: bool
) -> None:
    if limit:
        monkeypatch.setenv("WSSERVER_PROMPT_SIZE", limit)
    given = '"a line"\n' * 50_000
    async with once("--once", "Count", given=given, WSSERVER_DEMO_RATE="0") as process:
        code, out, err = await outcome(process)
    assert (code, out[:22]) == ((0, "This is the demo model") if taken else (1, ""))
    assert ("32,768 are allowed" in err) is not taken


@pytest.mark.parametrize(("last", "titles"), [(False, "off"), (True, "")])
async def test_prompt_that_is_not_kept_gets_no_title(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: bool, titles: str
) -> None:
    served: list[wsserver.Settings] = []

    def serve(**keywords: Any) -> wsserver.Server:
        served.append(keywords["settings"])
        return wsserver.serve(**keywords)

    monkeypatch.setattr("wsserver.terminal.program.serve", serve)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("WSSERVER_DEMO_RATE", "0")
    monkeypatch.delenv("WSSERVER_TITLES")
    options = Options(once="Hi", model="demo", last=last)
    async with asyncio.timeout(BOUND):
        assert await Terminal(options).run("Hi") == 0
    assert [settings.titles for settings in served] == [titles]


async def test_private_server_tells_its_user_why_reply_failed(tmp_path: Path) -> None:
    async with Upstream() as upstream:
        upstream.play(failure(404, message="model \x1b[2J not found, try pulling it first"))
        env = {"OPENAI_BASE_URL": f"{upstream.url}/v1"}
        async with once("--once", "Hi", "--model", "openai:x", **env) as process:
            code, _, err = await outcome(process)
    assert code == 1
    assert "(model_not_found): model \\x1b[2J not found, try pulling it first\n" in err
    assert "operator" not in err
    (tmp_path / "my.py").write_text("async def model(request):\n    yield request.nothing\n")
    async with once("--once", "Hi", "--model", "my:model", PYTHONPATH=str(tmp_path)) as process:
        code, _, err = await outcome(process)
    assert code == 1
    assert "AttributeError: 'Request' object has no attribute 'nothing' (my.py:2 in model)" in err


async def test_once_exits_with_1_after_error(server: wsserver.Server, puppet: Puppet) -> None:
    async with once(server.url, "--once", "Hi") as process:
        (await puppet.reply()).say("Half").fail(ModelError(Code.UNREACHABLE, "No \x1b[2J way."))
        code, out, err = await outcome(process)
    assert (code, out) == (1, "Half\n")
    assert err == "wsserver: No \\x1b[2J way. (unreachable); try again\n"


async def test_once_exits_with_130_after_ctrl_c_and_stops_reply(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with once(server.url, "--once", "Hi") as process:
        said = (await puppet.reply()).say("Half")
        assert process.stdout is not None
        async with asyncio.timeout(BOUND):
            assert await process.stdout.read(4) == b"Half"
        process.send_signal(signal.SIGINT)
        assert await outcome(process) == (130, "\n", "")
        assert said.closed.is_set()


async def test_sigterm_stops_reply_before_exit(server: wsserver.Server, puppet: Puppet) -> None:
    async with once(server.url, "--once", "Hi") as process:
        said = (await puppet.reply()).say("Half")
        assert process.stdout is not None
        async with asyncio.timeout(BOUND):
            assert await process.stdout.read(4) == b"Half"
        process.terminate()
        assert await outcome(process) == (128 + signal.SIGTERM, "", "")
        assert said.closed.is_set()


async def test_once_exits_quietly_after_closed_pipe(
    server: wsserver.Server, puppet: Puppet
) -> None:
    read, write = os.pipe()
    async with asyncio.timeout(BOUND):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "wsserver", "chat", server.url, "--once", "Hi"),
            stdout=write,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(write)
        reply = await puppet.reply()
        os.close(read)
        reply.say("into the void")
        _, err = await process.communicate()
        assert (process.returncode, err) == (1, b"")
        await reply.closed.wait()


async def test_token_comes_from_environment_or_flag(puppet: Puppet) -> None:
    tokens = f"ada sha256:{hashlib.sha256(b'good').hexdigest()}"
    async with wsserver.serve(puppet, port=0, tokens=tokens, drain_timeout=0) as server:
        for number, (arguments, env) in enumerate(
            [((), {"WSSERVER_CHAT_TOKEN": "good"}), (("--token", "good"), {})]
        ):
            async with once(server.url, "--once", "Hi", *arguments, **env) as process:
                (await puppet.reply(number)).say("Ada").end()
                code, said, noted = await outcome(process)
                assert (code, said) == (0, "Ada\n")
                assert ("can see --token" in noted) is bool(arguments)
        async with once(server.url, "--once", "Hi", WSSERVER_CHAT_TOKEN="bad") as process:
            code, out, err = await outcome(process)
        assert (code, out) == (1, "")
        assert "token" in err
        assert "bad" not in err


async def test_private_server_refuses_other_clients(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import json, sys\n"
        "from websockets.sync.client import connect\n"
        "import asyncio, gc, wsserver\n"
        "def intrude():\n"
        "    (server,) = [o for o in gc.get_objects() if isinstance(o, wsserver.Server)]\n"
        "    with connect(server.url, proxy=None) as socket:\n"
        '        socket.send(\'{"prompt": "Hi"}\')\n'
        "        return json.loads(socket.recv())['code']\n"
        "async def model(request):\n"
        "    yield await asyncio.to_thread(intrude)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    async with once("--once", "Hi", "--model", "mine:model", PYTHONPATH=path) as process:
        assert await outcome(process) == (0, "unauthenticated\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--once", " "], "empty"),
        (["--once", "\udcff"], "UTF-8"),
        (["--once", "Hi", "--system", "\udcff"], "--system"),
        (["--once", "Hi", "--conversation", "short"], "--conversation"),
        (["--once", "Hi", "--model", "gpt"], "model"),
        (["--once", "Hi", "-c", "--conversation", CONVERSATION], "exclude each other"),
        (["--colour", "red"], "--colour"),
        ([], "not a terminal"),
    ],
)
def test_unusable_arguments_exit_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["chat", *arguments])
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1, captured.err
    assert says in captured.err


@pytest.mark.parametrize("missing", ["<&-", ">&-", "2>&-"])
async def test_closed_standard_stream_is_error(missing: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        f'exec "$0" -m wsserver chat --once - {missing}',
        sys.executable,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    code, out, err = await outcome(process, "Hi")
    assert (code, out) == (2, "")
    assert "must be open" in err or missing == "2>&-"


async def test_full_disk_is_reported(server: wsserver.Server, puppet: Puppet) -> None:
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        'exec "$0" -m wsserver chat "$1" --once Hi >/dev/full',
        *(sys.executable, server.url),
        stderr=asyncio.subprocess.PIPE,
    )
    reply = (await puppet.reply()).say("Hello")
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err == b"wsserver: cannot write: No space left on device\n"
    async with asyncio.timeout(BOUND):
        await reply.closed.wait()


def test_help_names_token_environment_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["chat", "--help"])
    assert exit_.value.code == 0
    assert "WSSERVER_CHAT_TOKEN" in capsys.readouterr().out


def test_server_does_not_import_terminal() -> None:
    program = (
        "import sys, json, wsserver.cli\n"
        "print(json.dumps([m for m in sys.modules if m.partition('.')[0] == 'prompt_toolkit'"
        " or m.startswith(('wsserver.terminal', 'wsserver.client'))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=BOUND
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("end", ["end_turn", "max_tokens", "stopped", "failed", "ctrl-c"])
async def test_exit_code_of_once_tells_end_of_reply(
    server: wsserver.Server, puppet: Puppet, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    asking = asyncio.ensure_future(Terminal(Options(server.url, once="Hi")).run("Hi"))
    reply = (await puppet.reply()).say("x")
    if end == "stopped":
        async with connect(server.url) as chat:
            (conversation,) = await chat.conversations()
            (running,) = (await chat.history(conversation.id)).running
            followed = chat.resume(running)
            await followed.stop()
            await followed.done()
    elif end == "failed":
        reply.fail(ModelError(Code.TIMEOUT))
    elif end == "ctrl-c":
        await until(reply.heard_out)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        reply.say(End(end)).end()
    async with asyncio.timeout(BOUND):
        code = await asking
    assert code == {"end_turn": 0, "max_tokens": 0, "ctrl-c": 130}.get(end, 1)
    said = capsys.readouterr().err
    assert {"end_turn": "", "max_tokens": "maximum length", "stopped": "wsserver: stopped\n"}.get(
        end, ""
    ) in said


async def test_second_ctrl_c_of_once_does_not_wait_for_end(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with Line(server.port) as line, once(line.url, "--once", "Hi") as process:
        (await puppet.reply()).say("Half")
        assert process.stdout is not None
        async with asyncio.timeout(BOUND):
            assert await process.stdout.read(4) == b"Half"
            assert process.stderr is not None
            line.cut()
            assert b"connection lost" in await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.1)  # two signals at once would be one
        process.send_signal(signal.SIGINT)
        assert (await outcome(process))[:2] == (130, "\n")


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
async def test_once_on_terminal_escapes_control_characters(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with terminal(server.url, "--once", "Hi") as person:
        (await puppet.reply()).say("a\x1b]0;owned\x07b").end()
        assert await person.leaves() == 0
        assert person.text == "a\\x1b]0;owned\\x07b"
    assert person.output.endswith(b"\r\n")
