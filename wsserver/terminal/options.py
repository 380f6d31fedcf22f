"""The arguments of ``wsserver chat``."""

import re
import stat
import sys
from dataclasses import dataclass
from os import fstat
from urllib.parse import urlsplit

from wsserver.errors import ConfigError
from wsserver.protocol import Prompt
from wsserver.wire import ID_PATTERN


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of the command line."""

    url: str | None = None  # the server's address; None starts a private server
    once: str | None = None  # the only prompt; `-` reads it from stdin. None starts a dialogue
    conversation: str | None = None  # id of the conversation to continue
    token: str | None = None  # bearer token. Default: that of the environment
    model: str | None = None  # the model's name
    system: str | None = None  # the system prompt
    last: bool = False  # continue the last conversation
    plain: bool = False  # show Markdown as it is

    @property
    def prompt_model(self) -> str | None:
        """The model of prompts. A private server starts with ``model``, and takes no other name."""
        return None if self.url is None else self.model


def read_prompt(options: Options) -> str | None:
    """Check the options; return the only prompt, or None for a dialogue.

    Raises:
        ConfigError: an option or the input is not usable.
    """
    if options.conversation is not None and options.last:
        raise ConfigError("--continue and --conversation exclude each other")
    if options.conversation is not None and not re.fullmatch(ID_PATTERN, options.conversation):
        raise ConfigError(
            "--conversation: an id has 16 to 64 of A-Z, a-z, 0-9, _ and -; -c continues the last "
            "conversation"
        )
    _check_url(options.url)
    prompt = None if options.once is None else _read_once(options.once)
    if prompt is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                "stdin is not a terminal; give one prompt with --once, or --once - <FILE"
            )
        _require_libraries()
    try:
        Prompt(prompt=prompt or "Hi", model=options.model, system=options.system)
    except ValueError:
        raise ConfigError("the prompt, --model or --system cannot be sent as text") from None
    return prompt


def _check_url(url: str | None) -> None:
    if url is None:
        return
    scheme, separator, rest = url.partition("://")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and scheme in {"ws", "wss"}
    except ValueError:  # the port is no number, or a bracket is open
        usable = False
    if usable:
        return
    if scheme in {"http", "https"}:
        hint = f"write {scheme.replace('http', 'ws')}://{rest}"
    elif separator or not url:
        hint = "such as ws://localhost:3001"
    else:
        hint = f"write ws://{url}"
    shown = f"{url!r} is not the address of a WebSocket server: {hint}"
    raise ConfigError(shown.encode("ascii", "backslashreplace").decode())


def _read_once(once: str) -> str:
    """Return the prompt of ``--once``. Text from a pipe or a file comes before it."""
    try:
        once.encode()
    except UnicodeError:
        raise ConfigError("--once: the prompt is not UTF-8") from None
    try:
        if once == "-":
            prompt = sys.stdin.read()
        elif piped := _read_piped():
            prompt = f"{piped.rstrip()}\n\n{once}"
        else:
            prompt = once
        prompt.encode()  # stdin may have replaced bytes by surrogates
    except UnicodeError:
        raise ConfigError(
            "stdin is not UTF-8 text: convert it, for example with iconv -t UTF-8"
        ) from None
    if not prompt.strip():
        raise ConfigError("the prompt is empty: write it after --once, or to stdin with --once -")
    return prompt


def _read_piped() -> str:
    """Return what a pipe or a file gives on stdin; nothing from a terminal or /dev/null."""
    try:
        mode = fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # stdin is no file
        return ""
    piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
    return sys.stdin.read().strip("\n") if piped else ""


def _require_libraries() -> None:
    try:
        import prompt_toolkit  # noqa: F401, PLC0415
        import rich  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"a dialogue needs {error.name}: pip install prompt_toolkit rich; --once works without"
        ) from None
