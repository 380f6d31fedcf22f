"""Commands of ``wsserver chat``, such as ``/help``."""

import json
import shlex
import stat
import sys
from pathlib import Path

import pytest

import wsserver
from tests.support.puppet import Puppet
from tests.support.terminal import Person, terminal
from wsserver import Code, ModelError, Thinking
from wsserver.client import History, connect
from wsserver.terminal.commands import COMMANDS, CommandError, help_lines, parse
from wsserver.terminal.files import find_editor, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning"),
    pytest.mark.slow,
]


async def says(person: Person, puppet: Puppet, prompt: str, answer: str) -> wsserver.Request:
    """Send a prompt and answer it; return what the model got."""
    number = len(puppet.replies)
    person.types(prompt + "\r")
    reply = await puppet.reply(number)
    reply.say(answer).end()
    await person.sees(answer)
    await person.ready()
    return reply.request


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/help", ("help", "")),
        ("/MODEL  claude ", ("model", "claude")),
        ("/system Be kind.\nBe brief.", ("system", "Be kind.\nBe brief.")),
        ("/save! x.md", ("save!", "x.md")),
        ("/etc/passwd has what?", None),
        (" /help", None),
        ("/ is the root", None),
        ("Hi", None),
    ],
)
def test_command_is_a_slash_and_a_word(text: str, command: tuple[str, str] | None) -> None:
    assert parse(text) == command


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/sav x", "did you mean /save"),
        ("/quit", "there is no command /quit; did you mean /exit"),
        ("/clear", "did you mean /new"),
        ("/weather", "there is no command /weather; /help"),
        ("/save", "/save FILE: the argument is missing"),
        ("/exit now", "/exit has no argument"),
    ],
)
def test_unusable_command_is_explained(text: str, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        parse(text)


def test_help_fits_into_80_columns() -> None:
    assert max(map(len, help_lines())) < 80


async def test_help_lists_every_command(server: wsserver.Server) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("/help\r")
        await person.sees("recalls earlier ones")
        for name in COMMANDS:
            assert f"  /{name} " in person.text
        person.types("/exit\r")
        assert await person.leaves() == 0


async def test_unknown_command_is_not_sent(server: wsserver.Server, puppet: Puppet) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("/foo\r")
        await person.sees("there is no command /foo")
        request = await says(person, puppet, " /foo", "Sent")
        assert request.prompt == " /foo"


async def test_tab_completes_command(server: wsserver.Server) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("/he\t")
        await person.sees("> /help")


async def test_model_and_system_are_sent_with_next_prompts(puppet: Puppet) -> None:
    async with (
        wsserver.serve(puppet, port=0, models="other", drain_timeout=0) as server,
        terminal(server.url) as person,
    ):
        await person.ready()
        person.types("/model other\r")
        await person.sees("[model: other]")
        person.types("/system Be kind.\r")
        await person.sees("[system prompt: Be kind.]")
        request = await says(person, puppet, "One", "First")
        assert (request.model, request.system) == ("other", "Be kind.")
        person.types("/model wrong\r")
        await person.sees("[there is no model wrong; the server has: puppet, other]")
        assert (await says(person, puppet, "Two", "Still other")).model == "other"
        person.types("/model -\r/system -\r")
        await person.sees("[model: puppet, the server's own]")
        await person.sees("[system prompt: none]")
        request = await says(person, puppet, "Three", "Third")
        assert (request.model, request.system) == ("puppet", None)


async def test_private_server_names_its_models() -> None:
    async with terminal(WSSERVER_MODELS="other", WSSERVER_DEMO_RATE="0") as person:
        await person.ready()
        person.types("/model\r")
        await person.sees("[the server has: demo, other]")


async def test_list_open_and_new_change_conversation(
    server: wsserver.Server, puppet: Puppet
) -> None:
    async with terminal(server.url) as person:
        await person.ready()
        person.types("/list\r")
        await person.sees("[there are no conversations]")
        await says(person, puppet, "About ducks", "Quack")
        person.types("/new\r")
        await person.sees("[a new conversation]")
        request = await says(person, puppet, "About cats", "Meow")
        assert len(request.messages) == 1
        person.types("/list\r")
        await person.sees("*  1 About cats · now\n   2 About ducks · now")
        person.types("/open 2\r")
        await person.sees("[About ducks]\n> About ducks\nQuack")
        request = await says(person, puppet, "More", "Quack quack")
        assert [m.content for m in request.messages] == ["About ducks", "Quack", "More"]
        person.types("/open 9\r")
        await person.sees("[9 is neither a number of /list nor an id]")
        person.types("/open not-a-conversation\r")
        await person.sees("(not_found)]")
        assert len((await says(person, puppet, "Still ducks?", "Yes")).messages) == 5


async def test_save_writes_markdown_or_json_once(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path
) -> None:
    markdown, as_json = tmp_path / "a file.md", tmp_path / "file.json"
    async with terminal(server.url, size="300x30") as person:
        await person.ready()
        person.types(f"/save {markdown}\r")
        await person.sees("[there is nothing to save yet]")
        person.types("Tell me\r")
        reply = await puppet.reply()
        reply.say(Thinking("Hm."), "# Once\n").fail(ModelError(Code.OVERLOADED))
        await person.sees("overloaded")
        person.types(f"/save {markdown}\r")
        await person.sees(f"[saved 2 messages in {markdown}]")
        assert markdown.read_text() == (
            "# Tell me\n\n## You\n\nTell me\n\n"
            "## puppet\n\n# Once\n\n\n"
            "*(incomplete: The model is overloaded. Wait a little, and try again.)*\n"
        )
        person.types(f"/save {as_json}\r")
        await person.sees(f"[saved 2 messages in {as_json}]")
        markdown.write_text("mine")
        person.types(f"/save {markdown}\r")
        await person.sees(f"[{markdown} exists; /save! {markdown} overwrites it]")
        assert markdown.read_text() == "mine"
        person.types(f"/save! {markdown}\r")
        await person.sees(f"[saved 2 messages in {markdown}]", times=2)
        person.types(f"/save {tmp_path}/no/file\r")
        await person.sees(f"[cannot write {tmp_path}/no/file (No such file or directory): choose")
    saved = json.loads(as_json.read_text())
    async with connect(server.url) as chat:
        (known,) = await chat.conversations()
    assert (saved["id"], saved["title"]) == (known.id, "Tell me")
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["content"][0]["thinking"] == "Hm."
    assert saved["messages"][1]["partial"] == "overloaded"


@pytest.mark.parametrize("keys", ["/edit two words\r", "two words\x18\x05"], ids=["/edit", "key"])
async def test_editor_gets_and_returns_text(
    server: wsserver.Server, puppet: Puppet, tmp_path: Path, keys: str
) -> None:
    program = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "input('in the editor')\n"
        "file.write_text(file.read_text().upper() + '\\nmore\\n')\n"
    )
    (tmp_path / "editor.py").write_text(program)
    editor = shlex.join([sys.executable, str(tmp_path / "editor.py")])
    async with terminal(server.url, VISUAL=editor) as person:
        await person.ready()
        person.types("Begin\r")
        said = (await puppet.reply()).say("One\n\n")
        await person.sees("One")
        person.types(keys)
        await person.sees("in the editor")
        said.say("Two\n\n", "Three").end()
        person.types("\x03\r")
        await person.sees("> TWO WORDS\n  more")
        await person.sees("Two\n\nThree")
        person.types("!\r")
        assert (await puppet.reply(1)).request.prompt == "TWO WORDS\nmore!"


