"""The documents agree with the program.

``UPDATE_DOCS=1 pytest tests/test_docs.py`` writes the tables of settings.
"""

import json
import os
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any, get_args

import pytest
from fastapi import FastAPI
from pydantic import TypeAdapter
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import wsserver
from tests.support.client import Client, client
from tests.support.crowd import CROWD
from tests.support.declarations import declarations
from tests.support.process import run
from tests.support.puppet import Puppet
from tests.support.reference import reference
from tests.support.schemas import OF_CLIENT, OF_SERVER
from tests.support.sequences import VECTORS, load, written
from tests.support.terminal import terminal
from wsserver import Code, Settings, content
from wsserver.connections.requests import REQUESTS
from wsserver.parsing import parse
from wsserver.protocol import CLIENT_FRAMES, SERVER_FRAMES, Close, Limits, ServerFrame, StoppedBy
from wsserver.telemetry import Aborted, Refusal

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CLIENTS = (ROOT / "examples/clients.md").read_text()
HTTP = (ROOT / "examples/http.md").read_text()
LOGIN = (ROOT / "examples/login.md").read_text()
TUTORIAL = (ROOT / "examples/tutorial.md").read_text()
PROTOCOL = (Path(wsserver.__file__).parent / "PROTOCOL.md").read_text()


def rows(document: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    section = document.partition(f"\n{heading}\n")[2]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None, heading
    lines = table[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in re.split(r" ?\| ", line[2:-2])] for line in lines]


SAFETY = (Path(wsserver.__file__).parent / "SAFETY.md").read_text()
ABUSE = rows(SAFETY, "## Effect of abuse")


def settings_tables(*, tuning: bool) -> str:
    parts = []
    for title, names in Settings.sections(tuning=tuning).items():
        parts.append(f"### {title[0].upper()}{title[1:]}\n")
        parts.append("| variable | default | unit | |\n|---|---|---|---|")
        for name in names:
            default = Settings.shown_default(name)
            shown = f"`{default}`" if default else ""
            text = " ".join((Settings.model_fields[name].description or "").split())
            unit = Settings.unit(name)
            parts.append(f"| `WSSERVER_{name.upper()}` | {shown} | {unit} | {text} |")
        parts.append("")
    return "\n".join(parts)


@pytest.mark.parametrize(("marks", "tuning"), [("settings", False), ("tuning", True)])
def test_document_has_every_setting(marks: str, tuning: bool) -> None:
    path = ROOT / "wsserver/SETTINGS.md"
    before, _, rest = path.read_text().partition(f"<!-- {marks} -->\n")
    tables, _, after = rest.partition(f"<!-- /{marks} -->")
    if os.environ.get("UPDATE_DOCS"):
        tables = settings_tables(tuning=tuning)
        path.write_text(f"{before}<!-- {marks} -->\n{tables}<!-- /{marks} -->{after}")
    assert tables == settings_tables(tuning=tuning)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other Pythons write types otherwise")
def test_document_has_every_public_name() -> None:
    path = ROOT / "wsserver/API.md"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(reference())
    assert path.read_text() == reference()


def test_protocol_has_every_error_code_with_retryable() -> None:
    documented = {}
    for heading in ("### About a frame", "### Of a generation"):
        for code, retry, *_ in rows(PROTOCOL, heading):
            documented[code.strip("`")] = retry == "yes"
    assert documented == {code.value: code.retryable for code in Code}


def test_protocol_has_every_close_code() -> None:
    documented = {int(code) for code, *_ in rows(PROTOCOL, "## Close codes")}
    assert documented == {*Close, 1006}


def test_protocol_has_every_prompt_key() -> None:
    documented = {key.strip("`") for key, *_ in rows(PROTOCOL, "### prompt")}
    assert documented == set(wsserver.protocol.Prompt.model_fields)


