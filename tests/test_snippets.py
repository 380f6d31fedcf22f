"""A test runs each snippet of the documents. Here are the tests that have no better place."""

import asyncio
import json
import re
import shlex
from typing import Any

import pytest

import wsserver
from tests.support.client import client
from tests.support.puppet import BOUND, Puppet
from tests.support.tools import ROOT
from wsserver import Settings
from wsserver.models import make, name_of

# The first line of each snippet, and the test that runs it.
RUN_BY = {
    "README.md": {
        "make run": "test_docs.py::test_readme_make_targets_exist",
        "ANTHROPIC_API_KEY=": "test_snippets.py::test_commands_choose_models",
        "const ws": "browser/test_ten_lines.py::test_first_lines_of_readme_stream_reply",
        "import asyncio": "test_docs.py::test_readme_command_starts_model_of_file",
    },
    "examples/tutorial.md": {
        "make run": "test_docs.py::test_readme_make_targets_exist",
        "$ npx wscat": "test_docs.py::test_readme_frames_stop_and_resume_reply",
        "import asyncio": "test_docs.py::test_readme_command_starts_model_of_file",
        "<!doctype html>": "browser/test_ten_lines.py::test_page_of_the_tutorial_streams_and_stops",
    },
    "examples/models.md": {
        "OPENAI_BASE_URL=": "test_snippets.py::test_commands_choose_models",
        "from wsserver import End": "test_snippets.py::test_model_of_document_yields_and_raises",
    },
    "examples/clients.md": {
        "wsserver chat ": "test_docs.py::test_readme_commands_run",
        "import asyncio": "test_docs.py::test_readme_clients_run",
        "from wsserver.client import connect_sync": "test_docs.py::test_readme_clients_run",
        "import { connect }": "browser/test_client.py::test_readme_lines_run",
    },
    "examples/http.md": {
        "curl -N localhost:3001/api/chat -H 'Content-Type: application/json' \\\n  -d '{\"m": (
            "test_snippets.py::test_curl_gets_a_reply"
        ),
        "curl -N localhost:3001/api/chat -H 'Content-Type: application/json' \\\n  -d '{\"p": (
            "test_snippets.py::test_curl_leaves_resumes_and_stops_a_reply"
        ),
        "import { HttpAgent }": (
            "chats/test_one_reply.py::test_agent_of_the_readme_runs_and_connects"
        ),
        "const { messages": (
            "chats/test_one_reply.py::"
            "test_reply_of_use_chat_is_followed_resumed_and_stopped_by_other_protocols"
        ),
        "wsserver chat ws": (
            "chats/test_one_reply.py::test_commands_of_the_readme_follow_continue_and_stop_a_reply"
        ),
        "import { ChatTransport }": "browser/test_ai_sdk.py::test_lines_of_the_document_chat",
        "import wsserver": "test_docs.py::test_readme_mount_runs",
    },
    "examples/login.md": {
        "wsserver token": "test_docs.py::test_readme_token_commands_work",
        "from http.cookies": "test_docs.py::test_readme_authenticator_works",
    },
    "examples/wscat.md": {
        "": "test_wscat.py::test_transcript_matches_real_session",
    },
    "examples/deploy/README.md": {
        "python3 -m venv": (
            "test_snippets.py::test_commands_of_the_deployment_name_files_that_exist"
        ),
        "docker build": "test_deploy.py::test_image_copies_needed_files",
        "pip install '.[postgres]'": "stores/test_copying.py::test_commands_of_the_document_run",
        "defaults": "check/test_haproxy.py::test_lines_of_the_document_hold",
        "$ WSSERVER_CHAT_TOKEN=": "check/test_command.py::test_readme_shows_all_checks",
    },
    "examples/deploy/nodes.md": {
        "pip install '.[cluster]'": "cluster/test_command.py::test_commands_of_the_document_run",
    },
}
DOCUMENTS = ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("examples/**/*.md"))]


