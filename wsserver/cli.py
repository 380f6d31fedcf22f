"""The command line: ``wsserver serve``, ``chat``, ``check``, ``token``, ``store``, ``schema``."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import wsserver
from wsserver import descriptors, program
from wsserver.auth import tokens
from wsserver.errors import ConfigError
from wsserver.logs import log, set_up
from wsserver.schema import asyncapi, json_schema
from wsserver.settings import REMOVED, SECRETS, Settings

USAGE_ERROR = 2
SERVE_USAGE = "wsserver serve [--SETTING VALUE ...]"
SERVE_ABOUT = """\
Start the server. Each setting is also an environment variable, which the flag
overrides: --log-level is WSSERVER_LOG_LEVEL."""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse an unknown argument here, where the options of the command are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"{flag!r} is too much")
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.75)
            if near:
                self.exit(USAGE_ERROR, f"wsserver: there is no {flag}; did you mean {near[0]}?\n")
            self.error(f"there is no {flag}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"wsserver: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: always. 0 after a normal end, 2 after an error, which is one line on stderr.
            ``wsserver chat`` and ``wsserver check`` have further codes, see
            :func:`wsserver.terminal.run` and :func:`wsserver.doctor.run`.
    """
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        if command == "schema":
            print(json.dumps(asyncapi() if arguments["asyncapi"] else json_schema(), indent=2))
        elif command == "chat":
            sys.exit(_chat(**arguments))
        elif command == "check":
            sys.exit(_check(**arguments))
        elif command == "token":
            _make_token(**arguments)
        elif command == "store":
            sys.exit(_copy_store(**arguments))
        else:
            _run_server(arguments)
    except MemoryError:
        program.exit_out_of_memory()
    except ConfigError as error:
        if sys.stderr is not None:  # print writes to stdout if its file is None
            print(f"wsserver: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    sys.exit(0)


def _run_server(arguments: dict[str, Any]) -> NoReturn:
    """Start a server with the settings of flags and of the environment.

    Raises:
        ConfigError: the server cannot start.
        SystemExit: at its end.
    """
    if not os.environ.get("WSSERVER_STORE"):
        arguments.setdefault("store", f"sqlite:///{_data_file()}")
    settings = Settings.load(**arguments)
    set_up(settings.log_level)
    for name in arguments.keys() & set(SECRETS):
        flag = _flag(name)
        log.warning(
            "every user of this machine can see a secret in a flag; use a file or the environment",
            flag=flag,
            file=f"{flag}-file",
            variable=f"WSSERVER_{name.upper()}",
        )
    for name in ("store", "cluster"):
        if _has_password(arguments.get(name, "")):
            log.warning(
                "every user of this machine can see a password in a flag; use the environment",
                flag=_flag(name),
                variable=f"WSSERVER_{name.upper()}",
            )
    descriptors.raise_limit(settings)
    sys.exit(program.run(settings))


def _has_password(address: str) -> bool:
    """Return whether an address, even a malformed one, has a password before its host."""
    before = address.rpartition("@")[0]
    return ":" in (before.partition("://")[2] or before)


def _data_file() -> Path:
    """Return the default file for conversations (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "wsserver" / "conversations.sqlite"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wsserver",
        description=wsserver.__doc__,
        epilog="wsserver COMMAND --help describes a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wsserver {wsserver.__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    _add_serve(commands)
    _add_chat(commands)
    _add_check(commands)
    _add_token(commands)
    _add_store(commands)
    schema = commands.add_parser(
        "schema",
        help="print the JSON Schema of all frames",
        description="Print the JSON Schema (2020-12) of all frames of the protocol.",
        allow_abbrev=False,
    )
    schema.add_argument(
        "--asyncapi", action="store_true", help="print the protocol as AsyncAPI 3.0 instead"
    )
    return parser


def _add_token(commands: Any) -> None:
    token = commands.add_parser(
        "token",
        help="make tokens for clients and programs",
        description="Make tokens that let clients and programs use a server.",
    )
    making = token.add_subparsers(title="commands", required=True, metavar="COMMAND").add_parser(
        "new",
        help="make a token and print it",
        description="Make a token and print it. No file has the token: the server needs only its "
        "digest, in the file of the setting token_file.",
        allow_abbrev=False,
    )
    making.add_argument("name", metavar="NAME", help="name of the principal; logs show it")
    making.add_argument("--file", type=Path, help="append the digest to this file")
    making.add_argument(
        "--days", type=_days, help="days that the token is valid; default: for ever"
    )


def _add_store(commands: Any) -> None:
    store = commands.add_parser(
        "store",
        help="copy conversations to another store",
        description="Copy conversations to another store.",
    )
    copying = store.add_subparsers(title="commands", required=True, metavar="COMMAND").add_parser(
        "copy",
        help="copy everything from a SQLite file to PostgreSQL",
        description="Copy all conversations, replies and costs from a SQLite file to an empty "
        "PostgreSQL database. No server may use either of them. The file does not change. After an "
        "interruption the same command goes on where it stopped.",
        epilog="The exit code is 0, or 1 if replies could not be copied: they are listed.",
        allow_abbrev=False,
    )
    copying.add_argument("source", metavar="FROM", help="sqlite:///PATH")
    copying.add_argument(
        "target",
        metavar="TO",
        help="postgresql://USER@HOST/DATABASE; the variable PGPASSWORD hides a password",
    )


def _add_serve(commands: Any) -> None:
    serving = commands.add_parser(
        "serve",
        help="start the server",
        usage=SERVE_USAGE,
        description=f"{SERVE_ABOUT} --help shows only the settings that an operator decides.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    serving.add_argument(
        "-h",
        "--help",
        action=_FirstHelp,
        nargs=0,
        help="show the settings that an operator decides",
    )
    serving.add_argument("--help-all", action="help", help="show all settings")
    for tuning in (False, True):
        for title, names in Settings.sections(tuning=tuning).items():
            section = serving.add_argument_group(f"tuning: {title}" if tuning else title)
            for name in names:
                _add_setting(section, name)
    for name in REMOVED:
        serving.add_argument(_flag(name), help=argparse.SUPPRESS)


def _add_setting(section: Any, name: str) -> None:
    field = Settings.model_fields[name]
    default = _default(name)
    shown = f" Default: {default}." if default else ""
    text = f"{field.description}{shown} [WSSERVER_{name.upper()}]".replace("%", "%%")
    options: dict[str, Any] = {"help": text}
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = Settings.unit(name).upper()
    section.add_argument(_flag(name), **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(name: str) -> str:
    return "a file" if name == "store" else Settings.shown_default(name)


class _FirstHelp(argparse.Action):
    """Print one line for each setting that an operator decides."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        lines = [f"usage: {SERVE_USAGE}", "", *SERVE_ABOUT.splitlines()]
        for title, names in Settings.sections(tuning=False).items():
            lines += ["", f"{title}:"]
            for name in names:
                boolean = Settings.model_fields[name].annotation is bool
                value = "" if boolean else f" {Settings.unit(name).upper()}"
                about = (Settings.model_fields[name].description or "").partition(".\n")[0]
                about = about.replace("\n", " ").partition(". ")[0].removesuffix(".")
                default = _default(name)
                shown = f" [{'off' if default == '0' else default}]"
                shown = shown if default and not boolean else ""
                lines.append(f"  {_flag(name) + value:27} {about}{shown}")
        lines += ["", "--help-all describes each setting, and also those for tuning."]
        print("\n".join(lines))
        parser.exit(0)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser(
        "chat",
        help="chat with a server in this terminal",
        description="Chat with a server in this terminal. Without a URL, start a private server "
        "with the settings of the environment; this server ends with the chat. /help lists the "
        "commands of the chat.",
        epilog="With --once only the reply is on stdout, and text from a pipe or a file on stdin "
        "comes before the prompt. The exit code is 0, 1 after an error, 2 if the request is "
        "invalid, 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    chat.add_argument(
        "url", nargs="?", metavar="URL", help="address of a server, such as ws://localhost:3001"
    )
    chat.add_argument("--once", metavar="PROMPT", help="send one prompt; - reads it from stdin")
    chat.add_argument(
        "-c",
        "--continue",
        action="store_true",
        dest="last",
        help="continue the last conversation",
    )
    chat.add_argument("--conversation", metavar="ID", help="id of the conversation to continue")
    _add_token_option(chat)
    chat.add_argument("--model", help="model that answers")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    chat.add_argument(
        "--plain", action="store_true", help="show Markdown as it is, without colours and tables"
    )


def _add_token_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token",
        help="token for the server. Other users of this machine can see it: use the environment "
        "variable WSSERVER_CHAT_TOKEN instead",
    )