def documented_keys(section: str) -> dict[str, tuple[set[str], set[str]]]:
    """Return by type the required keys and the optional keys of a table."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for cell, *_ in rows(PROTOCOL, section):
        for kind, keys in re.findall(r'\{"type": "(\w+)"((?:, "\w+"\??)*)\}', cell):
            always, perhaps = found.setdefault(kind, (set(), set()))
            for key, left_out in re.findall(r'"(\w+)"(\??)', keys):
                (perhaps if left_out else always).add(key)
    return found


def test_protocol_has_every_server_frame_key() -> None:
    documented = documented_keys("## Frames of the server")
    assert documented.keys() == SERVER_FRAMES.keys()
    for kind, model in SERVER_FRAMES.items():
        always, perhaps = documented[kind]
        fields = {n: f for n, f in model.model_fields.items() if n not in {"type", "request"}}
        assert (always | perhaps) - {"request"} == fields.keys()
        required = {name for name, field in fields.items() if field.is_required()}
        assert required <= always


def test_protocol_has_every_request_key() -> None:
    documented = documented_keys("### list, rename, delete")
    assert documented.keys() == {"list", "rename", "delete"}
    for kind, (always, perhaps) in documented.items():
        fields = CLIENT_FRAMES[kind].model_fields
        assert always | perhaps == fields.keys() - {"type", "request"}
        assert always == {name for name, field in fields.items() if field.is_required()}


def test_safety_names_every_abuse_test() -> None:
    named = [re.fullmatch(r"`(test_\w+)`", row[4]) for row in ABUSE]
    files = [*(ROOT / "tests" / "abuse").glob("test_*.py"), ROOT / "tests" / "test_leak.py"]
    tests = re.findall(
        r"^(?:async )?def (test_\w+)", "".join(map(Path.read_text, files)), re.MULTILINE
    )
    assert sorted(match[1] for match in named if match) == sorted(tests)
    assert all(named)


def test_events_codes_and_settings_in_safety_exist() -> None:
    source = "".join(path.read_text() for path in Path(wsserver.__file__).parent.rglob("*.py"))
    events = set(re.findall(r'\b(?:log|events)\.\w+\(\s*(?:level,\s*)?"([^"]+)"', source))
    closes = {*map(str, Close), "1006"}
    frames = {*re.findall(r'type: Literal\["(\w+)"\]', source), "retry_after", "code"}
    values = {
        "by": set(get_args(StoppedBy)),
        "code": closes,
        "error": {*Code},
        "reason": {*get_args(Aborted), "stopped"},
        "why": set(get_args(Refusal)),
    }
    known = {*Code, *frames, *Settings.model_fields, "Retry-After"}
    for case, seen, logged, felt, _ in ABUSE:
        for code in re.findall(r"\b1\d{3}\b", case + seen + logged):
            assert code in closes
        for status in re.findall(r"\b[45]\d\d\b", seen):
            assert HTTPStatus(int(status))
        for quoted in re.findall(r"`([^`]+)`", case + seen + felt):
            assert quoted in known, quoted
        for line in re.findall(r"`([^`]+)`", logged):
            if line in Settings.model_fields:
                continue
            event = re.split(r" \w+=", line)[0]
            assert event in events, event
            for key, text, word in re.findall(r' (\w+)=(?:"([^"]*)"|(\S+))', line):
                assert (text or word) in values[key], line


def test_protocol_sequences_are_test_vectors() -> None:
    """``UPDATE_DOCS=1 pytest tests/test_docs.py`` writes them."""
    text = "".join(f"{line}\n" for line in written())
    if os.environ.get("UPDATE_DOCS"):
        VECTORS.write_text(text)
    assert VECTORS.read_text() == text


def test_types_of_frames_are_those_of_the_schema() -> None:
    path = Path(wsserver.__file__).parent / "web/frames.d.ts"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(declarations())
    assert path.read_text() == declarations()


EXTRA = {"citations", "context", "title"}  # keys of the Messages API that the server only passes on


def test_types_of_blocks_are_those_of_the_server() -> None:
    text = (Path(wsserver.__file__).parent / "web/blocks.d.ts").read_text()
    declared = {}
    for body in re.findall(r"^export interface \w+ {\n(.*?)^}", text, re.DOTALL | re.MULTILINE):
        kind, *keys = re.findall(r"^  (?:type: '(\w+)'|(\w+)\??:)", body, re.MULTILINE)
        declared[kind[0]] = {key for _, key in keys} - EXTRA
    known = [block for block in get_args(content.Block) if block is not content.Other]
    assert declared == {block.type: {*block.fields} for block in known}


FRAMES = [line for lines in load().values() for line in lines if "frame" in line]
EXAMPLES = re.findall(r"^```json\n(.*?)\n```$", PROTOCOL, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("line", FRAMES, ids=lambda line: line["frame"].get("type", "prompt"))
def test_protocol_frames_are_valid(line: dict[str, Any]) -> None:
    frame = line["frame"]
    (OF_CLIENT if line["from"] == "client" else OF_SERVER).validate(frame)
    if line["from"] == "client":
        parse(json.dumps(frame))
    else:
        model: TypeAdapter[ServerFrame] = TypeAdapter(ServerFrame)
        model.validate_json(json.dumps(frame))
        if frame["type"] == "error":
            assert frame["retryable"] is Code[frame["code"].upper()].retryable


@pytest.fixture
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CROWD:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_defaults")
async def test_protocol_examples_are_valid_and_hello_is_current() -> None:
    hello, *others = map(json.loads, EXAMPLES)

    async def nobody(token: str | None, _: wsserver.Handshake) -> None:
        return None

    async with wsserver.serve("demo", port=0, authenticate=nobody) as server:
        async with client(server, subprotocols=["wsserver.v1"]) as chat:
            assert await chat.receive() == hello
    for frame in others:
        parse(json.dumps(frame))


@pytest.mark.usefixtures("_defaults")
def test_protocol_limits_are_defaults() -> None:
    settings, told = Settings(), set()
    for _, default, setting, hello, _ in rows(PROTOCOL, "## Limits"):
        name = setting.strip("`")
        if hello:
            told.add(name)
        if name and default[0].isdigit():
            known = REQUESTS if name == "requests" else getattr(settings, name)
            assert float(default.replace(",", "")) == known, name
    assert told == set(Limits.model_fields)


PROGRAMS = re.findall(r"```python\n(.*?)```", README + CLIENTS + HTTP + LOGIN, re.DOTALL)
SERVER = "ws://localhost:3001"


@pytest.mark.parametrize("document", [README, TUTORIAL])
async def test_readme_command_starts_model_of_file(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (model,) = re.findall(r"--model (shout:\w+)", document)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shout", raising=False)
    (tmp_path / "shout.py").write_text(program.replace("0.2", "0"))
    async with wsserver.serve(model, port=0) as server, client(server) as chat:
        start = await chat.prompt("quiet please")
        assert (await chat.text(start["id"]))[0] == "QUIET PLEASE "
        assert start["model"] == "shout"


async def test_readme_authenticator_works() -> None:
    (program,) = [program for program in PROGRAMS if "by_cookie" in program]
    names: dict[str, Any] = {}
    exec(program, names)
    async with wsserver.serve(
        "demo", authenticate=names["by_cookie"], port=0, demo_rate=0
    ) as server:
        async with client(server, additional_headers={"Cookie": "session=4f9a"}) as chat:
            assert (await chat.prompt())["type"] == "start"
        with pytest.raises(InvalidStatus):
            async with client(server, additional_headers={"Cookie": "session=0000", "Via": "x"}):
                raise AssertionError


async def test_readme_mount_runs() -> None:
    (program,) = [program for program in PROGRAMS if "wsserver.asgi" in program]

    async def user_of(_: str | None, __: wsserver.Handshake) -> wsserver.Principal:
        return wsserver.Principal("ada")

    names: dict[str, Any] = {"wsserver": wsserver, "FastAPI": FastAPI}
    exec(program, {**names, "my_model": Puppet(), "user_of": user_of}, names)
    async with names["chat"].lifespan(names["app"]):
        assert names["chat"].app.model_name == "puppet"


@pytest.mark.parametrize(
    "program", [program for program in PROGRAMS if "wsserver.client" in program]
)
async def test_readme_clients_run(program: str) -> None:
    assert SERVER in program
    async with wsserver.serve("demo", port=0, demo_rate=0) as server:
        async with run("-c", program.replace(SERVER, server.url)) as process:
            assert await process.end() == 0
    assert process.output.startswith("This is the demo model")
    if "stop()" in program:
        assert re.search(r"\n\[(stopped|end_turn), \d+ tokens\]\n$", process.output)


async def test_readme_commands_run(tmp_path: Path) -> None:
    section = CLIENTS.partition("## In a terminal\n")[2].partition("```\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].strip() for line in section.splitlines()]
    assert len(commands) == 3
    (tmp_path / "notes.txt").write_text("A duck.\n")
    async with wsserver.serve("demo", port=0, demo_rate=0) as server:
        for command in commands:
            line = command.replace(SERVER, server.url)
            program = line.replace("wsserver chat", f"{sys.executable} -m wsserver chat")
            if "--once" in command:
                async with run("-c", f"import os; os.system({program!r})", cwd=tmp_path) as process:
                    assert await process.end() == 0
            else:
                async with terminal(*line.split()[2:], WSSERVER_DEMO_RATE="0") as person:
                    await person.ready()
                    person.types("Hello\r")
                    await person.sees("start the server again.")
                    await person.ready()
                    person.types("\x04")
                    assert await person.leaves() == 0
    assert "You wrote: “A duck. Summarise this”" in (tmp_path / "summary.txt").read_text()


async def test_readme_token_commands_work(tmp_path: Path) -> None:
    section = LOGIN.partition("```\n")[2].partition("```")[0]
    make, serve = [line.partition("#")[0].split() for line in section.strip().splitlines()]
    async with run("-m", *make, cwd=tmp_path) as process:
        token = (await process.line(r"^(wss_\S+)$"))[1]
        assert await process.end() == 0
    # The address is loopback. The name and the tokens still make the server require tokens.
    serve[serve.index("0.0.0.0")] = "127.0.0.1"
    async with run("-m", *serve, "--port", "0", cwd=tmp_path) as process:
        url = (await process.line(r"(ws://\S+)"))[1]
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(url, proxy=None, additional_headers=headers) as socket:
            assert (await Client(socket).prompt())["type"] == "start"
        with pytest.raises(InvalidStatus):
            async with connect(url, proxy=None, additional_headers={"Authorization": "Bearer x"}):
                raise AssertionError


def test_readme_frames_are_valid() -> None:
    sent = re.findall(r"^> (\{.*\})$", TUTORIAL, re.MULTILINE)
    got = re.findall(r"^< (\{.*\})$", TUTORIAL, re.MULTILINE)
    assert len(sent) == 3
    for text in sent:
        parse(text)
    frame: TypeAdapter[ServerFrame] = TypeAdapter(ServerFrame)
    for text in got:
        frame.validate_json(text)


async def test_readme_frames_stop_and_resume_reply() -> None:
    prompt, resume, stop = re.findall(r"^> (\{.*\})$", TUTORIAL, re.MULTILINE)
    name = json.loads(prompt)["id"]
    async with wsserver.serve("demo", port=0, drain_timeout=0) as server:
        async with client(server) as first:
            await first.send(prompt)
            assert (await first.next("token"))["id"] == name
            await first.next("token")
            before = first.said(name)
            first.socket.transport.abort()
        async with client(server) as second:
            await second.send(resume)
            await second.next("token")
            await second.send(stop)
            rest, terminal = await second.text(name)
            assert (terminal["reason"], terminal["by"]) == ("stopped", "client")
            assert "This is the demo model".startswith((before + rest)[:22])


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    "document",
    sorted(
        str(path.relative_to(ROOT))
        for folder in (".", "wsserver", "examples", "examples/*", "tests/bench")
        for path in ROOT.glob(f"{folder}/*.md")
    ),
)
def test_links_within_project_exist(document: str) -> None:
    path = ROOT / document
    for target, _, anchor in re.findall(r"\]\(([^)#: ]*)(#([^) ]+))?\)", path.read_text()):
        found = path.parent / target if target else path
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{target}#{anchor}"


def test_no_document_installs_unpublished_package() -> None:
    patterns = ("*.md", "examples/**/*.*", "wsserver/**/*.md", "wsserver/**/*.py")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert ROOT / "README.md" in files
    install = re.compile(rb"(?:pip|npm) install (?:-\S+ )*['\"]?wsserver")
    assert [path.name for path in files if install.search(path.read_bytes())] == []