def snippets(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_snippet_is_run_by_a_test(document: str) -> None:
    tests = RUN_BY[document]
    for snippet in snippets(document):
        assert any(snippet.startswith(first) for first in tests), snippet
    for first, test in tests.items():
        assert any(snippet.startswith(first) for snippet in snippets(document)), first
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / "tests" / path).read_text(), test


@pytest.mark.parametrize("document", ["README.md", "examples/models.md"])
def test_commands_choose_models(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (commands,) = [text for text in snippets(document) if "openai:" in text]
    lines = commands.replace("\\\n", "").strip().splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        words = shlex.split(line.replace("make run ARGS=", "wsserver serve "), comments=True)
        variables = [word.split("=", 1) for word in words if re.match("[A-Z_]+=", word)]
        with monkeypatch.context() as patch:
            for name, value in variables:
                patch.setenv(name, value.replace("…", "key"))
            command = " ".join(words[len(variables) :])
            if command == "make run":
                assert name_of(make(Settings())).startswith("claude-")
            else:
                model = command.removeprefix("wsserver serve --model ")
                assert name_of(make(Settings(model=model))) == model.partition(":")[2]


async def test_model_of_document_yields_and_raises() -> None:
    (program,) = [text for text in snippets("examples/models.md") if "async def" in text]
    names: dict[str, Any] = {}
    exec(program, names)
    async with wsserver.serve(names["careful"], port=0) as server, client(server) as chat:
        start = await chat.prompt("Is it short?")
        text, done = await chat.text(start["id"])
        assert (text, done["reason"]) == ("Yes, of course.", "end_turn")
        assert done["usage"] == {"input_tokens": 12, "output_tokens": 3}
        start = await chat.prompt("a" * 1001)
        assert (await chat.text(start["id"]))[1]["code"] == "prompt_too_long"


async def start_curl(command: str, server: wsserver.Server) -> asyncio.subprocess.Process:
    words = shlex.split(
        command.replace("\\\n", "").replace("localhost:3001", f"127.0.0.1:{server.port}")
    )
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=pipe)


def events(stream: bytes) -> list[dict[str, object]]:
    return [json.loads(data) for data in re.findall(r"^data: (.*)$", stream.decode(), re.MULTILINE)]


async def test_curl_gets_a_reply(server: wsserver.Server, puppet: Puppet) -> None:
    command = next(s for s in snippets("examples/http.md") if s.startswith("curl"))
    curl = await start_curl(command, server)
    (await puppet.reply()).say("Once").end()
    async with asyncio.timeout(BOUND):
        output, _ = await curl.communicate()
    assert [event["type"] for event in events(output)] == ["start", "token", "done"]


async def test_curl_leaves_resumes_and_stops_a_reply(
    server: wsserver.Server, puppet: Puppet
) -> None:
    commands = [s for s in snippets("examples/http.md") if s.startswith("curl")][1]
    ask, resume, stop = commands.replace("\\\n", "").strip().splitlines()
    asking = await start_curl(ask, server)
    reply = (await puppet.reply()).say(*"1234567")
    assert asking.stdout is not None
    async with asyncio.timeout(BOUND):
        await asking.stdout.readuntil(b'"text":"7"')
        asking.terminate()
        await asking.wait()
        resuming = await start_curl(resume, server)
        assert resuming.stdout is not None
        before = await resuming.stdout.readuntil(b'"text":"67"')
        told, _ = await (await start_curl(stop, server)).communicate()
        assert reply.closed.is_set()
        rest, _ = await resuming.communicate()
    assert [event["type"] for event in events(before + rest)] == ["start", "token", "done"]
    assert json.loads(told) == {"type": "stopped", "ids": [json.loads(ask.split("'")[3])["id"]]}


def test_commands_of_the_deployment_name_files_that_exist() -> None:
    commands = snippets("examples/deploy/README.md")[0].replace("\\\n", "")
    folder = ROOT / "examples/deploy"
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cp"]:
            assert all((folder / name).is_file() for name in words[1:-1]), line
        if words[:2] == ["sed", "-i"]:
            assert all("chat.example.com" in (folder / name).read_text() for name in words[3:])