def _warn_of_token(token: str | None) -> None:
    if token:
        _note("every user of this machine can see --token; WSSERVER_CHAT_TOKEN hides the token")


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="check a deployment: proxy, TLS, tokens, streams",
        description="Connect to a server as a client does, and tell what does not hold and which "
        "setting of the proxy or the server mends it. The check sends two short prompts and stops "
        "both; they are in no conversation. It takes about 70 s, because one connection stays idle "
        "for longer than the time-outs of common proxies.",
        epilog="The exit code is 0 if nothing failed, 1 if a check failed, 2 if nothing answers at "
        "the address or the request is invalid, 130 after Ctrl-C.",
        allow_abbrev=False,
    )
    check.add_argument(
        "url", metavar="URL", help="address of the chat, such as wss://chat.example.com/"
    )
    _add_token_option(check)
    check.add_argument("--quick", action="store_true", help="take less than 10 s: no idle time")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.add_argument(
        "--idle", type=_seconds, metavar="SECONDS", help="length of the idle time; default: 65"
    )


def _check(**options: Any) -> int:
    _warn_of_token(options["token"])
    from wsserver import doctor  # noqa: PLC0415 - a server does not need it

    return doctor.run(**options)


def _chat(**options: Any) -> int:
    _warn_of_token(options["token"])
    # Imported here, because a server does not need prompt_toolkit.
    from wsserver import terminal  # noqa: PLC0415

    return terminal.run(terminal.Options(**options))


def _seconds(text: str) -> float:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def _days(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days")
    return int(text)


def _copy_store(source: str, target: str) -> int:
    from wsserver.stores import copying  # noqa: PLC0415 - it needs asyncpg

    return copying.run(source, target)


def _make_token(name: str, file: Path | None, days: int | None) -> None:
    token, line = tokens.new(name, days)
    if file is None:
        _note(f"put this line into the file of the setting token_file:\n{line}\nthe token:")
    else:
        tokens.add(file, line)
        _note(f"added to {file}; a running server reads it on SIGHUP. The token:")
    print(token)


def _note(text: str) -> None:
    # A script reads the token from stdout; notes for people go to stderr.
    print(text, file=sys.stderr)