async def test_failed_editor_keeps_text(server: wsserver.Server) -> None:
    async with terminal(server.url, VISUAL="false") as person:
        await person.ready()
        person.types("/edit some text\r")
        await person.sees("[false ended with code 1]\n> some text")
    async with terminal(server.url, VISUAL="/no/editor") as person:
        await person.ready()
        person.types("/edit some text\r")
        await person.sees("[cannot start /no/editor (No such file or directory): set VISUAL")
        await person.sees("> some text")
    async with terminal(server.url, VISUAL="'vi") as person:
        await person.ready()
        person.types("/edit some text\r")
        await person.sees("[VISUAL or EDITOR is not a command (No closing quotation)]\n> some text")


async def test_missing_editor_is_told(server: wsserver.Server) -> None:
    async with terminal(server.url, VISUAL="", EDITOR="", PATH="/nowhere") as person:
        await person.ready()
        person.types("/edit\r")
        await person.sees("[there is no editor: set VISUAL or EDITOR]\n>")


def test_failed_save_keeps_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    history = History("an-id", "A title", (), ())
    file, link = tmp_path / "file.md", tmp_path / "link.md"
    file.write_text("mine")
    file.chmod(0o640)
    link.symlink_to(file)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save(history, str(link), overwrite=True)
    assert (file.read_text(), sorted(tmp_path.iterdir())) == ("mine", [file, link])
    save(history, str(link), overwrite=True)
    assert (file.read_text(), link.is_symlink()) == ("# A title\n", True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_editor_is_visual_then_editor_then_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    assert find_editor() is None
    monkeypatch.setenv("EDITOR", "vi")
    assert find_editor() == ["vi"]
    monkeypatch.setenv("VISUAL", "code --wait")
    assert find_editor() == ["code", "--wait"]
