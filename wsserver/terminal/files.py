"""The files of a dialogue: earlier prompts, saved conversations, the user's editor."""

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import stat
import tempfile
from pathlib import Path

from wsserver.client import History
from wsserver.content import dump_content
from wsserver.terminal.wording import describe_partial

EDITORS = ("editor", "nano", "vi")  # where neither VISUAL nor EDITOR is set


def state_file(name: str, variable: str, default: str) -> Path:
    """Return a file of the program in the user's home (XDG Base Directory Specification)."""
    home = os.environ.get(variable) or Path.home() / default
    return Path(home) / "wsserver" / name


def open_history() -> Path:
    """Create the file of earlier prompts if needed, readable for its user only; return its path.

    Raises:
        OSError: the file cannot be created.
    """
    path = state_file("history", "XDG_STATE_HOME", ".local/state")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.closing(os.fdopen(descriptor)):
        # To disable the history, a user may link the path to /dev/null, which others use too.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
    return path


def find_editor() -> list[str] | None:
    """Return the command of the user's editor; None if there is none.

    Raises:
        ValueError: VISUAL or EDITOR is not a command.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if command:
        try:
            return shlex.split(command)
        except ValueError as error:
            raise ValueError(f"VISUAL or EDITOR is not a command ({error})") from None
    found = next(filter(None, map(shutil.which, EDITORS)), None)
    return None if found is None else [found]


async def edit(command: list[str], text: str) -> str:
    """Return the text after the user has changed it in an editor.

    Raises:
        OSError: the file cannot be written or read.
        ValueError: the editor cannot start, or failed, or the text is not UTF-8.
    """
    with tempfile.NamedTemporaryFile(
        "w+", encoding="utf-8", prefix="wsserver-", suffix=".md"
    ) as file:
        file.write(text)
        file.flush()
        try:
            process = await asyncio.create_subprocess_exec(*command, file.name)
        except OSError as error:
            raise ValueError(
                f"cannot start {command[0]} ({error.strerror}): set VISUAL or EDITOR to an editor"
            ) from None
        if code := await process.wait():
            raise ValueError(f"{command[0]} ended with code {code}")
        return _read(file.name).rstrip("\n")


def _read(name: str) -> str:
    # By its name: editors replace the file.
    return Path(name).read_text(encoding="utf-8")


def save(history: History, name: str, *, overwrite: bool) -> Path:
    """Write a conversation: as JSON if the file's suffix is ``.json``, else as Markdown.

    Raises:
        FileExistsError: the file exists, and ``overwrite`` is not set.
        OSError: the file cannot be written.
        RuntimeError: the name begins with ``~`` and an unknown user.
    """
    path = Path(name).expanduser()
    text = _json(history) if path.suffix == ".json" else _markdown(history)
    if path.is_file() and overwrite:
        _replace(path.resolve(), text)
        return path
    with path.open("w" if overwrite else "x", encoding="utf-8") as file:
        file.write(text)
    return path


def _replace(path: Path, text: str) -> None:
    """Replace the text of a file. If the new text cannot be written, the file keeps the old one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            shutil.copymode(path, file.name)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def _json(history: History) -> str:
    messages = [
        {
            "role": message.role,
            "content": dump_content(message.blocks),
            "model": message.model,
            "partial": message.partial,
            "began": message.began,
            "ended": message.ended,
        }
        for message in history.messages
    ]
    known = [{k: v for k, v in message.items() if v is not None} for message in messages]
    whole = {"id": history.conversation, "title": history.title, "messages": known}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _markdown(history: History) -> str:
    parts = [f"# {history.title}"]
    for message in history.messages:
        name = "You" if message.role == "user" else message.model or "Model"
        broken = f"\n\n*({describe_partial(message.partial)})*" if message.partial else ""
        parts.append(f"## {name}\n\n{message.text}{broken}")
    return "\n\n".join(parts) + "\n"
